from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import FILE, Estimate, Stage
from pipeline.text.hashing import file_digest
from pipeline.text.matching import Matcher, check_entries, normalised, read_entries


@dataclass(kw_only=True)
class MatchEntries(Stage):
    """Finds the concepts of each caption: the entries of a list, words and phrases, that occur in it.

    Adds `entries`, the list of the distinct entries that match, in normal form; empty if none does. An entry matches a
    caption in which it occurs at word boundaries, ignoring case and punctuation between words; in scripts without
    spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer, Tibetan), anywhere. Both are compared in normal
    form (`pipeline.text.caption.normal`). `balance: {column: entries}` then balances by these matches. Follows MetaCLIP
    (Xu et al., ICLR 2024); one list for each language follows MetaCLIP 2 (Chuang et al., 2025).
    """

    entries: str | dict[str, str] = field(metadata=FILE)
    """A file of entries, as written by `python -m pipeline.entries`: a table with a column `entry` (`.tsv`), a JSON
    list of strings (`.json`), or text with one entry per line; may be `.gz`, `.zst` or `.bz2`. Or one file for each
    language, `{en: en.tsv, de: de.tsv}`: each caption is then matched with the entries of its language only, and
    captions in other languages match none."""
    by: str = "language"
    """Only with one file for each language: the column of languages."""

    adds = {"entries": pa.list_(pa.string())}  # noqa: RUF012

    def __post_init__(self) -> None:
        self.needs = ("caption", self.by) if isinstance(self.entries, dict) else ("caption",)  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 100_000, "measured with 500,000 entries (benchmarks/balance.py)")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.entries:
            yield "entries", "is empty; expected a file, or a file for each language, as in {en: en.tsv, de: de.tsv}"
        for path in self._files().values():
            yield from check_entries("entries", path)

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        if isinstance(self.entries, dict) and not pa.types.is_string(types.get(self.by, pa.string())):
            yield "by", f"the column {self.by!r} holds {types[self.by]}, expected text"

    def fingerprint(self) -> object:
        return {language: file_digest(path) for language, path in self._files().items()}

    def setup(self) -> None:
        self._matchers = {language: Matcher(read_entries(path)) for language, path in self._files().items()}

    def process(self, batch: pa.Table) -> pa.Table:
        captions = normalised(batch["caption"])
        if not isinstance(self.entries, dict):
            return batch.append_column("entries", self._matchers[""].match(captions))
        other = np.ones(len(batch), bool)
        rows, parts = [], []
        for language, matcher in self._matchers.items():
            in_language = pc.fill_null(pc.equal(batch[self.by], language), False).to_numpy(zero_copy_only=False)
            rows.append(np.flatnonzero(in_language))
            parts.append(matcher.match(captions.take(pa.array(rows[-1]))))
            other &= ~in_language
        rows.append(np.flatnonzero(other))
        parts.append(pa.array([[]] * len(rows[-1]), pa.list_(pa.string())))
        return batch.append_column("entries", pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(rows)))))

    def _files(self) -> dict[str, str]:
        return self.entries if isinstance(self.entries, dict) else {"": self.entries}
