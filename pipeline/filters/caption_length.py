from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Estimate, Filter
from pipeline.text import caption


@dataclass(kw_only=True)
class CaptionLength(Filter):
    """Drops captions that are `too_short`, have `too_few_words` or are `too_long`.

    Characters are Unicode code points of the normal caption (`pipeline.text.caption.normal`). Words are separated by
    white space; in scripts without spaces, every two characters (Chinese, Japanese) or four (Thai, Lao, Khmer, Burmese,
    Tibetan) count as a word. The minimum lengths come from DataComp's basic filter (Gadre et al., 2023: more
    than 5 characters and 2 words), the maximum from COYO-700M (Byeon et al., 2022). LAION-400M (2021) kept captions of
    at least 5 characters.
    """

    min_chars: int = 6
    """Minimum number of characters."""
    min_words: int = 3
    """Minimum number of words."""
    max_chars: int = 1000
    """Maximum number of characters."""

    needs = ("caption",)
    version = 2

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.95, 500_000, "measured on 10,000 rows of img2dataset's test list")

    def check(self) -> Iterator[tuple[str, str]]:
        for key in ("min_chars", "min_words"):
            if getattr(self, key) < 0:
                yield key, f"{getattr(self, key)} is negative; expected 0 (no limit) or more"
        if self.max_chars < max(self.min_chars, 1):
            yield "max_chars", f"{self.max_chars} drops every caption; expected at least min_chars, {self.min_chars}"

    def judge(self, batch: pa.Table) -> pa.StringArray:
        chars, words = _lengths(batch)
        long = pc.if_else(pc.greater(chars, self.max_chars), "too_long", pa.scalar(None, pa.string()))
        few = pc.if_else(pc.less(words, self.min_words), "too_few_words", long)
        return pc.if_else(pc.less(chars, self.min_chars), "too_short", few)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        chars, words = (length.cast(pa.string()) for length in _lengths(dropped))
        return pc.binary_join_element_wise(chars, pa.scalar(" characters, "), words, pa.scalar(" words"), "")

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        """The number of words if there are too few, else the number of characters."""
        chars, words = _lengths(dropped)
        return pc.if_else(pc.equal(self.judge(dropped), "too_few_words"), words, chars).cast(pa.float64())


def _lengths(batch: pa.Table) -> tuple[pa.Array, pa.Array]:
    text = caption.normal(batch["caption"])
    return pc.utf8_length(text), caption.words(text)
