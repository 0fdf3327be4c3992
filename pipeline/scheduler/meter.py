"""Measures how a process spends its time, from the kernel's counters for it and its child processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path


class Spent(dict[str, float]):
    """Seconds by use. `+=` adds another dictionary of this kind.

    | key | meaning |
    |---|---|
    | `waiting`, `working` | wall-clock time without a unit, and with one |
    | `cpu` | CPU time of all threads |
    | `queued` | time in which threads were ready to run and waited for a free core |
    | `child_cpu`, `child_queued` | the same for child processes, such as decoders |
    """

    def __missing__(self, what: str) -> float:
        return 0.0

    def __iadd__(self, other: Mapping[str, float]) -> Spent:
        for what, seconds in other.items():
            self[what] += seconds
        return self


class Meter:
    """Adds up the time of this process.

    The kernel's times come from `/proc` (`schedstat`: time on a core and in its queue). Without `/proc`, as on macOS,
    `cpu` is the only one of them. The time of threads and processes that end between two calls counts only in `cpu`.
    """

    def __init__(self) -> None:
        self._spent = Spent()
        self._clock, self._kernel = time.perf_counter(), _kernel()

    def add(self, what: str) -> None:
        """Counts the time since the last call, or since the beginning, as `what`."""
        clock, kernel = time.perf_counter(), _kernel()
        self._spent[what] += clock - self._clock
        self._spent += {key: max(0.0, seconds - self._kernel[key]) for key, seconds in kernel.items()}
        self._clock, self._kernel = clock, kernel

    def take(self) -> Spent:
        """Returns the time added since the last call."""
        spent, self._spent = self._spent, Spent()
        return spent


def _kernel() -> Spent:
    own, children = Path("/proc/self/task"), Spent()
    for child in _children(own):
        ran, queued = _scheduled(Path("/proc") / child / "task")
        children += {"child_cpu": ran, "child_queued": queued}
    return Spent(cpu=time.process_time(), queued=_scheduled(own)[1], **children)


def _children(threads: Path) -> Iterator[str]:
    with suppress(OSError):
        for thread in threads.iterdir():
            with suppress(OSError):  # the thread has just ended
                yield from (thread / "children").read_text().split()


def _scheduled(threads: Path) -> tuple[float, float]:
    """Seconds for which threads ran, and for which they were queued for a core."""
    ran = queued = 0
    with suppress(OSError):
        for thread in threads.iterdir():
            with suppress(OSError, ValueError):
                on, waiting, _ = map(int, (thread / "schedstat").read_text().split())
                ran, queued = ran + on, queued + waiting
    return ran / 1e9, queued / 1e9
