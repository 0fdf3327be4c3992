"""The event loop for rows: resources reused between streams, and its limits."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pyarrow as pa
import pytest

from pipeline.fetch.concurrent_rows import Begin, ConcurrentRows, Work


class Doubling:
    """Doubles numbers; fails on 13. Counts opens, closes and begun rows."""

    def __init__(self) -> None:
        self.opened = self.closed = self.begun = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Work[int]]:
        self.opened += 1

        async def work(values: tuple[Any, ...], begin: Begin) -> int:
            await begin()
            self.begun += 1
            await asyncio.sleep(0)
            if values[0] == 13:
                raise RuntimeError("thirteen")
            return int(2 * values[0])

        try:
            yield work
        finally:
            self.closed += 1


def rows_at_work(doubling: Doubling, **options: int) -> ConcurrentRows[int]:
    return ConcurrentRows(doubling, columns=["n"], **{"concurrency": 8, "admitted": 64, "group": 4, **options})


def results(working: ConcurrentRows[int], numbers: range) -> list[int]:
    return sorted(result for group in working([pa.table({"n": list(numbers)})]) for _, _, result in group)


def test_resources_are_reused_between_streams() -> None:
    doubling = Doubling()
    working = rows_at_work(doubling)
    for start in (100, 200, 300):
        assert results(working, range(start, start + 50)) == [2 * n for n in range(start, start + 50)]
    assert (doubling.opened, doubling.closed) == (1, 0)


def test_resources_are_reopened_after_an_error() -> None:
    doubling = Doubling()
    working = rows_at_work(doubling)
    with pytest.raises(RuntimeError, match="thirteen"):
        results(working, range(20))
    assert (doubling.opened, doubling.closed) == (1, 1)
    assert results(working, range(20, 30)) == [2 * n for n in range(20, 30)]
    assert doubling.opened == 2


def test_the_thread_ends_when_the_object_is_collected() -> None:
    doubling = Doubling()
    working = rows_at_work(doubling)
    results(working, range(5))
    assert results(pickle.loads(pickle.dumps(rows_at_work(Doubling()))), range(3)) == [0, 2, 4]
    del working
    gc.collect()
    assert doubling.closed == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "rows"]


def test_rows_wait_for_a_slow_consumer() -> None:
    """At most `concurrency` rows run and two groups are finished, beyond those taken."""
    doubling = Doubling()

    def tables() -> Iterator[pa.Table]:
        for start in range(1000, 2000, 20):
            yield pa.table({"n": list(range(start, start + 20))})

    stream = rows_at_work(doubling)(tables())
    handed_out = 0
    for _ in range(3):
        handed_out += len(next(stream))
        time.sleep(0.2)
        assert doubling.begun <= handed_out + 8 + 2 * 4
    assert handed_out + sum(map(len, stream)) == 1000
