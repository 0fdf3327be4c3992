"""What a `threshold` line keeps. The step, the studio and studies decide by this code, so they keep the same rows.

Each finds the boundary of a top fraction where its rows are: the step across a cluster, the studio in sorted columns in
memory, a study in files larger than memory. `Boundary.keeps` then decides every row.
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
"""What a condition may ask of a column."""

SIGNS = {"min": "≥", "max": "≤"}


@dataclass(frozen=True)
class Condition:
    """One `threshold` line: a minimum, a maximum, or the top fraction of what the conditions before it kept."""

    column: str
    rule: str
    """One of RULES."""
    value: float

    def __str__(self) -> str:
        if self.rule in SIGNS:
            return f"{self.column} {SIGNS[self.rule]} {self.value:g}"
        return f"{self.column} top {float(Fraction(str(self.value)) * 100):g}%"

    def line(self) -> dict[str, Any]:
        """The line of a recipe."""
        return {"threshold": {"column": self.column, self.rule: self.value}}


@dataclass(frozen=True)
class Boundary:
    """The lowest row that a condition keeps.

    Rows rank by value, then by the hash of the uid, then by their place in the run, because a pool may repeat uids.
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

        `uid_hashes` and `places` are asked for the rows, by index, whose value is that of the boundary.
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
    """The highest value that a condition keeps, as `highest` gives it."""

    value: float

    def keeps(self, values: np.ndarray, *_: object) -> np.ndarray:
        """Whether each row is at the ceiling or below it: bool of shape (n,). NaN is never kept."""
        return np.asarray(values <= self.value)


def highest(maximum: float, dtype: pa.DataType) -> float:
    """A maximum in the precision of its column: a 0.1 that was stored as float32 is above the float64 0.1."""
    return float(dtype.to_pandas_dtype()(maximum)) if pa.types.is_floating(dtype) else maximum


def wanted(fraction: float, rows: int) -> int:
    """How many of so many rows a top fraction keeps, rounded up.

    Exact decimal arithmetic: 0.07 of 100 is 7, although the float nearest to 0.07 is larger.
    """
    return math.ceil(Fraction(str(fraction)) * rows)


def _at_least(value: float, dtype: np.dtype) -> np.floating:
    """The smallest number of the type that is not below the value: comparing with it is comparing in float64."""
    rounded: np.floating = dtype.type(value)
    return dtype.type(np.nextafter(rounded, dtype.type(np.inf))) if float(rounded) < value else rounded
