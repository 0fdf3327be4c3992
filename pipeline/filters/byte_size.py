from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Estimate, Filter


@dataclass(kw_only=True)
class ByteSize(Filter):
    """Drops small files, such as icons, spacers and placeholders: those of fewer than `min` bytes (reason `too_small`).

    Rows of unknown size are dropped too. The default comes from LAION-400M (2021), which dropped pictures under 5 KB.
    """

    min: int = 5000
    """Minimum size of the file as published, in bytes."""

    needs = ("original_bytes",)
    reason = "too_small"

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.97, 1e6, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if self.min < 1:
            yield "min", f"{self.min} keeps everything; expected at least 1 byte"

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pc.greater_equal(batch["original_bytes"], self.min)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        return pc.fill_null(dropped["original_bytes"].cast(pa.string()), "unknown")

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        return dropped["original_bytes"].cast(pa.float64())
