from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.condition import Boundary, highest, wanted
from pipeline.schema import is_number, numbers
from pipeline.step import Estimate, Filter, drops_frame
from pipeline.text.hashing import hash64

if TYPE_CHECKING:
    import dask.dataframe as dd
    import pandas as pd

_WORDS = 3
_DIGIT_BITS = 16
_SHIFTS = (48, 32, 16, 0)


@dataclass(kw_only=True)
class Threshold(Filter):
    """Keeps the rows whose value in a column is at least `min` and at most `max`, or the `top_fraction` of the run with
    the highest values.

    `top_fraction` keeps exactly ceil(top_fraction · n) of the n rows with a value; a hash of the uid breaks ties.
    Prefer a fraction for scores, since their scale depends on the model (DataComp, Gadre et al., 2023: the top 30% by
    CLIP score). `max` is for scores where lower is better, such as the probability that a picture is unsafe. Rows with
    null or NaN are dropped as `missing`, others as `threshold`.
    """

    column: str
    """The numeric column to compare."""
    min: float | None = None
    """Lowest value kept. Each row is decided on its own."""
    max: float | None = None
    """Highest value kept. Each row is decided on its own."""
    top_fraction: float | None = None
    """Share of the run's rows with a value to keep, above 0 and at most 1. Makes the step a barrier."""

    def __post_init__(self) -> None:
        self.needs = (self.column,)  # type: ignore[misc]
        self.scope = "row" if self.top_fraction is None else "run"
        self._low = -math.inf if self.min is None else self.min
        self._high = math.inf if self.max is None else self.max

    def estimate(self, rows: float) -> Estimate:
        keep = 0.5 if self.top_fraction is None else self.top_fraction
        return Estimate(keep, 500_000, "keep as given" if self.top_fraction else "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        bounds = {key: value for key in ("min", "max") if (value := getattr(self, key)) is not None}
        if bool(bounds) == (self.top_fraction is not None):
            found = "both" if bounds else "neither"
            yield "min", f"either `min` or `max`, or `top_fraction` must be given, found {found}"
        for key, value in bounds.items():
            if math.isnan(value):
                yield key, "must be a number, found nan"
        if len(bounds) == 2 and bounds["min"] > bounds["max"]:
            yield "max", f"must be at least `min`, {self.min}, found {self.max}"
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            yield "top_fraction", f"must be above 0 and at most 1, found {self.top_fraction}"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        dtype = types.get(self.column)
        if dtype is not None and not comparable(dtype):
            yield "column", f"the column {self.column!r} must hold numbers, found type {dtype}"

    def judge(self, batch: pa.Table) -> pa.StringArray:
        values = self._values(batch)
        outside = pc.if_else(
            pa.array((values < self._low) | (values > self._highest(batch))), "threshold", pa.scalar(None, pa.string())
        )
        return pc.if_else(pa.array(np.isnan(values)), "missing", outside)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        values = self._values(dropped)
        return _compared(values, np.where(values > self._highest(dropped), self._high, self._low))

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        return pa.array(self._values(dropped), from_pandas=True)  # NaN becomes null

    def decide(self, frame: dd.DataFrame) -> dd.DataFrame:
        return frame.map_partitions(self._below, self._boundary(frame), meta=drops_frame())

    def _below(self, part: pd.DataFrame, boundary: Boundary) -> pd.DataFrame:
        table = pa.Table.from_pandas(part, preserve_index=False)
        values = self._values(table)
        below = ~boundary.keeps(
            values, lambda at: _uid_hashes(table.take(pa.array(at))), lambda at: _places(table.take(pa.array(at)))
        )
        dropped, values = table.filter(pa.array(below)), values[below]
        reasons = pc.if_else(pa.array(np.isnan(values)), "missing", "threshold")
        details = _compared(values, boundary.value)
        columns = {"unit": dropped["unit"], "row": dropped["row"], "reason": reasons, "detail": details}
        return drops_frame(pa.table({**columns, "value": pa.array(values, from_pandas=True)}))

    def _boundary(self, frame: dd.DataFrame) -> Boundary:
        """The lowest row kept. If no row has a value, the boundary keeps no row.

        Radix selection over the three 64-bit words of a row's rank (value, hash of the uid, place), from the highest
        digit down. Each round counts rows by their next 16 bits, among the rows that match all digits found so far.
        Four rounds find the value; only ties at the boundary need more. Only the counts, at most 65,536, reach the
        driver.
        """
        import pandas as pd  # imported here, so that checking a recipe does not need pandas

        assert self.top_fraction is not None
        cut: list[int] = []
        left: int | None = None
        while len(cut) < _WORDS:
            prefix = 0
            for shift in _SHIFTS:
                digits = frame.map_partitions(self._digits, cut, prefix, shift, meta=pd.Series([], dtype="int64"))
                counts = digits.value_counts().compute().sort_index(ascending=False)
                if counts.empty:
                    return Boundary(math.nan)
                if left is None:
                    left = wanted(self.top_fraction, int(counts.sum()))
                reached = counts.to_numpy(dtype=np.int64).cumsum()
                place = int(np.searchsorted(reached, left))
                left -= int(reached[place - 1]) if place else 0
                prefix = prefix << _DIGIT_BITS | int(counts.index[place])
            cut.append(prefix)
            if left == int(counts.iloc[place]):
                break
        value, *tie = cut
        return Boundary(float(_decoded(value)), *tie)

    def _digits(self, part: pd.DataFrame, cut: list[int], prefix: int, shift: int) -> pd.Series:
        """The next digit of the rows that match all previous digits."""
        import pandas as pd

        table = pa.Table.from_pandas(part, preserve_index=False)
        values = self._values(table)
        table, values = table.filter(pa.array(~np.isnan(values))), values[~np.isnan(values)]
        for word, at in enumerate(cut):
            equal = _word(table, values, word) == np.uint64(at)
            table, values = table.filter(pa.array(equal)), values[equal]
        key = _word(table, values, len(cut)) >> np.uint64(shift)
        above, digit = np.divmod(key, np.uint64(1 << _DIGIT_BITS))
        return pd.Series(digit[above == np.uint64(prefix)].astype(np.int64))

    def _highest(self, table: pa.Table) -> float:
        return highest(self._high, table[self.column].type)

    def _values(self, table: pa.Table) -> np.ndarray:
        column = table[self.column]
        if not comparable(column.type):
            raise ValueError(f"{self.label}: column {self.column!r} must hold numbers, found {column.type}")
        return numbers(column)


def comparable(dtype: pa.DataType) -> bool:
    """True for numbers, and for the type of a column without any value, whose rows are dropped as `missing`."""
    return is_number(dtype) or pa.types.is_null(dtype)


def _word(table: pa.Table, values: np.ndarray, word: int) -> np.ndarray:
    """One of the three words of a row's rank."""
    if word == 0:
        bits = (values + 0.0).view(np.uint64)  # maps -0.0 to 0.0
        # As integers, IEEE 754 numbers sort correctly except the negative ones, whose order is reversed.
        return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))
    if word == 1:
        return _uid_hashes(table)
    return _places(table)


def _uid_hashes(table: pa.Table) -> np.ndarray:
    return hash64(table["uid"], purpose="threshold")


def _places(table: pa.Table) -> np.ndarray:
    unit, row = (table[name].to_numpy().astype(np.uint64) for name in ("unit", "row"))
    return unit << np.uint64(32) | row


def _decoded(key: int) -> np.float64:
    """The value with the word `key`."""
    return np.uint64(key & ~(1 << 63) if key >> 63 else ~key & (1 << 64) - 1).view(np.float64)


def _compared(values: np.ndarray, cut: float | np.ndarray) -> pa.StringArray:
    cuts = np.broadcast_to(cut, values.shape).tolist()
    texts = [None if math.isnan(v) else f"{v:.6g}, cut at {c:.6g}" for v, c in zip(values.tolist(), cuts)]
    return pa.array(texts, pa.string())
