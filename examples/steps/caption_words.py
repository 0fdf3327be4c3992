"""A custom stage. In a recipe, with examples/ on PYTHONPATH: `- steps.caption_words`."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Stage


@dataclass(kw_only=True)
class CaptionWords(Stage):
    """Counts the words of a caption; `threshold: {column: words, min: 4}` can cut by it."""

    needs = ("caption",)
    adds = {"words": pa.int32()}  # noqa: RUF012

    def process(self, batch: pa.Table) -> pa.Table:
        words = pc.list_value_length(pc.utf8_split_whitespace(batch["caption"]))
        return batch.append_column("words", words.cast(pa.int32()))
