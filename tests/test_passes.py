"""Passes over units without Ray: what is committed, what is folded back, and what happens when things go wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline import ingest, pool
from pipeline.passes import Advance, Pass, alive, make_passes, read_unit, run_pass, unit_drops
from pipeline.recipe import PoolSpec, Recipe
from pipeline.step import Filter, Stage, Step


@dataclass(kw_only=True)
class Paint(Stage):
    """Stands in for a download: holds rows back and lets them go in another order, across units."""

    adds = {"image": pa.binary(), "size": pa.int32()}  # noqa: RUF012
    commits = True

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        table = pa.concat_tables(list(batches))
        for start in reversed(range(0, len(table), 7)):
            part = table.slice(start, 7)
            images = pa.array([c.encode() * 3 for c in part["caption"].to_pylist()], pa.binary())
            part = part.append_column("image", images).append_column("size", pc.binary_length(images).cast(pa.int32()))
            reasons = [("dead" if "dead" in c else None) for c in part["caption"].to_pylist()]
            yield part.append_column("drop_reason", pa.array(reasons, pa.string()))


@dataclass(kw_only=True)
class Even(Filter):
    needs = ("caption",)

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pa.array([int(c.split()[-1]) % 2 == 0 for c in batch["caption"].to_pylist()])


@dataclass(kw_only=True)
class Bright(Filter):
    needs = ("image", "size")
    limit: int = 0

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        assert pc.all(pc.equal(pc.binary_length(batch["image"]), batch["size"])).as_py(), "pixels stay with their row"
        return pc.greater_equal(batch["size"], self.limit)


@dataclass(kw_only=True)
class Loser(Stage):
    def process(self, batch: pa.Table) -> pa.Table:
        return batch.slice(1)


ROWS = 2_000


@pytest.fixture(params=["local", "remote"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    lines = [f"http://h/{i},{'dead ' if i % 10 == 3 else ''}picture number {i}" for i in range(ROWS)]
    (tmp_path / "p.csv").write_text("url,caption\n" + "\n".join(lines) + "\n")
    run = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run"
    return Recipe(name="t", pool=PoolSpec(path=str(tmp_path / "p.csv")), run=run)


def ingested(recipe: Recipe, steps: list[Step], units: int = 3) -> list[Pass]:
    recipe.steps = steps
    passes = make_passes(recipe, {"test": 1}, {})
    (split,) = pool.splits(recipe.pool)
    ingest.scatter(passes[0], 0, 0, [split], recipe.pool, {}, units, 2)
    records = [r for part in range(2) for r in ingest.gather(passes[0], part, 1, {}, units, 2)]
    assert sorted(r["unit"] for r in records) == list(range(units))
    assert sum(r["kept"] for r in records) == ROWS
    return passes


def records_of(advances: Iterable[Advance]) -> list[dict[str, Any]]:
    return [record for advance in advances for record in advance.records]


def test_passes_are_cut_where_results_are_dear(recipe: Recipe) -> None:
    recipe.steps = [Even(), Paint(), Bright(), Even()]
    assert [(p.kind, p.labels) for p in make_passes(recipe, {}, {})] == [
        ("pool", ["pool"]),
        ("map", ["even", "paint"]),
        ("map", ["bright", "even"]),
    ]


def test_keys_change_from_the_changed_step_on(recipe: Recipe) -> None:
    def keys(limit: int) -> list[str]:
        recipe.steps = [Even(), Paint(), Bright(limit=limit)]
        return [p.key for p in make_passes(recipe, {}, {})]

    before, after = keys(1), keys(2)
    assert before[:2] == after[:2]
    assert before[2] != after[2]


def test_every_row_comes_through_once_with_its_own_pixels(recipe: Recipe) -> None:
    passes = ingested(recipe, [Even(), Paint(), Bright(limit=55)])
    for index in (1, 2):
        records = records_of(run_pass(passes, index, range(3)))
        assert sorted(r["unit"] for r in records) == [0, 1, 2]
    seen = []
    for unit in range(3):
        table = pa.concat_tables(read_unit(passes, unit, ["caption", "image", "size"]))
        assert table["row"].to_pylist() == sorted(table["row"].to_pylist())
        for caption, image in zip(table["caption"].to_pylist(), table["image"].to_pylist()):
            assert image == caption.encode() * 3
            seen.append(int(caption.split()[-1]))
        fates = [r for p in passes for r in unit_drops(p, unit)["row"].to_pylist()] + table["row"].to_pylist()
        (pool_rows,) = read_unit(passes[:1], unit, ["uid"])
        assert sorted(fates) == pool_rows["row"].to_pylist(), "kept once or dropped once"
    assert sorted(seen) == [i for i in range(0, ROWS, 2) if len(f"picture number {i}") * 3 >= 55]


def test_the_order_of_rows_does_not_depend_on_the_number_of_units(recipe: Recipe, tmp_path: Path) -> None:
    def order(units: int) -> list[str]:
        recipe.run = str(tmp_path / f"run{units}")
        passes = ingested(recipe, [Even()], units)
        return [u for unit in range(units) for t in read_unit(passes[:1], unit, ["uid"]) for u in t["uid"].to_pylist()]

    assert order(1) == order(5)


def test_the_second_of_two_attempts_leaves_nothing_behind(recipe: Recipe) -> None:
    passes = ingested(recipe, [Paint()])
    slow = run_pass(passes, 1, [0])
    (first,) = records_of(run_pass(passes, 1, [0]))
    files = passes[1].store.names("units")
    (second,) = records_of(slow)
    assert second == first
    assert passes[1].store.names("units") == files


def test_an_attempt_that_fails_leaves_nothing_behind(recipe: Recipe) -> None:
    passes = ingested(recipe, [Paint(), Loser()])
    assert [p.labels for p in passes[1:]] == [["paint"], ["loser"]]
    list(run_pass(passes, 1, range(3)))
    with pytest.raises(RuntimeError, match="loser lost 1 rows of unit 0"):
        list(run_pass(passes, 2, [0]))
    assert passes[2].store.names("units") == []
    assert passes[2].record(0) is None


def test_a_restricted_attempt_drops_the_rows_it_must_not_touch(recipe: Recipe) -> None:
    passes = ingested(recipe, [Paint()])
    rows = alive(passes[:1], 1)
    (record,) = records_of(run_pass(passes, 1, [1], rows=rows, crashers=np.array([5], np.int32)))
    drops = {r["row"]: r["reason"] for r in unit_drops(passes[1], 1).to_pylist()}
    assert drops[5] == "decoder_crash"
    assert record["kept"] + len(drops) == len(rows)
