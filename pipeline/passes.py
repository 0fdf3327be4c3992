"""Passes over units: what is stored of each, and how one is run. No Ray here: this is what a worker does.

A pass over a unit leaves at most three files under names that no other attempt uses: the measurements it added
(`.parquet`: `row` and light columns of the rows that went on), its pixels and vectors (`.arrow`), and its drops
(`.drops.parquet`). Then one record, created exclusively, makes them count. A unit's present state is folded from the
records of the passes before: nothing is copied from pass to pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.ledger import Funnel
from pipeline.recipe import Recipe, identity
from pipeline.schema import DROP, POSITION, SAMPLE, is_heavy
from pipeline.step import Filter, Stage, Step, apply, drops_table, split_marked
from pipeline.storage import Store

HEAVY_ROWS = 256
"""Rows with pixels that are in hand at a time."""

Kind = Literal["pool", "map", "barrier", "write"]


@dataclass
class Pass:
    """Neighbouring steps that run together over each unit and are committed once.

    `key` is a hash of everything that determines the results: the pool, and every step up to the last of this pass.
    """

    kind: Kind
    key: str
    label: str
    steps: list[Step] = field(default_factory=list)
    adds: dict[str, pa.DataType] = field(default_factory=dict)
    root: str = ""

    @property
    def store(self) -> Store:
        return Store(self.root)

    @property
    def labels(self) -> list[str]:
        return [step.label for step in self.steps] if self.steps else [self.label]

    def record(self, unit: int) -> dict[str, Any] | None:
        """What was committed of a unit, or None."""
        data = self.store.read_if_there(_record_name(unit))
        return json.loads(data) if data is not None else None

    def complete(self) -> dict[str, Any] | None:
        """The record of the whole pass, written when every unit of it was committed; None before."""
        data = self.store.read_if_there("complete.json")
        return json.loads(data) if data is not None else None


def make_passes(recipe: Recipe, pool_key: dict[str, Any], types: dict[str, pa.DataType]) -> list[Pass]:
    """Cuts a recipe into passes.

    A pass ends at a barrier, behind a step whose results are dear, and where a step that needs whole units would not
    get them. The first pass is the pool's own; `types` are the pool's further columns.
    """
    known = {**{f.name: f.type for f in SAMPLE}, **types}
    passes = [Pass("pool", _key("", pool_key), "pool", adds=dict(known))]
    steps: list[Step] = []

    def close(kind: Kind = "map") -> None:
        if steps:
            adds = {k: v for step in steps for k, v in step.adds.items()}
            key = _key(passes[-1].key, [identity(step) for step in steps])
            passes.append(Pass(kind, key, steps[-1].label, list(steps), adds))
            steps.clear()

    for step in recipe.steps:
        scope = step.scope if isinstance(step, Filter) else "row"
        alone = "barrier" if scope == "run" else "write" if step.name() == "write_shards" else None
        regroups = any(isinstance(s, Stage) and type(s).stream is not Stage.stream for s in steps)
        wants_units = any(isinstance(s, Filter) and s.scope == "unit" for s in steps)
        pixels = any(is_heavy(known[c]) for c in step.needs if c in known and not any(c in s.adds for s in steps))
        if alone or (scope == "unit" and (regroups or _reads_heavy(steps, known))) or (wants_units and pixels):
            close()
        steps.append(step)
        known |= step.adds
        if alone or step.commits:
            close("barrier" if alone == "barrier" else "write" if alone == "write" else "map")
    close()
    for i, p in enumerate(passes):
        p.root = f"{recipe.run}/passes/{i:02d}-{p.label}-{p.key}"
    return passes


def source_columns(p: Pass) -> list[str]:
    """The columns that the steps of a pass take from the passes before it."""
    added: set[str] = set()
    wanted = dict.fromkeys(SAMPLE.names)
    for step in p.steps:
        wanted |= dict.fromkeys(c for c in step.needs if c not in added and c not in POSITION.names)
        added |= set(step.adds)
    return list(wanted)


def alive(before: Sequence[Pass], unit: int) -> np.ndarray:
    """The rows of a unit (int32, ascending) that the passes so far have kept."""
    # Each pass over units tells of the rows that it kept: the last one speaks for those before it.
    last = max(i for i, p in enumerate(before) if p.kind in ("pool", "map"))
    record = _must(before[last], unit)
    rows = _light(before[last], record, ["row"])["row"].to_numpy()
    gone = [_drops(before[last], record)["row"].to_numpy()] if before[last].kind == "pool" else []
    gone += [barrier_drops(p, unit)["row"].to_numpy() for p in before[last + 1 :] if p.kind == "barrier"]
    return np.setdiff1d(rows, np.concatenate(gone)).astype(np.int32) if gone else rows


def read_unit(
    before: Sequence[Pass], unit: int, columns: Iterable[str], rows: np.ndarray | None = None
) -> Iterator[pa.Table]:
    """The state of a unit: `unit, row` and `columns` of its living rows (or of `rows`), in the order of `row`.

    One table, or tables of HEAVY_ROWS rows where pixels or vectors are asked for.
    """
    if rows is None:
        rows = alive(before, unit)
    light: dict[str, pa.ChunkedArray] = {}
    heavy: list[tuple[_Heavy, list[str], np.ndarray]] = []
    wanted = [c for c in columns if c not in POSITION.names]
    with contextlib.ExitStack() as stack:
        for p in before:
            mine = [c for c in wanted if c in p.adds]
            if not mine or p.kind not in ("pool", "map"):
                continue
            record = _must(p, unit)
            small = [c for c in mine if not is_heavy(p.adds[c])]
            big = [c for c in mine if is_heavy(p.adds[c])]
            table = _light(p, record, ["row", *small, *(["heavy_at"] if big else [])])
            at = np.searchsorted(table["row"].to_numpy(), rows)
            light |= {c: table[c].take(pa.array(at)) for c in small}
            if big:
                source = stack.enter_context(_Heavy(p.store, record["heavy"]))
                heavy.append((source, big, table["heavy_at"].to_numpy()[at]))
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
    """What a barrier dropped of a unit: `row, step, reason, detail`."""
    complete = p.complete()
    if complete is None:
        raise FileNotFoundError(f"{p.root}: the barrier is not complete")
    name = complete["files"].get(str(unit // complete["units_per_file"]))
    if name is None:
        return DROP.empty_table().drop_columns("unit")
    table = _barrier_file(p.root, name)
    return table.filter(pa.compute.equal(table["unit"], unit)).drop_columns("unit")


@lru_cache(maxsize=2)
def _barrier_file(root: str, name: str) -> pa.Table:
    return Store(root).read_table(name)


def unit_drops(p: Pass, unit: int) -> pa.Table:
    """The drops of one pass over one unit, whatever its kind: `row, step, reason, detail`."""
    return barrier_drops(p, unit) if p.kind in ("barrier", "write") else _drops(p, _must(p, unit))


@dataclass
class Advance:
    """How far a pass has come since the last such account."""

    rows: int = 0
    """Rows that it is done with, those that it kept among them."""
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Of the others, so many by reason."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Of the units that were committed."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Advance:
        """A whole unit."""
        advance = cls(record["rows_in"], record["kept"], records=[record])
        for line in Funnel.from_json(record["funnel"]).lines.values():
            advance.reasons.update(line.dropped)
        return advance

    def __iadd__(self, other: Advance) -> Advance:
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
) -> Iterator[Advance]:
    """Runs a pass over units as one stream of batches and commits each unit as its last row comes out.

    Steps see rows of the next unit while stragglers of this one are still under way. `rows` restricts a single unit to
    some of its rows and `crashers` are dropped without being touched: see `pipeline.isolation`.
    """
    p, before = passes[index], passes[:index]
    columns = source_columns(p)
    writers: dict[int, UnitWriter] = {}
    advance = Advance()
    clock = dict.fromkeys(["", *p.labels], 0.0)

    def source() -> Iterator[pa.Table]:
        for unit in units:
            living = alive(before, unit) if rows is None else rows
            writers[unit] = UnitWriter(p, unit, living)
            if crashers is not None:
                dead = pa.table({"unit": np.full(len(crashers), unit, np.int32), "row": crashers.astype(np.int32)})
                # The last step of a pass is the one that handles the bytes.
                writers[unit].drop(drops_table(dead, p.labels[-1], "decoder_crash"))
                living = np.setdiff1d(living, crashers)
            for batch in read_unit(before, unit, columns, living):
                if len(batch):
                    yield batch

    def dropped(drops: pa.Table) -> None:
        if len(drops):
            for unit in drops["unit"].unique().to_pylist():
                writers[unit].drop(drops.filter(pa.compute.equal(drops["unit"], unit)))
            advance.rows += len(drops)
            advance.reasons.update(drops["reason"].to_pylist())

    stream: Iterator[pa.Table] = _timed(source(), clock, "")
    for step in p.steps:
        stream = _timed(_through(step, stream, dropped), clock, step.label)

    def finished() -> Iterator[dict[str, Any]]:
        for unit in [u for u, w in writers.items() if w.done]:
            writer = writers.pop(unit)
            seconds = _self_times(clock, p.labels)
            if commit:
                yield writer.commit(seconds)
            else:
                writer.abort()

    try:
        for batch in stream:
            for unit in batch["unit"].unique().to_pylist():
                part = batch if len(writers) == 1 else batch.filter(pa.compute.equal(batch["unit"], unit))
                writers[unit].add(part)
            advance.rows += len(batch)
            advance.kept += len(batch)
            advance.records += finished()
            yield advance
            advance = Advance()
        advance.records += finished()
        yield advance
        for unit, writer in writers.items():
            raise RuntimeError(f"{' + '.join(p.labels)} lost {writer.missing:,} rows of unit {unit}")
    finally:
        if hasattr(stream, "close"):
            stream.close()
        for writer in writers.values():
            writer.abort()


class UnitWriter:
    """Collects what one attempt at a unit produces, and commits it."""

    def __init__(self, p: Pass, unit: int, rows: np.ndarray) -> None:
        self.p, self.unit, self.rows_in = p, unit, len(rows)
        self._store = p.store
        self._attempt = new_attempt(unit)
        self._light_schema = pa.schema([("row", pa.int32())] + [(k, v) for k, v in p.adds.items() if not is_heavy(v)])
        self._heavy_schema = pa.schema([(k, v) for k, v in p.adds.items() if is_heavy(v)])
        self._open = set(rows.tolist())
        self._kept: list[pa.Table] = []
        self._dropped: list[pa.Table] = []
        self._heavy_at = 0
        self._stack = contextlib.ExitStack()
        self._ipc: Any = None

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def missing(self) -> int:
        return len(self._open)

    def add(self, batch: pa.Table) -> None:
        """Rows of this unit that went on; their pixels go to disk at once."""
        self._close_rows(batch["row"])
        light = batch.select(self._light_schema.names).cast(self._light_schema)
        if len(self._heavy_schema):
            if self._ipc is None:
                file = self._stack.enter_context(self._store.output(f"{self._attempt}.arrow"))
                self._ipc = pa.ipc.new_file(file, self._heavy_schema)
            self._ipc.write_table(batch.select(self._heavy_schema.names).cast(self._heavy_schema))
            at = np.arange(self._heavy_at, self._heavy_at + len(batch), dtype=np.int32)
            light = light.append_column("heavy_at", pa.array(at))
            self._heavy_at += len(batch)
        self._kept.append(light)

    def drop(self, drops: pa.Table) -> None:
        self._close_rows(drops["row"])
        self._dropped.append(drops)

    def commit(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Writes what is left and creates the record; if another attempt was first, returns that one's."""
        if self._ipc is not None:
            self._ipc.close()
        self._stack.close()
        kept = pa.concat_tables(self._kept) if self._kept else self._empty()
        drops = pa.concat_tables(self._dropped).sort_by("row") if self._dropped else DROP.empty_table()
        heavy = f"{self._attempt}.arrow" if self._ipc is not None else None
        return commit(self.p, self.unit, self._attempt, self.rows_in, kept.sort_by("row"), heavy, drops, seconds)

    def abort(self) -> None:
        """Gives up: nothing of this attempt stays."""
        with contextlib.suppress(Exception):
            if self._ipc is not None:
                self._ipc.close()
        self._stack.close()
        for suffix in (".parquet", ".arrow", ".drops.parquet"):
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
    """A name for the files of one attempt at a unit, which no other attempt has."""
    return f"units/{unit:07d}-{secrets.token_hex(4)}"


def commit(
    p: Pass,
    unit: int,
    attempt: str,
    rows_in: int,
    light: pa.Table,
    heavy: str | None,
    drops: pa.Table,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Writes the tables of an attempt and creates the record of the unit; returns the record that counts.

    Of two attempts one wins; the files of the other are removed.
    """
    record = {
        "unit": unit,
        "rows_in": rows_in,
        "kept": rows_in - len(drops),
        "light": f"{attempt}.parquet",
        "heavy": heavy,
        "drops": f"{attempt}.drops.parquet" if len(drops) else None,
        "funnel": Funnel.of(p.labels, rows_in, [drops], seconds).to_json(),
    }
    p.store.write_table(f"{attempt}.parquet", light)
    if len(drops):
        p.store.write_table(f"{attempt}.drops.parquet", drops.drop_columns("unit"))
    if p.store.create(_record_name(unit), json.dumps(record).encode()):
        return record
    for part in ("light", "heavy", "drops"):
        if record[part]:
            p.store.remove(str(record[part]))
    return _must(p, unit)


def _through(step: Step, stream: Iterator[pa.Table], dropped: Callable[[pa.Table], None]) -> Iterator[pa.Table]:
    if isinstance(step, Stage):
        outputs = (split_marked(step, batch) for batch in step.stream(stream))
    else:
        assert isinstance(step, Filter)
        outputs = (apply(step, batch) for batch in stream)
    for kept, drops in outputs:
        dropped(drops)
        # A batch without rows goes on as well: it lets the end of the stream see that a unit is done.
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
    """The pixels and vectors of a unit, a few rows at a time."""

    def __init__(self, store: Store, name: str | None) -> None:
        self._file = store.mapped(name) if name else None
        self._reader: Any = None
        sizes: list[int] = []
        if self._file is not None:  # None: every row of the unit was dropped
            self._reader = pa.ipc.open_file(self._file)
            sizes = [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __enter__(self) -> _Heavy:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def take(self, positions: np.ndarray, names: list[str]) -> dict[str, pa.ChunkedArray]:
        chunk = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(chunk, kind="stable")
        pieces = []
        for i in np.unique(chunk):
            local = pa.array(positions[chunk == i] - self._starts[i])
            pieces.append(pa.Table.from_batches([self._reader.get_batch(int(i)).select(names).take(local)]))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        table = pa.concat_tables(pieces).combine_chunks().take(pa.array(back))
        return {name: table[name] for name in names}


def _light(p: Pass, record: dict[str, Any], columns: list[str]) -> pa.Table:
    return p.store.read_table(record["light"], columns)


def _drops(p: Pass, record: dict[str, Any]) -> pa.Table:
    return p.store.read_table(record["drops"]) if record["drops"] else DROP.empty_table().drop_columns("unit")


def _must(p: Pass, unit: int) -> dict[str, Any]:
    record = p.record(unit)
    if record is None:
        raise FileNotFoundError(f"{p.root}: unit {unit} is not committed")
    return record


def _record_name(unit: int) -> str:
    return f"commits/{unit:07d}.json"


def _reads_heavy(steps: list[Step], known: dict[str, pa.DataType]) -> bool:
    return any(is_heavy(known[c]) for step in steps for c in step.needs if c in known)


def _key(before: str, what: Any) -> str:
    return hashlib.sha256(json.dumps([before, what], sort_keys=True).encode()).hexdigest()[:16]
