"""Matches captions against entries: words and phrases that stand for concepts.

Captions and entries are compared in one normal form (`normalised`). An entry matches a caption in which it occurs at
word boundaries; in scripts without spaces between words, anywhere.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain

import ahocorasick_rs
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.compressed import open_plain, plain_name
from pipeline.text.caption import UNSPACED, beyond_ascii, normal

COLUMN = "entry"
"""The column of entries in a `.tsv` of `pipeline.entries`."""
_CAPTIONS_AT_A_TIME = 10_000
"""Captions matched at a time. Limits the memory of the matches, which are Python tuples."""


def normalised(texts: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Lower-case words (letters, marks and digits) separated by single spaces; "" for null. In scripts without spaces
    between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer, Tibetan), each character is a word."""
    texts = pc.utf8_lower(normal(texts))
    texts = beyond_ascii(texts, lambda t: pc.replace_substring_regex(t, rf"({UNSPACED})", r" \1 "))
    return pc.utf8_trim(pc.replace_substring_regex(texts, r"[^\pL\pM\pN]+", " "), " ")


def read_entries(path: str) -> tuple[str, ...]:
    """The distinct, normalised entries of a file, in its order.

    A JSON list of strings (`.json`), a table with a column `entry` (`.tsv`, as `pipeline.entries` writes it), or text
    with an entry per line; may be `.gz`, `.zst` or `.bz2`. Raises OSError or ValueError if it cannot be read or has no
    entry.
    """
    try:
        with open_plain(path) as file:
            text = file.read().decode("utf-8-sig")
    except (EOFError, zlib.error) as error:
        raise ValueError(f"the compressed file is damaged: {error}") from None
    if plain_name(path).endswith(".json"):
        try:
            entries = json.loads(text)
        except RecursionError:
            raise ValueError("expected a JSON list of strings, found lists in lists") from None
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError("expected a JSON list of strings")
    elif plain_name(path).endswith(".tsv"):
        names, *rows = [line.split("\t") for line in text.splitlines()] or [[]]
        if COLUMN not in names:
            raise ValueError(f"expected a first line with a column {COLUMN!r}, found {', '.join(names)}")
        at = names.index(COLUMN)
        entries = [row[at] for row in rows if len(row) > at]
    else:
        entries = text.splitlines()
    found = tuple(entry for entry in dict.fromkeys(normalised(pa.array(entries, pa.string())).to_pylist()) if entry)
    if not found:
        raise ValueError("it has no entry with a letter or digit")
    return found


def check_entries(option: str, path: str) -> Iterator[tuple[str, str]]:
    """Yields `(option, problem)` if `read_entries` cannot read the file."""
    try:
        read_entries(path)
    except (OSError, ValueError) as error:
        yield option, f"cannot read {path!r}: {error}"


class Matcher:
    """Finds entries in captions. Both must be normalised."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._entries = pa.array(entries, pa.string())
        # Surrounding spaces make the search match whole words.
        self._automaton = ahocorasick_rs.AhoCorasick([f" {entry} " for entry in entries], store_patterns=False)

    def match(self, captions: pa.Array | pa.ChunkedArray) -> pa.ListArray:
        """The distinct entries that occur in each caption, in the order of the entries. As fast as the bare automaton
        (benchmarks/balance.py)."""
        row, entry = self.pairs(captions)
        bounds = np.searchsorted(row, np.arange(len(captions) + 1)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(bounds), self._entries.take(pa.array(entry)))

    def pairs(self, captions: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """The caption and entry of each distinct match, as int64 indices, sorted by both."""
        n = max(1, len(self._entries))
        pairs = [np.empty(0, np.int64)]
        for low in range(0, len(captions), _CAPTIONS_AT_A_TIME):
            # Searching one long text is faster than many short ones. No match crosses the line feed.
            lines = [f" {caption} \n" for caption in captions.slice(low, _CAPTIONS_AT_A_TIME).to_pylist()]
            found = self._automaton.find_matches_as_indexes("".join(lines), overlapping=True)
            entry, start, _ = np.fromiter(chain.from_iterable(found), np.int64, 3 * len(found)).reshape(-1, 3).T
            ends = np.cumsum([len(line) for line in lines])
            row = low + np.searchsorted(ends, start, side="right")
            pair = np.sort(row * n + entry, kind="stable")  # nearly sorted: matches come in the order of the text
            pairs.append(pair[np.append(True, pair[1:] != pair[:-1])[: len(pair)]])
        row, entry = np.divmod(np.concatenate(pairs), n)
        return row, entry


@lru_cache(maxsize=1)
def matcher(entries: tuple[str, ...]) -> Matcher:
    """A Matcher of these entries, cached for the next call with the same ones."""
    return Matcher(entries)
