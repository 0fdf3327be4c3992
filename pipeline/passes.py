"""Passes over units: what is stored of each, and how one is run. No Ray here: this is what a worker does.

A pass writes for each unit one table and, if it adds pixels or vectors, one `.arrow` file, under names that no other
attempt uses. The table (`.parquet`) has a line for each row that came in: `row`, the light columns that the pass added
and, for a dropped row, the step and reason (`drop_step, drop_reason, …`). Then it creates one record exclusively, which
makes the files count. The state of a unit is folded from the records of all passes so far; nothing is copied from pass
to pass.

The results of an expensive step belong to rows, not to the filters above it. Such a step is a pass of its own
(`measure`), stored under a key of what determines its values alone. A unit may have several records there, each for
other rows: when a filter above lets more rows through, only those never measured are measured, as a further record.
Results that another run has of the same pool count too (`lenders`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger import Funnel
from pipeline.recipe import Recipe, identity
from pipeline.schema import DROP, POSITION, SAMPLE, is_heavy
from pipeline.step import Filter, Sink, Stage, Step, apply, drops_table, split_marked
from pipeline.storage import DamagedError, Entry, Output, Store, is_part, sealed

HEAVY_ROWS = 256
"""Rows whose pixels are in memory at a time."""

PART_BITS = 32
"""`heavy_at` locates the pixels and vectors of a row: the lower PART_BITS bits are the place in a file, those above
the number of the file."""

File = tuple[Store, "Entry | None"]

FATE = [pa.field(f"drop_{f.name}", f.type) for f in DROP if f.name not in POSITION.names]
"""Columns of a unit's table that describe a dropped row; null for kept rows."""

Kind = Literal["pool", "map", "measure", "barrier", "write"]


@dataclass
class Pass:
    """Neighbouring steps that run together over each unit and are committed once."""

    kind: Kind
    key: str
    """Hash of everything that determines what is stored: the pool, and every step up to the last of this pass. For a
    `measure` pass: the step, and what determines the columns that it reads."""
    label: str
    steps: list[Step] = field(default_factory=list)
    adds: dict[str, pa.DataType] = field(default_factory=dict)
    root: str = ""
    chain: str = ""
    """For a `measure` pass, the hash of all steps so far, which decide which rows must be measured."""
    lenders: list[str] = field(default_factory=list)
    """For a `measure` pass, the folders of the same pass in other runs of the same pool."""

    @property
    def store(self) -> Store:
        return Store(self.root)

    @property
    def labels(self) -> list[str]:
        return [step.label for step in self.steps] if self.steps else [self.label]

    @property
    def repeatable(self) -> bool:
        """Whether the pass gives the same results if it is run again."""
        return all(step.repeatable for step in self.steps)

    def record(self, unit: int, part: int | None = None) -> dict[str, Any] | None:
        """The record of a unit, or None. In a `write` pass: of a sink's part. In a `measure` pass: of one `part`.

        DamagedError if the record was changed.
        """
        name = record_name(unit, part)
        record = self.store.read_record(name)
        if record is not None and (record["pass"], record["unit"], record.get("part")) != (self.key, unit, part):
            raise DamagedError(f"{self.store.path(name)}: damaged: this is the record of another unit")
        return record

    def parts(self, unit: int) -> list[dict[str, Any]]:
        """The records of a unit in a `measure` pass, in the order in which they were committed."""
        found: list[dict[str, Any]] = []
        while (record := self.record(unit, len(found))) is not None:
            found.append(record)
        return found

    @property
    def complete_name(self) -> str:
        return f"complete-{self.chain}.json" if self.chain else "complete.json"

    def complete(self) -> dict[str, Any] | None:
        """The record of the whole pass, written when all its units are committed.

        None before, or if it is damaged: everything in it can be recomputed.
        """
        with contextlib.suppress(DamagedError):
            record = self.store.read_record(self.complete_name)
            if record is not None and record["pass"] == (self.chain or self.key):
                return record
        return None

    def commit(self, unit: int, record: dict[str, Any]) -> bool:
        """Creates the record of a unit. False if there is one already, which then counts."""
        name = record_name(unit, record.get("part"))
        return self.store.create(name, sealed({"pass": self.key, "unit": unit, **record}))

    def finish(self, funnel: Funnel, **more: Any) -> None:
        """Writes the record of the whole pass."""
        record = {"pass": self.chain or self.key, "key": self.key, "label": self.label, "kind": self.kind, **more}
        self.store.write(self.complete_name, sealed({**record, "funnel": funnel.to_json()}))

    def forget(self, unit: int | None = None) -> None:
        """Removes the record of a unit, and the record that the pass is complete."""
        self.store.remove(self.complete_name)
        if unit is not None:
            names = self.store.names("commits") if self.kind == "measure" else []
            for name in [n for n in names if n.startswith(f"{unit:07d}.")] or [f"{unit:07d}.json"]:
                self.store.remove(f"commits/{name}")

    def sweep(self, entries: Iterable[Entry | None]) -> None:
        """Removes what failed or killed attempts left: all files except records and those that `entries` name."""
        keep = {entry["name"] for entry in entries if entry is not None}
        keep |= {name for name in self.store.names() if name.startswith("complete") and not is_part(name)}
        for folder in ("", "units", "drops", "attempts", "spool", "commits"):
            for file in self.store.names(folder):
                name = f"{folder}/{file}" if folder else file
                if name not in keep and (folder != "commits" or is_part(file)):
                    self.store.remove(name)


def make_passes(recipe: Recipe, pool_key: dict[str, Any], types: dict[str, pa.DataType]) -> list[Pass]:
    """Cuts a recipe into passes.

    An expensive step, a barrier and a sink are passes of their own; a pass also ends where a step that needs whole
    units would not get them. The first pass is the pool's own; `types` are the pool's further columns.
    """
    known = {**{f.name: f.type for f in SAMPLE}, **types}
    passes = [Pass("pool", _key("", pool_key), "pool", adds=dict(known))]
    sources: dict[str, str] = {}
    """For a column that a step added, a key of what determines its values."""
    steps: list[Step] = []
    identities: list[dict[str, Any]] = []

    def close(kind: Kind = "map") -> None:
        if steps:
            adds = {k: v for step in steps for k, v in step.adds.items()}
            key = _key(passes[-1].chain or passes[-1].key, identities)
            p = Pass(kind, key, steps[-1].label, list(steps), adds, f"{len(passes):02d}-{steps[-1].label}-{key}")
            if kind == "measure":
                p.chain, p.key = key, sources[next(iter(adds))]
                p.root = f"{steps[-1].name()}-{p.key}"
            passes.append(p)
            steps.clear()
            identities.clear()

    for step in recipe.steps:
        scope = step.scope if isinstance(step, Filter) else "row"
        alone: Kind | None = "barrier" if scope == "run" else "write" if isinstance(step, Sink) else None
        alone = "measure" if step.expensive else alone
        regroups = any(isinstance(s, Stage) and type(s).stream is not Stage.stream for s in steps)
        wants_units = any(isinstance(s, Filter) and s.scope == "unit" for s in steps)
        pixels = any(is_heavy(known[c]) for c in step.needs if c in known and not any(c in s.adds for s in steps))
        if alone or (scope == "unit" and (regroups or _reads_heavy(steps, known))) or (wants_units and pixels):
            close()
        step.needs = (*step.needs, *(c for c in step.wants if c in known and c not in step.needs))  # type: ignore[misc]
        steps.append(step)
        identities.append(identity(step))
        known |= step.adds
        source = _key("", [identities[-1], {c: sources[c] for c in step.needs if c in sources}])
        sources |= dict.fromkeys(step.adds, source)
        if alone:
            close(alone)
    close()
    for p in passes:
        p.root = f"{recipe.run}/passes/{p.root or f'00-{p.label}-{p.key}'}"
    return passes


def source_columns(p: Pass) -> list[str]:
    """The columns that the steps of a pass need from the passes before it."""
    added: set[str] = set()
    wanted = dict.fromkeys(SAMPLE.names)
    for step in p.steps:
        wanted |= dict.fromkeys(c for c in step.needs if c not in added and c not in POSITION.names)
        added |= set(step.adds)
    return list(wanted)


def surviving_rows(before: Sequence[Pass], unit: int) -> np.ndarray:
    """The rows of a unit that the passes so far have kept: int32, ascending."""
    earlier, last = before[:-1], before[-1]
    if last.kind == "barrier":
        return np.setdiff1d(surviving_rows(earlier, unit), barrier_drops(last, unit)["row"].to_numpy()).astype(np.int32)
    if last.kind == "measure":
        table = _of_rows(last, unit, ["drop_reason"], surviving_rows(earlier, unit))
    else:
        # Its table has every row that reached it, so the passes before it need not be read.
        table = _table(last, _must(last, unit), ["row", "drop_reason"])
    return table["row"].to_numpy()[pc.is_null(table["drop_reason"]).to_numpy()]


def read_unit(
    before: Sequence[Pass], unit: int, columns: Iterable[str], rows: np.ndarray | None = None
) -> Iterator[pa.Table]:
    """Yields `unit, row` and `columns` of a unit's surviving rows, or of `rows`, in the order of `row`.

    One table; with pixels or vectors among the columns, tables of HEAVY_ROWS rows.
    """
    if rows is None:
        rows = surviving_rows(before, unit)
    light: dict[str, pa.ChunkedArray] = {}
    heavy: list[tuple[_Heavy, list[str], np.ndarray]] = []
    wanted = [c for c in columns if c not in POSITION.names]
    with contextlib.ExitStack() as stack:
        for p in before:
            mine = [c for c in wanted if c in p.adds]
            if not mine or p.kind == "write":
                continue
            if p.kind == "barrier":
                values = barrier_values(p, unit)
                at = _places(values, rows)
                for c in mine:  # the other rows keep what they had
                    new = values[c].take(pa.array(at, mask=at < 0))
                    light[c] = pc.coalesce(new, light[c]) if c in light else new
                continue
            small = [c for c in mine if not is_heavy(p.adds[c])]
            big = [c for c in mine if is_heavy(p.adds[c])]
            table, files = _measured(p, unit, [*small, *(["heavy_at"] if big else [])])
            at = _places(table, rows)
            if not (at >= 0).all():
                raise DamagedError(
                    f"{p.root}: unit {unit} lacks rows that a later pass has. To go on, remove the folders of the "
                    "passes after it and give the same command again."
                )
            light |= {c: table[c].take(pa.array(at)) for c in small}
            if big:
                source = stack.enter_context(_Heavy(p, unit, files))
                heavy.append((source, big, table["heavy_at"].take(pa.array(at)).to_numpy()))
        order = [*POSITION.names, *wanted]
        table = pa.table({"unit": np.full(len(rows), unit, np.int32), "row": rows.astype(np.int32), **light})
        if not heavy:
            yield table.select(order)
            return
        for start in range(0, len(rows), HEAVY_ROWS):
            piece = table.slice(start, HEAVY_ROWS)
            for source, names, positions in heavy:
                for column, values in source.take(positions[start : start + HEAVY_ROWS], names).items():
                    piece = piece.append_column(column, values)
            yield piece.select(order)


def barrier_drops(p: Pass, unit: int) -> pa.Table:
    """The drops of a barrier or sink in one unit: the columns of `schema.DROP` without `unit`."""
    table = _decided(p, unit)
    return table.filter(pc.is_valid(table["reason"])).select([name for name in DROP.names if name != "unit"])


def barrier_values(p: Pass, unit: int) -> pa.Table:
    """`row` and the columns that a barrier adds, of the rows of a unit that got values, in the order of `row`."""
    table = _decided(p, unit)
    if not p.adds or not len(table):
        return pa.schema([POSITION.field("row"), *p.adds.items()]).empty_table()
    return table.filter(pc.is_null(table["reason"])).select(["row", *p.adds])


def _decided(p: Pass, unit: int) -> pa.Table:
    """What a barrier has stored of one unit: its drops, and lines without a reason for rows that got values."""
    complete = p.complete()
    if complete is None:
        raise FileNotFoundError(f"{p.root}: the barrier is not complete")
    entry = complete["files"].get(str(unit // complete["units_per_file"]))
    if entry is None:
        return DROP.empty_table()
    try:
        table = _barrier_file(p.root, **entry)
    except DamagedError as error:
        again = f"remove {p.store.path('complete.json')} and give the same command again: the pass is made again"
        raise DamagedError(f"{error} (unit {unit} of the pass {p.label}). To go on, {again}.") from None
    return table.filter(pc.equal(table["unit"], unit))


@lru_cache(maxsize=8)  # a recipe has some barriers, and each is asked for every unit of a file in turn
def _barrier_file(root: str, **entry: Any) -> pa.Table:
    return Store(root).read_table(entry)


def unit_drops(passes: Sequence[Pass], unit: int) -> pa.Table:
    """The drops of the last of these passes in one unit: the columns of `schema.DROP` without `unit`."""
    p = passes[-1]
    if p.kind in ("barrier", "write"):
        return barrier_drops(p, unit)
    return _drops(p, unit, surviving_rows(passes[:-1], unit) if p.kind == "measure" else None)


def _drops(p: Pass, unit: int, rows: np.ndarray | None) -> pa.Table:
    """The drops of a pass over one unit; of one that measures, among these rows."""
    names = [f.name for f in FATE]
    if rows is None:
        table = _table(p, _must(p, unit), ["row", *names])
    else:
        table = _of_rows(p, unit, names, rows)
    table = table.filter(pc.is_valid(table["drop_reason"])).rename_columns([f.name for f in DROP if f.name != "unit"])
    if rows is not None:  # the same step may have been called otherwise in another recipe
        table = table.set_column(1, "step", pa.array([p.label] * len(table), pa.string()))
    return table


def rows_with_values(p: Pass, unit: int) -> np.ndarray:
    """The rows of a unit (int32, ascending) for which a pass over units has stored values of the columns that it adds:
    those that it kept (the pool's own pass: all; a barrier: those that got some), whatever the passes before and after
    it say of them."""
    if p.kind == "barrier":
        return barrier_values(p, unit)["row"].to_numpy()
    table = _measured(p, unit, ["drop_reason"])[0]
    there = np.ones(len(table), bool) if p.kind == "pool" else pc.is_null(table["drop_reason"]).to_numpy()
    return table["row"].to_numpy()[there]


def missing_rows(passes: Sequence[Pass], unit: int, rows: np.ndarray | None = None) -> np.ndarray:
    """The rows that the last of these passes still has to process, among those that reach it or among `rows`."""
    rows = surviving_rows(passes[:-1], unit) if rows is None else rows
    if passes[-1].kind != "measure":
        return rows
    return np.setdiff1d(rows, _measured(passes[-1], unit, [])[0]["row"].to_numpy()).astype(np.int32)


def committed(passes: Sequence[Pass], unit: int) -> dict[str, Any] | None:
    """The record of a unit if the last of these passes is done with it, else None.

    `entries` lists all files stored for the unit, and `known` counts the rows measured before.
    """
    p = passes[-1]
    if p.kind == "measure":
        return None if len(missing_rows(passes, unit)) else _account(passes, unit, 0, {})
    record = p.record(unit)
    return None if record is None else {**record, "entries": _entries([record]), "known": 0}


def _account(passes: Sequence[Pass], unit: int, new: int, seconds: dict[str, float]) -> dict[str, Any]:
    """The record of a unit in a `measure` pass over all rows that reach it, `new` of which were measured just now."""
    p, rows = passes[-1], surviving_rows(passes[:-1], unit)
    drops = _drops(p, unit, rows)
    drops = drops.append_column("unit", pa.array(np.full(len(drops), unit, np.int32)))
    parts = p.parts(unit)
    return {
        "unit": unit,
        "rows_in": len(rows),
        "kept": len(rows) - len(drops),
        "funnel": Funnel.of(p.labels, len(rows), [drops], seconds).to_json(),
        "entries": _entries(parts),
        "parts": len(parts),
        "known": len(rows) - new,
    }


def _entries(records: Iterable[dict[str, Any]]) -> list[Entry]:
    return [entry for record in records for entry in (record["table"], record["heavy"]) if entry]


def check_unit(p: Pass, unit: int, digest: bool) -> None:
    """Raises DamagedError unless a committed unit is as its records say.

    Pixels and vectors are compared by size, with `digest` byte for byte.
    """
    records = p.parts(unit) if p.kind == "measure" else [_must(p, unit)]
    for record in records:
        _table(p, record, [])
        if record["heavy"]:
            with _cure(p, unit):
                p.store.check(record["heavy"], digest)


def check_measured(passes: Sequence[Pass], index: int, unit: int, digest: bool, whole: bool) -> None:
    """Does what `check_unit` does for a `measure` pass, and raises DamagedError if measurements are gone.

    They must be there for all rows that reach the pass, if it was complete (`whole`), and for all rows from whose
    results a later pass has measured something.
    """
    p = passes[index]
    check_unit(p, unit, digest)
    lost = missing_rows(passes[: index + 1], unit) if whole else np.empty(0, np.int32)
    for later in passes[index + 1 :]:
        if later.kind == "measure" and set(p.adds) & {c for step in later.steps for c in step.needs}:
            known, based = (_measured(q, unit, [])[0]["row"].to_numpy() for q in (p, later))
            lost = np.union1d(lost, np.setdiff1d(based, known))
    if len(lost):
        with _cure(p, unit):
            raise DamagedError(
                f"{p.store.path(f'commits/{unit:07d}.*')}: {len(lost):,} rows that were measured are gone"
            )


@dataclass
class UnitReport:
    """Progress of a pass since its last report."""

    rows: int = 0
    """Rows processed."""
    kept: int = 0
    """Rows kept among them."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows dropped among them, by reason."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Records of the units that were committed."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> UnitReport:
        """The report of a whole unit."""
        report = cls(record["rows_in"], record["kept"], records=[record])
        for line in Funnel.from_json(record["funnel"]).lines.values():
            report.reasons.update(line.dropped)
        return report

    def __iadd__(self, other: UnitReport) -> UnitReport:
        self.rows += other.rows
        self.kept += other.kept
        self.reasons.update(other.reasons)
        self.records += other.records
        return self


def run_pass(
    passes: Sequence[Pass],
    index: int,
    units: Iterable[int],
    rows: np.ndarray | None = None,
    crashers: np.ndarray | None = None,
    commit: bool = True,
) -> Iterator[UnitReport]:
    """Runs a pass over units as one stream of batches, and commits each unit when its last row comes out.

    Steps see rows of the next unit while the last rows of this one are in progress. `rows` restricts a single unit to
    some of its rows, and `crashers` are dropped without being processed: see `pipeline.isolation`.
    """
    p, before = passes[index], passes[:index]
    columns = source_columns(p)
    writers: dict[int, UnitWriter] = {}
    report = UnitReport()
    clock = dict.fromkeys(["", *p.labels], 0.0)

    def source() -> Iterator[pa.Table]:
        for unit in units:
            part = len(p.parts(unit)) if p.kind == "measure" else None  # before a look at which rows it has
            living = missing_rows(passes[: index + 1], unit, rows)
            writers[unit] = UnitWriter(p, unit, living, part)
            if crashers is not None:
                dead = pa.table({"unit": np.full(len(crashers), unit, np.int32), "row": crashers.astype(np.int32)})
                # The last step of a pass is the one that decodes.
                writers[unit].drop(drops_table(dead, p.labels[-1], "decoder_crash"))
                living = np.setdiff1d(living, crashers)
            for batch in read_unit(before, unit, columns, living):
                if len(batch):
                    yield batch

    def dropped(drops: pa.Table) -> None:
        if len(drops):
            for unit in drops["unit"].unique().to_pylist():
                writers[unit].drop(drops.filter(pc.equal(drops["unit"], unit)))
            report.rows += len(drops)
            report.reasons.update(drops["reason"].to_pylist())

    stream: Iterator[pa.Table] = _timed(source(), clock, "")
    for step in p.steps:
        stream = _timed(_through(step, stream, dropped), clock, step.label)

    def finished() -> Iterator[dict[str, Any]]:
        for unit in [u for u, w in writers.items() if w.done]:
            writer = writers.pop(unit)
            seconds = _self_times(clock, p.labels)
            if not commit:
                writer.abort()
            elif p.kind == "measure":
                writer.commit(seconds)
                account = _account(passes[: index + 1], unit, writer.rows_in, seconds)
                whole = UnitReport.of(account)
                report.rows += whole.rows - writer.rows_in
                report.kept += whole.kept - writer.kept
                report.reasons.update(whole.reasons - writer.reasons)
                yield account
            else:
                record = writer.commit(seconds)
                yield {**record, "entries": _entries([record]), "known": 0}

    try:
        for batch in stream:
            for unit in batch["unit"].unique().to_pylist():
                part = batch if len(writers) == 1 else batch.filter(pc.equal(batch["unit"], unit))
                writers[unit].add(part)
            report.rows += len(batch)
            report.kept += len(batch)
            report.records += finished()
            yield report
            report = UnitReport()
        report.records += finished()
        yield report
        for unit, writer in writers.items():
            raise RuntimeError(f"{' + '.join(p.labels)} lost {writer.missing:,} rows of unit {unit}")
    finally:
        if hasattr(stream, "close"):
            stream.close()
        for writer in writers.values():
            writer.abort()


class UnitWriter:
    """Collects the results of one attempt at a unit, and commits them."""

    def __init__(self, p: Pass, unit: int, rows: np.ndarray, part: int | None = None) -> None:
        """`part` is the number of the unit's next record in a `measure` pass."""
        self.p, self.unit, self.rows_in, self._part = p, unit, len(rows), part
        self._store = p.store
        self._attempt = new_attempt(unit)
        self._light_schema = pa.schema([("row", pa.int32())] + [(k, v) for k, v in p.adds.items() if not is_heavy(v)])
        self._heavy_schema = pa.schema([(k, v) for k, v in p.adds.items() if is_heavy(v)])
        self._open = set(rows.tolist())
        self._kept: list[pa.Table] = []
        self._dropped: list[pa.Table] = []
        self._heavy_at = 0
        self._heavy: Output | None = None
        self._stack = contextlib.ExitStack()
        self._ipc: Any = None

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def missing(self) -> int:
        return len(self._open)

    @property
    def kept(self) -> int:
        return sum(map(len, self._kept))

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reason for drops in self._dropped for reason in drops["reason"].to_pylist())

    def add(self, batch: pa.Table) -> None:
        """Adds rows that go on. Their pixels are written at once."""
        self._close_rows(batch["row"])
        light = batch.select(self._light_schema.names).cast(self._light_schema)
        if len(self._heavy_schema):
            if self._ipc is None:
                self._heavy = self._stack.enter_context(self._store.output(f"{self._attempt}.arrow"))
                self._ipc = pa.ipc.new_file(self._heavy, self._heavy_schema)
            self._ipc.write_table(batch.select(self._heavy_schema.names).cast(self._heavy_schema))
            at = np.arange(self._heavy_at, self._heavy_at + len(batch), dtype=np.int32)
            light = light.append_column("heavy_at", pa.array(at))
            self._heavy_at += len(batch)
        self._kept.append(light)

    def drop(self, drops: pa.Table) -> None:
        self._close_rows(drops["row"])
        self._dropped.append(drops)

    def commit(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Writes the rest and creates the record. Returns the record of another attempt if that was first."""
        if self._ipc is not None:
            self._ipc.close()
        self._stack.close()
        if not self.rows_in and self._part is not None:
            return {}
        kept = pa.concat_tables(self._kept) if self._kept else self._empty()
        drops = pa.concat_tables(self._dropped).sort_by("row") if self._dropped else DROP.empty_table()
        heavy = self._heavy.entry if self._heavy is not None else None
        kept = kept.sort_by("row")
        return commit(self.p, self.unit, self._attempt, self.rows_in, kept, heavy, drops, seconds, self._part)

    def abort(self) -> None:
        """Gives up, and removes the files of this attempt."""
        with contextlib.suppress(Exception):
            if self._ipc is not None:
                self._ipc.close()
        self._stack.close()
        for suffix in (".parquet", ".arrow"):
            self._store.remove(self._attempt + suffix)

    def _empty(self) -> pa.Table:
        table = self._light_schema.empty_table()
        return table.append_column("heavy_at", pa.array([], pa.int32())) if len(self._heavy_schema) else table

    def _close_rows(self, rows: pa.ChunkedArray) -> None:
        numbers = rows.to_pylist()
        before = len(self._open)
        self._open.difference_update(numbers)
        if before - len(self._open) != len(numbers):
            raise RuntimeError(f"{' + '.join(self.p.labels)} gave rows of unit {self.unit} twice, or made some up")


def new_attempt(unit: int) -> str:
    """A name for the files of one attempt at a unit, different from those of all other attempts."""
    return f"units/{unit:07d}-{secrets.token_hex(4)}"


def commit(
    p: Pass,
    unit: int,
    attempt: str,
    rows_in: int,
    light: pa.Table,
    heavy: Entry | None,
    drops: pa.Table,
    seconds: dict[str, float],
    part: int | None = None,
) -> dict[str, Any]:
    """Writes the table of an attempt and creates the unit's record; returns the record that counts.

    `light` and `drops` are in the order of `row`; `light` may include dropped rows. Of two attempts the first wins, and
    the files of the other are removed.
    """
    rows = np.union1d(light["row"].to_numpy(), drops["row"].to_numpy()).astype(np.int32)
    light, fates = _spread(light, rows), _spread(drops, rows)
    columns = {c: light[c] for c in light.column_names} | {"row": pa.array(rows)}
    table = pa.table(columns | {f"drop_{c}": fates[c] for c in drops.column_names if c not in POSITION.names})
    record: dict[str, Any] = {
        "rows_in": rows_in,
        "kept": rows_in - len(drops),
        "table": p.store.write_table(f"{attempt}.parquet", table),
        "heavy": heavy,
        "funnel": Funnel.of(p.labels, rows_in, [drops], seconds).to_json(),
    }
    if part is not None:
        record["part"] = part
    if p.commit(unit, record):
        return {"pass": p.key, "unit": unit, **record}
    for entry in _entries([record]):
        p.store.remove(entry["name"])
    return _must(p, unit, part)


def _spread(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The lines of a table for these rows, with nulls for rows that it lacks."""
    at = _places(table, rows)
    return table.take(pa.array(at, mask=at < 0))


def _places(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    """The place of each of these rows in a table in the order of `row`; −1 if the table lacks it."""
    there = table["row"].to_numpy()
    at = np.searchsorted(there, rows)
    found = np.append(there, -1)[at] == rows
    return np.where(found, at, -1)


def _through(step: Step, stream: Iterator[pa.Table], dropped: Callable[[pa.Table], None]) -> Iterator[pa.Table]:
    if (first := next(stream, None)) is None:  # a step need not handle a stream without batches
        return
    stream = chain([first], stream)
    if isinstance(step, Stage):
        outputs = (split_marked(step, batch) for batch in step.stream(stream))
    else:
        assert isinstance(step, Filter)
        outputs = (apply(step, batch) for batch in stream)
    for kept, drops in outputs:
        dropped(drops)
        # Empty batches go on too, so that the end of the stream can see that a unit is done.
        yield kept


def _timed(stream: Iterator[pa.Table], clock: dict[str, float], label: str) -> Iterator[pa.Table]:
    while True:
        start = time.perf_counter()
        try:
            batch = next(stream)
        except StopIteration:
            return
        finally:
            clock[label] += time.perf_counter() - start
        yield batch


def _self_times(clock: dict[str, float], labels: list[str]) -> dict[str, float]:
    """Seconds of each step since the last call, without those of the steps that fed it."""
    times = [clock[label] for label in ["", *labels]]
    for label in clock:
        clock[label] = 0.0
    return {label: max(0.0, now - fed) for label, now, fed in zip(labels, times[1:], times)}


class _Heavy:
    """Reads pixels and vectors of a unit, a few rows at a time."""

    def __init__(self, p: Pass, unit: int, files: Sequence[File]) -> None:
        self._files: list[pa.NativeFile] = []
        self._batches: list[tuple[Any, int]] = []
        starts: list[int] = []
        for number, (store, entry) in enumerate(files):
            if entry is None:  # every row of this part was dropped
                continue
            with _cure(p, unit):
                self._files.append(store.mapped(entry))
            reader, at = pa.ipc.open_file(self._files[-1]), number << PART_BITS
            for i in range(reader.num_record_batches):
                self._batches.append((reader, i))
                starts.append(at)
                at += reader.get_batch(i).num_rows
        self._starts = np.array(starts, np.int64)

    def __enter__(self) -> _Heavy:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def take(self, positions: np.ndarray, names: list[str]) -> dict[str, pa.ChunkedArray]:
        chunk = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(chunk, kind="stable")
        pieces = []
        for i in np.unique(chunk):
            local = pa.array(positions[chunk == i] - self._starts[i])
            reader, number = self._batches[i]
            pieces.append(pa.Table.from_batches([reader.get_batch(number).select(names).take(local)]))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        table = pa.concat_tables(pieces).combine_chunks().take(pa.array(back))
        return {name: table[name] for name in names}


def _table(p: Pass, record: dict[str, Any], columns: list[str]) -> pa.Table:
    with _cure(p, record["unit"]):
        return p.store.read_table(record["table"], columns)


def _measured(p: Pass, unit: int, columns: list[str]) -> tuple[pa.Table, list[File]]:
    """`row` and columns of a unit from all its records, lenders' included, each row once, in the order of `row`.

    Also returns the files of its pixels and vectors, one for each record, which `heavy_at` refers to.
    """
    wanted = ["row", *columns]
    if p.kind != "measure":
        record = _must(p, unit)
        return _table(p, record, wanted), [(p.store, record["heavy"])]
    tables: list[pa.Table] = []
    files: list[File] = []
    for owner in [p, *(replace(p, root=root, lenders=[]) for root in p.lenders)]:
        for record in owner.parts(unit):
            table = _table(owner, record, wanted)
            if "heavy_at" in columns:
                at = pc.add(table["heavy_at"].cast(pa.int64()), len(files) << PART_BITS)
                table = table.set_column(table.schema.get_field_index("heavy_at"), "heavy_at", at)
            tables.append(table)
            files.append((owner.store, record["heavy"]))
    if not tables:
        schema = {"row": pa.int32(), "heavy_at": pa.int64(), **p.adds, **{f.name: f.type for f in FATE}}
        return pa.schema([(name, schema[name]) for name in wanted]).empty_table(), files
    if len(tables) == 1:
        return tables[0], files
    table = pa.concat_tables(tables)
    _, first = np.unique(table["row"].to_numpy(), return_index=True)  # the first record that has a row counts
    return table.take(pa.array(first)), files


def _of_rows(p: Pass, unit: int, columns: list[str], rows: np.ndarray) -> pa.Table:
    """What a pass has measured for these rows. DamagedError if it lacks one."""
    table = _measured(p, unit, columns)[0]
    at = _places(table, rows)
    with _cure(p, unit):
        if not (at >= 0).all():
            raise DamagedError(f"{p.store.path('commits')}: the records of unit {unit} lack {np.sum(at < 0):,} rows")
    return table.take(pa.array(at))


def _must(p: Pass, unit: int, part: int | None = None) -> dict[str, Any]:
    with _cure(p, unit):
        record = p.record(unit, part)
        if record is None:
            raise DamagedError(f"{p.store.path(record_name(unit, part))}: missing")
        return record


@contextlib.contextmanager
def _cure(p: Pass, unit: int) -> Iterator[None]:
    """Adds unit, pass and cure to a DamagedError."""
    try:
        yield
    except DamagedError as error:
        if p.repeatable:
            name = p.store.path(f"commits/{unit:07d}.*" if p.kind == "measure" else record_name(unit))
            cure = f"remove {name} and give the same command again: the unit is made again"
        else:
            cure = (
                "restore it from a copy; or, to fetch again what the web still has, remove "
                f"{p.root} and the folders of all later passes and give the same command again"
            )
        raise DamagedError(f"{error} (unit {unit} of the pass {p.label}). To go on, {cure}.") from None


def record_name(unit: int, part: int | None = None) -> str:
    """The file of a unit's record, or of one part of the unit's measurements."""
    return f"commits/{unit:07d}.json" if part is None else f"commits/{unit:07d}.{part:03d}.json"


def _reads_heavy(steps: list[Step], known: dict[str, pa.DataType]) -> bool:
    return any(is_heavy(known[c]) for step in steps for c in step.needs if c in known)


def _key(before: str, what: Any) -> str:
    return hashlib.sha256(json.dumps([before, what], sort_keys=True).encode()).hexdigest()[:16]
