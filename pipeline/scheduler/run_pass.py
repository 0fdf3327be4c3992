"""Runs a pass over units: reads their rows, applies the steps, and commits each unit. Workers call it; it needs no Ray.

See `pipeline.scheduler.passes` for what is stored for a unit.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger import Funnel
from pipeline.scheduler.meter import Spent
from pipeline.scheduler.passes import MeasurePass, Pass, UnitPass, accounted, commit, new_attempt, read_unit
from pipeline.schema import DROP, POSITION, SAMPLE, is_heavy
from pipeline.step import Filter, Stage, Step, apply, drops_table, split_marked
from pipeline.storage import Output


@dataclass
class UnitReport:
    """Progress of a pass since its last report."""

    rows: int = 0
    """Rows processed."""
    kept: int = 0
    """Rows kept among those processed."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows dropped among those processed, by reason."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Records of the units that were committed."""
    spent: Spent = field(default_factory=Spent)
    """The time of the worker by use."""

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
        self.spent += other.spent
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

    Steps receive rows of the next unit while the last rows of the current one are in progress. For
    `pipeline.scheduler.isolation`, `rows` restricts a single unit to some of its rows, `crashers` are rows to drop
    without processing them, and `commit=False` discards the results.
    """
    p, before = passes[index], passes[:index]
    assert isinstance(p, UnitPass)
    columns = _source_columns(p)
    writers: dict[int, UnitWriter] = {}
    report = UnitReport()
    clock = dict.fromkeys(["", *p.labels], 0.0)

    def source() -> Iterator[pa.Table]:
        for unit in units:
            # Before `missing` reads the records, so that two attempts cannot both commit the same rows.
            part = p.next_part(unit)
            living = p.missing(before, unit, rows)
            writers[unit] = UnitWriter(p, unit, living, part)
            if crashers is not None:
                dead = pa.table({"unit": np.full(len(crashers), unit, np.int32), "row": crashers.astype(np.int32)})
                # The crash is attributed to the last step of the pass, which is the one that decodes.
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

    stream = _timed(source(), clock, "")
    for step in p.steps:
        stream = _timed(_through(step, stream, dropped), clock, step.label)

    def finished() -> Iterator[dict[str, Any]]:
        for unit in [unit for unit, writer in writers.items() if not writer.missing]:
            writer = writers.pop(unit)
            seconds = _self_times(clock, p.labels)
            if not commit:
                writer.abort()
            elif isinstance(p, MeasurePass):
                writer.commit(seconds)
                account = p.account(before, unit, seconds, writer.rows_in)
                whole = UnitReport.of(account)
                report.rows += whole.rows - writer.rows_in
                report.kept += whole.kept - writer.kept
                report.reasons.update(whole.reasons - writer.reasons)
                yield account
            else:
                yield accounted(writer.commit(seconds))

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
        stream.close()
        for writer in writers.values():
            writer.abort()


def _source_columns(p: Pass) -> list[str]:
    """The columns that the steps of a pass need from earlier passes."""
    added: set[str] = set()
    wanted = dict.fromkeys(SAMPLE.names)
    for step in p.steps:
        wanted |= dict.fromkeys(c for c in step.needs if c not in added and c not in POSITION.names)
        added |= set(step.adds)
    return list(wanted)


class UnitWriter:
    """Collects the results of one attempt at a unit, and commits them."""

    def __init__(self, p: UnitPass, unit: int, rows: np.ndarray, part: int | None = None) -> None:
        """`part` is the number of the record if the unit may have several; else None."""
        self.p, self.unit, self.rows_in, self._part = p, unit, len(rows), part
        self._store = p.store
        self._attempt = new_attempt(unit)
        self._light_schema = pa.schema([("row", pa.int32())] + [(k, v) for k, v in p.adds.items() if not is_heavy(v)])
        self._heavy_schema = pa.schema([(k, v) for k, v in p.adds.items() if is_heavy(v)])
        self._open = set(rows.tolist())
        heavy_at = [("heavy_at", pa.int32())] if len(self._heavy_schema) else []
        self._kept = [pa.schema([*self._light_schema, *heavy_at]).empty_table()]
        self._dropped: list[pa.Table] = []
        self._heavy_at = 0
        self._heavy: Output | None = None
        self._stack = contextlib.ExitStack()
        self._ipc: Any = None

    @property
    def missing(self) -> int:
        """Number of rows that were neither added nor dropped yet."""
        return len(self._open)

    @property
    def kept(self) -> int:
        return sum(map(len, self._kept))

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reason for drops in self._dropped for reason in drops["reason"].to_pylist())

    def add(self, batch: pa.Table) -> None:
        """Adds rows that were kept. Their pixels and vectors are written immediately."""
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
        """Adds rows that were dropped, as `schema.DROP`."""
        self._close_rows(drops["row"])
        self._dropped.append(drops)

    def commit(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Writes the table and creates the record. Returns the record of another attempt if that one was first."""
        if self._ipc is not None:
            self._ipc.close()
        self._stack.close()
        if not self.rows_in and self._part is not None:
            return {}
        kept = pa.concat_tables(self._kept).sort_by("row")
        drops = pa.concat_tables(self._dropped).sort_by("row") if self._dropped else DROP.empty_table()
        heavy = self._heavy.entry if self._heavy is not None else None
        return commit(self.p, self.unit, self._attempt, self.rows_in, kept, heavy, drops, seconds, self._part)

    def abort(self) -> None:
        """Removes the files of this attempt."""
        with contextlib.suppress(Exception):
            if self._ipc is not None:
                self._ipc.close()
        self._stack.close()
        for suffix in (".parquet", ".arrow"):
            self._store.remove(self._attempt + suffix)

    def _close_rows(self, rows: pa.ChunkedArray) -> None:
        numbers = rows.to_pylist()
        before = len(self._open)
        self._open.difference_update(numbers)
        if before - len(self._open) != len(numbers):
            raise RuntimeError(
                f"{' + '.join(self.p.labels)} returned rows of unit {self.unit} twice, or rows that it was not given"
            )


def _through(step: Step, stream: Iterator[pa.Table], dropped: Callable[[pa.Table], None]) -> Iterator[pa.Table]:
    """Applies a step to a stream. Yields the batches of kept rows, and passes drops to `dropped`."""
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
        # Empty batches are passed on too, so that `run_pass` notices when a unit is done.
        yield kept


def _timed(stream: Iterator[pa.Table], clock: dict[str, float], label: str) -> Generator[pa.Table, None, None]:
    """The same stream. Adds the time spent in it, including the streams that feed it, to `clock[label]`."""
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
    """Seconds of each step since the last call, without the time of the steps that feed it."""
    times = [clock[label] for label in ["", *labels]]
    for label in clock:
        clock[label] = 0.0
    return {label: max(0.0, now - fed) for label, now, fed in zip(labels, times[1:], times)}
