"""Cuts a recipe into passes, and defines what a pass stores for each unit. `run_pass` runs a pass.

For each unit, a pass writes one table and, if it adds pixels or vectors, one `.arrow` file, under names that no other
attempt uses. The table (`.parquet`) has one line for each incoming row: `row`, the light columns that the pass added
and, for a dropped row, the step and reason (`drop_step, drop_reason, …`). The pass then creates one record exclusively;
files count only if a record lists them. The state of a unit is computed from the records of all passes so far: a pass
does not copy the columns of earlier passes.

The results of an expensive step belong to rows and do not depend on the filters above it. Such a step is a pass of its
own (`measure`), stored under a hash of only what determines its values. A unit may have several records there, each for
different rows: when a filter above lets more rows through, only rows without results are measured, and they get a
further record. Results for the same rows from another run are also committed as a further record, which refers to the
pixels and vectors in that run (`MeasurePass.borrow`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger import Funnel
from pipeline.recipe import Recipe, identity
from pipeline.schema import DROP, POSITION, SAMPLE, is_heavy
from pipeline.step import Filter, Fitted, Sink, Stage, Step
from pipeline.storage import DamagedError, Entry, Store, sealed
from trainer import atomic

HEAVY_ROWS = 256
"""Maximum number of rows of a batch with pixels or vectors."""

PART_BITS = 32
"""`heavy_at` locates the pixels and vectors of a row: the lower PART_BITS bits are the position in a file, the higher
bits the number of the file."""

FIT = "fit.arrow"
"""The table that `Fitted.fit` returned; removed when the pass is complete."""

File = tuple[Store, "Entry | None"]

FATE = [pa.field(f"drop_{f.name}", f.type) for f in DROP if f.name not in POSITION.names]
"""Columns of a unit's table that describe a dropped row; null for kept rows."""


@dataclass
class Pass:
    """Adjacent steps that run and are committed together. Subclasses define what is stored, and for which rows.

    `before` is always the list of all passes before this one.
    """

    kind: ClassVar[str] = ""
    """The name of the class in records and in `run.json`."""
    over_units: ClassVar[bool] = False
    """Whether each unit is run and committed separately, so that adjacent passes overlap."""

    key: str
    """Hash of everything that determines what is stored: the pool, and every step up to the last of this pass."""
    label: str
    steps: list[Step] = field(default_factory=list)
    adds: dict[str, pa.DataType] = field(default_factory=dict)
    root: str = ""

    @property
    def store(self) -> Store:
        return Store(self.root)

    @property
    def labels(self) -> list[str]:
        return [step.label for step in self.steps] or [self.label]

    @property
    def fitted(self) -> Fitted | None:
        """The first step if it is `Fitted`, and therefore needs all units of the earlier passes; else None."""
        return next((step for step in self.steps if isinstance(step, Fitted)), None)

    def setup(self) -> None:
        """Sets up the steps on a worker."""
        if (fitted := self.fitted) is not None:
            fitted.use(pa.ipc.open_file(self.store.input(FIT)).read_all())
        for step in self.steps:
            step.setup()

    @property
    def repeatable(self) -> bool:
        """Whether the pass gives the same results if it is run again."""
        return all(step.repeatable for step in self.steps)

    @property
    def rows_key(self) -> str:
        """Hash of everything that determines which rows are left after the pass."""
        return self.key

    def record(self, unit: int, part: int | None = None) -> dict[str, Any] | None:
        """The record of a unit, or None. For a sink, `unit` is the number of one of its parts. Only a `MeasurePass` has
        several records per unit, numbered by `part`.

        Raises DamagedError if the record was changed.
        """
        name = record_name(unit, part)
        record = self.store.read_record(name)
        if record is not None and (record["pass"], record["unit"], record.get("part")) != (self.key, unit, part):
            raise DamagedError(f"{self.store.path(name)}: damaged: this is the record of another unit")
        return record

    @property
    def complete_name(self) -> str:
        return "complete.json"

    def complete(self) -> dict[str, Any] | None:
        """The record of the whole pass, written when all its units are committed.

        None if it is missing or damaged: everything in it can be recomputed.
        """
        with contextlib.suppress(DamagedError):
            record = self.store.read_record(self.complete_name)
            if record is not None and record["pass"] == self.rows_key:
                return record
        return None

    def commit(self, unit: int, record: dict[str, Any]) -> bool:
        """Creates the record of a unit. Returns False if one exists already: then that one counts."""
        name = record_name(unit, record.get("part"))
        return self.store.create(name, sealed({"pass": self.key, "unit": unit, **record}))

    def finish(self, funnel: Funnel, **more: Any) -> None:
        """Writes the record of the whole pass."""
        record = {"pass": self.rows_key, "key": self.key, "label": self.label, "kind": self.kind, **more}
        self.store.write(self.complete_name, sealed({**record, "funnel": funnel.to_json()}))

    def forget(self, unit: int | None = None) -> None:
        """Removes the record of a unit, and the record that the pass is complete."""
        self.store.remove(self.complete_name)
        if unit is not None:
            self.store.remove(record_name(unit))

    def sweep(self, entries: Iterable[Entry | None]) -> None:
        """Removes the files that failed or killed attempts left: all except records and the files in `entries`."""
        keep = {entry["name"] for entry in entries if entry is not None}
        keep |= {name for name in self.store.names() if name.startswith("complete") and not atomic.is_part(name)}
        for folder in ("", "units", "drops", "attempts", "spool", "commits"):
            for file in self.store.names(folder):
                name = f"{folder}/{file}" if folder else file
                if name not in keep and (folder != "commits" or atomic.is_part(file)):
                    self.store.remove(name)

    def surviving(self, before: Sequence[Pass], unit: int) -> np.ndarray:
        """The rows of a unit that are left after the pass: int32, ascending."""
        raise NotImplementedError

    def drops(self, before: Sequence[Pass], unit: int) -> pa.Table:
        """The rows of a unit that the pass dropped, with the columns of `schema.DROP` except `unit`."""
        raise NotImplementedError


class UnitPass(Pass):
    """A pass that stores one record and one table for each unit. The table has a line for every incoming row."""

    kind = "map"
    over_units = True

    def records(self, unit: int) -> list[dict[str, Any]]:
        """All records of a unit. Raises DamagedError if one is missing."""
        return [_must(self, unit)]

    def next_part(self, unit: int) -> int | None:
        """The number of the unit's next record if a unit may have several; else None."""
        return None

    def stored(self, unit: int, columns: list[str]) -> tuple[pa.Table, list[File]]:
        """Returns `row` and `columns` of all rows in the unit's tables, in the order of `row`.

        Also returns the files of pixels and vectors that `heavy_at` refers to.
        """
        (record,) = self.records(unit)
        return _table(self, record, ["row", *columns]), self.files(record)

    def files(self, record: dict[str, Any]) -> list[File]:
        """The files of the pixels and vectors of a record."""
        return [(self.store, record["heavy"])]

    def surviving(self, before: Sequence[Pass], unit: int) -> np.ndarray:
        # The table has every row that reached the pass, so earlier passes need not be read.
        return _kept(self.stored(unit, ["drop_reason"])[0])

    def drops(self, before: Sequence[Pass], unit: int) -> pa.Table:
        return _fates(self.stored(unit, [f.name for f in FATE])[0])

    def valued(self, unit: int) -> np.ndarray:
        """The rows (int32, ascending) with stored values of the columns that the pass adds: those that it kept, even
        if earlier or later passes drop them."""
        return _kept(self.stored(unit, ["drop_reason"])[0])

    def missing(self, before: Sequence[Pass], unit: int, rows: np.ndarray | None = None) -> np.ndarray:
        """The rows that the pass still has to process, among those that reach it or among `rows`."""
        return surviving_rows(before, unit) if rows is None else rows

    def account(self, before: Sequence[Pass], unit: int) -> dict[str, Any] | None:
        """The record of a unit if the pass has finished it, else None.

        It has two more keys: `entries` lists all files stored for the unit, and `known` counts its rows that had been
        measured before.
        """
        record = self.record(unit)
        return None if record is None else accounted(record)


class PoolPass(UnitPass):
    """The pool, cut into units."""

    kind = "pool"

    def valued(self, unit: int) -> np.ndarray:
        return self.stored(unit, [])[0]["row"].to_numpy()


class Loan(NamedTuple):
    """Two passes of another run with results of the same step: its pool, and the pass of that step."""

    pool: Pass
    measured: MeasurePass


@dataclass
class MeasurePass(UnitPass):
    """An expensive step. Its results belong to rows, so `key` is a hash of the step and of what determines the columns
    that it reads. A unit may have several records, each for different rows."""

    kind = "measure"

    chain: str = ""
    """Hash of all steps up to this one: they determine which rows must be measured."""
    origins: tuple[str, ...] = ()
    """The columns of the pool that determine the results."""
    upstream: tuple[str, ...] = ()
    """The keys of the earlier passes of this class that determine the results."""
    lender: Loan | None = None

    @property
    def rows_key(self) -> str:
        return self.chain

    @property
    def complete_name(self) -> str:
        return f"complete-{self.chain}.json"

    def forget(self, unit: int | None = None) -> None:
        super().forget()
        if unit is not None:
            for name in self.store.names("commits"):
                if name.startswith(f"{unit:07d}."):
                    self.store.remove(f"commits/{name}")

    def records(self, unit: int) -> list[dict[str, Any]]:
        """All records of a unit, in the order in which they were committed."""
        found: list[dict[str, Any]] = []
        with _cure(self, unit):
            while (record := self.record(unit, len(found))) is not None:
                found.append(record)
        return found

    def next_part(self, unit: int) -> int | None:
        return len(self.records(unit))

    def stored(self, unit: int, columns: list[str]) -> tuple[pa.Table, list[File]]:
        """Returns each row once. These rows may differ from those that reach the pass in this run."""
        wanted = ["row", *columns]
        tables: list[pa.Table] = []
        files: list[File] = []
        for record in self.records(unit):
            table = _table(self, record, wanted)
            tables.append(_numbered(table, len(files)))
            files += self.files(record)
        if not tables:
            schema = {"row": pa.int32(), "heavy_at": pa.int64(), **self.adds, **{f.name: f.type for f in FATE}}
            return pa.schema([(name, schema[name]) for name in wanted]).empty_table(), files
        if len(tables) == 1:
            return tables[0], files
        table = pa.concat_tables(tables)
        _, first = np.unique(table["row"].to_numpy(), return_index=True)  # the first record that has a row counts
        return table.take(pa.array(first)), files

    def files(self, record: dict[str, Any]) -> list[File]:
        if "borrowed" in record:
            return [(Store(file["root"]), file["entry"]) for file in record["borrowed"]]
        return super().files(record)

    def of_rows(self, unit: int, columns: list[str], rows: np.ndarray) -> pa.Table:
        """The stored columns of these rows. Raises DamagedError if a row is missing."""
        table = self.stored(unit, columns)[0]
        at = _places(table, rows)
        with _cure(self, unit):
            if not (at >= 0).all():
                lack = f"the records of unit {unit} lack {np.sum(at < 0):,} rows"
                raise DamagedError(f"{self.store.path('commits')}: {lack}")
        return table.take(pa.array(at))

    def surviving(self, before: Sequence[Pass], unit: int) -> np.ndarray:
        return _kept(self.of_rows(unit, ["drop_reason"], surviving_rows(before, unit)))

    def drops(self, before: Sequence[Pass], unit: int) -> pa.Table:
        return self._own_fates(self.of_rows(unit, [f.name for f in FATE], surviving_rows(before, unit)))

    def _own_fates(self, table: pa.Table) -> pa.Table:
        drops = _fates(table)
        # Another recipe may have labelled the same step differently.
        return drops.set_column(1, "step", pa.array([self.label] * len(drops), pa.string()))

    def missing(self, before: Sequence[Pass], unit: int, rows: np.ndarray | None = None) -> np.ndarray:
        rows = super().missing(before, unit, rows)
        return np.setdiff1d(rows, self.stored(unit, [])[0]["row"].to_numpy()).astype(np.int32)

    def account(self, before: Sequence[Pass], unit: int, seconds: dict[str, float] | None = None, new: int = 0) -> Any:
        """Sums up all rows that reach the pass, `new` of which were measured just now."""
        rows = surviving_rows(before, unit)
        table = self.stored(unit, [f.name for f in FATE])[0]
        at = _places(table, rows)
        if (at < 0).any():
            return None
        drops = self._own_fates(table.take(pa.array(at)))
        drops = drops.append_column("unit", pa.array(np.full(len(drops), unit, np.int32)))
        records = self.records(unit)
        return {
            "unit": unit,
            "rows_in": len(rows),
            "kept": len(rows) - len(drops),
            "funnel": Funnel.of(self.labels, len(rows), [drops], seconds or {}).to_json(),
            "entries": _entries(records),
            "parts": len(records),
            "known": len(rows) - new,
        }

    def borrow(self, before: Sequence[Pass], unit: int, units: int) -> None:
        """Commits the lender's results for the rows of a unit as one more record. Pixels and vectors are not copied.

        Two rows are the same if their uids are equal and, if the pools differ, all columns `origins` are equal. A URL
        has the same place (a hash) in every pool, so the rows of a unit are in those units of the lender that cover the
        same range of places. A result that depends on another measuring pass is taken only for rows for which that
        pass took the lender's result too.
        """
        assert self.lender is not None
        pool, (lent_pool, lent) = before[0], self.lender
        complete = lent_pool.complete()
        rows = self.missing(before[:1], unit)
        for p in before:
            if isinstance(p, MeasurePass) and p.key in self.upstream:
                rows = np.intersect1d(rows, p.borrowed_rows(unit, lent_pool)).astype(np.int32)
        if complete is None or not len(rows):
            return
        same = ["uid"] if lent_pool.key == pool.key else list(self.origins)
        place = {line["uid"]: (row, line) for row, line in zip(rows.tolist(), _lines(pool, unit, same, rows))}
        light = [name for name, dtype in self.adds.items() if not is_heavy(dtype)]
        columns = [*light, *(["heavy_at"] if len(light) < len(self.adds) else []), *(f.name for f in FATE)]
        tables: list[pa.Table] = []
        files: list[File] = []
        for other in range(unit * complete["units"] // units, -(-(unit + 1) * complete["units"] // units)):
            table, held = lent.stored(other, columns)
            found = [
                (i, place[line["uid"]][0])
                for i, line in enumerate(_lines(lent_pool, other, same, table["row"].to_numpy()))
                if line["uid"] in place and place[line["uid"]][1] == line
            ]
            table = table.take(pa.array([i for i, _ in found], pa.int64()))
            table = table.set_column(0, "row", pa.array([row for _, row in found], pa.int32()))
            fate = pc.if_else(pc.is_valid(table["drop_reason"]), self.label, pa.scalar(None, pa.string()))
            table = table.set_column(table.schema.get_field_index("drop_step"), "drop_step", fate)
            tables.append(_numbered(table, len(files)))
            files += held
        table = pa.concat_tables(tables).sort_by("row")
        if len(table):
            borrowed = [{"root": store.root, "entry": entry} for store, entry in files]
            record = {"heavy": None, "borrowed": borrowed, "pool": lent_pool.key, "part": self.next_part(unit)}
            _commit_table(self, unit, new_attempt(unit), table, len(table), {}, record)

    def borrowed_rows(self, unit: int, pool: Pass) -> np.ndarray:
        """The rows of a unit whose results were borrowed from a run of this pool."""
        tables = [_table(self, record, ["row"]) for record in self.records(unit) if record.get("pool") == pool.key]
        return np.concatenate([np.empty(0, np.int32), *(table["row"].to_numpy() for table in tables)])


class BarrierPass(Pass):
    """A whole-run filter. Its drops are stored in one file per range of units."""

    kind = "barrier"

    def surviving(self, before: Sequence[Pass], unit: int) -> np.ndarray:
        drops = self.drops(before, unit)["row"].to_numpy()
        return np.setdiff1d(surviving_rows(before, unit), drops).astype(np.int32)

    def drops(self, before: Sequence[Pass], unit: int) -> pa.Table:
        table = self._decided(unit)
        return table.filter(pc.is_valid(table["reason"])).select([name for name in DROP.names if name != "unit"])

    def values(self, unit: int) -> pa.Table:
        """`row` and the columns that the filter adds, for the rows of a unit that got values, in the order of `row`."""
        table = self._decided(unit)
        if not self.adds or not len(table):
            return pa.schema([POSITION.field("row"), *self.adds.items()]).empty_table()
        return table.filter(pc.is_null(table["reason"])).select(["row", *self.adds])

    def valued(self, unit: int) -> np.ndarray:
        """The rows (int32, ascending) that got values of the columns that the filter adds."""
        return self.values(unit)["row"].to_numpy()

    def _decided(self, unit: int) -> pa.Table:
        """The lines stored for a unit: its drops, and lines without a reason for rows that got values."""
        complete = self.complete()
        if complete is None:
            raise FileNotFoundError(f"{self.root}: the barrier is not complete")
        entry = complete["files"].get(str(unit // complete["units_per_file"]))
        if entry is None:
            return DROP.empty_table()
        with _cure(self, unit):
            table = _barrier_files(self.root)(**entry)
        return table.filter(pc.equal(table["unit"], unit))


class SinkPass(BarrierPass):
    """A sink. Its records describe the parts that it wrote. Its drops are the rows after the last part, and the samples
    that were taken down."""

    kind = "write"

    @property
    def sink(self) -> Sink:
        (step,) = self.steps
        assert isinstance(step, Sink)
        return step


KINDS: dict[str, type[Pass]] = {cls.kind: cls for cls in (PoolPass, UnitPass, MeasurePass, BarrierPass, SinkPass)}


class _Column(NamedTuple):
    """A column that steps may read, and what its values depend on."""

    dtype: pa.DataType
    source: str = ""
    """A hash of everything that determines the values; empty for a column of the pool."""
    origins: frozenset[str] = frozenset()
    """The columns of the pool that determine the values."""
    measured: frozenset[str] = frozenset()
    """The keys of the `measure` passes that determine the values."""


def make_passes(recipe: Recipe, pool_key: dict[str, Any], types: dict[str, pa.DataType]) -> list[Pass]:
    """Cuts a recipe into passes.

    An expensive step, a barrier and a sink are passes of their own. A pass also ends where a filter of scope "unit"
    would otherwise not get whole units, and before a `Fitted` step. The first pass ingests the pool; `types` are the
    pool's columns besides SAMPLE.
    """
    pool_types = {**{f.name: f.type for f in SAMPLE}, **types}
    columns = {name: _Column(dtype, origins=frozenset({name})) for name, dtype in pool_types.items()}
    passes: list[Pass] = [PoolPass(_key("", pool_key), "pool", adds=pool_types)]
    steps: list[Step] = []
    identities: list[dict[str, Any]] = []

    def close(kind: type[Pass] = UnitPass) -> None:
        if not steps:
            return
        adds = column_types(steps)
        key, label = _key(passes[-1].rows_key, identities), steps[-1].label
        if kind is MeasurePass:
            column = columns[next(iter(adds))]
            root = f"{steps[-1].name()}-{column.source}"
            # A step may read the columns of SAMPLE without declaring them.
            origins, measured = tuple(sorted({*SAMPLE.names} | column.origins)), tuple(sorted(column.measured))
            passes.append(MeasurePass(column.source, label, list(steps), adds, root, key, origins, measured))
            columns.update({c: columns[c]._replace(measured=columns[c].measured | {column.source}) for c in adds})
        else:
            passes.append(kind(key, label, list(steps), adds, f"{len(passes):02d}-{label}-{key}"))
        steps.clear()
        identities.clear()

    for step in recipe.steps:
        scope = step.scope if isinstance(step, Filter) else "row"
        alone: type[Pass] | None = BarrierPass if scope == "run" else SinkPass if isinstance(step, Sink) else None
        alone = MeasurePass if step.expensive else alone
        heavy = {name for name, column in columns.items() if is_heavy(column.dtype)}
        regroups = any(isinstance(s, Stage) and type(s).stream is not Stage.stream for s in steps)
        wants_units = any(isinstance(s, Filter) and s.scope == "unit" for s in steps)
        pixels = any(c in heavy and not any(c in s.adds for s in steps) for c in step.needs)
        reads_heavy = any(not heavy.isdisjoint(s.needs) for s in steps)
        torn = scope == "unit" and (regroups or reads_heavy)
        if alone or torn or (wants_units and pixels) or isinstance(step, Fitted):
            close()
        step.needs = (*step.needs, *(c for c in step.wants if c in columns and c not in step.needs))  # type: ignore[misc]
        steps.append(step)
        identities.append(identity(step))
        read = {c: columns[c] for c in step.needs if c in columns}
        source = _key("", [identities[-1], {c: column.source for c, column in read.items() if column.source}])
        origins = frozenset[str]().union(*(column.origins for column in read.values()))
        measured = frozenset[str]().union(*(column.measured for column in read.values()))
        columns |= {name: _Column(dtype, source, origins, measured) for name, dtype in step.adds.items()}
        if alone:
            close(alone)
    close()
    for p in passes:
        p.root = f"{recipe.run}/passes/{p.root or f'00-{p.label}-{p.key}'}"
    return passes


def column_types(adding: Iterable[Pass | Step]) -> dict[str, pa.DataType]:
    """The type of each column that these passes or steps add."""
    return {name: dtype for each in adding for name, dtype in each.adds.items()}


def surviving_rows(passes: Sequence[Pass], unit: int) -> np.ndarray:
    """The rows of a unit that these passes have kept: int32, ascending."""
    return passes[-1].surviving(passes[:-1], unit)


def read_unit(
    before: Sequence[Pass], unit: int, columns: Iterable[str], rows: np.ndarray | None = None
) -> Iterator[pa.Table]:
    """Yields `unit, row` and `columns` of a unit's surviving rows, or of `rows`, in the order of `row`.

    Yields one table or, if pixels or vectors are among the columns, tables of HEAVY_ROWS rows. Raises DamagedError if a
    row or a file is missing or damaged.
    """
    if rows is None:
        rows = surviving_rows(before, unit)
    light: dict[str, pa.ChunkedArray] = {}
    heavy: list[tuple[_Heavy, list[str], np.ndarray]] = []
    wanted = [c for c in columns if c not in POSITION.names]
    with contextlib.ExitStack() as stack:
        for p in before:
            mine = [c for c in wanted if c in p.adds]
            if isinstance(p, BarrierPass) and mine:
                values = _spread(p.values(unit).select(["row", *mine]), rows)
                for c in mine:  # other rows keep their earlier values
                    light[c] = pc.coalesce(values[c], light[c]) if c in light else values[c]
            if not mine or not isinstance(p, UnitPass):
                continue
            small = [c for c in mine if not is_heavy(p.adds[c])]
            big = [c for c in mine if is_heavy(p.adds[c])]
            table, files = p.stored(unit, [*small, *(["heavy_at"] if big else [])])
            if not np.array_equal(table["row"].to_numpy(), rows):
                at = _places(table, rows)
                if not (at >= 0).all():
                    raise DamagedError(
                        f"{p.root}: unit {unit} lacks rows that a later pass has. To continue, remove the folders of "
                        "the passes after it and run the same command again."
                    )
                table = table.take(pa.array(at))
            light |= {c: table[c] for c in small}
            if big:
                source = stack.enter_context(_Heavy(p, unit, files))
                heavy.append((source, big, table["heavy_at"].to_numpy()))
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


def byte_ranges(p: UnitPass, unit: int, column: str, rows: np.ndarray) -> tuple[list[File], np.ndarray]:
    """Locates the stored pixels of these rows of a unit.

    Returns the files, and an int64 array of shape (n, 3): for each row the number of its file, the offset and the size
    in bytes. Raises DamagedError if a row or a file is missing or damaged.
    """
    table, files = p.stored(unit, ["heavy_at"])
    at = _places(table, rows)
    with _cure(p, unit):
        if not (at >= 0).all():
            raise DamagedError(f"{p.root}: unit {unit} lacks rows that a later pass has")
    with _Heavy(p, unit, files) as heavy:
        return files, heavy.ranges(table["heavy_at"].take(pa.array(at)).to_numpy().astype(np.int64), column)


@lru_cache(maxsize=8)  # one for each barrier; recipes have few
def _barrier_files(root: str) -> Callable[..., pa.Table]:
    """Returns a function that reads a file of a barrier, given its entry as keywords.

    It caches the last two files: a file is read for each of its units in turn, and units are read concurrently.
    """
    store, lock = Store(root), Lock()
    read = lru_cache(maxsize=2)(lambda **entry: store.read_table(entry))

    def read_once(**entry: Any) -> pa.Table:
        with lock:  # otherwise every thread that misses the cache would read the file
            return read(**entry)

    return read_once


def _fates(table: pa.Table) -> pa.Table:
    """The dropped rows of a unit's table with `row` and FATE, as the columns of `schema.DROP` without `unit`."""
    dropped = table.filter(pc.is_valid(table["drop_reason"]))
    return dropped.rename_columns([f.name for f in DROP if f.name != "unit"])


def _lines(pool: Pass, unit: int, columns: list[str], rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields these columns of rows of the pool, each row as a dictionary."""
    for table in read_unit([pool], unit, columns, rows):
        yield from table.drop_columns(POSITION.names).to_pylist()


def accounted(record: dict[str, Any]) -> dict[str, Any]:
    """What `UnitPass.account` returns for a unit with only this record."""
    return {**record, "entries": _entries([record]), "known": 0}


def _entries(records: Iterable[dict[str, Any]]) -> list[Entry]:
    return [entry for record in records for entry in (record["table"], record["heavy"]) if entry]


def check_unit(p: UnitPass, unit: int, digest: bool) -> None:
    """Raises DamagedError unless the files of a committed unit match its records.

    Pixels and vectors are compared by size, and with `digest` also by SHA-256.
    """
    for record in p.records(unit):
        _table(p, record, [])
        for store, entry in p.files(record):
            if entry:
                with _cure(p, unit):
                    store.check(entry, digest)


def check_measured(passes: Sequence[Pass], index: int, unit: int, digest: bool, whole: bool) -> None:
    """Does the same as `check_unit` for a `MeasurePass`, and raises DamagedError if measurements are missing.

    If the pass was complete (`whole`), every row that reaches it must have results. So must every row that a later pass
    has measured, if that measurement depends on this pass.
    """
    p = passes[index]
    assert isinstance(p, MeasurePass)
    check_unit(p, unit, digest)
    lost = p.missing(passes[:index], unit) if whole else np.empty(0, np.int32)
    for later in passes[index + 1 :]:
        if isinstance(later, MeasurePass) and p.key in later.upstream:
            known, based = (q.stored(unit, [])[0]["row"].to_numpy() for q in (p, later))
            lost = np.union1d(lost, np.setdiff1d(based, known))
    if len(lost):
        with _cure(p, unit):
            gone = record_name(unit, len(p.records(unit)))  # they are numbered without gaps
            raise DamagedError(f"{p.store.path(gone)}: {len(lost):,} rows that were measured are gone")


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

    `light` and `drops` are in the order of `row`; `light` may include dropped rows. If two attempts commit, the first
    wins, and the files of the other are removed.
    """
    rows = np.union1d(light["row"].to_numpy(), drops["row"].to_numpy()).astype(np.int32)
    light, fates = _spread(light, rows), _spread(drops, rows)
    columns = {c: light[c] for c in light.column_names} | {"row": pa.array(rows)}
    table = pa.table(columns | {f"drop_{c}": fates[c] for c in drops.column_names if c not in POSITION.names})
    more = {"heavy": heavy, **({} if part is None else {"part": part})}
    return _commit_table(p, unit, attempt, table, rows_in, seconds, more)


def _commit_table(
    p: Pass, unit: int, attempt: str, table: pa.Table, rows_in: int, seconds: dict[str, float], more: dict[str, Any]
) -> dict[str, Any]:
    """Writes a unit's table, which must include FATE, and creates the record with the further keys `more`."""
    drops = table.filter(pc.is_valid(table["drop_reason"]))
    fates = [pa.table({"step": drops["drop_step"], "reason": drops["drop_reason"]})]
    record: dict[str, Any] = {
        "rows_in": rows_in,
        "kept": rows_in - len(drops),
        "table": p.store.write_table(f"{attempt}.parquet", table, _encodings(table.schema)),
        "funnel": Funnel.of(p.labels, rows_in, fates, seconds).to_json(),
        **more,
    }
    if p.commit(unit, record):
        return {"pass": p.key, "unit": unit, **record}
    for entry in _entries([record]):
        p.store.remove(entry["name"])
    return _must(p, unit, more.get("part"))


def _encodings(schema: pa.Schema) -> dict[str, str]:
    """Parquet encodings for the columns of a unit whose values are nearly all distinct: dictionary encoding would take
    twice the bytes and twice the time to read."""
    floats = {field.name: "BYTE_STREAM_SPLIT" for field in schema if field.type in (pa.float32(), pa.float64())}
    return {"row": "DELTA_BINARY_PACKED", **floats}


def _spread(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The lines of a table for these rows, with nulls for rows that it lacks."""
    at = _places(table, rows)
    return table.take(pa.array(at, mask=at < 0))


def _kept(table: pa.Table) -> np.ndarray:
    """The rows of a table without a `drop_reason`."""
    return table["row"].to_numpy()[pc.is_null(table["drop_reason"]).to_numpy()]


def _numbered(table: pa.Table, files: int) -> pa.Table:
    """Adds `files` to the file numbers in `heavy_at`, if the table has that column."""
    if "heavy_at" not in table.column_names:
        return table
    at = pc.add(table["heavy_at"].cast(pa.int64()), files << PART_BITS)
    return table.set_column(table.schema.get_field_index("heavy_at"), "heavy_at", at)


def _places(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    """The index of each of these rows in a table sorted by `row`; −1 for a row that the table lacks."""
    there = table["row"].to_numpy()
    if np.array_equal(there, rows):
        return np.arange(len(rows))
    at = np.searchsorted(there, rows)
    found = np.append(there, -1)[at] == rows
    return np.where(found, at, -1)


class _Heavy:
    """Reads pixels and vectors of a unit, a few rows at a time."""

    def __init__(self, p: Pass, unit: int, files: Sequence[File]) -> None:
        self._files: list[pa.NativeFile] = []
        self._batches: list[tuple[Any, int, int, int]] = []
        """For each batch, the reader of its file, its index there, the file's number and the address of its mapping."""
        starts: list[int] = []
        for number, (store, entry) in enumerate(files):
            if entry is None:  # every row of this part was dropped
                continue
            with _cure(p, unit):
                self._files.append(store.mapped(entry))
            base = self._files[-1].read_buffer(1).address
            reader, at = pa.ipc.open_file(self._files[-1]), number << PART_BITS
            for i in range(reader.num_record_batches):
                self._batches.append((reader, i, number, base))
                starts.append(at)
                at += reader.get_batch(i).num_rows
        self._starts = np.array(starts, np.int64)

    def __enter__(self) -> _Heavy:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def take(self, positions: np.ndarray, names: list[str]) -> dict[str, pa.ChunkedArray]:
        """The values of these columns at positions (`heavy_at`), in the order of the positions."""
        chunk = np.searchsorted(self._starts, positions, side="right") - 1
        pieces = []
        for i in np.unique(chunk):
            local = pa.array(positions[chunk == i] - self._starts[i])
            reader, batch, *_ = self._batches[i]
            pieces.append(pa.Table.from_batches([reader.get_batch(batch).select(names).take(local)]))
        back = np.argsort(np.argsort(chunk, kind="stable"))  # the inverse permutation
        table = pa.concat_tables(pieces).combine_chunks().take(pa.array(back))
        return {name: table[name] for name in names}

    def ranges(self, positions: np.ndarray, name: str) -> np.ndarray:
        """Locates values of a binary column: the number of the file, the offset and the size in bytes; int64 (n, 3).

        Files are Arrow IPC without compression, so every value is a range of bytes. A null has size 0.
        """
        chunk = np.searchsorted(self._starts, positions, side="right") - 1
        found = np.zeros((len(positions), 3), np.int64)
        for i in np.unique(chunk):
            reader, batch, number, base = self._batches[i]
            values = reader.get_batch(batch).column(name)
            _, bounds, data = values.buffers()
            width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
            ends = np.frombuffer(bounds, width)[values.offset : values.offset + len(values) + 1].astype(np.int64)
            mine = np.flatnonzero(chunk == i)
            at = positions[mine] - self._starts[i]
            found[mine] = np.stack(
                [np.full(len(at), number), data.address - base + ends[at], ends[at + 1] - ends[at]], 1
            )
        return found


def _table(p: Pass, record: dict[str, Any], columns: list[str]) -> pa.Table:
    with _cure(p, record["unit"]):
        return p.store.read_table(record["table"], columns)


def _must(p: Pass, unit: int, part: int | None = None) -> dict[str, Any]:
    with _cure(p, unit):
        record = p.record(unit, part)
        if record is None:
            raise DamagedError(f"{p.store.path(record_name(unit, part))}: missing")
        return record


@contextlib.contextmanager
def _cure(p: Pass, unit: int) -> Iterator[None]:
    """Adds the unit, the pass and how to continue to the message of a DamagedError."""
    try:
        yield
    except DamagedError as error:
        if isinstance(p, BarrierPass):
            cure = f"remove {p.store.path(p.complete_name)} and run the same command again to recompute the pass"
        elif p.repeatable:
            name = p.store.path(f"commits/{unit:07d}.*" if isinstance(p, MeasurePass) else record_name(unit))
            cure = f"remove {name} and run the same command again to recompute the unit"
        else:
            cure = (
                "restore it from a copy; or, to fetch again what is still online, remove "
                f"{p.root} and the folders of all later passes and run the same command again"
            )
        raise DamagedError(f"{error} (unit {unit} of the pass {p.label}). To continue, {cure}.") from None


def record_name(unit: int, part: int | None = None) -> str:
    """The file of a unit's record, or of one part of the unit's measurements."""
    return f"commits/{unit:07d}.json" if part is None else f"commits/{unit:07d}.{part:03d}.json"


def _key(before: str, what: Any) -> str:
    return hashlib.sha256(json.dumps([before, what], sort_keys=True).encode()).hexdigest()[:16]
