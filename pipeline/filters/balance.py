from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

import ahocorasick_rs
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption import UNSPACED, normal
from pipeline.compressed import open_plain, plain_name
from pipeline.hashing import uniform
from pipeline.step import Estimate, Filter, drops_frame

if TYPE_CHECKING:
    import dask.dataframe as dd

_CAP = 20_000
# Captions matched at a time. Bounds the memory of the matches, which are Python tuples.
_CAPTIONS_AT_A_TIME = 10_000


@dataclass(kw_only=True)
class Balance(Filter):
    """Balances the concepts of a run: subsamples frequent concepts and keeps rare ones.

    Concepts are entries: words and phrases. A caption matches an entry that occurs in it at word boundaries, ignoring
    case and punctuation between words; in scripts without spaces, anywhere. Both are compared in normal form
    (`pipeline.caption.normal`). An entry e with count_e matching captions keeps each of them with probability
    min(1, t / count_e). A row is kept if any of its entries keeps it: if u < 1 − Π(1 − min(1, t / count_e)), where u in
    [0, 1) is a hash of seed and uid. Rows are never repeated. Rows without a match are dropped as `no_entry`, others as
    `balance`. Follows CLIP (Radford et al., 2021) and MetaCLIP (Xu et al., ICLR 2024).
    """

    needs = ("caption",)
    version = 2
    scope = "run"

    entries: str | None = None
    """A file of entries: a JSON list of strings (`.json`), or text with one entry per line; may be `.gz` or `.zst`.
    None: the words and word pairs that occur in at least `min_count` captions of this run."""
    max_per_entry: int | None = None
    """The cap t: about this many captions are kept per entry, or more. Default without `tail_mass`: 20,000, as in
    CLIP."""
    tail_mass: float | None = None
    """Sets t from the share of all matches, between 0 and 1, held by entries too rare to be capped: t is the count at
    which the cumulative count, from the rarest entry up, reaches this share (MetaCLIP 2, Chuang et al., 2025: 0.06)."""
    min_count: int = 100
    """Without `entries`: minimum number of captions with a word or pair (CLIP: 100 times in the English Wikipedia)."""
    max_entries: int = 500_000
    """Without `entries`: maximum number of entries, most frequent first (CLIP and MetaCLIP have 500,000)."""
    keep_unmatched: bool = False
    """Keep rows that match no entry."""
    seed: int = 0
    """Seed of the hash u."""

    def estimate(self, rows: float) -> Estimate:
        # The kept share is assumed to grow with √(cap / rows), calibrated on MetaCLIP's figures.
        cap = self.max_per_entry or _CAP
        keep = min(1.0, 0.25 * ((cap / max(rows, 1)) / (20_000 / 1.6e9)) ** 0.5)
        return Estimate(keep, 50_000, "MetaCLIP (2023): 400 of 1,600 million at a cap of 20,000; √(cap/rows) assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if self.max_per_entry is not None and self.tail_mass is not None:
            yield "tail_mass", "give at most one of `max_per_entry` and `tail_mass`, found both"
        if self.max_per_entry is not None and self.max_per_entry < 1:
            yield "max_per_entry", f"must be at least 1, found {self.max_per_entry}"
        if self.tail_mass is not None and not 0 < self.tail_mass < 1:
            yield "tail_mass", f"must be between 0 and 1, found {self.tail_mass}"
        for key in ("min_count", "max_entries"):
            if getattr(self, key) < 1:
                yield key, f"must be at least 1, found {getattr(self, key)}"
        if self.entries is not None:
            try:
                if not _read_entries(self.entries):
                    yield "entries", f"{self.entries!r} has no entry with a letter or digit"
            except (OSError, ValueError) as error:
                yield "entries", f"cannot read {self.entries!r}: {error}"

    def fingerprint(self) -> object:
        if self.entries is None:
            return None
        with fsspec.open(self.entries, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def decide(self, frame: dd.DataFrame) -> dd.DataFrame:
        counts = self._vocabulary(frame) if self.entries is None else self._count(frame, _read_entries(self.entries))
        return frame.map_partitions(self._dropped, counts, meta=drops_frame(), align_dataframes=False)

    def _count(self, frame: dd.DataFrame, entries: list[str]) -> dd.DataFrame:
        """The number of matching captions of each entry with a match, in one partition."""
        import dask.dataframe as dd

        listed = dd.from_pandas(pd.DataFrame({"entry": pd.Series(entries, dtype="string[pyarrow]")}), npartitions=1)
        tallies = frame.map_partitions(_tally, listed, meta=_COUNTS, align_dataframes=False)
        return tallies.reduction(chunk=_total, combine=_total, aggregate=_total, meta=_COUNTS, split_every=8)

    def _vocabulary(self, frame: dd.DataFrame) -> dd.DataFrame:
        """The most frequent words and word pairs with the number of captions of each, in one partition."""
        most = self.max_entries

        def frequent(grams: pd.DataFrame, min_count: int) -> pd.DataFrame:
            grams = _total(grams)
            return grams[grams["count"] >= min_count]

        def top(grams: pd.DataFrame) -> pd.DataFrame:
            return grams.sort_values(["count", "entry"], ascending=[False, True]).head(most).reset_index(drop=True)

        grams = frame.map_partitions(_grams, meta=_COUNTS).shuffle(on="entry", shuffle_method="tasks")
        grams = grams.map_partitions(frequent, self.min_count, meta=_COUNTS)
        return grams.reduction(chunk=top, combine=top, aggregate=top, meta=_COUNTS, split_every=8)

    def _dropped(self, part: pd.DataFrame, counts: pd.DataFrame) -> pd.DataFrame:
        table = pa.Table.from_pandas(part, preserve_index=False)
        entries, count = tuple(counts["entry"]), counts["count"].to_numpy(dtype=np.int64)
        row, entry = _matches(_normalised(table["caption"]), entries)
        first = np.flatnonzero(np.append(True, row[1:] != row[:-1])[: len(row)])
        matched = row[first]
        missed = np.ones(len(table))
        rarest = np.full(len(table), -1)
        if len(row):
            missed[matched] = np.multiply.reduceat(1 - np.minimum(1, self._cap(count) / count[entry]), first)
            rarest[matched] = np.minimum.reduceat(count[entry] * len(entries) + entry, first) % len(entries)
        u = uniform(table["uid"], seed=self.seed, purpose=self.name())
        unmatched = rarest < 0
        drop = np.where(unmatched, not self.keep_unmatched, u >= 1 - missed)
        dropped = table.filter(pa.array(drop))
        details = [
            None if e < 0 else f"kept with probability {1 - m:.3g}; rarest entry {entries[e]!r} in {count[e]} captions"
            for e, m in zip(rarest[drop].tolist(), missed[drop].tolist())
        ]
        reasons = pc.if_else(pa.array(unmatched[drop], pa.bool_()), "no_entry", self.name())
        return drops_frame(
            pa.table(
                {
                    "unit": dropped["unit"],
                    "row": dropped["row"],
                    "reason": reasons,
                    "detail": pa.array(details, pa.string()),
                    "value": pa.array((1 - missed)[drop], mask=unmatched[drop]),  # the probability of being kept
                }
            )
        )

    def _cap(self, count: np.ndarray) -> int:
        """The cap t, in captions."""
        if self.tail_mass is None:
            return self.max_per_entry or _CAP
        ascending = np.sort(count)
        mass = np.cumsum(ascending)
        return int(ascending[np.searchsorted(mass, self.tail_mass * mass[-1])])


_COUNTS = pd.DataFrame({"entry": pd.Series([], dtype="string[pyarrow]"), "count": pd.Series([], dtype="int64")})


def _read_entries(path: str) -> list[str]:
    """The distinct, normalised entries of a file. Raises OSError or ValueError if it cannot be read."""
    try:
        with open_plain(path) as file:
            text = file.read().decode("utf-8-sig")
    except (EOFError, zlib.error) as error:
        raise ValueError(f"the compressed file is damaged: {error}") from None
    if plain_name(path).endswith(".json"):
        entries = json.loads(text)
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError("expected a JSON list of strings")
    else:
        entries = text.splitlines()
    return [entry for entry in dict.fromkeys(_normalised(pa.array(entries, pa.string())).to_pylist()) if entry]


def _normalised(texts: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Lower-case words (letters, marks and digits) separated by single spaces; "" for null. In scripts without spaces
    between words, each character is a word."""
    texts = pc.replace_substring_regex(pc.utf8_lower(normal(texts)), rf"({UNSPACED})", r" \1 ")
    return pc.utf8_trim(pc.replace_substring_regex(texts, r"[^\pL\pM\pN]+", " "), " ")


@lru_cache(maxsize=2)
def _automaton(entries: tuple[str, ...]) -> ahocorasick_rs.AhoCorasick:
    # Surrounding spaces make the search match whole words.
    return ahocorasick_rs.AhoCorasick([f" {entry} " for entry in entries], store_patterns=False)


def _matches(captions: pa.ChunkedArray, entries: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Row and entry (indices) of every distinct match, sorted by row and entry. 330,000 captions/s on one core."""
    pairs = [np.empty(0, np.int64)]
    for low in range(0, len(captions), _CAPTIONS_AT_A_TIME):
        # Searching one long text is faster than many short ones. No match crosses the line feed.
        lines = [f" {caption} \n" for caption in captions.slice(low, _CAPTIONS_AT_A_TIME).to_pylist()]
        found = _automaton(entries).find_matches_as_indexes("".join(lines), overlapping=True)
        entry, start, _ = np.fromiter(chain.from_iterable(found), np.int64, 3 * len(found)).reshape(-1, 3).T
        ends = np.cumsum([len(line) for line in lines])
        row = low + np.searchsorted(ends, start, side="right")
        pairs.append(np.unique(row * len(entries) + entry))
    row, entry = np.divmod(np.concatenate(pairs), max(1, len(entries)))
    return row, entry


def _tally(part: pd.DataFrame, listed: pd.DataFrame) -> pd.DataFrame:
    """The number of captions of this partition that match each entry."""
    entries = tuple(listed["entry"])
    captions = _normalised(pa.Table.from_pandas(part[["caption"]], preserve_index=False)["caption"])
    found, count = np.unique(_matches(captions, entries)[1], return_counts=True)
    return pd.DataFrame({"entry": [entries[i] for i in found], "count": count}).astype(_COUNTS.dtypes)


def _grams(part: pd.DataFrame) -> pd.DataFrame:
    """The number of captions of this partition with each word and each pair of adjacent words."""
    captions = _normalised(pa.Table.from_pandas(part[["caption"]], preserve_index=False)["caption"])
    split = pc.split_pattern(captions, " ")
    words, row = pc.list_flatten(split), pc.list_parent_indices(split).to_numpy()
    neighbours = row[1:] == row[:-1]
    pairs = pc.binary_join_element_wise(words[:-1], words[1:], " ").filter(pa.array(neighbours))
    grams = pa.concat_arrays([words, pairs]).dictionary_encode()
    row = np.concatenate([row, row[1:][neighbours]])
    texts = grams.dictionary
    gram = np.unique(row * max(1, len(texts)) + grams.indices.to_numpy()) % max(1, len(texts))
    tally = pd.DataFrame({"entry": texts.to_pandas(), "count": np.bincount(gram, minlength=len(texts))})
    return tally.loc[tally["entry"] != ""].astype(_COUNTS.dtypes)


def _total(counts: pd.DataFrame) -> pd.DataFrame:
    return counts.groupby("entry", sort=True)["count"].sum().reset_index()
