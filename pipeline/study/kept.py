"""Computes exactly which candidates each cut keeps, and how the cuts overlap."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice

import numpy as np

from pipeline.condition import Boundary, Ceiling, Condition, highest, wanted
from pipeline.study.candidates import Candidates
from pipeline.study.study_plan import Cut

SAMPLE = 1 << 18
"""Values sampled to estimate the boundary of a fraction; more if there are more than SAMPLE^1.5 rows."""

THREADS = os.cpu_count() or 1
"""Blocks of rows processed at a time; numpy computes without Python's lock."""

Conditions = tuple[Condition, ...]
Grid = tuple[tuple[Conditions, str], list[Condition]]
"""The conditions met before, a column, and the top fractions of it to try."""


class Cuts:
    """The cuts of a study, applied to its candidates."""

    def __init__(self, candidates: Candidates, cuts: Sequence[Cut]) -> None:
        self.candidates, self.cuts = candidates, list(cuts)
        self.boundaries: dict[Conditions, Boundary | Ceiling] = {}
        """The boundary of the last condition of each prefix of a cut."""
        grids: dict[tuple[Conditions, str], list[Condition]] = {}
        for cut in self.cuts:
            for number, condition in enumerate(cut.conditions):
                before = cut.conditions[:number]
                if condition.rule == "min":
                    self.boundaries[before + (condition,)] = Boundary(condition.value)
                elif condition.rule == "max":
                    stored = candidates.run.columns(candidates.after)[condition.column]
                    self.boundaries[before + (condition,)] = Ceiling(highest(condition.value, stored))
                elif condition not in (grid := grids.setdefault((before, condition.column), [])):
                    grid.append(condition)
        with ThreadPoolExecutor(THREADS) as threads:
            for _, same_depth in groupby(sorted(grids.items(), key=_depth), key=_depth):
                for found in threads.map(self._boundaries, same_depth):
                    self.boundaries |= found

    def kept(self, at: slice) -> np.ndarray:
        """Whether each cut keeps each candidate of a block: bool (cuts, rows)."""
        known: dict[Conditions, np.ndarray] = {}
        kept = np.empty((len(self.cuts), at.stop - at.start), bool)
        for number, cut in enumerate(self.cuts):
            kept[number] = self._meets(cut.conditions, at, known)
        return kept

    def _meets(self, conditions: Conditions, at: slice, known: dict[Conditions, np.ndarray]) -> np.ndarray:
        """Whether the candidates of a block meet all conditions: bool (rows,). `known` caches prefixes of cuts."""
        if not conditions:
            return np.ones(at.stop - at.start, bool)
        if conditions not in known:
            values = self.candidates.column(conditions[-1].column)[at]
            meets = self.boundaries[conditions].keeps(
                values, lambda tied: self.candidates.uid_hashes(at.start + tied), lambda tied: at.start + tied
            )
            known[conditions] = meets & self._meets(conditions[:-1], at, known) if len(conditions) > 1 else meets
        return known[conditions]

    def _boundaries(self, grid: Grid) -> dict[Conditions, Boundary]:
        """The boundaries of top fractions of a column among the candidates that meet the conditions before."""
        (before, column), conditions = grid
        candidates = self.candidates
        values = candidates.column(column)

        def eligible(at: slice) -> np.ndarray:
            valid = ~np.isnan(values[at])
            return valid & self._meets(before, at, {}) if before else valid

        counts = [int(np.count_nonzero(eligible(at))) for at in candidates.blocks]
        everything, count = sum(counts) == len(candidates), sum(counts)
        if not count:
            return {before + (condition,): Boundary(math.nan) for condition in conditions}
        ranks = [wanted(condition.value, count) for condition in conditions]

        def blocks() -> Iterator[np.ndarray]:
            return (values[at] if everything else values[at][eligible(at)] for at in candidates.blocks)

        found: dict[Conditions, Boundary] = {}
        for condition, rank, (value, above, tied) in zip(conditions, ranks, largest(blocks, count, ranks)):
            if above + tied == rank:
                found[before + (condition,)] = Boundary(float(value))
                continue
            left = rank - above

            def ties(value: np.number = value) -> Iterator[np.ndarray]:
                for at in candidates.blocks:
                    tied = np.flatnonzero(values[at] == value)
                    yield at.start + (tied if everything or not len(tied) else tied[eligible(at)[tied]])

            [(lowest, higher, same)] = largest(lambda: map(candidates.uid_hashes, ties()), tied, [left])
            equal = np.concatenate([places[candidates.uid_hashes(places) == lowest] for places in ties()])
            place = int(equal[same - (left - higher)])
            found[before + (condition,)] = Boundary(float(value), int(lowest), place)
        return found


def _depth(grid: Grid) -> int:
    """How many conditions a grid follows. It needs the boundaries of those."""
    return len(grid[0][0])


def largest(
    blocks: Callable[[], Iterator[np.ndarray]], count: int, ranks: Sequence[int]
) -> list[tuple[np.number, int, int]]:
    """Finds the k-th largest of `count` numbers for each k in `ranks`, counted from 1.

    Returns for each the value, how many numbers are above it, and how many equal it. Exact, in two or three passes over
    the blocks. A sample gives two bounds between which the result lies almost surely (Floyd and Rivest, 1975). A pass
    then counts the numbers above and collects those between, O(count^(2/3)) numbers. If the result lies outside the
    bounds, the pass is repeated with wider ones.
    """
    size = max(SAMPLE, int(count ** (2 / 3)))
    step = max(1, count // size)
    seen, parts = 0, []
    for block in blocks():
        parts.append(np.array(block[-seen % step :: step]))
        seen += len(block)
    sample = np.sort(np.concatenate(parts))[::-1]
    margin = 0 if step == 1 else 4 * int(len(sample) ** 0.5)
    results: dict[int, tuple[np.number, int, int]] = {}
    while due := [rank for rank in dict.fromkeys(ranks) if rank not in results]:
        bounds = []
        for rank in due:
            near = min((rank - 1) // step, len(sample) - 1)
            high = sample[near - margin] if near >= margin else None
            low = sample[near + margin] if near + margin < len(sample) else None
            bounds.append((low, high))
        if step == 1:
            inside, above = [sample] * len(due), [0] * len(due)
        else:
            inside, above = _between(blocks, bounds)
        for rank, between, higher in zip(due, inside, above):
            if higher < rank <= higher + len(between):
                place = len(between) - (rank - higher)
                value = np.partition(between, place)[place]
                greater = int((between > value).sum())
                results[rank] = (value, higher + greater, int((between == value).sum()))
        margin *= 4
    return [results[rank] for rank in ranks]


def _between(
    blocks: Callable[[], Iterator[np.ndarray]], bounds: Sequence[tuple[np.number | None, np.number | None]]
) -> tuple[list[np.ndarray], list[int]]:
    """For each pair of bounds, the numbers from low to high, and how many are above high; None is unbounded."""
    parts: list[list[np.ndarray]] = [[] for _ in bounds]
    above = [0] * len(bounds)
    for block in blocks():
        for i, (low, high) in enumerate(bounds):
            within = np.ones(len(block), bool) if low is None else block >= low
            if high is not None:
                over = block > high
                above[i] += int(np.count_nonzero(over))
                within &= ~over
            parts[i].append(block[within])
    return [np.concatenate(arrays) for arrays in parts], above


# --- What a cut keeps -------------------------------------------------------------------------------------------------


def overlaps(cuts: Cuts) -> np.ndarray:
    """How many candidates both cuts of each pair keep: int64 (cuts, cuts). The diagonal is what each cut keeps."""
    count = len(cuts.cuts)

    def part(first: int) -> np.ndarray:
        both = np.zeros((count, count), np.int64)
        for at in islice(cuts.candidates.blocks, first, None, THREADS):
            bits = np.packbits(cuts.kept(at), axis=1)
            padded = np.zeros((count, -(-bits.shape[1] // 8) * 8), np.uint8)
            padded[:, : bits.shape[1]] = bits
            words = padded.view(np.uint64)
            for i in range(count):
                both[i, i:] += np.bitwise_count(words[i] & words[i:]).sum(axis=1, dtype=np.int64)
        return both

    with ThreadPoolExecutor(THREADS) as threads:
        both = sum(threads.map(part, range(THREADS)), np.zeros((count, count), np.int64))
    return both + np.triu(both, 1).T


def jaccard(both: np.ndarray) -> np.ndarray:
    """The rows that both cuts of each pair keep, divided by those that either keeps: float64 (cuts, cuts), NaN if
    neither keeps any. `both` comes from `overlaps`."""
    sizes = both.diagonal()
    either = sizes[:, None] + sizes[None, :] - both
    return np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)


def packed(cuts: Cuts, at: slice) -> np.ndarray:
    """The cuts that keep each candidate of a block, as bits, the first cut highest: uint8 (rows, bytes)."""
    return np.packbits(cuts.kept(at), axis=0).T


def cut_rows(cuts: Cuts, number: int) -> np.ndarray:
    """The places of the candidates that a cut keeps: int64, ascending."""
    only = cuts.cuts[number].conditions
    kept = (at.start + np.flatnonzero(cuts._meets(only, at, {})) for at in cuts.candidates.blocks)
    return np.concatenate([np.empty(0, np.int64), *kept])
