from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption import normal
from pipeline.step import Estimate, FrequencyFilter


@dataclass(kw_only=True)
class CaptionFrequency(FrequencyFilter):
    """Drops boilerplate: captions that more than `max_count` rows of the run share.

    Captions count as one if their normal forms (`pipeline.caption.normal`) are equal, character for character. All rows
    of such a caption go, none stays behind to stand for them: a text found under so many pictures describes none of
    them. Follows COYO-700M (Byeon et al., 2022), which removes texts that occur more than 10 times. Rows without a
    caption share none and are kept.
    """

    needs = ("caption",)
    column = "caption"
    version = 2

    max_count: int = 10
    """The largest number of rows that may share a caption."""

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.90, 50_000, "keep assumed; COYO-700M drops captions shared by more than 10 rows")

    def compared(self, batch: pa.Table) -> pa.ChunkedArray:
        return pc.if_else(pc.is_valid(batch["caption"]), normal(batch["caption"]), pa.scalar(None, pa.string()))
