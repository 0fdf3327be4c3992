"""Memory and sockets of this process and its descendants."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

# Linux, with a kernel that lists child processes and proportional memory.
CAN_MEASURE = Path("/proc/self/smaps_rollup").exists() and Path(f"/proc/self/task/{os.getpid()}/children").exists()


def family(root: int | None = None, without: Collection[int] = ()) -> list[int]:
    """Process ids of `root` (default: this process) and its descendants, excluding `without` and theirs."""
    found, ahead = [], [os.getpid() if root is None else root]
    while ahead:
        pid = ahead.pop()
        if pid not in without:
            found.append(pid)
            for thread in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # it has exited
                    ahead += map(int, thread.read_text().split())
    return found


def alive(pid: int) -> bool:
    """True if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WHOLE = ("Pss:",)
OWN = ("Pss_Anon:", "Pss_Shmem:")
"""Excludes file-backed pages, such as libraries: a process's share of them grows when other processes end."""


def memory(root: int | None = None, without: Collection[int] = (), kinds: tuple[str, ...] = WHOLE) -> int:
    """Proportional set size of the family in bytes: a page shared by n processes counts 1/n for each."""
    total = 0
    for pid in family(root, without):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(kinds):
                    total += 1024 * int(line.split()[1])
    return total


def sockets() -> int:
    """Open sockets of this process."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += os.readlink(entry).startswith("socket:")
    return count


@contextlib.contextmanager
def peak_memory(root: int | None = None, without: Collection[int] = (), every: float = 0.05) -> Iterator[list[int]]:
    """Measures periodically. The yielded list holds only the highest value."""
    peak = [memory(root, without)]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every):
            peak[0] = max(peak[0], memory(root, without))

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
