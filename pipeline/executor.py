"""Runs the passes of a recipe, one after the other or, where they go from unit to unit, side by side.

Nothing here holds rows: what a worker does with a unit is `passes.run_pass`, and how it gets the unit is `crew`.
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import crew, ingest, pool
from pipeline.ledger import BooksError, Funnel, Line
from pipeline.passes import Pass, alive, read_unit, unit_drops
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.schema import DROP, POSITION
from pipeline.stages.write_shards import WriteShards
from pipeline.step import Filter, drops_table
from pipeline.storage import Store

if TYPE_CHECKING:
    import pandas as pd

GROUP_ROWS = 1_000_000
"""Rows of a table that one task of a barrier reads, and of a file of drops."""


@dataclass
class Outcome:
    """What a run came to."""

    funnel: Funnel
    reused: list[str]
    """The labels of the passes that were found complete, in order."""


def execute(recipe: Recipe, passes: list[Pass], types: dict[str, pa.DataType], progress: Progress) -> Outcome:
    """Runs what is not done yet; afterwards every pass of the recipe is complete and the books of the run balance."""
    funnel = Funnel()
    reused: list[str] = []
    units = _ingest(recipe, passes[0], types, progress, reused)
    index = 1
    funnel.add(_funnel(passes[0]))
    while index < len(passes):
        p = passes[index]
        if p.complete() is not None and (p.kind != "write" or _owns_shards(recipe, p)):
            reused.append(p.label)
            funnel.add(_funnel(p))
            index += 1
            continue
        if p.kind == "barrier":
            _barrier(passes, index, units, funnel.kept, progress)
            chain = [index]
        elif p.kind == "write":
            _write(recipe, passes, index, units, progress)
            chain = [index]
        else:
            end = index
            while end < len(passes) and passes[end].kind == "map" and passes[end].complete() is None:
                end += 1
            chain = list(range(index, end))
            _map(recipe, passes, chain, units, progress)
        for i in chain:
            funnel.add(_funnel(passes[i]))
        index = chain[-1] + 1
    funnel.balance()
    return Outcome(funnel, reused)


def write_books(recipe: Recipe, passes: list[Pass], outcome: Outcome, units: int) -> int:
    """Writes `drops/*.parquet` and `funnel.json`; returns the rows in the drops. BooksError if rows are missing."""
    store = Store(recipe.run)
    group = _units_per_group(recipe)
    groups = list(range(-(-units // group)))

    def export(numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        for number in numbers:
            yield _export_drops(store, passes, number, range(number * group, min(units, (number + 1) * group)))

    rows = sum(record["rows"] for record in crew.over(groups, export))
    keep = {f"{number:05d}.parquet" for number in groups}
    for name in store.names("drops"):
        if name not in keep:
            store.remove(f"drops/{name}")
    funnel = outcome.funnel
    if funnel.rows_in != funnel.kept + rows:
        raise BooksError(f"{funnel.rows_in:,} rows in, but {funnel.kept:,} kept and {rows:,} in the ledger of drops")
    books = {"name": recipe.name, "rows_in": funnel.rows_in, "kept": funnel.kept, "steps": funnel.to_json()}
    store.write("funnel.json", json.dumps(books, indent=1).encode())
    return rows


def unit_total(passes: Sequence[Pass]) -> int:
    """The number of units of a run whose pool was ingested."""
    complete = passes[0].complete()
    assert complete is not None
    return int(complete["units"])


def _funnel(p: Pass) -> Funnel:
    complete = p.complete()
    assert complete is not None, p.root
    return Funnel.from_json(complete["funnel"])


def _finish(p: Pass, funnel: Funnel, **more: Any) -> None:
    p.store.create("complete.json", json.dumps({"pass": p.label, "funnel": funnel.to_json(), **more}).encode())


def _empty_funnel(p: Pass) -> Funnel:
    return Funnel.of(p.labels, 0, [], {})


# --- The pool ---------------------------------------------------------------------------------------------------------


def _ingest(recipe: Recipe, p: Pass, types: dict[str, pa.DataType], progress: Progress, reused: list[str]) -> int:
    if p.complete() is not None:
        reused.append(p.label)
        return unit_total([p])
    spec, splits = recipe.pool, pool.splits(recipe.pool)
    data = p.store.read_if_there("plan.json")
    if data is None:
        sizes = [split.rows or 0 for split in splits]

        def count(batch: Sequence[tuple[int, pool.Split]]) -> Iterator[dict[str, Any]]:
            for i, split in batch:
                yield {"split": i, "rows": pool.count(spec, split)}

        for record in crew.over([(i, s) for i, s in enumerate(splits) if s.rows is None], count):
            sizes[record["split"]] = record["rows"]
        rows = sum(sizes)
        size = pool.size(spec)
        units = ingest.unit_count(rows, recipe.unit_rows, size)
        parts = ingest.partition_count(rows, units, size)
        plan = {"rows": rows, "units": units, "parts": parts, "pieces": ingest.pieces(sizes)}
        p.store.create("plan.json", json.dumps(plan).encode())
        data = p.store.read("plan.json")
    plan = json.loads(data)
    units, parts, starts = plan["units"], plan["parts"], plan["pieces"]
    progress.begin([(p.label, plan["rows"])], units)

    def scatter(batch: Sequence[tuple[int, int, list[pool.Split]]]) -> Iterator[dict[str, Any]]:
        for piece, first, some in batch:
            ingest.scatter(p, piece, first, some, spec, types, units, parts)
            yield {}

    def gather(batch: Sequence[int]) -> Iterator[dict[str, Any]]:
        for part in batch:
            yield from ingest.gather(p, part, len(starts), types, units, parts)

    pieces = [
        (i, first, splits[first:last]) for i, (first, last) in enumerate(itertools.pairwise([*starts, len(splits)]))
    ]
    started = time.perf_counter()
    for _ in crew.over(pieces, scatter):
        pass
    funnel = _empty_funnel(p)
    for record in crew.over(range(parts), gather):
        unit_funnel = Funnel.from_json(record["funnel"])
        funnel.add(unit_funnel)
        progress.add(p.label, record["rows_in"], record["kept"], unit_funnel.lines[p.label].dropped, units=1)
    if funnel.rows_in != plan["rows"]:
        raise BooksError(f"the pool has {plan['rows']:,} rows, but its units hold {funnel.rows_in:,}")
    funnel.lines[p.label].seconds = time.perf_counter() - started
    _finish(p, funnel, units=units)
    for name in p.store.names("spool"):
        p.store.remove(f"spool/{name}")
    return units


# --- Passes over units ------------------------------------------------------------------------------------------------


def _map(recipe: Recipe, passes: list[Pass], chain: list[int], units: int, progress: Progress) -> None:
    """Streams all units through neighbouring passes: while one downloads, the one before it is scored."""
    rows = _funnel(passes[chain[0] - 1]).kept
    progress.begin([(passes[i].label, rows if i == chain[0] else None) for i in chain], units)
    funnels = {i: _empty_funnel(passes[i]) for i in chain}
    for i, advance in crew.stream(passes, chain, units, recipe.workers):
        progress.add(passes[i].label, advance.rows, advance.kept, advance.reasons, units=len(advance.records))
        for record in advance.records:
            funnels[i].add(Funnel.from_json(record["funnel"]))
    for i in chain:
        if funnels[i].rows_in != (rows if i == chain[0] else funnels[i - 1].kept):
            raise BooksError(f"{passes[i].label}: {rows:,} rows were due, {funnels[i].rows_in:,} came")
        _finish(passes[i], funnels[i])


# --- Barriers ---------------------------------------------------------------------------------------------------------


def _units_per_group(recipe: Recipe) -> int:
    return max(1, GROUP_ROWS // recipe.unit_rows)


def _barrier(passes: list[Pass], index: int, units: int, rows: int, progress: Progress) -> None:
    """Lets a whole-run filter decide on the column tables of all units, as a Dask graph that Ray computes."""
    import dask
    import dask.dataframe as dd
    import pandas as pd
    from ray.util.dask import ray_dask_get

    p, before = passes[index], passes[:index]
    step = p.steps[0]
    assert isinstance(step, Filter)
    progress.begin([(p.label, rows)])
    if not rows:
        _finish(p, _empty_funnel(p), files={}, units_per_file=units)
        return
    started = time.perf_counter()
    types = {k: v for q in before for k, v in q.adds.items()}
    columns = dict.fromkeys(["uid", *(c for c in step.needs if c not in POSITION.names)])
    schema = pa.schema([*POSITION, *((c, types[c]) for c in columns)])
    per_file = max(1, GROUP_ROWS * units // rows)
    groups = [range(low, min(units, low + per_file)) for low in range(0, units, per_file)]

    def frame_of(group: range) -> pd.DataFrame:
        tables = [t for unit in group for t in read_unit(before, unit, schema.names[2:])]
        return _to_pandas(pa.concat_tables([schema.empty_table(), *tables]))

    attempt = secrets.token_hex(4)

    def store_part(part: pd.DataFrame) -> pd.DataFrame:
        written = []
        for number, drops in part.sort_values(["unit", "row"]).groupby("_file"):
            name = f"drops/{number:06d}-{attempt}.parquet"
            table = pa.table(
                {**{c: drops[c].to_numpy() for c in POSITION.names}, "step": [p.label] * len(drops),
                 **{c: pa.array(drops[c] if c in drops else [None] * len(drops), DROP.field(c).type, from_pandas=True)
                    for c in ("reason", "detail", "value")}}
            ).cast(DROP)  # fmt: skip
            p.store.write_table(name, table)
            counts = json.dumps({str(k): int(v) for k, v in drops["reason"].value_counts().items()})
            written.append((int(number), name, counts))
        return pd.DataFrame(written, columns=["file", "name", "counts"]).astype(object)

    with dask.config.set({"scheduler": ray_dask_get, "dataframe.shuffle.method": "tasks"}):
        frame = dd.from_map(frame_of, groups, meta=_to_pandas(schema.empty_table()))
        drops = step.decide(frame)
        drops = drops.assign(_file=drops["unit"] // per_file)
        if drops.npartitions > 1:
            drops = drops.shuffle(on="_file")
        meta = pd.DataFrame({c: pd.Series([], dtype=object) for c in ("file", "name", "counts")})
        written = drops.map_partitions(store_part, meta=meta).compute()
    line = Line(rows)
    for counts in written["counts"]:
        for reason, n in json.loads(counts).items():
            line.dropped[reason] = line.dropped.get(reason, 0) + n
    line.seconds = time.perf_counter() - started
    files = {str(number): name for number, name in zip(written["file"], written["name"])}
    progress.add(p.label, rows, line.kept, line.dropped)
    _finish(p, Funnel({p.label: line}), files=files, units_per_file=per_file)


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    """With types that hold nulls: a null among 64-bit hashes must not turn them all into floats."""
    import pandas as pd

    def dtype(of: pa.DataType) -> Any:
        if pa.types.is_string(of):
            return pd.StringDtype("pyarrow")
        return pd.ArrowDtype(of) if pa.types.is_integer(of) else None

    return table.to_pandas(types_mapper=dtype)


# --- Shards -----------------------------------------------------------------------------------------------------------


def _owns_shards(recipe: Recipe, p: Pass) -> bool:
    return Store(recipe.run).read_if_there("shards/OWNER") == p.key.encode()


def _write(recipe: Recipe, passes: list[Pass], index: int, units: int, progress: Progress) -> None:
    """Writes the shards: each is a range of the run's rows in the order of units, whoever writes it and when."""
    p, before = passes[index], passes[:index]
    step = p.steps[0]
    assert isinstance(step, WriteShards)
    store = Store(recipe.run)
    if not _owns_shards(recipe, p):
        # Shards of an earlier variant of the recipe stand here: they are no longer whole from this moment on.
        store.remove("shards/_SUCCESS")
        for name in p.store.names("commits"):
            p.store.remove(f"commits/{name}")
        p.store.remove("complete.json")
        store.write("shards/OWNER", p.key.encode())

    def count(batch: Sequence[int]) -> Iterator[dict[str, Any]]:
        for unit in batch:
            yield {"unit": unit, "rows": len(alive(before, unit))}

    sizes = np.zeros(units, np.int64)
    for record in crew.over(range(units), count, at_once=64):
        sizes[record["unit"]] = record["rows"]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if units else 0
    n = step.samples_per_shard
    shards = total // n if step.drop_last else -(-total // n)
    progress.begin([(p.label, total)])
    types = {k: v for q in before for k, v in q.adds.items()}

    def write(batch: Sequence[int]) -> Iterator[dict[str, Any]]:
        for shard in batch:
            record = p.record(shard)
            if record is None:
                rows = _rows_of(before, ends, shard * n, min(total, (shard + 1) * n), list(types))
                record = step.write(store.folder("shards"), shard, rows, types)
                p.store.create(f"commits/{shard:07d}.json", json.dumps(record).encode())
            yield record

    started = time.perf_counter()
    records: list[dict[str, Any]] = []
    for record in crew.over(range(shards), write):
        records.append(record)
        progress.add(p.label, record["samples"], record["samples"], {})
    kept = sum(record["samples"] for record in records)
    files, tail = {}, total - kept
    if tail:
        left = pa.concat_tables(_rows_of(before, ends, kept, total, []))
        name = f"drops/{secrets.token_hex(4)}.parquet"
        p.store.write_table(name, drops_table(left, p.label, "last_shard_short"))
        files = {"0": name}
    line = Line(total, {"last_shard_short": tail} if tail else {}, time.perf_counter() - started)
    records.sort(key=lambda record: record["name"])

    def finish(_: Sequence[int]) -> Iterator[dict[str, Any]]:
        step.finish(store.folder("shards"), recipe.name, records)
        yield {}

    list(crew.over([0], finish))  # not here: it holds the uids of all samples
    _finish(p, Funnel({p.label: line}), files=files, units_per_file=max(1, units))


def _rows_of(before: Sequence[Pass], ends: np.ndarray, low: int, high: int, columns: list[str]) -> Iterator[pa.Table]:
    """The living rows low … high−1 of the run, in the order of units."""
    unit = int(np.searchsorted(ends, low, side="right"))
    while low < high:
        start = int(ends[unit - 1]) if unit else 0
        take = min(high, int(ends[unit])) - low
        if take:
            rows = alive(before, unit)[low - start : low - start + take]
            yield from read_unit(before, unit, columns, rows)
        low += take
        unit += 1


def _export_drops(store: Store, passes: list[Pass], number: int, units: range) -> dict[str, Any]:
    """Joins the drops of a group of units with their urls and captions into one file for people and tools."""
    types = {"uid": pa.string(), "url": pa.string(), "caption": pa.string()}
    said = [name for name in DROP.names if name not in POSITION.names]
    schema = pa.schema([*types.items(), *(DROP.field(name) for name in said)])
    name, rows = f"drops/{number:05d}.parquet", 0
    with store.output(name) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for unit in units:
            drops = pa.concat_tables([unit_drops(p, unit).select(["row", *said]) for p in passes])
            if not len(drops):
                continue
            drops = drops.sort_by("row")
            (texts,) = read_unit(passes[:1], unit, types, drops["row"].to_numpy())
            table = pa.table([*(texts[c] for c in types), *(drops[c] for c in said)], schema=schema)
            writer.write_table(table)
            rows += len(table)
    return {"rows": rows}
