from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Estimate, Filter


@dataclass(kw_only=True)
class AspectRatio(Filter):
    """Drops pictures longer than `max` times their shorter side: banners, rules, skyscrapers (reason `too_elongated`).

    The ratio is of the published size, longer over shorter side, so ≥ 1 whichever way the picture lies. A row whose
    size is unknown is dropped too. Source: DataComp's basic filter (2023), ratio ≤ 3.
    """

    max: float = 3.0
    """The largest ratio kept, from 1.0 (only squares)."""

    needs = ("original_width", "original_height")

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.98, 1e6, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.max >= 1:
            yield "max", f"{self.max} is below any picture's ratio of longer to shorter side; expected 1.0 or more"

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pc.less_equal(_ratio(batch), self.max)

    def reason(self, dropped: pa.Table) -> pa.StringArray:
        return pa.array(["too_elongated"] * len(dropped), pa.string())

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        return pc.fill_null(pc.round(_ratio(dropped), 2).cast(pa.string()), "unknown")

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        return _ratio(dropped)


def _ratio(batch: pa.Table) -> pa.ChunkedArray:
    # Floats, since a side of 0 must give infinity (dropped) and not an error.
    width, height = (batch[name].cast(pa.float64()) for name in AspectRatio.needs)
    longer = pc.max_element_wise(width, height, skip_nulls=False)
    return pc.divide(longer, pc.min_element_wise(width, height, skip_nulls=False))
