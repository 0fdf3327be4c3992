"""Finds the rows of a unit that kill their worker process, by running rows in child processes, and drops them.

An exception is a bug and is raised. The death of a process (a segmentation fault in a decoder, an out-of-memory kill)
is attributed to its input: the unit is bisected down to the rows that cause it, those rows are dropped as
`decoder_crash`, and the rest of the unit is committed as usual.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import cloudpickle
import numpy as np

from pipeline.child import die_with_parent, start_child
from pipeline.scheduler.passes import Pass, UnitPass
from pipeline.scheduler.run_pass import run_pass

ATTEMPTS = 3
"""Ordinary attempts at a unit before it is isolated."""


def attempt(p: Pass, unit: int) -> int:
    """Records an attempt at a unit before it starts, so that the count survives a crash. Returns its number, from 1.

    All attempts beyond ATTEMPTS return ATTEMPTS + 1.
    """
    for number in range(1, ATTEMPTS + 1):
        if p.store.create(f"attempts/{unit:07d}.{number}", b""):
            return number
    return ATTEMPTS + 1


def forgive(p: Pass, units: Iterable[int]) -> None:
    """Deletes the recorded attempts at units whose failure had another cause, such as a lost node."""
    for unit in units:
        for number in range(1, ATTEMPTS + 1):
            p.store.remove(f"attempts/{unit:07d}.{number}")


def run_isolated(passes: Sequence[Pass], index: int, unit: int) -> dict[str, Any]:
    """Commits a unit without the rows that crash a process, and returns its record."""
    p, before = passes[index], passes[:index]
    assert isinstance(p, UnitPass)
    rows = p.missing(before, unit)
    crashers = _find(passes, index, unit, rows)
    _run_rows(passes, index, unit, rows, np.array(crashers, np.int32), commit=True)
    record = p.account(before, unit)
    if record is None:
        raise RuntimeError(f"unit {unit} of {p.label} crashes only when all its rows run together; free more memory")
    return record


def _find(passes: Sequence[Pass], index: int, unit: int, rows: np.ndarray) -> list[int]:
    """Bisects the rows of a unit. Returns the rows that crash a process on their own."""
    if not len(rows) or _run_rows(passes, index, unit, rows, np.empty(0, np.int32), commit=False):
        return []
    if len(rows) == 1:
        return [int(rows[0])]
    half = len(rows) // 2
    return _find(passes, index, unit, rows[:half]) + _find(passes, index, unit, rows[half:])


def _run_rows(
    passes: Sequence[Pass], index: int, unit: int, rows: np.ndarray, crashers: np.ndarray, commit: bool
) -> bool:
    """Runs some rows of a unit in a child process. Returns False if the process died; raises if it failed."""
    job = cloudpickle.dumps((list(passes), index, unit, rows, crashers, commit))
    with start_child("pipeline.scheduler.isolation", stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(job)
    if process.returncode == 1:
        raise RuntimeError(f"unit {unit} of {passes[index].label}: {errors.decode(errors='replace').strip()}")
    return process.returncode == 0


def _main() -> None:
    die_with_parent()
    passes, index, unit, rows, crashers, commit = cloudpickle.loads(sys.stdin.buffer.read())
    passes[index].setup()
    for _ in run_pass(passes, index, [unit], rows=rows, crashers=crashers, commit=commit):
        pass


if __name__ == "__main__":
    _main()
