"""The condition of a `threshold` line. The step, the studio and studies share this code, so they keep the same rows.

Each of the three finds the boundary of a top fraction in its own way: the step across a cluster, the studio in sorted
columns in memory, a study in files larger than memory. `Boundary.keeps` then decides every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

RULES = ("min", "max", "top_fraction")
"""The kinds of conditions on a column."""

SIGNS = {"min": "≥", "max": "≤"}


@dataclass(frozen=True)
class Condition:
    """One `threshold` line: a minimum, a maximum, or the top fraction of the rows that earlier conditions kept."""

    column: str
    rule: str
    """One of RULES."""
    value: float

    def __str__(self) -> str:
        if self.rule in SIGNS:
            return f"{self.column} {SIGNS[self.rule]} {self.value:g}"
        return f"{self.column} top {float(Fraction(str(self.value)) * 100):g}%"

    def line(self) -> dict[str, Any]:
        """The condition as a recipe line."""
        return {"threshold": {"column": self.column, self.rule: self.value}}


@dataclass(frozen=True)
class Boundary:
    """The lowest row that a condition keeps.

    Rows are ranked by value, then by the hash of the uid, then by their place in the run, since a pool may repeat uids.
    """

    value: float
    """NaN keeps no row."""
    uid_hash: int = 0
    place: int = 0

    def keeps(
        self,
        values: np.ndarray,
        uid_hashes: Callable[[np.ndarray], np.ndarray],
        places: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """Whether each row is at the boundary or above it: bool of shape (n,). NaN is never kept.

        `uid_hashes` and `places` map row indices to uint64. They are called for the rows whose value is the boundary's.
        """
        value = _at_least(self.value, values.dtype)
        if not (self.uid_hash or self.place):
            return np.asarray(values >= value)
        kept = np.asarray(values > value)
        tied = np.flatnonzero(values == value)
        hashes, lowest = uid_hashes(tied), np.uint64(self.uid_hash)
        kept[tied] = (hashes > lowest) | ((hashes == lowest) & (places(tied) >= self.place))
        return kept


@dataclass(frozen=True)
class Ceiling:
    """The highest value that a condition keeps, as returned by `highest`."""

    value: float

    def keeps(self, values: np.ndarray, *_: object) -> np.ndarray:
        """Whether each row is at the ceiling or below it: bool of shape (n,). NaN is never kept."""
        return np.asarray(values <= self.value)


def highest(maximum: float, dtype: pa.DataType) -> float:
    """A maximum rounded to its column's precision, so that 0.1 keeps a 0.1 stored as float32, which is larger."""
    return float(dtype.to_pandas_dtype()(maximum)) if pa.types.is_floating(dtype) else maximum


def wanted(fraction: float, rows: int) -> int:
    """The number of rows that a top fraction keeps, rounded up.

    Exact decimal arithmetic: 0.07 of 100 is 7, although the float nearest to 0.07 is larger.
    """
    return math.ceil(Fraction(str(fraction)) * rows)


def _at_least(value: float, dtype: np.dtype) -> np.floating:
    """The smallest number of the type that is at least `value`. Comparing with it equals comparing in float64."""
    rounded: np.floating = dtype.type(value)
    return dtype.type(np.nextafter(rounded, dtype.type(np.inf))) if float(rounded) < value else rounded
