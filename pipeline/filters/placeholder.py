from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.step import Estimate, FrequencyFilter


@dataclass(kw_only=True)
class Placeholder(FrequencyFilter):
    """Drops the pictures that servers send in place of what is gone: those that come back under too many urls.

    "Image not available", a tracking pixel, a logo: one file under `max_count` urls and more shows none of what their
    captions say, so all of its rows go and none stays behind to stand for them. Put it before `exact_dedup` by sha256,
    which would leave one, and after `exact_dedup` by url, so that one url is not counted twice.
    """

    by: Literal["sha256", "phash"] = "sha256"
    """`sha256`: the same bytes; `phash`: the same picture at any size and quality, and some that merely look alike."""
    max_count: int = 10
    """The largest number of rows that may share a picture."""

    def __post_init__(self) -> None:
        self.column = self.by
        self.needs = (self.by,)  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.98, 50_000, "keep assumed")
