from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.step import Estimate, FrequencyFilter


@dataclass(kw_only=True)
class Placeholder(FrequencyFilter):
    """Drops placeholder pictures: those that more than `max_count` rows share.

    Such a picture ("image not available", a tracking pixel, a logo) matches none of its captions, so no row with it is
    kept. Put this step after `exact_dedup` by url, so that each URL counts once, and before `exact_dedup` by sha256,
    which would keep one row.
    """

    by: Literal["sha256", "phash"] = "sha256"
    """How to compare pictures. `sha256`: identical bytes; `phash`: the same picture at any size and quality, and some
    lookalikes."""
    max_count: int = 10
    """Maximum number of rows that may share a picture."""

    def __post_init__(self) -> None:
        self.column = self.by
        self.needs = (self.by,)  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.98, 50_000, "keep assumed")
