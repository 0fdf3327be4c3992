"""Runs an asynchronous function over the rows of a stream of tables, with many rows in flight across tables.

The event loop runs in a background thread. The caller's thread pulls the next table when there is room for its rows,
and yields rows as they finish, so slow rows of one table overlap with rows of later tables.

The loop and its resources (connections, caches, processes) outlive a stream: they last as long as the worker.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow as pa

from pipeline.fetch.reasons import FetchError

T = TypeVar("T")
Begin = Callable[[], Awaitable[None]]
Work = Callable[[tuple[Any, ...], Begin], Awaitable[T]]
Finished = tuple[pa.Table, int, T]
"""A row (its table and its position there) and its result."""

# Longest time that a finished row waits for its group to fill.
HOLD_SECONDS = 0.5


@dataclass(eq=False)  # weakref.finalize needs a hash
class ConcurrentRows(Generic[T]):
    """Calls `work(values, begin)` for each row, with the row's values in `columns`.

    The context manager `open_work()` gives `work`. It is entered by the first stream, left after an error, and entered
    again by the next stream. Only one stream may run at a time. A pickled copy starts closed.

    The event loop holds up to `admitted` rows, most of them waiting. A row needs memory from when it has awaited
    `begin` until the consumer takes its result. At most `concurrency` rows run at once. If more than two groups of
    finished rows wait for the consumer, each further finished row counts as running until it is taken.
    """

    open_work: Callable[[], AbstractAsyncContextManager[Work[T]]]
    _: KW_ONLY
    columns: Sequence[str]
    concurrency: int
    admitted: int
    group: int
    _run: _Run[T] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_run": None}

    def __call__(self, tables: Iterable[pa.Table]) -> Iterator[list[Finished[T]]]:
        """Yields each row of each table once, in order of completion, in lists of at most `group`.

        Raises the exceptions of `work` and `tables`. An exception, or closing the generator early, cancels the rows in
        flight and ends the thread.
        """
        if self._run is None:
            self._run = _Run(self)
            weakref.finalize(self, self._run.stop)
        run, source = self._run, iter(tables)
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
        except BaseException:
            self._run = None
            run.stop()
            raise


class _Room:
    """All rows fed so far are admitted: there is room for the next table."""


@dataclass
class _End:
    """The stream has finished, or failed with `error`."""

    error: BaseException | None


_Group = list[tuple[Finished[T], bool]]
"""Finished rows, each with True if it counts as running until it is taken (back-pressure)."""


class _Run(Generic[T]):
    """The event loop. `feed`, `taken` and `stop` are called from the consumer's thread."""

    def __init__(self, settings: ConcurrentRows[T]):
        # Holds at most `admitted` rows.
        self.events: queue.SimpleQueue[_Group[T] | _Room | _End] = queue.SimpleQueue()
        self._open_work = settings.open_work
        self._columns = settings.columns
        self._inbox: asyncio.Queue[pa.Table | None] = asyncio.Queue()
        self._places = asyncio.Semaphore(settings.concurrency)
        self._admissions = asyncio.Semaphore(settings.admitted)
        self._size = settings.group
        self._group: _Group[T] = []
        self._untaken = 0
        self._due: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._main, name="rows", daemon=True)
        self._thread.start()
        self._started.wait()

    def feed(self, table: pa.Table | None) -> None:
        """Passes the next table; None ends the stream."""
        self._in_loop(self._inbox.put_nowait, table)

    def taken(self, group: _Group[T]) -> None:
        self._in_loop(self._release, len(group), sum(held for _, held in group))

    def stop(self) -> None:
        if self._task is not None:
            self._in_loop(self._task.cancel)
        if self._thread is not threading.current_thread():  # the garbage collector may call this in the loop's thread
            self._thread.join()

    def _in_loop(self, function: Callable[..., object], *args: object) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
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
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            pass
        except BaseException as caught:  # raised again in the consumer's thread
            error = caught
        self.events.put(_End(error))
        self._started.set()

    async def _serve(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._started.set()
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
        # Wake the consumer once per group: switching threads for each row would cost more than the work itself.
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
    """The Python values of a column. Bytes of invalid UTF-8, which Arrow allows in strings, become surrogates."""
    if not pa.types.is_string(column.type):
        return iter(column.to_pylist())
    raw = (value.as_py() for value in column.cast(pa.large_binary()))
    return (None if value is None else value.decode("utf-8", "surrogateescape") for value in raw)


def table_of(finished: list[Finished[dict[str, Any]]], types: Mapping[str, pa.DataType]) -> pa.Table:
    """A table of finished rows with the columns of their results, grouped by source table, in order of completion."""
    sources: dict[int, list[Finished[dict[str, Any]]]] = {}
    for row in finished:
        sources.setdefault(id(row[0]), []).append(row)
    parts = []
    for rows in sources.values():
        source = rows[0][0].take([index for _, index, _ in rows])
        parts.append(with_columns(source, [result for _, _, result in rows], types))
    return pa.concat_tables(parts)


def with_columns(source: pa.Table, results: Sequence[Mapping[str, Any]], types: Mapping[str, pa.DataType]) -> pa.Table:
    """Adds the columns of `types`, `drop_reason` and `drop_detail` to `source`, from one mapping per row.

    Existing columns of these names are replaced. Keys missing from a mapping become null.
    """
    types = {**types, "drop_reason": pa.string(), "drop_detail": pa.string()}
    table = source.drop_columns([name for name in types if name in source.column_names])
    for name, dtype in types.items():
        table = table.append_column(name, pa.array([result.get(name) for result in results], dtype))
    return table


def as_drop(failure: FetchError) -> dict[str, Any]:
    """The result of a dropped row, for `with_columns`."""
    return {"drop_reason": failure.reason, "drop_detail": failure.detail or None}
