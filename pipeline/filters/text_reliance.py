from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import is_number, wrong_type
from pipeline.step import Estimate, Filter


@dataclass(kw_only=True)
class TextReliance(Filter):
    """Drops pictures that match their caption mostly through text in the picture: those whose score falls by more than
    `max_drop` when the text is masked.

    Get the masked score from `clip_score` with `mask` (see `text_overlap`). Rows that lack one of the scores are
    dropped as `missing`. T-MARS (Maini et al., ICLR 2024) keeps the highest masked scores instead; use `threshold` for
    this.
    """

    max_drop: float
    """Largest `score` − `masked_score` kept, 0 or more. Depends on the model, as the scores do."""
    score: str = "clip_score"
    """The column of scores of the whole picture."""
    masked_score: str = "masked_clip_score"
    """The column of scores with the text masked, by the same model."""

    def __post_init__(self) -> None:
        self.needs = (self.score, self.masked_score)  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.8, 1e6, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.max_drop >= 0:
            yield "max_drop", f"must be 0 or more, found {self.max_drop}"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        for key in ("score", "masked_score"):
            yield from ((key, problem) for problem in wrong_type(types, getattr(self, key), is_number, "numbers"))

    def judge(self, batch: pa.Table) -> pa.StringArray:
        difference = self.value(batch)
        reason = pc.if_else(pc.greater(difference, self.max_drop), self.name(), pa.scalar(None, pa.string()))
        return pc.if_else(pc.is_null(difference, nan_is_null=True), "missing", reason)

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        return pc.subtract(*(dropped[column].cast(pa.float64()) for column in self.needs))
