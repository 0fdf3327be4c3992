"""Runs the passes of a recipe: barriers and sinks one after the other, adjacent passes over units concurrently.

The driver holds no rows. `run_pass` processes units on a worker, and `workers` sends units to workers.

Results of earlier commands are checked before they are reused: records, tables and the sizes of all other files, or
every byte if nothing is left to do. Damaged results are recomputed if that gives the same bytes; otherwise the run
fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import pool
from pipeline.dataset.card import About
from pipeline.ledger import BooksError, Funnel, Line
from pipeline.recipe import Recipe
from pipeline.scheduler import ingest, vectors
from pipeline.scheduler.claim import Claim
from pipeline.scheduler.meter import Spent
from pipeline.scheduler.passes import (
    BarrierPass,
    MeasurePass,
    Pass,
    PoolPass,
    SinkPass,
    UnitPass,
    check_measured,
    check_unit,
    column_types,
    read_unit,
    surviving_rows,
)
from pipeline.scheduler.progress import Progress
from pipeline.scheduler.taken_down import NAME as TAKEN_DOWN
from pipeline.scheduler.taken_down import REASON, read_taken, taken_drops, taken_rows
from pipeline.scheduler.workers import map_tasks, run_passes
from pipeline.schema import DROP, POSITION
from pipeline.step import Filter, Sink, VectorFilter, drops_table, to_pandas
from pipeline.storage import DamagedError, Entry, Store, sealed

if TYPE_CHECKING:
    import pandas as pd

GROUP_ROWS = 1_000_000
"""Rows that one task of a barrier reads, and rows of the run covered by one file of drops."""


@dataclass
class Outcome:
    """The result of a run."""

    funnel: Funnel
    reused: list[str]
    """Labels of the passes that were complete already, in order."""
    mended: list[str]
    """One line for each damaged result that was recomputed."""
    known: dict[str, tuple[int, int]]
    """For each `measure` pass that ran, by label: the rows that reached it, and those of them measured before."""


@dataclass
class Job:
    """What the functions of this module share about a run."""

    recipe: Recipe
    passes: list[Pass]
    types: dict[str, pa.DataType]
    """The pool's columns besides `schema.SAMPLE`."""
    progress: Progress
    claim: Claim
    units: int = 0
    """Set when the pool is ingested."""


def execute(job: Job) -> Outcome:
    """Runs the passes that are not complete, and checks that the books of the run balance.

    Raises DamagedError if committed results are missing or damaged and cannot be recomputed.
    """
    passes, funnel = job.passes, Funnel()
    reused: list[str] = []
    mended = _mend(job)
    known: dict[str, tuple[int, int]] = {}
    if passes[0].complete() is None:
        _ingest(job)
    else:
        reused.append(passes[0].label)
        job.progress.reused(passes[0].label, _funnel(passes[0]))
    ingested = passes[0].complete()
    assert ingested is not None
    job.units = int(ingested["units"])
    _borrow(job)
    index = 1
    funnel.add(_funnel(passes[0]))
    while index < len(passes):
        job.claim.check()
        p, chain = passes[index], [index]
        if p.complete() is not None and (not isinstance(p, SinkPass) or _written_whole(job.recipe, p)):
            reused.append(p.label)
            job.progress.reused(p.label, _funnel(p))
        elif p.over_units:
            chain += itertools.takewhile(lambda i: _joins(passes[i]), range(index + 1, len(passes)))
            if p.fitted is not None:
                label = f"{p.fitted.label} (fit)"
                job.progress.begin([(label, funnel.kept)])
                vectors.fit_step(p, passes[:index], job.units, funnel.kept, map_tasks)
                job.progress.add(label, funnel.kept, funnel.kept, {})
            known |= _map(job, chain)
        else:
            (_write if isinstance(p, SinkPass) else _barrier)(job, index)
        for i in chain:
            funnel.add(_funnel(passes[i]))
        index += len(chain)
    funnel.balance()
    return Outcome(funnel, reused, mended, known)


def write_books(job: Job, outcome: Outcome) -> int:
    """Writes `drops/*.parquet`, `funnel.json` and, last, `seal.json`. Returns the number of dropped rows.

    Raises BooksError if rows are missing.
    """
    recipe, passes, units, claim = job.recipe, job.passes, job.units, job.claim
    store = Store(recipe.run)
    group = max(1, GROUP_ROWS // recipe.unit_rows)
    groups = list(range(-(-units // group)))

    def export(numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        for number in numbers:
            claim.check()
            yield export_drops(store, passes, number, range(number * group, min(units, (number + 1) * group)))

    exported = list(map_tasks(groups, export))
    rows = sum(record["rows"] for record in exported)
    claim.check()
    keep = {f"{number:05d}.parquet" for number in groups}
    for name in store.names("drops"):
        if name not in keep:
            store.remove(f"drops/{name}")
    funnel = outcome.funnel
    if funnel.rows_in != funnel.kept + rows:
        raise BooksError(f"{funnel.rows_in:,} rows in, but {funnel.kept:,} kept and {rows:,} in the ledger of drops")
    books = {"name": recipe.name, "rows_in": funnel.rows_in, "kept": funnel.kept, "steps": funnel.to_json()}
    files = [store.write("funnel.json", json.dumps(books, indent=1).encode()), store.entry("run.json")]
    files += [store.entry(TAKEN_DOWN)] if store.exists(TAKEN_DOWN) else []
    files += sorted((record["entry"] for record in exported), key=lambda entry: str(entry["name"]))
    if isinstance(passes[-1], SinkPass) and (complete := passes[-1].complete()) is not None:
        folder = complete["folder"]
        files += [store.entry(f"{folder}/OWNER")]
        files += [{**entry, "name": f"{folder}/{entry['name']}"} for entry in complete["documents"]]
    within = f"{recipe.run}/"
    completes = [{"pass": p.root.removeprefix(within), **p.store.entry(p.complete_name)} for p in passes]
    for part in store.parts():
        if not part.startswith("claim/"):
            store.remove(part)
    store.write("seal.json", sealed({"files": files, "passes": completes}))
    return rows


def _joins(p: Pass) -> bool:
    """Whether a pass can run concurrently with the pass before it, on units as that pass commits them."""
    return p.over_units and p.fitted is None and p.complete() is None


def _funnel(p: Pass) -> Funnel:
    complete = p.complete()
    assert complete is not None, p.root
    return Funnel.from_json(complete["funnel"])


def _empty_funnel(p: Pass) -> Funnel:
    return Funnel.of(p.labels, 0, [], {})


# --- Results of earlier commands --------------------------------------------------------------------------------------


def _mend(job: Job) -> list[str]:
    """Checks everything that is committed, and removes the records of damaged results, so that they are recomputed.

    Raises DamagedError, and removes nothing, if any damaged result could not be reproduced.
    """
    passes = job.passes
    complete = [p.complete() for p in passes]
    done = all(complete)
    if complete[0] is None:
        return []
    units = int(complete[0]["units"])
    own = f"{Store(job.recipe.run).root}/"
    complete_here = [record is not None and p.root.startswith(own) for record, p in zip(complete, passes)]
    for i, p in enumerate(passes):
        there = units if complete[i] or p.repeatable else len(p.store.names("commits"))
        if there < units and any(complete_here[i:]):
            raise DamagedError(
                f"{p.root}: only {there:,} of {units:,} units are there, and later passes depend on the others. "
                "To continue, restore it from a copy; or, to fetch again what is still online, remove the folders of "
                "all later passes and run the same command again."
            )
    work = [
        (i, low, min(units, low + 64))
        for i, p in enumerate(passes)
        if p.over_units and (complete[i] or isinstance(p, MeasurePass) or p.store.names("commits"))
        for low in range(0, units, 64)
    ]

    def look(ranges: Sequence[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
        for i, low, high in ranges:
            p = passes[i]
            assert isinstance(p, UnitPass)
            for unit in range(low, high):
                try:
                    if isinstance(p, MeasurePass):
                        check_measured(passes, i, unit, digest=done, whole=complete[i] is not None)
                    elif complete[i] or p.record(unit) is not None:
                        check_unit(p, unit, digest=done)
                except DamagedError as error:
                    yield {"pass": i, "unit": unit, "error": str(error)}

    found = list(map_tasks(work, look))
    for i, record in enumerate(complete):
        if record is not None and isinstance(passes[i], BarrierPass):
            try:
                for entry in record["files"].values():
                    passes[i].store.check(entry)
            except DamagedError as error:
                found.append({"pass": i, "unit": None, "error": str(error)})
    if lost := [d for d in found if not (passes[d["pass"]].repeatable and passes[d["pass"]].root.startswith(own))]:
        for damage in lost:
            if not passes[damage["pass"]].root.startswith(own):
                problem = damage["error"].partition(" To continue")[0]
                damage["error"] = f"{problem} To continue, run the command of that run again, or remove `reuse`."
        more = f"\n… and {len(lost) - 5:,} more" if len(lost) > 5 else ""
        raise DamagedError("\n".join(damage["error"] for damage in lost[:5]) + more)
    for damage in found:
        passes[damage["pass"]].forget(damage["unit"])
    return [damage["error"].partition(" To continue")[0] for damage in found]


# --- The pool ---------------------------------------------------------------------------------------------------------


def _ingest(job: Job) -> None:
    """Cuts the pool into units: scatters its files by partition, then gathers each partition."""
    recipe, types, claim, p = job.recipe, job.types, job.claim, job.passes[0]
    assert isinstance(p, PoolPass)
    ingest.mend(p)
    spec, splits = recipe.pool, pool.splits(recipe.pool)
    plan = p.store.read_record("plan.json")
    if plan is None:
        sizes = [split.rows or 0 for split in splits]

        def count(batch: Sequence[tuple[int, pool.Split]]) -> Iterator[dict[str, Any]]:
            for i, split in batch:
                yield {"split": i, "rows": pool.count(spec, split)}

        for record in map_tasks([(i, s) for i, s in enumerate(splits) if s.rows is None], count):
            sizes[record["split"]] = record["rows"]
        rows = sum(sizes)
        size = pool.size(spec)
        units = ingest.unit_count(rows, recipe.unit_rows, size)
        parts = ingest.partition_count(rows, units, size)
        plan = {"rows": rows, "units": units, "parts": parts, "pieces": ingest.pieces(sizes)}
        p.store.write("plan.json", sealed(plan))
    units, parts, starts = plan["units"], plan["parts"], plan["pieces"]
    job.progress.begin([(p.label, plan["rows"])], units)

    def scatter(batch: Sequence[tuple[int, int, list[pool.Split]]]) -> Iterator[dict[str, Any]]:
        for piece, first, of_piece in batch:
            ingest.scatter(p, piece, first, of_piece, spec, types, units, parts)
            pa.default_memory_pool().release_unused()  # Ray reuses the process
            yield {}

    def gather(batch: Sequence[int]) -> Iterator[dict[str, Any]]:
        for part in batch:
            yield from ingest.gather(p, part, len(starts), types, units, parts)
            pa.default_memory_pool().release_unused()

    pieces = [
        (i, first, splits[first:last]) for i, (first, last) in enumerate(itertools.pairwise([*starts, len(splits)]))
    ]
    started, spent = time.perf_counter(), Spent()
    for _ in map_tasks(pieces, scatter, spent=spent):
        claim.check()
    funnel, entries = _empty_funnel(p), []
    for record in map_tasks(range(parts), gather, spent=spent):
        claim.check()
        entries += [record["table"], record["heavy"]]
        unit_funnel = Funnel.from_json(record["funnel"])
        funnel.add(unit_funnel)
        job.progress.add(p.label, record["rows_in"], record["kept"], unit_funnel.lines[p.label].dropped, units=1)
    if funnel.rows_in != plan["rows"]:
        raise BooksError(f"the pool has {plan['rows']:,} rows, but its units hold {funnel.rows_in:,}")
    job.progress.add(p.label, 0, 0, {}, spent=spent)
    funnel.lines[p.label].seconds = time.perf_counter() - started
    p.sweep(entries)
    p.finish(funnel, units=units)


# --- Passes over units ------------------------------------------------------------------------------------------------


def _borrow(job: Job) -> None:
    """Takes over the measurements that the run named by `reuse` has for the same rows."""
    passes, units = job.passes, job.units
    for index, p in enumerate(passes):
        if not isinstance(p, MeasurePass) or p.lender is None or p.complete() is not None:
            continue

        def borrow(batch: Sequence[int], index: int = index, p: MeasurePass = p) -> Iterator[dict[str, Any]]:
            for unit in batch:
                p.borrow(passes[:index], unit, units)
                yield {}

        for _ in map_tasks(range(units), borrow, at_once=16):
            job.claim.check()


def _map(job: Job, chain: list[int]) -> dict[str, tuple[int, int]]:
    """Streams all units through adjacent passes: one unit is downloaded while another is scored.

    Returns `Outcome.known` for these passes.
    """
    passes, units = job.passes, job.units
    rows = _funnel(passes[chain[0] - 1]).kept
    job.progress.begin([(passes[i].label, rows if i == chain[0] else None) for i in chain], units)
    funnels = {i: _empty_funnel(passes[i]) for i in chain}
    entries: dict[int, list[Entry]] = {i: [] for i in chain}
    known: Counter[int] = Counter()
    parts: dict[int, dict[str, int]] = {i: {} for i in chain}
    """The number of records of each unit that does not have exactly one."""
    for i, report, workers in run_passes(passes, chain, units, job.recipe.workers):
        job.claim.check()
        done = len(report.records)
        job.progress.add(passes[i].label, report.rows, report.kept, report.reasons, done, workers, report.spent)
        for record in report.records:
            funnels[i].add(Funnel.from_json(record["funnel"]))
            entries[i] += record["entries"]
            known[i] += record["known"]
            if record.get("parts", 1) != 1:
                parts[i][str(record["unit"])] = record["parts"]
    for i in chain:
        if funnels[i].rows_in != rows:
            raise BooksError(f"{passes[i].label}: expected {rows:,} rows, received {funnels[i].rows_in:,}")
        rows = funnels[i].kept
        passes[i].sweep(entries[i])
        passes[i].finish(funnels[i], **({"parts": parts[i]} if isinstance(passes[i], MeasurePass) else {}))
    return {passes[i].label: (funnels[i].rows_in, known[i]) for i in chain if isinstance(passes[i], MeasurePass)}


# --- Barriers ---------------------------------------------------------------------------------------------------------


def _barrier(job: Job, index: int) -> None:
    """Runs a whole-run filter over columns of all units."""
    p, before, units = job.passes[index], job.passes[:index], job.units
    rows = _funnel(before[-1]).kept
    step = p.steps[0]
    assert isinstance(step, Filter)
    job.progress.begin([(p.label, rows)])
    if not rows:
        p.finish(_empty_funnel(p), files={}, units_per_file=units)
        return
    started, spent = time.perf_counter(), Spent()
    per_file = max(1, GROUP_ROWS * units // rows)
    if isinstance(step, VectorFilter):
        files, reasons = vectors.decide(p, before, units, rows, per_file, partial(map_tasks, spent=spent))
        line = Line(rows, dict(sorted(reasons.items())))
    else:
        files, line = _decide(p, step, before, units, rows, per_file)
    line.seconds = time.perf_counter() - started
    job.progress.add(p.label, rows, line.kept, line.dropped, spent=spent)
    p.sweep(files.values())
    p.finish(Funnel({p.label: line}), files=files, units_per_file=per_file)


def _decide(
    p: Pass, step: Filter, before: Sequence[Pass], units: int, rows: int, per_file: int
) -> tuple[dict[str, Entry], Line]:
    """Runs a whole-run filter as a Dask graph that Ray computes.

    Returns the files of its drops, by the number of the range of `per_file` units that each covers, and its line in the
    funnel.
    """
    import dask
    import dask.dataframe as dd
    import pandas as pd
    from ray.util.dask import ray_dask_get

    types = column_types(before)
    schema = pa.schema([*POSITION, *((c, types[c]) for c in vectors.needed_columns(step))])
    groups = [range(low, min(units, low + per_file)) for low in range(0, units, per_file)]

    def frame_of(group: range) -> pd.DataFrame:
        tables = [t for unit in group for t in read_unit(before, unit, schema.names[2:])]
        return to_pandas(pa.concat_tables([schema.empty_table(), *tables]))

    attempt = secrets.token_hex(4)

    def store_part(part: pd.DataFrame) -> pd.DataFrame:
        written = []
        for number, drops in part.sort_values(["unit", "row"]).groupby("_file"):
            name = f"drops/{number:06d}-{attempt}.parquet"
            columns = [*DROP, *map(pa.field, p.adds.keys(), p.adds.values())]
            drops = drops.assign(step=p.label)
            table = pa.table(
                {f.name: pa.array(drops[f.name] if f.name in drops else [None] * len(drops), f.type, from_pandas=True)
                 for f in columns},
                pa.schema(columns),
            )  # fmt: skip
            entry = json.dumps(p.store.write_table(name, table))
            counts = json.dumps({str(k): int(v) for k, v in drops["reason"].value_counts().items()})
            written.append((int(number), entry, counts))
        return pd.DataFrame(written, columns=["file", "entry", "counts"]).astype(object)

    with dask.config.set({"scheduler": ray_dask_get, "dataframe.shuffle.method": "tasks"}):
        frame = dd.from_map(frame_of, groups, meta=to_pandas(schema.empty_table()))
        decided = step.decide(frame)
        figures = step.figures(frame, decided)
        drops = decided.assign(_file=decided["unit"] // per_file)
        if drops.npartitions > 1:
            drops = drops.shuffle(on="_file")
        meta = pd.DataFrame({c: pd.Series([], dtype=object) for c in ("file", "entry", "counts")})
        stored = drops.map_partitions(store_part, meta=meta)
        written, table = dask.compute(stored, figures)
    dropped: Counter[str] = Counter()
    for counts in written["counts"]:
        dropped.update(json.loads(counts))
    line = Line(rows, dropped, figures=[] if table is None else json.loads(table.to_json(orient="records")))
    return {str(number): json.loads(entry) for number, entry in zip(written["file"], written["entry"])}, line


# --- Sinks and drops --------------------------------------------------------------------------------------------------


def _owns_folder(recipe: Recipe, p: SinkPass) -> bool:
    return Store(recipe.run).read_if_there(f"{p.sink.folder}/OWNER") == p.key.encode()


def _written_whole(recipe: Recipe, p: SinkPass) -> bool:
    """Whether the sink's folder holds exactly the files that this pass wrote, compared by SHA-256."""
    folder, complete = Store(recipe.run).folder(p.sink.folder), p.complete()
    if complete is None or not _owns_folder(recipe, p):
        return False
    try:
        for entry in complete["files"].values():
            p.store.check(entry)
        records = [p.record(part) for part in range(complete["parts"])]
    except DamagedError:
        return False
    entries = [*complete["documents"], *(entry for record in records if record for entry in record["files"])]
    if None in records or set(folder.names()) - {"_SUCCESS"} != {"OWNER", *(entry["name"] for entry in entries)}:
        return False
    whole = map_tasks(entries, lambda batch: ({"whole": _whole(folder, batch)},), at_once=16)
    return all(record["whole"] for record in whole)


def _whole(store: Store, entries: Iterable[Entry]) -> bool:
    try:
        for entry in entries:
            store.check(entry)
    except DamagedError:
        return False
    return True


def _write(job: Job, index: int) -> None:
    """Runs a sink. Each part is a fixed range of the run's rows in the order of units, whichever worker writes it."""
    recipe, claim, units = job.recipe, job.claim, job.units
    p, before = job.passes[index], job.passes[:index]
    assert isinstance(p, SinkPass)
    step, store = p.sink, Store(recipe.run)
    folder = store.folder(step.folder)
    if not _owns_folder(recipe, p):
        # The folder holds the output of an earlier variant of the recipe. That output is incomplete from now on.
        folder.remove("_SUCCESS")
        store.remove("seal.json")
        for name in p.store.names("commits"):
            p.store.remove(f"commits/{name}")
        folder.write("OWNER", p.key.encode())
    p.forget()

    def count(batch: Sequence[int]) -> Iterator[dict[str, Any]]:
        for unit in batch:
            yield {"unit": unit, "rows": len(surviving_rows(before, unit))}

    sizes = np.zeros(units, np.int64)
    for record in map_tasks(range(units), count, at_once=64):
        sizes[record["unit"]] = record["rows"]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if units else 0
    bounds = step.plan(total)
    job.progress.begin([(p.label, total)])
    types = column_types(before)

    def write(batch: Sequence[int]) -> Iterator[dict[str, Any]]:
        ledger = read_taken(store)
        for part in batch:
            claim.check()
            low, high = bounds[part], bounds[part + 1]
            taken = rows_taken(before, ends, low, high, ledger)
            with contextlib.suppress(DamagedError):
                record = p.record(part)
                if record is not None and record.get("taken", []) == taken and _whole(folder, record["files"]):
                    yield record
                    continue
            written = step.write(folder, part, rows_between(before, ends, low, high, step.reads(types)), types)
            if taken:
                written = {**step.remove(folder, written, ledger["uid"]), "taken": taken}
            p.forget(part)
            p.commit(part, written)
            yield {**written, "unit": part}

    started, spent = time.perf_counter(), Spent()
    records: list[dict[str, Any]] = []
    for record in map_tasks(range(len(bounds) - 1), write, spent=spent):
        claim.check()
        records.append(record)
        job.progress.add(p.label, record["rows"], record["rows"], {})
    records.sort(key=lambda record: int(record["unit"]))
    books = Funnel()
    for lines in map(_funnel, before):
        books.add(lines)
    honours = [opt_out for q in before for step in q.steps for opt_out in step.honours()]
    about = About(recipe.name, types, books, honours)

    def finish(_: Sequence[int]) -> Iterator[dict[str, Any]]:
        claim.check()
        finish_sink(p, before, step, folder, ends, about, records, time.perf_counter() - started)
        yield {}

    list(map_tasks([0], finish, spent=spent))  # not on the driver: the sink may load the uids of all samples
    job.progress.add(p.label, 0, 0, {}, spent=spent)


def finish_sink(
    p: Pass, before: Sequence[Pass], step: Sink, folder: Store, ends: np.ndarray, about: About,
    records: Sequence[dict[str, Any]], seconds: float,
) -> None:  # fmt: skip
    """Writes the files that describe all parts of a sink, given their records in order, and the record of the pass.

    `ends` holds for each unit the number of rows that reach the sink from this and all earlier units. `about` holds the
    funnel of the steps before the sink.
    """
    total = int(ends[-1]) if len(ends) else 0
    bounds = step.plan(total)
    taken = [row for record in records for row in record.get("taken", [])]
    if (kept := sum(record["rows"] for record in records)) + len(taken) != bounds[-1]:
        raise BooksError(f"{p.label} wrote {kept:,} of {bounds[-1]:,} rows, and {len(taken):,} were taken down")
    tail = pa.concat_tables([POSITION.empty_table(), *rows_between(before, ends, bounds[-1], total, [])])
    drops = pa.concat_tables([taken_drops(taken, p.label), drops_table(tail, p.label, step.leftover)])
    files = {"0": p.store.write_table(f"drops/{secrets.token_hex(4)}.parquet", drops)} if len(drops) else {}
    reasons = {step.leftover: len(tail), REASON: len(taken)}
    funnel = Funnel({p.label: Line(total, {why: n for why, n in reasons.items() if n}, seconds)})
    books = Funnel()
    for lines in (about.funnel, funnel):
        books.add(lines)
    documents = step.finish(folder, dataclasses.replace(about, funnel=books), list(records))
    named = {"OWNER", *(e["name"] for e in documents), *(e["name"] for r in records for e in r["files"])}
    for name in folder.names():
        if name not in named:
            folder.remove(name)
    p.sweep(files.values())
    p.finish(
        funnel, files=files, units_per_file=max(1, len(ends)), folder=step.folder, parts=len(records),
        documents=documents,
    )  # fmt: skip


def rows_taken(before: Sequence[Pass], ends: np.ndarray, low: int, high: int, ledger: pa.Table) -> list[list[Any]]:
    """The surviving rows low … high − 1 of the run that were taken down, in the format of `taken_down.taken_rows`."""
    if not len(ledger) or low == high:
        return []
    return taken_rows(pa.concat_tables(rows_between(before, ends, low, high, ["uid"])), ledger)


def rows_between(
    before: Sequence[Pass], ends: np.ndarray, low: int, high: int, columns: list[str]
) -> Iterator[pa.Table]:
    """The surviving rows low … high − 1 of the run, in the order of units."""
    unit = int(np.searchsorted(ends, low, side="right"))
    while low < high:
        start = int(ends[unit - 1]) if unit else 0
        take = min(high, int(ends[unit])) - low
        if take:
            rows = surviving_rows(before, unit)[low - start : low - start + take]
            yield from read_unit(before, unit, columns, rows)
        low += take
        unit += 1


def export_drops(store: Store, passes: list[Pass], number: int, units: range) -> dict[str, Any]:
    """Writes the drops of a range of units, with uid, url and caption, into one file for people and tools.

    Returns its number of `rows` and its `entry`.
    """
    types = {"uid": pa.string(), "url": pa.string(), "caption": pa.string()}
    fate = [name for name in DROP.names if name not in POSITION.names]
    schema = pa.schema([*types.items(), *(DROP.field(name) for name in fate)])
    name, rows = f"drops/{number:05d}.parquet", 0
    with store.output(name) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for unit in units:
            ledgers = [p.drops(passes[:i], unit) for i, p in enumerate(passes)]
            drops = pa.concat_tables([ledger.select(["row", *fate]) for ledger in ledgers])
            if not len(drops):
                continue
            drops = drops.sort_by("row")
            (texts,) = read_unit(passes[:1], unit, types, drops["row"].to_numpy())
            table = pa.table([*(texts[c] for c in types), *(drops[c] for c in fate)], schema=schema)
            writer.write_table(table)
            rows += len(table)
    return {"rows": rows, "entry": file.entry}
