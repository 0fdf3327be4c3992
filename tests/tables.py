"""Helpers for step tests: rows as dicts in, one verdict per row out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.schema import PICTURE
from pipeline.step import Filter, Stage, apply, split_marked

# The types a row's own columns have in a run; others are inferred from the values.
COLUMNS = {
    "unit": pa.int32(),
    "row": pa.int32(),
    "uid": pa.string(),
    "url": pa.string(),
    "caption": pa.string(),
    **PICTURE,
    "clip_score": pa.float32(),
    "language": pa.string(),
    "language_score": pa.float32(),
}


def sample_uid(url: str, caption: str) -> str:
    return hashlib.sha256(f"{url}\0{caption}".encode("utf-8", "replace")).hexdigest()[:32]


def make_batch(rows: Sequence[Mapping[str, Any]], unit: int = 0) -> pa.Table:
    """A batch as a step receives it. Each row sets only what the test needs; the rest is filled in:
    `unit, row` by position, `url` distinct, `caption` harmless, `uid` as ingest derives it."""
    full = []
    for i, row in enumerate(rows):
        url = row.get("url", f"https://host{i}.example.org/{unit}/{i}.jpg")
        caption = row.get("caption", f"a plain photograph of a thing, number {i}")
        uid = sample_uid(url or "", caption or "")
        full.append({"unit": unit, "row": i, "uid": uid, "url": url, "caption": caption} | dict(row))
    names = list(dict.fromkeys(name for row in full for name in row)) or list(COLUMNS)[:5]
    return pa.table({name: pa.array([row.get(name) for row in full], COLUMNS.get(name)) for name in names})


def run_step(step: Stage | Filter, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Checks and sets up a step, then runs it on one batch as a worker would: returns kept rows and drops."""
    problems = list(step.check())
    assert not problems, problems
    step.setup()
    if isinstance(step, Stage):
        outputs = [split_marked(step, out) for out in step.stream([batch])]
        order = [("unit", "ascending"), ("row", "ascending")]  # a stage may reorder rows
        kept, drops = (pa.concat_tables(part).sort_by(order) for part in zip(*outputs))
        return kept, drops
    return apply(step, batch)


def verdicts(batch: pa.Table, kept: pa.Table, drops: pa.Table) -> list[str | None]:
    """Per row of `batch`: None where it was kept, else the reason. Fails if a row is lost or duplicated."""
    place = dict.fromkeys(zip(batch["unit"].to_pylist(), batch["row"].to_pylist()))
    fates: list[tuple[tuple[int, int], str | None]] = [
        *((at, None) for at in zip(kept["unit"].to_pylist(), kept["row"].to_pylist())),
        *zip(zip(drops["unit"].to_pylist(), drops["row"].to_pylist()), drops["reason"].to_pylist()),
    ]
    assert sorted(at for at, _ in fates) == sorted(place), "every row must be kept once or dropped once"
    place.update(fates)
    return list(place.values())


def check_filter(step: Stage | Filter, rows: Sequence[Mapping[str, Any]], expected: Sequence[str | None]) -> None:
    """`expected[i]` is None if row i is to be kept, else the reason of its drop."""
    assert len(rows) == len(expected), "one expectation per row"
    batch = make_batch(rows)
    found = verdicts(batch, *run_step(step, batch))
    wrong = [f"{str(row)[:200]}: expected {e}, found {f}" for row, e, f in zip(rows, expected, found) if e != f]
    assert not wrong, "\n".join(wrong)
