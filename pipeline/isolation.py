"""The last resort for a unit that kills its workers: find the rows that do it, each in a process that may die.

An exception is a bug and is reported as one. A dead process (a segmentation fault in a decoder, a kill for memory) is
bad luck with hostile bytes: the unit is bisected down to the rows that cause it, those become drops
(`decoder_crash`), and the rest of the unit is committed as usual.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import cloudpickle
import numpy as np

from pipeline.fetch.sandbox import die_with_parent
from pipeline.passes import Pass, committed, missing_rows, run_pass

ATTEMPTS = 3
"""How often a unit is tried in the ordinary way."""


def attempt(p: Pass, unit: int) -> int:
    """Notes that a unit is about to be tried, for whoever comes after a crash; the number of this attempt, from 1.

    Attempts beyond ATTEMPTS are not told apart.
    """
    for number in range(1, ATTEMPTS + 1):
        if p.store.create(f"attempts/{unit:07d}.{number}", b""):
            return number
    return ATTEMPTS + 1


def forgive(p: Pass, units: Iterable[int]) -> None:
    """Forgets the attempts at units that failed through no fault of their own."""
    for unit in units:
        for number in range(1, ATTEMPTS + 1):
            p.store.remove(f"attempts/{unit:07d}.{number}")


def run_isolated(passes: Sequence[Pass], index: int, unit: int) -> dict[str, Any]:
    """Commits a unit without the rows that crash; returns its record."""
    rows = missing_rows(passes[: index + 1], unit)
    crashers = _find(passes, index, unit, rows)
    _child(passes, index, unit, rows, np.array(crashers, np.int32), commit=True)
    record = committed(passes[: index + 1], unit)
    if record is None:
        raise RuntimeError(f"unit {unit} of {passes[index].label} dies only as a whole: is there enough memory for it?")
    return record


def _find(passes: Sequence[Pass], index: int, unit: int, rows: np.ndarray) -> list[int]:
    if not len(rows) or _child(passes, index, unit, rows, np.empty(0, np.int32), commit=False):
        return []
    if len(rows) == 1:
        return [int(rows[0])]
    half = len(rows) // 2
    return _find(passes, index, unit, rows[:half]) + _find(passes, index, unit, rows[half:])


def _child(passes: Sequence[Pass], index: int, unit: int, rows: np.ndarray, crashers: np.ndarray, commit: bool) -> bool:
    """Runs some rows of a unit in a process of their own; False if the process died of them."""
    job = cloudpickle.dumps((list(passes), index, unit, rows, crashers, commit))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.run(
        [sys.executable, "-m", "pipeline.isolation"], input=job, env=environment, stderr=subprocess.PIPE
    )
    if child.returncode == 1:
        raise RuntimeError(f"unit {unit} of {passes[index].label}: {child.stderr.decode(errors='replace').strip()}")
    return child.returncode == 0


def _main() -> None:
    die_with_parent()
    passes, index, unit, rows, crashers, commit = cloudpickle.loads(sys.stdin.buffer.read())
    for step in passes[index].steps:
        step.setup()
    for _ in run_pass(passes, index, [unit], rows=rows, crashers=crashers, commit=commit):
        pass


if __name__ == "__main__":
    _main()
