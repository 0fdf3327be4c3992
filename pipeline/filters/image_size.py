from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Estimate, SizeFilter


@dataclass(kw_only=True)
class ImageSize(SizeFilter):
    """Drops small pictures: those with a shorter side under `min_side` pixels (reason `too_small`).

    The sides are those of the published picture, before resizing. Rows of unknown size are dropped too. The default
    comes from DataComp's basic filter (Gadre et al., 2023).
    """

    min_side: int = 200
    """Minimum length of the shorter side, in pixels."""

    columns: list[str] = field(default_factory=lambda: ["original_width", "original_height"])
    """The columns of width and height, in pixels. Before a download, use those of the pool: `[pool_original_width,
    pool_original_height]` for CommonPool."""

    reason = "too_small"

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.80, 1e6, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if self.min_side < 1:
            yield "min_side", f"{self.min_side} keeps everything; expected at least 1 pixel"
        yield from super().check()

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pc.greater_equal(self.value(batch), self.min_side)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        width, height = (dropped[name].cast(pa.string()) for name in self.columns)
        return pc.fill_null(pc.binary_join_element_wise(width, height, "x"), "unknown")

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        shorter = pc.min_element_wise(*(dropped[name] for name in self.columns), skip_nulls=False)
        return shorter.cast(pa.float64())
