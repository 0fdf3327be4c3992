"""Finds the concepts of a run: the entries of its `balance` step, and the captions that match them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.reader import Run
from pipeline.text.matching import matcher, normalised, read_entries


def find_entries(run: Run) -> tuple[str, ...]:
    """Returns the normalised entries of the `balance` step; empty without one, or if its file cannot be read here."""
    from pipeline.filters.balance import Balance  # imports pandas, which the `--help` of commands does not need

    for step in run.steps:
        path = step.options.get("entries")
        if step.step == f"{Balance.__module__}.{Balance.__name__}" and path:
            try:
                return read_entries(path)
            except (OSError, ValueError):
                continue
    return ()


def matches(captions: pa.ChunkedArray, entries: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and the entries (indices, two arrays) of all distinct matches, as `balance` finds them."""
    return matcher(entries).pairs(normalised(captions))
