"""Tries cuts on the rows of a run, in memory and within milliseconds: counts, histograms, rows on both sides of a cut.

`load` reads the rows once. A cut is one `threshold` line; a run whose recipe has the same lines keeps the same rows.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.condition import Boundary, Condition, wanted
from pipeline.reader import Run, RunStep
from pipeline.schema import POSITION, SAMPLE, is_heavy, is_number, numbers
from pipeline.studio.concepts import find_entries, matches
from pipeline.text.hashing import hash64
from pipeline.text.url import hosts

THRESHOLD = "pipeline.filters.threshold.Threshold"
"""The class of the steps that are cuts."""
BINS = 80
"""Bars of a histogram."""
_EDGE = 0.001
"""Share of the rows at each end of a score that the histogram adds to its first or last bar."""
_VIEWS = 16
"""Most views whose rows are cached."""


@dataclass(frozen=True)
class View:
    """Selects the rows to look at; empty fields select all. It has no effect on what the cuts keep."""

    language: str = ""
    host: str = ""
    concept: str = ""
    text: str = ""
    """Part of the caption, in any case."""


@dataclass(frozen=True)
class Applied:
    """What a list of cuts keeps of all rows."""

    keeps: tuple[np.ndarray, ...]
    """For each cut: the rows on its upper side, whatever the other cuts keep; bool (n,)."""
    after: tuple[int, ...]
    """For each cut: how many rows it and the cuts before it keep."""
    at: tuple[float, ...]
    """For each cut: the lowest value that it keeps; NaN if it keeps nothing."""

    def without(self, number: int | None, n: int) -> np.ndarray:
        """The rows that all cuts keep, or all except the cut with this number; bool (n,)."""
        kept = np.ones(n, bool)
        for i, keep in enumerate(self.keeps):
            if i != number:
                kept &= keep
        return kept


class Groups:
    """An index from names, such as hosts, to rows. A row may have several names or none."""

    def __init__(self, names: list[str], rows: np.ndarray, codes: np.ndarray) -> None:
        """`rows` and `codes` are pairs: a row, and the number of one of its names."""
        order = np.argsort(codes, kind="stable")
        self.names = names
        self._numbers = {name: number for number, name in enumerate(names)}
        self._rows = rows[order].astype(np.intp)
        self._starts = np.searchsorted(codes[order], np.arange(len(names) + 1))

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Groups:
        """Indexes the rows by the values of a text column."""
        encoded = column.combine_chunks().dictionary_encode()
        valid = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
        return cls(encoded.dictionary.to_pylist(), np.flatnonzero(valid), encoded.indices.drop_null().to_numpy())

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, number: int) -> np.ndarray:
        """The rows that have the name with this number."""
        return self._rows[self._starts[number] : self._starts[number + 1]]

    def where(self, name: str, n: int) -> np.ndarray:
        """The rows that have a name: bool (n,)."""
        found = np.zeros(n, bool)
        if name in self._numbers:
            found[self.rows(self._numbers[name])] = True
        return found

    def most(self, rows: np.ndarray, top: int) -> list[tuple[int, int]]:
        """The `top` names with most rows in a mask, most first, each as its number and its count of rows."""
        counts = np.zeros(len(self), np.int64)
        begins = self._starts[:-1]
        used = begins < self._starts[1:]  # `reduceat` does not give 0 for an empty range
        if used.any():
            counts[used] = np.add.reduceat(rows[self._rows].view(np.uint8), begins[used], dtype=np.int32)
        best = np.argpartition(-counts, top)[:top] if len(counts) > top else np.arange(len(counts))
        best = best[np.lexsort((best, -counts[best]))]
        return [(int(i), int(counts[i])) for i in best if counts[i]]


class Rows:
    """Rows in memory. Scores are float64, NaN for a row without one; texts are in a memory-mapped file."""

    def __init__(
        self,
        place: np.ndarray,
        texts: pa.Table,
        scores: Mapping[str, np.ndarray],
        language: pa.ChunkedArray | None = None,
        entries: tuple[str, ...] = (),
    ) -> None:
        """`place` is unit and row, ascending, int32 (n, 2); `texts` has `uid, url, caption`; `entries` are concepts."""
        self.place, self.texts, self.scores = place, texts, dict(scores)
        self.n = len(place)
        # `threshold` breaks ties by this hash. Its order also serves as a fixed random order of the rows.
        self._hash = hash64(texts["uid"], purpose="threshold")
        self._random = np.argsort(self._hash)
        self.order: dict[str, np.ndarray] = {}
        """For each score, the rows that have it, by ascending value."""
        self.ranges: dict[str, tuple[float, float]] = {}
        """For each score, the limits of its histogram."""
        self._bars: dict[str, np.ndarray] = {}
        for name, values in self.scores.items():
            order = np.argsort(values, kind="stable")
            self.order[name] = order[: self.n - int(np.isnan(values).sum())]
            self.ranges[name], self._bars[name] = self._binned(name)
        self.groups = {"hosts": Groups.of(hosts(texts["url"]))}
        if language is not None:
            self.groups["languages"] = Groups.of(language)
        if entries:
            self.groups["concepts"] = Groups(list(entries), *matches(texts["caption"], entries))
        # The first row of each chunk of the texts.
        self._chunks = np.cumsum([0, *(len(chunk) for chunk in texts["uid"].chunks)])
        self._threads = ThreadPoolExecutor(os.cpu_count())
        self.seen = lru_cache(_VIEWS)(self._seen)
        self.apply = lru_cache(4)(self._apply)
        self._drawn = lru_cache(_VIEWS * 32)(lambda name, view: self._histogram(name, self.seen(view)))
        self._most = lru_cache(_VIEWS * 4)(lambda kind, view, top: self.groups[kind].most(self.seen(view), top))

    def _binned(self, name: str) -> tuple[tuple[float, float], np.ndarray]:
        """The limits of a score's histogram, and the bar of each row: uint8 (n,), BINS for a row without a value."""
        values, order = self.scores[name], self.order[name]
        edge = int(len(order) * _EDGE)
        low, high = (float(values[order[i]]) for i in (edge, len(order) - 1 - edge))
        if not (math.isfinite(low) and math.isfinite(high)) or low == high:
            finite = values[np.isfinite(values)]
            low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        high = high if high > low else low + 1.0
        inner = np.linspace(low, high, BINS + 1)[1:-1]
        edges = [0, *(_place(values, order, float(at), "left") for at in inner), len(order)]
        bars = np.full(self.n, BINS, np.uint8)
        bars[order] = np.repeat(np.arange(BINS), np.diff(edges))
        return (low, high), bars

    # --- Cuts ---------------------------------------------------------------------------------------------------------

    def _apply(self, cuts: tuple[Condition, ...]) -> Applied:
        """Applies cuts in the order given."""
        kept = np.ones(self.n, bool)
        keeps, after, at = [], [], []
        for cut in cuts:
            boundary = Boundary(float(cut.value)) if cut.rule == "min" else self._top(cut.column, kept, cut.value)
            keep = boundary.keeps(self.scores[cut.column], self._hash.__getitem__, lambda rows: rows)
            at.append(boundary.value)
            kept &= keep
            keeps.append(keep)
            after.append(int(np.count_nonzero(kept)))
        return Applied(tuple(keeps), tuple(after), tuple(at))

    def _top(self, name: str, among: np.ndarray, fraction: float) -> Boundary:
        """The boundary of the ceil(fraction · m) highest of the m rows in the mask `among` that have a score."""
        values, order = self.scores[name], self.order[name]
        candidates = np.flatnonzero(among[order])  # positions in `order`
        count = wanted(fraction, len(candidates))
        if not count:
            return Boundary(math.nan)
        lowest = float(values[order[candidates[-count]]])
        low, high = (_place(values, order, lowest, side) for side in ("left", "right"))
        first, last = np.searchsorted(candidates, [low, high])
        above = len(candidates) - int(last)
        if count - above == last - first:
            return Boundary(lowest)
        tied = order[low:high]
        tied = tied[among[tied]]
        worst = tied[np.lexsort((tied, self._hash[tied]))][above - count]
        return Boundary(lowest, int(self._hash[worst]), int(worst))

    # --- Views --------------------------------------------------------------------------------------------------------

    def _seen(self, view: View) -> np.ndarray:
        """The rows of a view: bool (n,)."""
        seen = np.ones(self.n, bool)
        for kind, name in (("languages", view.language), ("hosts", view.host), ("concepts", view.concept)):
            if name and kind in self.groups:
                seen &= self.groups[kind].where(name, self.n)
        if view.text:
            found = self._threads.map(partial(_contains, text=view.text), self.texts["caption"].chunks)
            seen &= np.concatenate([np.empty(0, bool), *found])
        return seen

    def summary(self, cuts: Sequence[Condition], view: View, columns: Sequence[str], top: int = 8) -> dict[str, Any]:
        """Counts what cuts keep, and makes the histograms of the scores `columns`; plain data.

        For each score, `all` counts the rows of the view by bin, and `kept` those of them that all cuts on other scores
        keep, so its own cut divides `kept`.
        """
        applied, seen = self.apply(tuple(cuts)), self.seen(view)
        kept = applied.without(None, self.n)
        inside = kept & seen
        drawn = {}
        cut_columns = {cut.column for cut in cuts}
        for name in columns:
            rest = inside
            if name in cut_columns:
                rest = seen.copy()
                for cut, keep in zip(cuts, applied.keeps):
                    if cut.column != name:
                        rest &= keep
            drawn[name] = {"all": self._drawn(name, view), "kept": self._histogram(name, rest)}
        alone = [int(np.count_nonzero(applied.without(i, self.n) & ~keep)) for i, keep in enumerate(applied.keeps)]
        return {
            "rows": self.n,
            "kept": int(np.count_nonzero(kept)),
            "seen": int(np.count_nonzero(seen)),
            "seen_kept": int(np.count_nonzero(inside)),
            "cuts": [
                {"after": after, "alone": n, "at": _in_json(at)}
                for after, n, at in zip(applied.after, alone, applied.at)
            ],
            "columns": drawn,
            **{kind: self._kept_of(kind, view, inside, top) for kind in ("languages", "hosts", "concepts")},
        }

    def _histogram(self, name: str, rows: np.ndarray) -> list[int]:
        counts: list[int] = np.bincount(self._bars[name][rows], minlength=BINS + 1)[:BINS].tolist()
        return counts

    def _kept_of(self, kind: str, view: View, kept: np.ndarray, top: int) -> list[dict[str, Any]]:
        """The most frequent names of a view, each with its rows in the view and in the mask `kept`."""
        if kind not in self.groups:
            return []
        groups = self.groups[kind]
        return [
            {"name": groups.names[number], "seen": seen, "kept": int(np.count_nonzero(kept[groups.rows(number)]))}
            for number, seen in self._most(kind, view, top)
        ]

    # --- Single rows --------------------------------------------------------------------------------------------------

    def sides(self, cuts: Sequence[Condition], number: int, view: View, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the rows of a view that all other cuts keep, the n lowest above a cut and the n highest below it."""
        applied = self.apply(tuple(cuts))
        keep, order = applied.keeps[number], self.order[cuts[number].column]
        shown = applied.without(number, self.n) & self.seen(view)
        values = self.scores[cuts[number].column]
        at = applied.at[number]
        low, high = (int(_place(values, order, at, side)) for side in ("left", "right"))
        return first(order[low:], shown & keep, n), first(order[:high][::-1], shown & ~keep, n)

    def sample(self, cuts: Sequence[Condition], view: View, kept: bool, n: int) -> np.ndarray:
        """Random rows of a view that the cuts keep, or that they do not; the same for each call."""
        mask = self.apply(tuple(cuts)).without(None, self.n)
        return first(self._random, self.seen(view) & (mask if kept else ~mask), n)

    def describe(self, rows: np.ndarray, cuts: Sequence[Condition]) -> list[dict[str, Any]]:
        """The texts and scores of rows, and the cuts that drop them, as plain data."""
        applied = self.apply(tuple(cuts))
        chunk = np.searchsorted(self._chunks, rows, side="right") - 1
        texts = [
            {name: self.texts[name].chunk(c)[at].as_py() for name in SAMPLE.names}
            for c, at in zip(chunk.tolist(), (rows - self._chunks[chunk]).tolist())
        ]
        return [
            {
                **text,
                "id": int(row),
                "scores": {name: _in_json(values[row]) for name, values in self.scores.items()},
                "dropped_by": [cut.column for cut, keep in zip(cuts, applied.keeps) if not keep[row]],
            }
            for row, text in zip(rows, texts)
        ]


def _in_json(value: float) -> float | None:
    """Converts a number to what JSON can hold: NaN to null, infinities to the largest float."""
    return None if math.isnan(value) else float(np.nan_to_num(value))


def _contains(texts: pa.Array, text: str) -> np.ndarray:
    """Which of the texts contain a text, in any case: bool (n,)."""
    hits = pc.match_substring(texts, text, ignore_case=True)
    return pc.fill_null(hits, False).to_numpy(zero_copy_only=False)


def _place(values: np.ndarray, order: np.ndarray, at: float, side: str) -> int:
    """Where a value belongs in an order, by bisection, as `np.searchsorted`; all values sort before NaN."""
    low, high = 0, len(order)
    while low < high and not math.isnan(at):
        middle = (low + high) // 2
        value = values[order[middle]]
        if value < at or (side == "right" and value == at):
            low = middle + 1
        else:
            high = middle
    return high


def first(order: np.ndarray, mask: np.ndarray, n: int) -> np.ndarray:
    """The first n rows of an order that are in a mask. Reads no more of the order than needed."""
    found: list[np.ndarray] = []
    start, step = 0, 4096
    while start < len(order) and sum(map(len, found)) < n:
        part = order[start : start + step]
        found.append(part[mask[part]])
        start, step = start + step, step * 4
    return np.concatenate([np.empty(0, np.intp), *found])[:n]


def as_cut(step: RunStep) -> Condition | None:
    """The cut of a `threshold` step; None for other steps and for a `threshold` with a maximum."""
    options = {name: value for name, value in step.options.items() if value is not None}
    column, rule = options.pop("column", None), next(iter(options), "")
    if step.step != THRESHOLD or len(options) != 1 or rule not in ("min", "top_fraction"):
        return None
    return Condition(column, rule, options[rule])


def default_step(run: Run) -> str:
    """The step before the last uninterrupted series of cuts; without a cut, the last step that writes no shards."""
    steps = run.steps
    last = max((i for i, step in enumerate(steps) if as_cut(step)), default=None)
    if last is None:
        return steps[-2].label if steps[-1].step.startswith("pipeline.stages.write_") else steps[-1].label
    while as_cut(steps[last - 1]):
        last -= 1
    return steps[last - 1].label


def score_columns(types: Mapping[str, pa.DataType]) -> list[str]:
    """The numeric columns that can be cut: not the position of a row, nor `phash`, whose order means nothing."""
    skipped = {*POSITION.names, "phash"}
    return [name for name, dtype in types.items() if name not in skipped and is_number(dtype)]


def vector_columns(types: Mapping[str, pa.DataType]) -> list[str]:
    """The columns of embeddings, those of pictures first."""
    vectors = [name for name, dtype in types.items() if is_heavy(dtype) and pa.types.is_fixed_size_list(dtype)]
    return sorted(vectors, key=lambda name: "image" not in name)


def load(run: Run, after: str, folder: str, progress: Callable[[int], None] = lambda units: None) -> Rows:
    """Reads the rows that survived a step. Texts go to a memory-mapped file in `folder`.

    `progress` is called with the number of units read. Takes about 60 bytes of memory per row, plus 17 for each score
    and 8 for each concept. Raises RunError for an unknown step.
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
                parts[name].append(numbers(table[name]))
            languages += table["language"].chunks if language else []
            progress(done)
    mapped = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    values = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    values = {name: array for name, array in values.items() if not np.isnan(array).all()}
    spoken = pa.chunked_array(languages) if language else None
    return Rows(np.concatenate(places), mapped, values, spoken, find_entries(run))
