from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.hashing import hash64
from pipeline.step import KeyedFilter


@dataclass(kw_only=True)
class CaptionFrequency(KeyedFilter):
    """Drops boilerplate: captions that more than `max_count` rows of the run share, character for character.

    All rows of such a caption go, none stays behind to stand for them: a text found under so many pictures describes
    none of them. Follows COYO-700M (Byeon et al., 2022), which removes texts that occur more than 10 times. Rows
    without a caption share none and are kept.
    """

    needs = ("caption",)
    scope = "run"

    max_count: int = 10
    """The largest number of rows that may share a caption."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.max_count < 1:
            yield "max_count", f"must be at least 1, found {self.max_count}"

    def key(self, batch: pa.Table) -> np.ndarray:
        return hash64(batch["caption"].fill_null("").to_pylist())

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pa.array(_rows_sharing(batch["caption"]) <= self.max_count)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        # Rows that share a caption are dropped together, so they are all here to be counted.
        return pa.array([f"shared by {n} rows" for n in _rows_sharing(dropped["caption"]).tolist()], pa.string())


def _rows_sharing(captions: pa.ChunkedArray) -> np.ndarray:
    """How many rows have each row's caption; 0 for a row without one."""
    codes, _ = pd.factorize(captions.to_pandas(types_mapper=pd.ArrowDtype))
    counts = np.bincount(codes[codes >= 0], minlength=1)
    return np.where(codes >= 0, counts[codes], 0)
