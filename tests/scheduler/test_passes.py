"""Passes over units without Ray: commits, measurements and failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline import pool
from pipeline.ledger import Funnel
from pipeline.recipe import PoolSpec, Recipe
from pipeline.scheduler import ingest
from pipeline.scheduler.passes import (
    Loan,
    MeasurePass,
    Pass,
    UnitPass,
    check_measured,
    check_unit,
    commit,
    make_passes,
    new_attempt,
    read_unit,
    surviving_rows,
)
from pipeline.scheduler.run_pass import UnitReport, run_pass
from pipeline.schema import DROP
from pipeline.step import Filter, Stage, Step
from pipeline.storage import DamagedError


@dataclass(kw_only=True)
class Paint(Stage):
    """Stands in for a download: buffers rows and emits them in another order, across units."""

    adds = {"image": pa.binary(), "size": pa.int32()}  # noqa: RUF012
    expensive = True

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


def ingested(recipe: Recipe, steps: list[Step], units: int = 3, rows: int = ROWS) -> list[Pass]:
    recipe.steps = steps
    passes = make_passes(recipe, {"units": units, "pool": Path(str(recipe.pool.path)).read_text()}, {})
    (split,) = pool.splits(recipe.pool)
    ingest.scatter(passes[0], 0, 0, [split], recipe.pool, {}, units, 2)
    records = [r for part in range(2) for r in ingest.gather(passes[0], part, 1, {}, units, 2)]
    assert sorted(r["unit"] for r in records) == list(range(units))
    assert sum(r["kept"] for r in records) == rows
    passes[0].finish(Funnel(), units=units)
    return passes


def records_of(advances: Iterable[UnitReport]) -> list[dict[str, Any]]:
    return [record for advance in advances for record in advance.records]


def test_an_expensive_step_gets_its_own_pass(recipe: Recipe) -> None:
    recipe.steps = [Even(), Paint(), Bright(), Even()]
    assert [(p.kind, p.labels) for p in make_passes(recipe, {}, {})] == [
        ("pool", ["pool"]),
        ("map", ["even"]),
        ("measure", ["paint"]),
        ("map", ["bright", "even"]),
    ]


def test_keys_change_from_the_changed_step_on(recipe: Recipe) -> None:
    def keys(limit: int) -> list[str]:
        recipe.steps = [Even(), Paint(), Bright(limit=limit)]
        return [p.key for p in make_passes(recipe, {}, {})]

    before, after = keys(1), keys(2)
    assert before[:3] == after[:3]
    assert before[3] != after[3]


@dataclass(kw_only=True)
class Score(Stage):
    """Stands in for a model: looks at pixels, and counts how many it has seen."""

    needs = ("image",)
    adds = {"score": pa.float32()}  # noqa: RUF012
    expensive = True
    shift: int = 0
    seen: ClassVar[list[bytes]] = []

    def process(self, batch: pa.Table) -> pa.Table:
        self.seen.extend(batch["image"].to_pylist())
        score = pc.add(pc.binary_length(batch["image"]), self.shift).cast(pa.float32())
        return batch.append_column("score", score)


def test_the_key_of_a_measurement_is_what_determines_its_value(recipe: Recipe) -> None:
    def keys(*steps: Step) -> dict[str, str]:
        recipe.steps = list(steps)
        return {p.label: p.root for p in make_passes(recipe, {}, {}) if p.kind == "measure"}

    plain = keys(Paint(), Score())
    assert keys(Even(), Paint(), Bright(), Score(), Even()) == plain, "filters above it do not matter"
    shifted = keys(Paint(), Score(shift=1))
    assert shifted["paint"] == plain["paint"]
    assert shifted["score"] != plain["score"], "its options do"
    other = keys(Repainted(), Score())
    assert other["score"] != plain["score"], "and so do the pictures it looks at"


class Repainted(Paint):
    version = 2


def run_all(passes: list[Pass], units: int = 3) -> list[list[dict[str, Any]]]:
    """The accounts of every unit of each pass."""
    return [records_of(run_pass(passes, i, range(units))) for i in range(1, len(passes))]


def contents(passes: list[Pass], units: int = 3) -> list[dict[str, Any]]:
    """The columns of the kept rows, in order, and the drops."""
    rows = [
        row
        for unit in range(units)
        for table in read_unit(passes, unit, ["uid", "image", "size", "score"])
        for row in table.to_pylist()
    ]
    return rows + [d for u in range(units) for i, p in enumerate(passes) for d in p.drops(passes[:i], u).to_pylist()]


def funnels(accounts: list[list[dict[str, Any]]]) -> list[dict[int, list[dict[str, Any]]]]:
    """The funnel of each pass and unit, without the seconds."""
    return [{r["unit"]: [{**line, "seconds": 0} for line in r["funnel"]] for r in records} for records in accounts]


def known_of(accounts: list[list[dict[str, Any]]], index: int) -> tuple[int, int]:
    """The number of rows that reached a pass, and how many of them had been measured before."""
    return tuple(sum(record[key] for record in accounts[index - 1]) for key in ("rows_in", "known"))  # type: ignore[return-value]


def test_filters_above_a_measurement_move_freely(recipe: Recipe, tmp_path: Path) -> None:
    """With any filters, only unmeasured rows are measured, and the result equals a run from scratch."""
    root = recipe.run
    recipes: list[tuple[list[Step], tuple[int, int], int]] = [
        ([Even(), Paint(), Score()], (1000, 0), 1000),
        ([Even(), Paint(), Bright(limit=56), Score()], (1000, 1000), 0),
        ([Paint(), Score()], (2000, 1000), 800),
        ([Even(), Paint(), Score(), Even()], (1000, 1000), 0),
        ([Paint(), Even(), Bright(limit=56), Score()], (2000, 2000), 0),
        ([Paint(), Score(shift=1)], (2000, 2000), 1800),
    ]
    for number, (steps, painted, scored) in enumerate(recipes):
        recipe.run = root
        passes = ingested(recipe, steps)
        Score.seen.clear()
        accounts = run_all(passes)
        paint = next(i for i, p in enumerate(passes) if p.label == "paint")
        assert known_of(accounts, paint) == painted, steps
        assert len(Score.seen) == scored, "just those that were never scored"
        recipe.run = f"{root}-fresh{number}"
        fresh = ingested(recipe, steps)
        again = run_all(fresh)
        assert contents(passes) == contents(fresh)
        assert funnels(accounts) == funnels(again)


def lend(lender: list[Pass], passes: list[Pass], units: int) -> None:
    for index, p in enumerate(passes):
        if isinstance(p, MeasurePass):
            (other,) = (q for q in lender if isinstance(q, MeasurePass) and q.key == p.key)
            p.lender = Loan(lender[0], other)
            for unit in range(units):
                p.borrow(passes[:index], unit, units)


@pytest.mark.parametrize(("added", "units"), [(0, 3), (0, 5), (400, 3), (400, 4), (3000, 2)])
def test_measurements_of_another_run_are_reused(recipe: Recipe, added: int, units: int) -> None:
    """Rows that occur in two different pools are measured once, regardless of their units."""
    lender = ingested(recipe, [Even(), Paint(), Score()])
    run_all(lender)
    recipe.run += "-borrower"
    if added:
        file = Path(str(recipe.pool.path))
        file.write_text(file.read_text() + "".join(f"http://new/{i},picture number {i}\n" for i in range(added)))
    steps: list[Step] = [Paint(), Score()]
    passes = ingested(recipe, steps, units, ROWS + added)
    lend(lender, passes, units)
    entries = [p.store.names("commits") for p in passes]
    lend(lender, passes, units)
    assert [p.store.names("commits") for p in passes] == entries, "once is enough"
    Score.seen.clear()
    accounts = run_all(passes, units)
    assert known_of(accounts, 1) == (ROWS + added, 1000)
    assert known_of(accounts, 2)[1] == 1000
    assert len(Score.seen) == 800 + added
    recipe.run += "-fresh"
    fresh = ingested(recipe, steps, units, ROWS + added)
    run_all(fresh, units)
    assert contents(passes, units) == contents(fresh, units)
    for unit in range(units):
        check_measured(passes, 1, unit, digest=True, whole=True)
    # A run also lends the measurements that it borrowed.
    recipe.run += "-third"
    third = ingested(recipe, steps, units, ROWS + added)
    lend(passes, third, units)
    assert [records_of(run_pass(third, i, range(units)))[0]["known"] > 0 for i in (1, 2)] == [True, True]
    assert contents(third, units) == contents(fresh, units)


def test_only_equal_rows_and_results_of_their_own_pictures_are_borrowed(recipe: Recipe) -> None:
    lender = ingested(recipe, [Paint(), Score()])
    run_all(lender)
    recipe.run += "-borrower"
    passes = ingested(recipe, [Even(), Paint(), Score()])
    records_of(run_pass(passes, 1, range(3)))
    records_of(run_pass(passes, 2, range(3)))  # gives the run its own pictures for half of the rows
    lend(lender, passes, 3)
    assert sum(len(passes[2].borrowed_rows(u, lender[0])) for u in range(3)) == 1000
    assert sum(len(passes[3].borrowed_rows(u, lender[0])) for u in range(3)) == 800


def test_an_equal_uid_with_another_caption_is_another_row(recipe: Recipe) -> None:
    file = Path(str(recipe.pool.path))
    lines = [f"{i:032x},http://h/{i},picture number {i}" for i in range(ROWS)]
    recipe.pool.uid = "id"
    file.write_text("id,url,caption\n" + "\n".join(lines))
    lender = ingested(recipe, [Paint()])
    run_all(lender)
    file.write_text("id,url,caption\n" + "\n".join(f"{line} again" if i % 4 else line for i, line in enumerate(lines)))
    recipe.run += "-borrower"
    passes = ingested(recipe, [Paint()])
    lend(lender, passes, 3)
    assert sum(len(passes[1].borrowed_rows(u, lender[0])) for u in range(3)) == ROWS / 4


def test_rows_that_a_record_lost_are_named_and_not_passed_over(recipe: Recipe) -> None:
    passes = ingested(recipe, [Paint(), Score()])
    run_all(passes)
    passes[1].store.remove("commits/0000001.000.json")
    assert passes[1].account(passes[:1], 1) is None
    with pytest.raises(DamagedError, match="the records of unit 1 lack"):
        surviving_rows(passes[:2], 1)
    # This does not depend on the filters above: the scores need pictures that no longer exist.
    with pytest.raises(DamagedError, match=r"commits/0000001\.000\.json: \d+ rows that were measured are gone "):
        check_measured(passes, 1, 1, digest=False, whole=False)
    check_measured(passes, 1, 0, digest=True, whole=True)


def test_every_row_comes_through_once_with_its_own_pixels(recipe: Recipe) -> None:
    passes = ingested(recipe, [Even(), Paint(), Bright(limit=55)])
    for index in (1, 2, 3):
        records = records_of(run_pass(passes, index, range(3)))
        assert sorted(r["unit"] for r in records) == [0, 1, 2]
    seen = []
    for unit in range(3):
        table = pa.concat_tables(read_unit(passes, unit, ["caption", "image", "size"]))
        assert table["row"].to_pylist() == sorted(table["row"].to_pylist())
        for caption, image in zip(table["caption"].to_pylist(), table["image"].to_pylist()):
            assert image == caption.encode() * 3
            seen.append(int(caption.split()[-1]))
        fates = [r for i, p in enumerate(passes) for r in p.drops(passes[:i], unit)["row"].to_pylist()] + table[
            "row"
        ].to_pylist()
        (pool_rows,) = read_unit(passes[:1], unit, ["uid"])
        assert sorted(fates) == pool_rows["row"].to_pylist(), "kept once or dropped once"
    assert sorted(seen) == [i for i in range(0, ROWS, 2) if len(f"picture number {i}") * 3 >= 55]


def test_the_order_of_rows_does_not_depend_on_the_number_of_units(recipe: Recipe, tmp_path: Path) -> None:
    def order(units: int) -> list[str]:
        recipe.run = str(tmp_path / f"run{units}")
        passes = ingested(recipe, [Even()], units)
        return [u for unit in range(units) for t in read_unit(passes[:1], unit, ["uid"]) for u in t["uid"].to_pylist()]

    assert order(1) == order(5)


def test_columns_of_distinct_values_are_stored_without_dictionaries(recipe: Recipe) -> None:
    p = UnitPass("key", "score", root=f"{recipe.run}/passes/score")
    rng, rows = np.random.default_rng(0), np.arange(0, 20_000, 2, dtype=np.int32)
    values = {"score": rng.random(len(rows)).astype(np.float32), "depth": rng.random(len(rows)), "kind": ["a"] * 10_000}
    values["score"][7] = np.nan
    table = pa.table({"row": rows, **values})
    record = commit(p, 0, new_attempt(0), len(rows), table, None, DROP.empty_table(), {})
    assert str(p.stored(0, [*values])[0].to_pylist()) == str(table.to_pylist())
    stored = p.store.read(record["table"]["name"])
    columns = pq.ParquetFile(pa.BufferReader(stored)).metadata.row_group(0)
    used = {columns.column(i).path_in_schema: columns.column(i).encodings for i in range(columns.num_columns)}
    assert "DELTA_BINARY_PACKED" in used["row"]
    assert "BYTE_STREAM_SPLIT" in used["score"]
    assert "BYTE_STREAM_SPLIT" in used["depth"]
    assert "RLE_DICTIONARY" in used["kind"]
    default = pa.BufferOutputStream()
    pq.write_table(table, default, compression="zstd")
    assert len(stored) < 0.7 * default.getvalue().size


def test_the_second_of_two_attempts_leaves_no_file(recipe: Recipe) -> None:
    passes = ingested(recipe, [Paint()])
    slow = run_pass(passes, 1, [0])
    next(slow)
    (first,) = records_of(run_pass(passes, 1, [0]))
    (second,) = records_of(slow)
    for key in ("rows_in", "kept", "entries", "parts"):
        assert second[key] == first[key]
    assert passes[1].store.names("units") == sorted(entry["name"].partition("/")[2] for entry in first["entries"])


def test_a_failed_attempt_leaves_no_file(recipe: Recipe) -> None:
    passes = ingested(recipe, [Paint(), Loser()])
    assert [p.labels for p in passes[1:]] == [["paint"], ["loser"]]
    list(run_pass(passes, 1, range(3)))
    with pytest.raises(RuntimeError, match="loser lost 1 rows of unit 0"):
        list(run_pass(passes, 2, [0]))
    assert passes[2].store.names("units") == []
    assert passes[2].record(0) is None


def test_a_restricted_attempt_drops_the_rows_it_must_not_touch(recipe: Recipe) -> None:
    passes = ingested(recipe, [Paint()])
    rows = surviving_rows(passes[:1], 1)
    (record,) = records_of(run_pass(passes, 1, [1], rows=rows, crashers=np.array([5], np.int32)))
    drops = {r["row"]: r["reason"] for r in passes[1].drops(passes[:1], 1).to_pylist()}
    assert drops[5] == "decoder_crash"
    assert record["kept"] + len(drops) == len(rows)


def test_the_table_of_a_unit_has_a_verdict_for_every_input_row(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Paint, "expensive", False)
    passes = ingested(recipe, [Paint()])
    (record,) = records_of(run_pass(passes, 1, [0]))
    table = passes[1].store.read_table(record["table"])
    assert table["row"].to_pylist() == surviving_rows(passes[:1], 0).tolist()
    for row in table.to_pylist():
        dead = row["drop_reason"] == "dead"
        assert (row["drop_step"], row["size"] is None, row["heavy_at"] is None) == (
            "paint" if dead else None,
            dead,
            dead,
        )
    assert record["kept"] == table["drop_reason"].null_count
    assert sorted(passes[1].store.names("units")) == sorted(
        record[file]["name"].partition("/")[2] for file in ("table", "heavy")
    ), "a unit with pixels costs two files and its record"


@pytest.mark.parametrize(
    ("what", "damage", "repeatable"),
    [
        ("record", "flip", True),
        ("record", "delete", False),
        ("table", "flip", False),
        ("table", "cut", True),
        ("heavy", "flip", True),
        ("heavy", "delete", False),
    ],
)
def test_damage_is_named_with_unit_pass_and_cure(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, what: str, damage: str, repeatable: bool
) -> None:
    monkeypatch.setattr(Paint, "expensive", False)
    monkeypatch.setattr(Paint, "repeatable", repeatable)
    passes = ingested(recipe, [Paint()])
    record = records_of(run_pass(passes, 1, range(3)))[1]
    unit, store = record["unit"], passes[1].store
    name = f"commits/{unit:07d}.json" if what == "record" else record[what]["name"]
    data = store.read(name)
    store.remove(name)
    if damage != "delete":
        store.write(name, data[:-9] if damage == "cut" else data[:50] + bytes([data[50] ^ 1]) + data[51:])
    for number in range(3):
        if number != unit:
            check_unit(passes[1], number, digest=True)
    looks = [lambda: check_unit(passes[1], unit, digest=True), lambda: list(read_unit(passes, unit, ["image", "size"]))]
    for look in looks:
        with pytest.raises(DamagedError) as error:
            look()
        message = str(error.value)
        assert message.startswith(f"{store.path(name)}: ")
        assert f"(unit {unit} of the pass paint). To continue, " in message
        cure = f"remove {store.path(f'commits/{unit:07d}.json')} and run the same" if repeatable else "from a copy; or"
        assert cure in message
    if what == "heavy" and damage != "flip":
        with pytest.raises(DamagedError):
            check_unit(passes[1], unit, digest=False)
    passes[1].forget(unit)
    again = records_of(run_pass(passes, 1, [unit]))
    assert [r["kept"] for r in again] == [record["kept"]]
    check_unit(passes[1], unit, digest=True)


def test_a_record_in_the_place_of_another_is_noticed(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Paint, "expensive", False)
    passes = ingested(recipe, [Paint()])
    list(run_pass(passes, 1, range(3)))
    store = passes[1].store
    store.write("commits/0000001.json", store.read("commits/0000002.json"))
    with pytest.raises(DamagedError, match="this is the record of another unit"):
        passes[1].record(1)
    store.write("commits/0000000.json", passes[0].store.read("commits/0000000.json"))
    with pytest.raises(DamagedError, match="this is the record of another unit"):
        passes[1].record(0)


def test_a_sweep_leaves_records_and_what_they_name(recipe: Recipe) -> None:
    passes = ingested(recipe, [Paint()])
    records = records_of(run_pass(passes, 1, range(3)))
    p = passes[1]
    p.finish(Funnel.of(p.labels, 0, [], {}))
    folders = ("", "units", "drops", "attempts", "spool", "commits")
    there = {folder: p.store.names(folder) for folder in folders}
    for name in ("plan.json", "units/0000001-ab.arrow", "units/.0000001-ab.arrow.0123456789ab.part",
                 "attempts/0000001.1", "spool/x.arrow", "commits/.0000001.json.0123456789ab.part"):  # fmt: skip
        p.store.write(name, b"?")
    p.sweep(entry for record in records for entry in record["entries"])
    assert {folder: p.store.names(folder) for folder in folders} == there
