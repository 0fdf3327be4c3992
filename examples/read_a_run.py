"""Prints a histogram of a column of a run: `python examples/read_a_run.py runs/demo clip_score`."""

from __future__ import annotations

import sys

import numpy as np

from pipeline import open_run


def main(path: str, column: str = "clip_score") -> np.ndarray:
    """Counts the values of a column in 40 bins from 0 to 1, for all measured rows, also those dropped later."""
    run = open_run(path)
    measured = next(step.label for step in run.steps if column in step.adds)
    counts = np.zeros(40, np.int64)
    for table in run.scan([column], after=measured):
        counts += np.histogram(table[column], bins=40, range=(0, 1))[0]
    for low, count in zip(np.arange(40) / 40, counts):
        print(f"{low:.3f} {count:8,} {'█' * int(60 * count / max(counts.max(), 1))}")
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
