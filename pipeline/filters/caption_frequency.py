from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Estimate, FrequencyFilter
from pipeline.text.caption import normal


@dataclass(kw_only=True)
class CaptionFrequency(FrequencyFilter):
    """Drops boilerplate: captions shared by more than `max_count` rows of the run.

    Captions are equal if their normal forms (`pipeline.text.caption.normal`) are. No row with such a caption is kept,
    since a text used for many pictures describes none of them. Follows COYO-700M (Byeon et al., 2022), which removes
    texts that occur more than 10 times. Rows without a caption are kept.
    """

    needs = ("caption",)
    column = "caption"
    version = 2

    max_count: int = 10
    """Maximum number of rows that may share a caption."""

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.90, 50_000, "keep assumed; COYO-700M drops captions shared by more than 10 rows")

    def compared(self, batch: pa.Table) -> pa.ChunkedArray:
        return pc.if_else(pc.is_valid(batch["caption"]), normal(batch["caption"]), pa.scalar(None, pa.string()))
