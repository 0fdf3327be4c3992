"""The rows of a run in memory, to try cuts on: counts, curves, and the rows on both sides of each cut, in milliseconds.

`load` reads them once. A cut decides as the step `threshold` does, ties included, so that a run of a recipe with the
same lines keeps the same rows.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.concepts import find_entries, matches
from pipeline.hashing import hash64
from pipeline.reader import Run
from pipeline.schema import POSITION, SAMPLE, is_heavy
from pipeline.url import hosts

BINS = 80
"""Bars of a histogram."""
_EDGE = 0.001
"""Share of the rows at either end of a column that its histogram adds to the first and last bar."""
_NO_BIN = 255
_MASKS = 16
"""Views whose rows are remembered."""


@dataclass(frozen=True)
class Cut:
    """One `threshold` line: exactly one of the two is given."""

    column: str
    min: float | None = None
    """Lowest value kept."""
    top_fraction: float | None = None
    """Share kept of the rows that have a value and that the cuts before this one kept."""

    def line(self) -> dict[str, Any]:
        """The line of a recipe."""
        how = {"min": self.min} if self.top_fraction is None else {"top_fraction": self.top_fraction}
        return {"threshold": {"column": self.column, **how}}


@dataclass(frozen=True)
class View:
    """Which rows are looked at. It changes nothing of what the cuts keep."""

    language: str = ""
    host: str = ""
    concept: str = ""
    text: str = ""
    """Part of the caption, in either case."""


@dataclass(frozen=True)
class Applied:
    """Cuts applied to all rows."""

    keeps: tuple[np.ndarray, ...]
    """For each cut: bool of shape (n,), the rows on its upper side, whatever the other cuts say."""
    after: tuple[int, ...]
    """For each cut: the rows that it and the cuts before it keep."""
    at: tuple[float, ...]
    """For each cut: the lowest value that it keeps; NaN if it keeps none."""

    def without(self, number: int | None, n: int) -> np.ndarray:
        """The rows that all cuts keep, or all but one of them."""
        kept = np.ones(n, bool)
        for i, keep in enumerate(self.keeps):
            if i != number:
                kept &= keep
        return kept


class Categories:
    """A text column as codes: -1 where there is none."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        encoded = column.combine_chunks().dictionary_encode()
        self.names: list[str] = encoded.dictionary.to_pylist()
        self.codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int32)

    def where(self, name: str) -> np.ndarray:
        """The rows of one name."""
        if name not in self.names:
            return np.zeros(len(self.codes), bool)
        return self.codes == self.names.index(name)

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Rows of each name among those of a mask."""
        return np.bincount(self.codes[rows & (self.codes >= 0)], minlength=len(self.names))


class Rows:
    """Rows in memory: scores as float64, NaN where there is none; texts in a file that is mapped."""

    def __init__(
        self,
        place: np.ndarray,
        texts: pa.Table,
        scores: Mapping[str, np.ndarray],
        language: pa.ChunkedArray | None = None,
        entries: tuple[str, ...] = (),
    ) -> None:
        """`place` is int32 of shape (n, 2), unit and row; `texts` has `uid, url, caption`; `entries` are concepts."""
        self.place, self.texts, self.scores = place, texts, dict(scores)
        self.n = len(place)
        # What breaks ties in `threshold`, and a fixed random order of the rows.
        self._hash = hash64(texts["uid"], purpose="threshold")
        self._position = place[:, 0].astype(np.uint64) << np.uint64(32) | place[:, 1].astype(np.uint64)
        self._random = np.argsort(self._hash).astype(np.int32)
        self.order: dict[str, np.ndarray] = {}
        """For each score, the rows that have one, in ascending order."""
        self.ranges: dict[str, tuple[float, float]] = {}
        """For each score, where its histogram begins and ends."""
        self._bins: dict[str, np.ndarray] = {}
        for name, values in self.scores.items():
            order = np.argsort(values, kind="stable")
            self.order[name] = order[: self.n - int(np.isnan(values).sum())].astype(np.int32)
            self.ranges[name], self._bins[name] = self._binned(name)
        self.languages = Categories(language) if language is not None else None
        self.hosts = Categories(hosts(texts["url"]))
        self.entries = entries
        row, entry = matches(texts["caption"], entries) if entries else (np.empty(0, int), np.empty(0, int))
        by_entry = np.argsort(entry, kind="stable")
        self._concept_rows, self._concepts = row[by_entry].astype(np.int32), entry[by_entry].astype(np.int32)
        self.seen = lru_cache(_MASKS)(self._seen)
        self.apply = lru_cache(4)(self._apply)
        self.histogram = lru_cache(_MASKS * 32)(self._seen_histogram)

    def _binned(self, name: str) -> tuple[tuple[float, float], np.ndarray]:
        values, order = self.scores[name], self.order[name]
        bins = np.full(self.n, _NO_BIN, np.uint8)
        if not len(order):
            return (0.0, 1.0), bins
        edge = int(len(order) * _EDGE)
        low, high = (float(values[order[i]]) for i in (edge, len(order) - 1 - edge))
        if not (math.isfinite(low) and math.isfinite(high)) or low == high:
            finite = values[np.isfinite(values)]
            low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        high = high if high > low else low + 1.0
        with np.errstate(invalid="ignore", over="ignore"):
            at = np.clip((values[order] - low) / (high - low) * BINS, 0, BINS - 1)
        bins[order] = at.astype(np.uint8)
        return (low, high), bins

    # --- Cuts ---------------------------------------------------------------------------------------------------------

    def _apply(self, cuts: tuple[Cut, ...]) -> Applied:
        """Applies cuts in their order."""
        kept = np.ones(self.n, bool)
        keeps, after, at = [], [], []
        for cut in cuts:
            values = self.scores[cut.column]
            if cut.top_fraction is None:
                keep = values >= np.float64(cut.min)  # NaN is never kept
                at.append(float(cut.min or 0.0))
            else:
                keep, lowest = self._top(values, kept, cut.top_fraction)
                at.append(lowest)
            kept &= keep
            keeps.append(keep)
            after.append(int(np.count_nonzero(kept)))
        return Applied(tuple(keeps), tuple(after), tuple(at))

    def _top(self, values: np.ndarray, among: np.ndarray, fraction: float) -> tuple[np.ndarray, float]:
        """The rows at or above the lowest of the ceil(fraction · m) highest of m rows with a value, and that value."""
        candidates = values[among]
        candidates = candidates[~np.isnan(candidates)]
        wanted = math.ceil(Fraction(str(fraction)) * len(candidates))
        if not wanted:
            return np.zeros(self.n, bool), math.nan
        lowest = float(np.partition(candidates, len(candidates) - wanted)[len(candidates) - wanted])
        keep = values > lowest
        tied = np.flatnonzero(values == lowest)
        rest = wanted - int(np.count_nonzero(candidates > lowest))
        mine = tied[among[tied]]
        if rest == len(mine):
            keep[tied] = True
            return keep, lowest
        ranked = mine[np.lexsort((self._position[mine], self._hash[mine]))]
        last = ranked[len(ranked) - rest]
        word = self._hash[tied]
        more = (word > self._hash[last]) | ((word == self._hash[last]) & (self._position[tied] >= self._position[last]))
        keep[tied[more]] = True
        return keep, lowest

    # --- Views --------------------------------------------------------------------------------------------------------

    def _seen(self, view: View) -> np.ndarray:
        """The rows of a view: bool of shape (n,)."""
        seen = np.ones(self.n, bool)
        if view.language and self.languages is not None:
            seen &= self.languages.where(view.language)
        if view.host:
            seen &= self.hosts.where(view.host)
        if view.concept:
            found = np.zeros(self.n, bool)
            if view.concept in self.entries:
                number = self.entries.index(view.concept)
                low, high = np.searchsorted(self._concepts, [number, number + 1])
                found[self._concept_rows[low:high]] = True
            seen &= found
        if view.text:
            hit = pc.match_substring(self.texts["caption"], view.text, ignore_case=True)
            seen &= pc.fill_null(hit, False).to_numpy()
        return seen

    def summary(self, cuts: Sequence[Cut], view: View, columns: Sequence[str], top: int = 8) -> dict[str, Any]:
        """Counts for a set of cuts and the histograms of some scores, as plain data.

        For each score: `all` are the rows of the view by bin, `kept` those that all cuts on other scores keep; the
        cuts on a score itself divide its `kept`.
        """
        applied, seen = self.apply(tuple(cuts)), self.seen(view)
        kept = applied.without(None, self.n)
        inside = kept & seen
        drawn = {}
        for name in columns:
            rest = seen.copy()
            for cut, keep in zip(cuts, applied.keeps):
                if cut.column != name:
                    rest &= keep
            drawn[name] = {"all": self.histogram(name, view), "kept": self._histogram(name, rest)}
        alone = [int(np.count_nonzero(applied.without(i, self.n) & ~keep)) for i, keep in enumerate(applied.keeps)]
        return {
            "rows": self.n,
            "kept": int(np.count_nonzero(kept)),
            "seen": int(np.count_nonzero(seen)),
            "seen_kept": int(np.count_nonzero(inside)),
            "cuts": [
                {"after": after, "alone": n, "at": None if math.isnan(at) else at}
                for after, n, at in zip(applied.after, alone, applied.at)
            ],
            "columns": drawn,
            "languages": _table(self.languages, seen, inside, top) if self.languages else [],
            "hosts": _table(self.hosts, seen, inside, top),
            "concepts": self._concept_table(seen, inside, top),
        }

    def _seen_histogram(self, name: str, view: View) -> list[int]:
        return self._histogram(name, self.seen(view))

    def _histogram(self, name: str, rows: np.ndarray) -> list[int]:
        counts = np.bincount(self._bins[name][rows], minlength=_NO_BIN + 1)
        return [int(n) for n in counts[:BINS]]

    def _concept_table(self, seen: np.ndarray, kept: np.ndarray, top: int) -> list[dict[str, Any]]:
        size = len(self.entries)
        every = np.bincount(self._concepts[seen[self._concept_rows]], minlength=size)
        mine = np.bincount(self._concepts[kept[self._concept_rows]], minlength=size)
        return _ranked(list(self.entries), every, mine, top)

    # --- Single rows --------------------------------------------------------------------------------------------------

    def sides(self, cuts: Sequence[Cut], number: int, view: View, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a view that all other cuts keep: the n lowest above a cut, and the n highest below it."""
        applied = self.apply(tuple(cuts))
        keep, order = applied.keeps[number], self.order[cuts[number].column]
        shown = applied.without(number, self.n) & self.seen(view)
        values = self.scores[cuts[number].column]
        at = applied.at[number]
        low, high = (int(_place(values, order, at, side)) for side in ("left", "right"))
        return _first(order[low:], shown & keep, n), _first(order[:high][::-1], shown & ~keep, n)

    def sample(self, cuts: Sequence[Cut], view: View, kept: bool, n: int) -> np.ndarray:
        """Random rows of a view, the same each time: of those that the cuts keep, or of the others."""
        mask = self.apply(tuple(cuts)).without(None, self.n)
        return _first(self._random, self.seen(view) & (mask if kept else ~mask), n)

    def describe(self, rows: np.ndarray, cuts: Sequence[Cut]) -> list[dict[str, Any]]:
        """Texts, scores and fate of some rows, as plain data."""
        applied = self.apply(tuple(cuts))
        texts = self.texts.take(pa.array(rows)).to_pylist()
        return [
            {
                **text,
                "id": int(row),
                "scores": {k: None if math.isnan(v[row]) else float(v[row]) for k, v in self.scores.items()},
                "dropped_by": [cut.column for cut, keep in zip(cuts, applied.keeps) if not keep[row]],
            }
            for row, text in zip(rows, texts)
        ]


def _place(values: np.ndarray, order: np.ndarray, at: float, side: str) -> int:
    """Where a value belongs in an order, by bisection; everything is below NaN."""
    low, high = 0, len(order)
    while low < high and not math.isnan(at):
        middle = (low + high) // 2
        value = values[order[middle]]
        if value < at or (side == "right" and value == at):
            low = middle + 1
        else:
            high = middle
    return high


def _first(order: np.ndarray, mask: np.ndarray, n: int) -> np.ndarray:
    """The first n rows of an order that a mask has; looks no further than it must."""
    found: list[np.ndarray] = []
    start, step = 0, 4096
    while start < len(order) and sum(map(len, found)) < n:
        part = order[start : start + step]
        found.append(part[mask[part]])
        start, step = start + step, step * 4
    return np.concatenate([np.empty(0, np.int32), *found])[:n].astype(np.int32)


def _table(categories: Categories, seen: np.ndarray, kept: np.ndarray, top: int) -> list[dict[str, Any]]:
    return _ranked(categories.names, categories.counts(seen), categories.counts(kept), top)


def _ranked(names: list[str], seen: np.ndarray, kept: np.ndarray, top: int) -> list[dict[str, Any]]:
    first = np.argsort(-seen, kind="stable")[:top] if len(seen) <= 10_000 else _largest(seen, top)
    return [{"name": names[i], "seen": int(seen[i]), "kept": int(kept[i])} for i in first if seen[i]]


def _largest(counts: np.ndarray, top: int) -> np.ndarray:
    best = np.argpartition(-counts, top)[:top]
    return best[np.lexsort((best, -counts[best]))]


def score_columns(types: Mapping[str, pa.DataType]) -> list[str]:
    """The columns that can be cut: numbers, but no hashes or sizes of whole integers beyond what a float64 holds."""
    kinds = (pa.types.is_floating, pa.types.is_decimal, pa.types.is_integer)
    skipped = {*POSITION.names, "phash"}
    return [name for name, dtype in types.items() if name not in skipped and any(is_kind(dtype) for is_kind in kinds)]


def vector_columns(types: Mapping[str, pa.DataType]) -> list[str]:
    """The columns of embeddings."""
    return [n for n, t in types.items() if is_heavy(t) and pa.types.is_fixed_size_list(t) and "image" in n] + [
        n for n, t in types.items() if is_heavy(t) and pa.types.is_fixed_size_list(t) and "image" not in n
    ]


def load(run: Run, after: str, folder: str, progress: Callable[[int], None] = lambda units: None) -> Rows:
    """Reads the rows that survived a step; texts go to a file in `folder`, which is mapped.

    Memory: some 60 bytes a row, 13 for each score and 8 for each concept. RunError for an unknown step.
    """
    types = run.columns(after)
    scores = score_columns(types)
    language = types.get("language") == pa.string()
    columns = [*SAMPLE.names, *scores, *(["language"] if language else [])]
    texts = pa.schema(list(SAMPLE))
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0)] for name in scores}
    places, languages = [np.empty((0, 2), np.int32)], [pa.array([], pa.string())]
    file = tempfile.NamedTemporaryFile(dir=folder, suffix=".arrow", delete=False)  # noqa: SIM115
    with file, pa.ipc.new_file(file, texts) as writer:
        for done, table in enumerate(run.scan(columns, after), 1):
            writer.write_table(table.select(SAMPLE.names).combine_chunks())
            places.append(np.stack([table[name].to_numpy() for name in POSITION.names], axis=1))
            for name in scores:
                values = pc.fill_null(table[name].cast(pa.float64(), safe=False), math.nan)
                parts[name].append(values.to_numpy())
            languages += table["language"].chunks if language else []
            progress(done)
    mapped = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    values = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    values = {name: array for name, array in values.items() if not np.isnan(array).all()}
    spoken = pa.chunked_array(languages) if language else None
    return Rows(np.concatenate(places), mapped, values, spoken, find_entries(run))
