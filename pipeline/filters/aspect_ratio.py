from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Estimate, Filter


@dataclass(kw_only=True)
class AspectRatio(Filter):
    """Drops pictures whose longer side is over `max` times the shorter: banners, rules (reason `too_elongated`).

    The ratio is longer over shorter side of the published size, so it is at least 1. Rows of unknown size are dropped
    too. Source: DataComp's basic filter (2023), ratio ≤ 3.
    """

    max: float = 3.0
    """Maximum ratio; 1.0 keeps only squares."""

    needs = ("original_width", "original_height")
    reason = "too_elongated"

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.98, 1e6, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.max >= 1:
            yield "max", f"{self.max} drops every picture; expected 1.0 or more (longer side / shorter side)"

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pc.less_equal(_ratio(batch), self.max)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        return pc.fill_null(pc.round(_ratio(dropped), 2).cast(pa.string()), "unknown")

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        return _ratio(dropped)


def _ratio(batch: pa.Table) -> pa.ChunkedArray:
    # Floats, so that a side of 0 gives infinity (dropped) instead of an error.
    width, height = (batch[name].cast(pa.float64()) for name in AspectRatio.needs)
    longer = pc.max_element_wise(width, height, skip_nulls=False)
    return pc.divide(longer, pc.min_element_wise(width, height, skip_nulls=False))
