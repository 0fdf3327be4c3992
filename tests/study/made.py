"""A finished run without Ray: coloured pictures with scores, as passes would leave it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.ledger import Funnel, Line
from pipeline.reader import describe
from pipeline.recipe import PoolSpec, Recipe
from pipeline.scheduler.passes import MeasurePass, commit, make_passes, new_attempt
from pipeline.scheduler.run_pass import UnitWriter
from pipeline.schema import DROP
from pipeline.step import Filter, Stage
from pipeline.storage import Store
from pipeline.text.hashing import hash64
from tests.trainer.shards import COLOURS, jpeg, picture

UNITS = 3


@dataclass(kw_only=True)
class Paint(Stage):
    adds = {"image": pa.binary(), "phash": pa.uint64(), "language": pa.string()}  # noqa: RUF012
    expensive = True


@dataclass(kw_only=True)
class Score(Stage):
    adds = {"clip_score": pa.float32(), "other": pa.float64(), "width": pa.int32()}  # noqa: RUF012
    expensive = True


@dataclass(kw_only=True)
class Threshold(Filter):
    """Only its place in the recipe counts."""

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pa.array([True] * len(batch))


def samples(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a run: the better their score, the likelier the caption is true."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    found = []
    for i in range(rows):
        true, named = names[i % 4], names[i % 4 if rng.random() < 0.7 else (i + 1) % 4]
        score = np.float32(rng.normal(0.3 if true == named else 0.2, 0.05))
        found.append(
            {
                "uid": f"{i * 7919:032x}",
                "url": f"http://h/{i}",
                "caption": f"a {named} picture",
                "image": jpeg(picture(true, i, (48, 40))),
                "phash": i // 2 * 2 if i % 10 == 1 else i,
                "language": "en" if i % 5 else "de",
                "clip_score": None if i % 17 == 3 else float(score),
                "other": float(rng.integers(0, 5)),
                "width": int(rng.integers(10, 12)),
            }
        )
    return found


def make_run(folder: Path, rows: list[dict[str, Any]], units: int = UNITS, name: str = "made") -> Path:
    """Writes a run with these rows, cut into units by their uids."""
    recipe = Recipe(
        name=name, pool=PoolSpec(path="made.parquet"), run=str(folder), steps=[Paint(), Score(), Threshold()]
    )
    passes = make_passes(recipe, {"made": len(rows)}, {})
    of_unit = hash64([row["uid"] for row in rows]) % np.uint64(units)
    for p in passes:
        for unit in range(units):
            mine = [row for row, at in zip(rows, of_unit) if at == unit]
            place = np.arange(len(mine), dtype=np.int32)
            adds = {column: pa.array([row[column] for row in mine], dtype) for column, dtype in p.adds.items()}
            part = 0 if isinstance(p, MeasurePass) else None
            if "image" in adds:
                writer = UnitWriter(p, unit, place, part)  # type: ignore[arg-type]
                table = pa.table({"unit": np.full(len(mine), unit, np.int32), "row": place, **adds})
                for start in range(0, len(mine), 16):  # several batches in a file
                    writer.add(table.slice(start, 16))
                writer.commit({})
            else:
                light = pa.table({"row": place, **adds})
                commit(p, unit, new_attempt(unit), len(mine), light, None, DROP.empty_table(), {}, part)
        p.finish(Funnel({label: Line(rows_in=len(rows)) for label in p.labels}), units=units, parts={})
    claim = {"name": name, "recipe": {}, "passes": describe(passes, recipe)}
    Store(str(folder)).write("run.json", json.dumps(claim).encode())
    return folder
