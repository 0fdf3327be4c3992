"""Shared by `text_safety` and `image_safety`: checks the scores of the user's scorer, and applies the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import check_column_name


def check_score(column: str, max_score: float | None) -> Iterator[tuple[str, str]]:
    """Yields `(key, problem)` for an unusable column name or limit of a score."""
    yield from check_column_name(column, "unsafe_score")
    if max_score is not None and not 0 <= max_score <= 1:
        yield "max_score", f"must be from 0 to 1, found {max_score}"


def scored(path: str, scorer: Callable[[Any], Any], items: Sequence[Any]) -> np.ndarray:
    """Calls a scorer. Returns float64 of shape (n,), 0 to 1 or NaN; raises ValueError for anything else.

    `path` names the scorer in errors.
    """
    scores = np.asarray(scorer(items), np.float64)
    if scores.shape != (len(items),):
        raise ValueError(f"{path}: expected {len(items)} scores, found an array of shape {scores.shape}")
    if (wrong := scores[(scores < 0) | (scores > 1)]).size:
        raise ValueError(f"{path}: expected scores from 0 to 1, found {wrong[0]}")
    return scores


def with_score(batch: pa.Table, column: str, scores: np.ndarray, max_score: float | None) -> pa.Table:
    """Appends scores, with null for NaN. Marks rows above the limit as `unsafe`, and rows without a score as `missing`.

    A limit of None marks no row.
    """
    batch = batch.append_column(column, pa.array(scores, pa.float32(), from_pandas=True))
    if max_score is None:
        return batch
    unsafe = pc.if_else(pa.array(scores > max_score), "unsafe", pa.scalar(None, pa.string()))
    reasons = pc.if_else(pa.array(np.isnan(scores)), "missing", unsafe)
    batch = batch.append_column("drop_reason", reasons)
    return batch.append_column("drop_value", pa.array(scores, pa.float64(), from_pandas=True))
