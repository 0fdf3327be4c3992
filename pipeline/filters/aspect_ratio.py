from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Estimate, SizeFilter


@dataclass(kw_only=True)
class AspectRatio(SizeFilter):
    """Drops elongated pictures, such as banners and rules: longer side / shorter side > `max` (reason `too_elongated`).

    The sides are those of the published picture, before resizing. Rows of unknown size are dropped too. The default
    comes from DataComp's basic filter (Gadre et al., 2023).
    """

    max: float = 3.0
    """Maximum ratio of the longer to the shorter side; 1.0 keeps only squares."""

    columns: list[str] = field(default_factory=lambda: ["original_width", "original_height"])
    """The columns of width and height, in pixels. Before a download, use those of the pool: `[pool_original_width,
    pool_original_height]` for CommonPool."""

    reason = "too_elongated"

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.98, 1e6, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.max >= 1:
            yield "max", f"{self.max} drops every picture; expected 1.0 or more (longer side / shorter side)"
        yield from super().check()

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pc.less_equal(self.value(batch), self.max)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        return pc.fill_null(pc.round(self.value(dropped), 2).cast(pa.string()), "unknown")

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        # Floats, so that a side of 0 gives infinity (dropped) instead of an error.
        width, height = (dropped[name].cast(pa.float64()) for name in self.columns)
        longer = pc.max_element_wise(width, height, skip_nulls=False)
        return pc.divide(longer, pc.min_element_wise(width, height, skip_nulls=False))
