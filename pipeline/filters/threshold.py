from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.hashing import hash64
from pipeline.step import Estimate, Filter, drops_frame

if TYPE_CHECKING:
    import dask.dataframe as dd

_WORDS = 3
_DIGIT_BITS = 16
_SHIFTS = (48, 32, 16, 0)


@dataclass(kw_only=True)
class Threshold(Filter):
    """Keeps the rows with the highest values in a column: all from `min` up, or the `top_fraction` of the run.

    `top_fraction` keeps exactly ceil(fraction · n) of the n rows that have a value; among equal values at the cut, a
    hash of the uid chooses. A score's best cut is better named as a fraction, since its scale changes with the model
    that gave it (DataComp, Gadre et al. 2023: the top 30% by CLIP score). Rows without a value, null or NaN, are
    dropped as `missing`, the others as `threshold`.
    """

    column: str
    """The column of numbers to compare."""
    min: float | None = None
    """The lowest value kept; decided row by row."""
    top_fraction: float | None = None
    """Share of the run's rows to keep, between 0 and 1; a barrier."""

    def __post_init__(self) -> None:
        self.needs = (self.column,)  # type: ignore[misc]
        self.scope = "row" if self.top_fraction is None else "run"

    def estimate(self, rows: float) -> Estimate:
        keep = 0.5 if self.top_fraction is None else self.top_fraction
        return Estimate(keep, 500_000, "keep as given" if self.top_fraction else "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if (self.min is None) == (self.top_fraction is None):
            found = "neither" if self.min is None else "both"
            yield "min", f"exactly one of `min` and `top_fraction` must be given, found {found}"
        if self.min is not None and math.isnan(self.min):
            yield "min", "must be a number, found nan"
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            yield "top_fraction", f"must be above 0 and at most 1, found {self.top_fraction}"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        dtype = types.get(self.column)
        if dtype is not None and not _comparable(dtype):
            yield "column", f"the column {self.column!r} must hold numbers, but is of the type {dtype}"

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pa.array(self._values(batch) >= self.min)

    def reason(self, dropped: pa.Table) -> pa.StringArray:
        return pc.if_else(pa.array(np.isnan(self._values(dropped))), "missing", "threshold")

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        return _compared(self._values(dropped), self.min)

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        return pa.array(self._values(dropped), from_pandas=True)  # NaN decides nothing

    def decide(self, frame: dd.DataFrame) -> dd.DataFrame:
        return frame.map_partitions(self._below, self._cut(frame), meta=drops_frame())

    def _below(self, part: pd.DataFrame, cut: list[int]) -> pd.DataFrame:
        table = pa.Table.from_pandas(part, preserve_index=False)
        values = self._values(table)
        # Lexicographic: each word of the key decides only where those before it are equal.
        kept, tied = np.zeros(len(values), bool), ~np.isnan(values)
        for word, at in enumerate(cut):
            key = _word(table, values, word)
            kept |= tied & (key > np.uint64(at))
            tied &= key == np.uint64(at)
        dropped = table.filter(pa.array(~(kept | tied)))
        values = values[~(kept | tied)]
        reasons = pc.if_else(pa.array(np.isnan(values)), "missing", "threshold")
        details = _compared(values, float(_decoded(cut[0])) if cut else math.nan)
        columns = {"unit": dropped["unit"], "row": dropped["row"], "reason": reasons, "detail": details}
        return drops_frame(pa.table({**columns, "value": pa.array(values, from_pandas=True)}))

    def _cut(self, frame: dd.DataFrame) -> list[int]:
        """The lowest key kept, as the first words of (value, hash of the uid, position); empty if no row has a value.

        A radix selection from the highest digit down: each round counts the rows by their next 16 bits, among those
        that agree with the digits found so far. Four rounds find the value, and only a tie at the cut needs more. The
        counts, at most 65,536 of them, are all that reaches the driver.
        """
        cut: list[int] = []
        wanted: int | None = None
        while len(cut) < _WORDS:
            prefix = 0
            for shift in _SHIFTS:
                digits = frame.map_partitions(self._digits, cut, prefix, shift, meta=pd.Series([], dtype="int64"))
                counts = digits.value_counts().compute().sort_index(ascending=False)
                if counts.empty:
                    return []
                if wanted is None:
                    # As the recipe spells it: 0.07 of 100 is 7, though the float nearest to 0.07 lies above it.
                    wanted = math.ceil(Fraction(str(self.top_fraction)) * int(counts.sum()))
                reached = counts.to_numpy(dtype=np.int64).cumsum()
                place = int(np.searchsorted(reached, wanted))
                wanted -= int(reached[place - 1]) if place else 0
                prefix = prefix << _DIGIT_BITS | int(counts.index[place])
            cut.append(prefix)
            if wanted == int(counts.iloc[place]):
                break
        return cut

    def _digits(self, part: pd.DataFrame, cut: list[int], prefix: int, shift: int) -> pd.Series:
        """The next digit of the rows that agree with all before it."""
        table = pa.Table.from_pandas(part, preserve_index=False)
        values = self._values(table)
        table, values = table.filter(pa.array(~np.isnan(values))), values[~np.isnan(values)]
        for word, at in enumerate(cut):
            equal = _word(table, values, word) == np.uint64(at)
            table, values = table.filter(pa.array(equal)), values[equal]
        key = _word(table, values, len(cut)) >> np.uint64(shift)
        above, digit = np.divmod(key, np.uint64(1 << _DIGIT_BITS))
        return pd.Series(digit[above == np.uint64(prefix)].astype(np.int64))

    def _values(self, table: pa.Table) -> np.ndarray:
        column = table[self.column]
        if not _comparable(column.type):
            raise ValueError(f"{self.label}: column {self.column!r} must hold numbers, found {column.type}")
        return pc.fill_null(column.cast(pa.float64(), safe=False), math.nan).to_numpy()


def _comparable(dtype: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    return any(is_kind(dtype) for is_kind in kinds)


def _word(table: pa.Table, values: np.ndarray, word: int) -> np.ndarray:
    """One of the three words by which rows are ranked. The position is the last: a pool's own uids may repeat."""
    if word == 0:
        bits = (values + 0.0).view(np.uint64)  # 0.0 and -0.0 are equal, their bits are not
        # Read as integers, IEEE 754 numbers are in order but for the negative ones, whose order is reversed.
        return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))
    if word == 1:
        return hash64(table["uid"], purpose="threshold")
    unit, row = (table[name].to_numpy().astype(np.uint64) for name in ("unit", "row"))
    return unit << np.uint64(32) | row


def _decoded(key: int) -> np.float64:
    """The value whose word is `key`."""
    return np.uint64(key & ~(1 << 63) if key >> 63 else ~key & (1 << 64) - 1).view(np.float64)


def _compared(values: np.ndarray, cut: float | None) -> pa.StringArray:
    return pa.array([None if math.isnan(v) else f"{v:.6g}, cut at {cut:.6g}" for v in values.tolist()], pa.string())
