from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from pipeline.step import FILE, Estimate, Filter
from pipeline.text.matching import matcher, normalised, read_entries


@dataclass(kw_only=True)
class CaptionEntries(Filter):
    """Keeps captions that contain an entry of a list, such as the class names of a target set: DataComp's text-based
    filter (Gadre et al., 2023). Others are dropped as `no_entry`.

    As in `balance`, an entry must occur at word boundaries, ignoring case and punctuation between words; in scripts
    without spaces, it may occur anywhere. Both are compared in normal form (`pipeline.text.caption.normal`).

    DataComp looks up each word of an English caption in WordNet and keeps the caption if the first sense of any word is
    a synset of ImageNet-21k. To do the same, list all words whose first sense is one of these synsets, and the plural
    forms that WordNet reduces to them.
    """

    entries: str = field(metadata=FILE)
    """A file of entries: a JSON list of strings (`.json`), or text with one entry per line; may be `.gz` or `.zst`."""

    needs = ("caption",)
    reason = "no_entry"

    def estimate(self, rows: float) -> Estimate:
        # DataComp, small: 3.2 of 12.8 million rows.
        return Estimate(0.25, 100_000, "keep: DataComp's small pool, English included; rate: as in balance")

    def check(self) -> Iterator[tuple[str, str]]:
        try:
            _ = self._listed
        except (OSError, ValueError) as error:
            yield "entries", f"cannot read {self.entries!r}: {error}"

    def fingerprint(self) -> object:
        return hashlib.sha256("\n".join(self._listed).encode()).hexdigest()

    @cached_property
    def _listed(self) -> tuple[str, ...]:
        return read_entries(self.entries)

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        kept = np.zeros(len(batch), bool)
        kept[matcher(self._listed).pairs(normalised(batch["caption"]))[0]] = True
        return pa.array(kept)
