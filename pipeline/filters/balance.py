from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.step import FILE, Estimate, Filter, drops_frame
from pipeline.text.hashing import file_digest, uniform
from pipeline.text.matching import check_entries, matcher, normalised, read_entries

if TYPE_CHECKING:
    import dask.dataframe as dd

_CAP = 20_000
_TAB = "\t"
"""Separates the language from the entry in a key. No entry contains it."""


@dataclass(kw_only=True)
class Balance(Filter):
    """Balances the concepts of a run: subsamples frequent concepts and keeps rare ones.

    Concepts are represented by entries: words and phrases. A caption matches an entry that occurs in it at word
    boundaries, ignoring case and punctuation between words; in scripts without spaces, anywhere. Both are compared in
    normal form (`pipeline.text.caption.normal`). An entry e with count_e matching captions keeps each of them with
    probability min(1, t / count_e), where t is the cap. A row is kept if any of its entries keeps it, that is, if
    u < 1 − Π(1 − min(1, t / count_e)), where u in [0, 1) is a hash of seed and uid. Rows are never repeated. Rows
    without a match are dropped as `no_entry`, others as `balance`. Follows CLIP (Radford et al., 2021) and MetaCLIP (Xu
    et al., ICLR 2024).

    With `by: language`, each language is balanced separately, as in MetaCLIP 2 (Chuang et al., 2025): count_e counts
    the captions of the language, and each language has its own t, chosen so that the same share of its matches belongs
    to entries too rare to be capped.

    The funnel of the run shows the effect as `figures`, by language (null without `by`) and by power of two: the number
    of entries (`entries`) with at least `at_least` matching captions, but fewer than twice as many; their matches
    before (`matches`) and after (`kept`); and the language's t (`cap`).
    """

    version = 2
    scope = "run"

    entries: str | None = field(default=None, metadata=FILE)
    """A file of entries, as written by `python -m pipeline.entries`: a table with a column `entry` (`.tsv`), a JSON
    list of strings (`.json`), or text with one entry per line; may be `.gz`, `.zst` or `.bz2`. Default, if `column` is
    not given either: the words and word pairs that occur in at least `min_count` captions of the run."""
    column: str | None = None
    """Instead of `entries`: the column of matched entries that `match_entries` adds."""
    max_per_entry: int | None = None
    """The cap t: each entry keeps about this many captions, or more. Default without `tail_mass`: 20,000, as in CLIP.
    With `by`, this is the t of the language `reference`; those of other languages follow from the share of the
    reference's matches that belong to entries with fewer than t."""
    tail_mass: float | None = None
    """Instead of `max_per_entry`: the share of all matches, between 0 and 1, that belongs to entries too rare to be
    capped. t is the count at which the cumulative count, from the rarest entry up, reaches this share (MetaCLIP 2,
    Chuang et al., 2025: 0.06)."""
    by: str | None = None
    """A column of languages, such as `language`, to balance each language separately."""
    reference: str = "en"
    """With `by` and `max_per_entry`: the language with this t (MetaCLIP 2: English). If it has no match, all languages
    have this t."""
    min_count: int = 100
    """Without a list of entries: minimum number of captions that contain a word or word pair (CLIP: 100 occurrences in
    the English Wikipedia)."""
    max_entries: int = 500_000
    """Without a list of entries: maximum number of entries, most frequent first (CLIP and MetaCLIP have 500,000). With
    `by`, the maximum for each language."""
    keep_unmatched: bool = False
    """Keep rows that match no entry."""
    seed: int = 0
    """Seed of the hash u."""

    def __post_init__(self) -> None:
        self.needs = (self.column or "caption", *([self.by] if self.by else []))  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        # The kept share is assumed to grow with √(cap / rows), calibrated on MetaCLIP's figures.
        cap = self.max_per_entry or _CAP
        keep = min(1.0, 0.25 * ((cap / max(rows, 1)) / (20_000 / 1.6e9)) ** 0.5)
        return Estimate(keep, 50_000, "MetaCLIP (2023): 400 of 1,600 million at a cap of 20,000; √(cap/rows) assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        for one, other in (("max_per_entry", "tail_mass"), ("entries", "column")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                yield other, f"give at most one of `{one}` and `{other}`, found both"
        if self.max_per_entry is not None and self.max_per_entry < 1:
            yield "max_per_entry", f"must be at least 1, found {self.max_per_entry}"
        if self.tail_mass is not None and not 0 < self.tail_mass < 1:
            yield "tail_mass", f"must be between 0 and 1, found {self.tail_mass}"
        for key in ("min_count", "max_entries"):
            if getattr(self, key) < 1:
                yield key, f"must be at least 1, found {getattr(self, key)}"
        if self.entries is not None:
            yield from check_entries("entries", self.entries)

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        list_of_strings = "a list of strings, as match_entries adds it"
        for key, dtype, wanted in (("column", pa.list_(pa.string()), list_of_strings), ("by", pa.string(), "text")):
            if (name := getattr(self, key)) in types and types[name] != dtype:
                yield key, f"the column {name!r} holds {types[name]}, expected {wanted}"

    def fingerprint(self) -> object:
        return None if self.entries is None else file_digest(self.entries)

    def decide(self, frame: dd.DataFrame) -> dd.DataFrame:
        matched, counts = self._matched(frame)
        return matched.map_partitions(self._dropped, counts, meta=drops_frame(), align_dataframes=False)

    def figures(self, frame: dd.DataFrame, drops: dd.DataFrame) -> dd.DataFrame:
        matched, counts = self._matched(frame)
        kept = _sum(matched.map_partitions(_tally_kept, drops, meta=_COUNTS, align_dataframes=False))
        return counts.map_partitions(self._figures, kept, align_dataframes=False, meta=_FIGURES)

    def _matched(self, frame: dd.DataFrame) -> tuple[dd.DataFrame, dd.DataFrame]:
        """Each row with its keys (`unit, row, uid, keys`), and, in one partition, the number of captions of each key. A
        key is an entry, which with `by` follows the language and a tab."""
        import dask.dataframe as dd

        meta = frame._meta[["unit", "row", "uid"]].assign(keys=pd.Series([], dtype=_KEYS))
        if self.column is None and self.entries is None:
            counts = self._vocabulary(frame)
            listed = counts.map_partitions(self._entries, meta=_entry_table([]))
            return frame.map_partitions(self._keyed, listed, meta=meta, align_dataframes=False), counts
        lists = (
            [] if self.entries is None else [dd.from_pandas(_entry_table(read_entries(self.entries)), npartitions=1)]
        )
        matched = frame.map_partitions(self._keyed, *lists, meta=meta, align_dataframes=False)
        return matched, _sum(matched.map_partitions(_tally, meta=_COUNTS))

    def _vocabulary(self, frame: dd.DataFrame) -> dd.DataFrame:
        """The most frequent words and word pairs with the number of captions of each, in one partition."""

        def frequent(grams: pd.DataFrame, min_count: int) -> pd.DataFrame:
            grams = _total(grams)
            return grams[grams["count"] >= min_count]

        def top(grams: pd.DataFrame) -> pd.DataFrame:
            grams = grams.sort_values(["count", "key"], ascending=[False, True])
            grams = grams.groupby(self._languages(grams)).head(self.max_entries)
            return grams.sort_values("key").reset_index(drop=True)

        grams = frame.map_partitions(self._grams, meta=_COUNTS).shuffle(on="key", shuffle_method="tasks")
        grams = grams.map_partitions(frequent, self.min_count, meta=_COUNTS)
        return grams.reduction(chunk=top, combine=top, aggregate=top, meta=_COUNTS, split_every=8)

    def _grams(self, part: pd.DataFrame) -> pd.DataFrame:
        """The number of captions of this partition with each word and each pair of adjacent words."""
        table = pa.Table.from_pandas(part, preserve_index=False)
        split = pc.split_pattern(normalised(table["caption"]), " ")
        words, row = pc.list_flatten(split), pc.list_parent_indices(split).to_numpy()
        neighbours = row[1:] == row[:-1]
        pairs = pc.binary_join_element_wise(words[:-1], words[1:], " ").filter(pa.array(neighbours))
        grams, row = pa.concat_arrays([words, pairs]), np.concatenate([row, row[1:][neighbours]])
        nonempty = pc.not_equal(grams, "")
        grams, row = grams.filter(nonempty), row[nonempty.to_numpy(zero_copy_only=False)]
        keys = self._in_language(grams, table, row).dictionary_encode()
        texts = keys.dictionary
        gram = np.unique(row * max(1, len(texts)) + keys.indices.to_numpy()) % max(1, len(texts))
        tally = pd.DataFrame({"key": texts.to_pandas(), "count": np.bincount(gram, minlength=len(texts))})
        return tally.astype(_COUNTS.dtypes)

    def _keyed(self, part: pd.DataFrame, listed: pd.DataFrame | None = None) -> pd.DataFrame:
        """The keys of each row: from the column `column`, or matched against the entries of `listed`."""
        table = pa.Table.from_pandas(part, preserve_index=False)
        if listed is None:
            lists = table[str(self.column)].combine_chunks()
        else:
            lists = matcher(tuple(listed["entry"])).match(normalised(table["caption"]))
        row = pc.list_parent_indices(lists).to_numpy()
        keys = self._in_language(pc.list_flatten(lists), table, row)
        bounds = pa.array(np.searchsorted(row, np.arange(len(table) + 1)).astype(np.int32))
        lists = pa.ListArray.from_arrays(bounds, keys)
        return part[["unit", "row", "uid"]].assign(keys=pd.arrays.ArrowExtensionArray(lists))

    def _in_language(self, entries: pa.Array, table: pa.Table, row: np.ndarray) -> pa.Array:
        """The keys of entries, given the row of the table that each belongs to."""
        if self.by is None:
            return entries.cast(pa.string())
        languages = pc.fill_null(table[self.by], "").combine_chunks().cast(pa.string())
        return pc.binary_join_element_wise(languages.take(pa.array(row)), entries.cast(pa.string()), _TAB)

    def _split(self, key: str) -> tuple[str, str]:
        """The language of a key, "" without `by`, and its entry."""
        if self.by is None:
            return "", key
        language, _, entry = key.partition(_TAB)
        return language, entry

    def _entries(self, counts: pd.DataFrame) -> pd.DataFrame:
        return _entry_table(dict.fromkeys(self._split(key)[1] for key in counts["key"]))

    def _languages(self, counts: pd.DataFrame) -> np.ndarray:
        return np.array([self._split(key)[0] for key in counts["key"]], dtype=object)

    def _dropped(self, part: pd.DataFrame, counts: pd.DataFrame) -> pd.DataFrame:
        table = pa.Table.from_pandas(part, preserve_index=False)
        keys, count = counts["key"].tolist(), counts["count"].to_numpy(dtype=np.int64)
        row, key = _matches(table["keys"], counts)
        first = np.flatnonzero(np.append(True, row[1:] != row[:-1])[: len(row)])
        matched = row[first]
        missed = np.ones(len(table))
        rarest = np.full(len(table), -1)
        if len(row):
            chance = np.minimum(1, self._caps(counts) / count)
            missed[matched] = np.multiply.reduceat(1 - chance[key], first)
            rarest[matched] = np.minimum.reduceat(count[key] * len(keys) + key, first) % len(keys)
        u = uniform(table["uid"], seed=self.seed, purpose=self.name())
        unmatched = rarest < 0
        drop = np.where(unmatched, not self.keep_unmatched, u >= 1 - missed)
        dropped = table.filter(pa.array(drop))
        details = [
            None if k < 0 else f"kept with probability {1 - m:.3g}; rarest entry {self._describe(keys[k], count[k])}"
            for k, m in zip(rarest[drop].tolist(), missed[drop].tolist())
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

    def _describe(self, key: str, count: int) -> str:
        language, entry = self._split(key)
        return f"{entry!r} in {count} captions" + (f" in {language}" if language else "")

    def _caps(self, counts: pd.DataFrame) -> np.ndarray:
        """The cap t of each entry, in captions."""
        count, language = counts["count"].to_numpy(dtype=np.int64), self._languages(counts)
        cap = self.max_per_entry or _CAP
        share = self.tail_mass
        in_reference = np.asarray(language == self.reference)
        if share is None and (self.by is None or not in_reference.any()):
            return np.full(len(count), cap)
        if share is None:
            share = count[in_reference & (count < cap)].sum() / count[in_reference].sum()
        caps = np.empty(len(count), np.int64)
        for rows in counts.groupby(language).indices.values():
            ascending = np.sort(count[rows])
            mass = np.cumsum(ascending)
            caps[rows] = ascending[min(np.searchsorted(mass, share * mass[-1]), len(mass) - 1)]
        if self.tail_mass is None:
            caps[in_reference] = cap
        return caps

    def _figures(self, counts: pd.DataFrame, kept: pd.DataFrame) -> pd.DataFrame:
        both = counts.merge(kept, how="left", on="key", suffixes=("", "_kept"))
        both["language"] = self._languages(both) if self.by else None
        both["cap"] = self._caps(counts)
        both["at_least"] = 2 ** np.log2(both["count"].to_numpy(dtype=np.float64)).astype(np.int64)
        groups = both.groupby(["language", "cap", "at_least"], dropna=False, sort=True)
        figures = groups.agg(entries=("key", "size"), matches=("count", "sum"), kept=("count_kept", "sum"))
        figures = figures.reset_index()
        return figures.astype({"language": object}).astype(dict.fromkeys(figures.columns[1:], "int64"))


_KEYS = pd.ArrowDtype(pa.list_(pa.string()))
_TEXT = "string[pyarrow]"
_COUNTS = pd.DataFrame({"key": pd.Series([], dtype=_TEXT), "count": pd.Series([], dtype="int64")})
_FIGURES = pd.DataFrame({"language": pd.Series([], dtype=object)}).assign(
    **{name: pd.Series([], dtype="int64") for name in ("cap", "at_least", "entries", "matches", "kept")}
)


def _entry_table(entries: Iterable[str]) -> pd.DataFrame:
    return pd.DataFrame({"entry": pd.Series(list(entries), dtype=_TEXT)})


def _matches(lists: pa.ChunkedArray, counts: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The row and the key (an index in `counts`) of every match, sorted by row."""
    keys = lists.combine_chunks()
    key = pc.index_in(pc.list_flatten(keys), pa.array(counts["key"].tolist(), pa.string()))
    valid = pc.is_valid(key).to_numpy(zero_copy_only=False)
    return pc.list_parent_indices(keys).to_numpy()[valid], key.drop_null().to_numpy().astype(np.int64)


def _tally(part: pd.DataFrame) -> pd.DataFrame:
    """The number of captions in this partition with each key."""
    lists = pa.array(part["keys"])
    counted = pc.value_counts(pc.list_flatten(lists.combine_chunks() if hasattr(lists, "chunks") else lists))
    return pd.DataFrame({"key": counted.field(0).to_pandas(), "count": counted.field(1)}).astype(_COUNTS.dtypes)


def _tally_kept(part: pd.DataFrame, drops: pd.DataFrame) -> pd.DataFrame:
    """Like `_tally`, without the rows of `drops`."""
    dropped = pd.MultiIndex.from_frame(drops[["unit", "row"]])
    return _tally(part[~pd.MultiIndex.from_frame(part[["unit", "row"]]).isin(dropped)])


def _total(counts: pd.DataFrame) -> pd.DataFrame:
    return counts.groupby("key", sort=True)["count"].sum().reset_index()


def _sum(tallies: dd.DataFrame) -> dd.DataFrame:
    """The sum of tallies, in one partition, sorted by key."""
    return tallies.reduction(chunk=_total, combine=_total, aggregate=_total, meta=_COUNTS, split_every=8)
