"""The rows of a run in memory, to try cuts on: counts, curves, and the rows on both sides of each cut, in milliseconds.

`load` reads them once. A cut is one `threshold` line, and a run of a recipe with the same lines keeps the same rows.
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
"""The step of a cut."""
BINS = 80
"""Bars of a histogram."""
_EDGE = 0.001
"""Share of the rows at either end of a column that its histogram adds to the first and last bar."""
_MASKS = 16
"""Views whose rows are remembered."""


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


class Groups:
    """Names, and the rows of each; a row may have several names or none."""

    def __init__(self, names: list[str], rows: np.ndarray, codes: np.ndarray) -> None:
        """`rows` and `codes` are pairs: a row, and the number of a name that it has."""
        order = np.argsort(codes, kind="stable")
        self.names = names
        self._numbers = {name: number for number, name in enumerate(names)}
        self._rows = rows[order].astype(np.intp)
        self._starts = np.searchsorted(codes[order], np.arange(len(names) + 1))

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Groups:
        """The rows by the value of a text column."""
        encoded = column.combine_chunks().dictionary_encode()
        there = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
        return cls(encoded.dictionary.to_pylist(), np.flatnonzero(there), encoded.indices.drop_null().to_numpy())

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, number: int) -> np.ndarray:
        """The rows that have a name, by its number."""
        return self._rows[self._starts[number] : self._starts[number + 1]]

    def where(self, name: str, n: int) -> np.ndarray:
        """The rows that have a name: bool of shape (n,)."""
        found = np.zeros(n, bool)
        if name in self._numbers:
            found[self.rows(self._numbers[name])] = True
        return found

    def most(self, rows: np.ndarray, top: int) -> list[tuple[int, int]]:
        """The names that most rows of a mask have, with the number of these rows."""
        counts = np.zeros(len(self), np.int64)
        begins = self._starts[:-1]
        there = begins < self._starts[1:]  # what `reduceat` gives for an empty range is not 0
        if there.any():
            counts[there] = np.add.reduceat(rows[self._rows].view(np.uint8), begins[there], dtype=np.int32)
        best = np.argpartition(-counts, top)[:top] if len(counts) > top else np.arange(len(counts))
        best = best[np.lexsort((best, -counts[best]))]
        return [(int(i), int(counts[i])) for i in best if counts[i]]


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
        """`place` is int32 of shape (n, 2), unit and row, ascending; `texts` has `uid, url, caption`; `entries` are
        concepts."""
        self.place, self.texts, self.scores = place, texts, dict(scores)
        self.n = len(place)
        # What breaks ties in `threshold`, and a fixed random order of the rows.
        self._hash = hash64(texts["uid"], purpose="threshold")
        self._random = np.argsort(self._hash)
        self.order: dict[str, np.ndarray] = {}
        """For each score, the rows that have one, in ascending order."""
        self.ranges: dict[str, tuple[float, float]] = {}
        """For each score, where its histogram begins and ends."""
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
        # Where the chunks of the texts begin.
        self._chunks = np.cumsum([0, *(len(chunk) for chunk in texts["uid"].chunks)])
        self._threads = ThreadPoolExecutor(os.cpu_count())
        self.seen = lru_cache(_MASKS)(self._seen)
        self.apply = lru_cache(4)(self._apply)
        self._drawn = lru_cache(_MASKS * 32)(self._seen_histogram)
        self._most = lru_cache(_MASKS * 4)(self._most_seen)

    def _binned(self, name: str) -> tuple[tuple[float, float], np.ndarray]:
        """Where the histogram of a score begins and ends, and the bar of each row (uint8; BINS without a value)."""
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
        """Applies cuts in their order."""
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
        """The lowest of the ceil(fraction · m) highest of m rows with a value."""
        values, order = self.scores[name], self.order[name]
        candidates = np.flatnonzero(among[order])  # places in the order
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
        """The rows of a view: bool of shape (n,)."""
        seen = np.ones(self.n, bool)
        for kind, name in (("languages", view.language), ("hosts", view.host), ("concepts", view.concept)):
            if name and kind in self.groups:
                seen &= self.groups[kind].where(name, self.n)
        if view.text:
            found = self._threads.map(partial(_contains, text=view.text), self.texts["caption"].chunks)
            seen &= np.concatenate([np.empty(0, bool), *found])
        return seen

    def summary(self, cuts: Sequence[Condition], view: View, columns: Sequence[str], top: int = 8) -> dict[str, Any]:
        """Counts for a set of cuts and the histograms of some scores, as plain data.

        For each score: `all` are the rows of the view by bin, `kept` those that all cuts on other scores keep; the
        cuts on a score itself divide its `kept`.
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

    def _seen_histogram(self, name: str, view: View) -> list[int]:
        return self._histogram(name, self.seen(view))

    def _histogram(self, name: str, rows: np.ndarray) -> list[int]:
        counts: list[int] = np.bincount(self._bars[name][rows], minlength=BINS + 1)[:BINS].tolist()
        return counts

    def _most_seen(self, kind: str, view: View, top: int) -> list[tuple[int, int]]:
        return self.groups[kind].most(self.seen(view), top)

    def _kept_of(self, kind: str, view: View, kept: np.ndarray, top: int) -> list[dict[str, Any]]:
        """The most frequent names of a view: the rows of the view that have them, and those of a mask."""
        if kind not in self.groups:
            return []
        groups = self.groups[kind]
        return [
            {"name": groups.names[number], "seen": seen, "kept": int(np.count_nonzero(kept[groups.rows(number)]))}
            for number, seen in self._most(kind, view, top)
        ]

    # --- Single rows --------------------------------------------------------------------------------------------------

    def sides(self, cuts: Sequence[Condition], number: int, view: View, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a view that all other cuts keep: the n lowest above a cut, and the n highest below it."""
        applied = self.apply(tuple(cuts))
        keep, order = applied.keeps[number], self.order[cuts[number].column]
        shown = applied.without(number, self.n) & self.seen(view)
        values = self.scores[cuts[number].column]
        at = applied.at[number]
        low, high = (int(_place(values, order, at, side)) for side in ("left", "right"))
        return first(order[low:], shown & keep, n), first(order[:high][::-1], shown & ~keep, n)

    def sample(self, cuts: Sequence[Condition], view: View, kept: bool, n: int) -> np.ndarray:
        """Random rows of a view, the same each time: of those that the cuts keep, or of the others."""
        mask = self.apply(tuple(cuts)).without(None, self.n)
        return first(self._random, self.seen(view) & (mask if kept else ~mask), n)

    def describe(self, rows: np.ndarray, cuts: Sequence[Condition]) -> list[dict[str, Any]]:
        """Texts, scores and fate of some rows, as plain data."""
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
    """A number as JSON can hold it: NaN is null, an infinity the largest number."""
    return None if math.isnan(value) else float(np.nan_to_num(value))


def _contains(texts: pa.Array, text: str) -> np.ndarray:
    """Which texts contain a text, in either case."""
    hits = pc.match_substring(texts, text, ignore_case=True)
    return pc.fill_null(hits, False).to_numpy(zero_copy_only=False)


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


def first(order: np.ndarray, mask: np.ndarray, n: int) -> np.ndarray:
    """The first n rows of an order that a mask has; looks no further than it must."""
    found: list[np.ndarray] = []
    start, step = 0, 4096
    while start < len(order) and sum(map(len, found)) < n:
        part = order[start : start + step]
        found.append(part[mask[part]])
        start, step = start + step, step * 4
    return np.concatenate([np.empty(0, np.intp), *found])[:n]


def as_cut(step: RunStep) -> Condition | None:
    """The cut that a step of a run is; None for other steps and for a `threshold` with a maximum."""
    options = {name: value for name, value in step.options.items() if value is not None}
    column, rule = options.pop("column", None), next(iter(options), "")
    if step.step != THRESHOLD or len(options) != 1 or rule not in ("min", "top_fraction"):
        return None
    return Condition(column, rule, options[rule])


def default_step(run: Run) -> str:
    """The step before the last cuts that follow each other; without a cut, the last step that writes nothing."""
    steps = run.steps
    last = max((i for i, step in enumerate(steps) if as_cut(step)), default=None)
    if last is None:
        return steps[-2].label if steps[-1].step.startswith("pipeline.stages.write_") else steps[-1].label
    while as_cut(steps[last - 1]):
        last -= 1
    return steps[last - 1].label


def score_columns(types: Mapping[str, pa.DataType]) -> list[str]:
    """The columns that can be cut: numbers, but no hashes or sizes of whole integers beyond what a float64 holds."""
    skipped = {*POSITION.names, "phash"}
    return [name for name, dtype in types.items() if name not in skipped and is_number(dtype)]


def vector_columns(types: Mapping[str, pa.DataType]) -> list[str]:
    """The columns of embeddings."""
    return [n for n, t in types.items() if is_heavy(t) and pa.types.is_fixed_size_list(t) and "image" in n] + [
        n for n, t in types.items() if is_heavy(t) and pa.types.is_fixed_size_list(t) and "image" not in n
    ]


def load(run: Run, after: str, folder: str, progress: Callable[[int], None] = lambda units: None) -> Rows:
    """Reads the rows that survived a step; texts go to a file in `folder`, which is mapped.

    Memory: some 60 bytes a row, 17 for each score and 8 for each concept. RunError for an unknown step.
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
