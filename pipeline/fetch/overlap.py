"""Runs an asynchronous function over the rows of a stream of tables, with many rows in flight across tables.

The event loop lives in one background thread. The caller's thread pulls tables, only when there is room for their rows,
and hands out finished rows as they come: a table's slow rows run out while the next tables are already at work.

The loop, and what the work has opened, stay from stream to stream: connections, caches and processes are for the life
of a worker and not of the few units that it is handed at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa

from pipeline.fetch.reasons import FetchError

T = TypeVar("T")
Begin = Callable[[], Awaitable[None]]
Work = Callable[[tuple[Any, ...], Begin], Awaitable[T]]
Finished = tuple[pa.Table, int, T]
"""A row (its table and position there) and what became of it."""

# A finished row is handed out after this time at the latest, in however small a group.
HOLD_SECONDS = 0.5


class Overlap(Generic[T]):
    """`work(values, begin)` is called for each row with its values in `columns`, within `open_work()`.

    `open_work` is entered with the first stream, left after an error, and entered anew with the next. One stream at a
    time. A copy (pickle) has opened nothing.

    `admitted` rows are known to the event loop, most of them waiting; a row costs memory from when it has awaited
    `begin` until its result is handed out. Of those at most `concurrency` are at work, and two groups are finished:
    with more, no row begins until the consumer has taken some.
    """

    def __init__(
        self,
        open_work: Callable[[], AbstractAsyncContextManager[Work[T]]],
        *,
        columns: Sequence[str],
        concurrency: int,
        admitted: int,
        group: int,
    ):
        self._open_work = open_work
        self._columns = columns
        self._concurrency = concurrency
        self._admitted = admitted
        self._group = group
        self._run: _Run[T] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_run": None}

    def __call__(self, tables: Iterable[pa.Table]) -> Iterator[list[Finished[T]]]:
        """Every row of every table once, in order of completion, in lists of at most `group`.

        What `work` raises ends the stream. That, an error in `tables`, and closing the generator early cancel what is
        in flight and end the thread.
        """
        if self._run is None:
            self._run = _Run(self._open_work, self._columns, self._concurrency, self._admitted, self._group)
            weakref.finalize(self, self._run.stop)
        run, whole = self._run, False
        source = iter(tables)
        try:
            run.feed(next(source, None))
            while True:
                event = run.events.get()
                if isinstance(event, _Room):
                    run.feed(next(source, None))
                elif isinstance(event, _End):
                    if event.error is not None:
                        raise event.error
                    break
                else:
                    run.taken(event)
                    yield [row for row, _ in event]
            whole = True
        finally:
            if not whole:
                self._run = None
                run.stop()


class _Room:
    """All rows handed in so far are admitted: time for the next table."""


@dataclass
class _End:
    """All rows of the stream are finished, or it cannot go on."""

    error: BaseException | None


_Group = list[tuple[Finished[T], bool]]
"""Finished rows, and whether each holds a place among the rows at work until it is taken."""


class _Run(Generic[T]):
    """The event loop. `feed`, `taken` and `stop` are called from the consumer's thread."""

    def __init__(
        self,
        open_work: Callable[[], AbstractAsyncContextManager[Work[T]]],
        columns: Sequence[str],
        concurrency: int,
        admitted: int,
        group: int,
    ):
        # Unbounded as a queue, bounded by what may be admitted.
        self.events: queue.SimpleQueue[_Group[T] | _Room | _End] = queue.SimpleQueue()
        self._open_work = open_work
        self._columns = columns
        self._inbox: asyncio.Queue[pa.Table | None] = asyncio.Queue()
        self._places = asyncio.Semaphore(concurrency)
        self._admissions = asyncio.Semaphore(admitted)
        self._size = group
        self._group: _Group[T] = []
        self._untaken = 0
        self._due: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="overlap", daemon=True)
        self._thread.start()
        self._started.wait()

    def feed(self, table: pa.Table | None) -> None:
        """The next table; None: the stream has no more."""
        self._in_loop(self._inbox.put_nowait, table)

    def taken(self, group: _Group[T]) -> None:
        self._in_loop(self._release, len(group), sum(held for _, held in group))

    def stop(self) -> None:
        if self._task is not None:
            self._in_loop(self._task.cancel)
        if self._thread is not threading.current_thread():  # where the collector of garbage calls
            self._thread.join()

    def _in_loop(self, function: Callable[..., object], *args: object) -> None:
        # A closed loop has nothing left to be told.
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *args)

    def _release(self, rows: int, held: int) -> None:
        self._untaken -= rows
        for _ in range(rows):
            self._admissions.release()
        for _ in range(held):
            self._places.release()

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            asyncio.run(self._all())
        except asyncio.CancelledError:
            pass
        except BaseException as caught:  # raised again in the consumer's thread
            error = caught
        self.events.put(_End(error))
        self._started.set()

    async def _all(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._serve())
        self._started.set()
        await self._task

    async def _serve(self) -> None:
        rows: set[asyncio.Task[None]] = set()
        async with self._open_work() as work:
            try:
                while True:
                    table = await self._inbox.get()
                    if table is None:
                        await asyncio.gather(*rows)
                        self._hand_out()
                        self.events.put(_End(None))
                        continue
                    for row, values in enumerate(zip(*(_values(table[name]) for name in self._columns))):
                        await self._admissions.acquire()
                        task = asyncio.create_task(self._one(work, table, row, values))
                        rows.add(task)
                        task.add_done_callback(rows.discard)
                    self.events.put(_Room())
                    del table
            finally:
                for task in rows:
                    task.cancel()
                await asyncio.gather(*rows, return_exceptions=True)

    async def _one(self, work: Work[T], table: pa.Table, row: int, values: tuple[Any, ...]) -> None:
        begun = False

        async def begin() -> None:
            nonlocal begun
            await self._places.acquire()
            begun = True

        try:
            result = await work(values, begin)
        except Exception as error:
            self.events.put(_End(error))
            return
        # The consumer is woken once for a group: two threads that take turns cost each other more than they do.
        self._untaken += 1
        held = begun and self._untaken > 2 * self._size
        if begun and not held:
            self._places.release()
        self._group.append(((table, row, result), held))
        if len(self._group) == self._size:
            self._hand_out()
        elif len(self._group) == 1:
            self._due = asyncio.get_running_loop().call_later(HOLD_SECONDS, self._hand_out)

    def _hand_out(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._group:
            self.events.put(self._group)
            self._group = []


def _values(column: pa.ChunkedArray) -> Iterator[Any]:
    """Python values; in a text, bytes that are not UTF-8, which Arrow lets pass, become surrogates."""
    if not pa.types.is_string(column.type):
        return iter(column.to_pylist())
    raw = (value.as_py() for value in column.cast(pa.large_binary()))
    return (None if value is None else value.decode("utf-8", "surrogateescape") for value in raw)


def table_of(finished: list[Finished[dict[str, Any]]], types: Mapping[str, pa.DataType]) -> pa.Table:
    """Finished rows with the columns that came of them: those of each source table in order, table after table."""
    sources: dict[int, list[Finished[dict[str, Any]]]] = {}
    for row in finished:
        sources.setdefault(id(row[0]), []).append(row)
    parts = []
    for rows in sources.values():
        source = rows[0][0].take([index for _, index, _ in rows])
        parts.append(with_columns(source, [result for _, _, result in rows], types))
    return pa.concat_tables(parts)


def with_columns(source: pa.Table, results: Sequence[Mapping[str, Any]], types: Mapping[str, pa.DataType]) -> pa.Table:
    """`source` with the columns of `types`, and `drop_reason` and `drop_detail`, from a mapping for each row.

    They take the place of columns of the same names; what a mapping lacks is null.
    """
    types = {**types, "drop_reason": pa.string(), "drop_detail": pa.string()}
    table = source.drop_columns([name for name in types if name in source.column_names])
    for name, dtype in types.items():
        table = table.append_column(name, pa.array([result.get(name) for result in results], dtype))
    return table


def as_drop(failure: FetchError) -> dict[str, Any]:
    """What `with_columns` takes for a row that ends here."""
    return {"drop_reason": failure.reason, "drop_detail": failure.detail or None}
