"""Summaries gathered batch by batch in bounded memory: histograms, counts of values, rows with the smallest keys."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BINS = 48


class Histogram:
    """Counts finite numbers in at most 2 · BINS bins of equal width. The width doubles when a number fits no bin."""

    def __init__(self) -> None:
        self.low, self.width = 0.0, 0.0
        self.counts = np.zeros(2 * BINS, np.int64)
        self.total = 0

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)].astype(np.float64)
        if not len(values):
            return
        low, high = float(values.min()), float(values.max())
        if not self.width:
            span = max(high - low, abs(high) * 1e-6, 1e-9)
            self.width = 2.0 ** math.ceil(math.log2(span / BINS))
            self.low = math.floor(low / self.width) * self.width
        self._cover(low, high)
        self.counts += np.bincount(((values - self.low) / self.width).astype(np.int64), minlength=len(self.counts))
        self.total += len(values)

    def _cover(self, low: float, high: float) -> None:
        """Moves the bins, and doubles their width if that is not enough, so that they also cover `low` to `high`.

        Edges stay multiples of the width, so no bin is split.
        """
        filled = np.flatnonzero(self.counts)
        at = self.low + filled * self.width
        low, high = min([low, *at[:1]]), max([high, *at[-1:]])
        wide = self.width
        while math.floor(high / wide) - math.floor(low / wide) >= len(self.counts):
            wide *= 2
        start = math.floor(low / wide) * wide
        if (start, wide) != (self.low, self.width):
            index = np.rint((np.floor(at / wide) * wide - start) / wide).astype(np.int64)
            self.counts = np.bincount(index, self.counts[filled], len(self.counts)).astype(np.int64)
            self.low, self.width = start, wide

    def bars(self, width: float = 0.0) -> list[tuple[float, float, int]]:
        """Returns `(from, to, count)` for each bin from the first to the last non-empty one.

        `width`, that of a wider histogram, merges the bins into bins of that width.
        """
        filled = np.flatnonzero(self.counts)
        if not len(filled):
            return []
        width = width or self.width
        at = np.floor((self.low + filled * self.width) / width).astype(np.int64)
        counts = np.bincount(at - at[0], self.counts[filled])
        return [((at[0] + i) * width, (at[0] + i + 1) * width, int(n)) for i, n in enumerate(counts)]


class Tally:
    """Counts values in bounded memory: of more than `most` distinct ones, the rarest are forgotten."""

    def __init__(self, most: int) -> None:
        self.counts: Counter[str] = Counter()
        self._most = most

    def add(self, values: pa.Array | pa.ChunkedArray) -> None:
        """Adds the values of a column of text, except nulls."""
        for found in pc.value_counts(values.drop_null()).to_pylist():
            self.counts[found["values"]] += found["counts"]
        if len(self.counts) > self._most:
            self.counts = Counter(dict(self.counts.most_common(self._most // 2)))


class NotedRow(NamedTuple):
    """A row, and the note to show with it, such as its value or the reason of its drop."""

    unit: int
    row: int
    note: str


class Nearest:
    """Keeps the `most` rows with the smallest keys."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, int, str]] = []

    def add(self, keys: np.ndarray, table: pa.Table, notes: Sequence[str]) -> None:
        """Adds the rows of a table with `unit` and `row`, a key and a note for each."""
        best = np.argsort(keys, kind="stable")[: self._most]
        units, rows = (table[name].take(pa.array(best)).to_pylist() for name in ("unit", "row"))
        for i, unit, row in zip(best.tolist(), units, rows):
            item = (-float(keys[i]), -unit, -row, notes[i])
            if len(self._heap) < self._most:
                heapq.heappush(self._heap, item)
            else:
                heapq.heappushpop(self._heap, item)

    def rows(self) -> list[NotedRow]:
        """The rows, smallest key first."""
        return [NotedRow(-unit, -row, note) for _, unit, row, note in sorted(self._heap, reverse=True)]
