"""A custom filter. In a recipe, with examples/ on PYTHONPATH: `- steps.no_shouting`."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import Filter


@dataclass(kw_only=True)
class NoShouting(Filter):
    """Drops captions in capitals."""

    needs = ("caption",)

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pc.invert(pc.utf8_is_upper(batch["caption"]))
