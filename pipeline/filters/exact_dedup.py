from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.hashing import hash64
from pipeline.step import Estimate, KeyedFilter
from pipeline.url import canonical


@dataclass(kw_only=True)
class ExactDedup(KeyedFilter):
    """Of rows that agree in all columns of `by`, keeps the one with the lowest uid.

    Compares URLs in canonical form (`pipeline.url`) and other columns verbatim. Keeps rows with a null in a `by`
    column. If `by` contains `url`, the step is not a barrier: rows with equal URLs are in the same unit.
    """

    by: list[str] = field(default_factory=lambda: ["url"])
    """The columns to compare, such as `[url]`, `[url, caption]` or, after the download, `[sha256]`."""

    def __post_init__(self) -> None:
        self.needs = ("uid", *(column for column in self.by if column != "uid"))  # type: ignore[misc]
        self.scope = "unit" if "url" in self.by else "run"

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.97, 50_000, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.by:
            yield "by", "must name at least one column, found []"
        if len(set(self.by)) < len(self.by):
            yield "by", f"must name each column once, found {self.by}"

    def key(self, batch: pa.Table) -> np.ndarray:
        key = np.zeros(len(batch), np.uint64)
        for column in self._compared(batch):
            text = column if pa.types.is_string(column.type) else column.cast(pa.string())
            key = key * np.uint64(0x9E3779B97F4A7C15) + hash64(pc.fill_null(text, ""))
        return key

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        compared = pd.concat([c.to_pandas(types_mapper=pd.ArrowDtype) for c in self._compared(batch)], axis=1)
        shared = (compared.duplicated(keep=False) & compared.notna().all(axis=1)).to_numpy()
        # Only duplicate rows need sorting, and they are few.
        twins = compared[shared].set_axis(range(compared.shape[1]), axis=1)
        order = batch.select(["uid", "unit", "row"]).filter(pa.array(shared)).to_pandas()
        twins = twins.iloc[np.lexsort((order["row"], order["unit"], order["uid"].astype(str)))]
        keep = np.ones(len(batch), bool)
        keep[twins.index[twins.duplicated()]] = False
        return pa.array(keep)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        """The values shared with the row that was kept, by which to find it."""
        shared = [column.cast(pa.string()) for column in self._compared(dropped)]
        return pc.binary_join_element_wise(*shared, " ").combine_chunks()

    def _compared(self, batch: pa.Table) -> list[pa.ChunkedArray]:
        return [_canonical(batch[column]) if column == "url" else batch[column] for column in self.by]


def _canonical(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([[None if url is None else canonical(url) for url in urls.to_pylist()]], pa.string())
