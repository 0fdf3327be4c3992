"""The concepts of a run: the entries that its `balance` step names, and which captions match them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.reader import Run
from pipeline.text.matching import matcher, normalised, read_entries


def find_entries(run: Run) -> tuple[str, ...]:
    """The entries that `balance` was given, in normal form; none without such a step, or if its file is not here."""
    from pipeline.filters.balance import Balance  # brings pandas, which `--help` of commands does not need

    for step in run.steps:
        path = step.options.get("entries")
        if step.step == f"{Balance.__module__}.{Balance.__name__}" and path:
            try:
                return read_entries(path)
            except (OSError, ValueError):
                continue
    return ()


def matches(captions: pa.ChunkedArray, entries: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Row and entry (indices) of every distinct match, as `balance` finds them."""
    return matcher(entries).pairs(normalised(captions))
