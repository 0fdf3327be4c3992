from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.models import plugin
from pipeline.models.safety import check_score, scored, with_score
from pipeline.step import FILE, Estimate, Stage
from pipeline.text.caption import normal
from pipeline.text.matching import check_entries, matcher, normalised, read_entries


@dataclass(kw_only=True)
class TextSafety(Stage):
    """Scores how unsafe a caption is, with a scorer or a list of words that you supply, and drops rows with a score
    above `max_score` (reason `unsafe`).

    Adds `text_unsafe_score`, 0 to 1. No classifier comes with Winnow. CommonPool (Gadre et al., 2023, section 3.2 and
    appendix E) removed unsafe captions by the score of Detoxify, a classifier of toxic comments.
    """

    scorer: str | None = None
    """Import path of a scorer, `my_package.my_module:MyClass`. It is called without arguments once per worker, and
    returns a callable that maps a list of n captions to n scores from 0 to 1; NaN means no score."""
    words: str | None = field(default=None, metadata=FILE)
    """Instead of a scorer, a file of words and phrases: a JSON list of strings (`.json`), or text with one per line;
    may be `.gz` or `.zst`. The score is 1 if the caption contains one, matched as in `balance`, else 0."""
    max_score: float | None = 0.1
    """Highest score kept; null keeps all rows. The default is ours, and strict: choose your own on captions that you
    have labelled. Rows without a score are dropped as `missing`."""
    column: str = "text_unsafe_score"
    """Name of the score column."""

    needs = ("caption",)

    def __post_init__(self) -> None:
        self.adds = {self.column: pa.float32()}  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.98, 100_000 if self.words else 100, "assumed", stored=4)

    def check(self) -> Iterator[tuple[str, str]]:
        if (self.scorer is None) == (self.words is None):
            given = "neither" if self.scorer is None else "both"
            yield "scorer", f"exactly one of `scorer` and `words` must be given, found {given}"
        if self.scorer is not None and (problem := plugin.problem(self.scorer)) is not None:
            yield "scorer", problem
        if self.words is not None:
            yield from check_entries("words", self.words)
        yield from check_score(self.column, self.max_score)

    def fingerprint(self) -> object:
        return self.words and hashlib.sha256("\n".join(read_entries(self.words)).encode()).hexdigest()

    def setup(self) -> None:
        if self.words is not None:
            self._words = read_entries(self.words)
        else:
            self._scorer = plugin.load(str(self.scorer))

    def process(self, batch: pa.Table) -> pa.Table:
        if self.words is None:
            captions = normal(batch["caption"]).to_pylist()
            scores = scored(str(self.scorer), self._scorer, captions) if captions else np.empty(0)
        else:
            scores = np.zeros(len(batch))
            scores[matcher(self._words).pairs(normalised(batch["caption"]))[0]] = 1
        return with_score(batch, self.column, scores, self.max_score)
