"""Counts what each cut keeps besides rows: concepts, languages, duplicates.

This takes one more scan of the run, of texts and hashes only. Each candidate has one bit for each cut, set if the cut
keeps it. The bits of a concept are those of all its candidates combined, so a cut keeps the concepts that have its bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reader import Run
from pipeline.studio.concepts import find_entries, matches
from pipeline.study.candidates import Candidates
from pipeline.study.kept import Cuts, packed
from pipeline.study.study_plan import StudyError
from pipeline.text.hashing import hash64
from pipeline.text.matching import read_entries
from trainer.terminal import progress

WORD_BITS = 22
"""Distinct words are counted by linear counting (Whang et al., 1990) in 2^22 cells: practically exact for a few
thousand words, within 0.1% for a few million, in constant memory."""
GROUP = 1 << 22
"""Hashes compared at a time when duplicates are counted."""
DUPLICATES = ("phash", "sha256")
"""The columns by which rows count as duplicates: the perceptual hash if the run has it, else the hash of the file."""


def find_concepts(run: Run, option: str | None) -> tuple[str, ...] | str | None:
    """Resolves the key `concepts` of a study: the entries that count as concepts, or `words`; None to count none.

    Raises StudyError for an unreadable file of entries.
    """
    if option == "entries":
        return find_entries(run) or "words"
    if option is None or option == "words":
        return option
    try:
        return read_entries(option)
    except (OSError, ValueError) as error:
        raise StudyError(f"concepts: cannot read {option!r}: {error}") from None


def contents(cuts: Cuts, concepts: tuple[str, ...] | str | None) -> dict[str, list[int]]:
    """Counts for each cut the distinct `concepts` and `languages` that it keeps, and the `duplicates`: rows kept beyond
    the first of each group. A count whose columns the run lacks is left out."""
    candidates = cuts.candidates
    types = candidates.run.columns(candidates.after)
    counters: dict[str, _Distinct] = {}
    if isinstance(concepts, tuple):
        counters["concepts"] = _Distinct("caption", partial(matches, entries=concepts))
    elif concepts is not None:
        counters["concepts"] = _Distinct("caption", _words, cells=1 << WORD_BITS)
    if "language" in types:
        counters["languages"] = _Distinct("language", partial(_distinct_values, {}))
    key = duplicates_by(candidates)
    found: dict[str, list[int]] = {}
    if counters:
        columns = [counter.column for counter in counters.values()]
        tables = candidates.run.scan(columns, after=candidates.after)
        for (_, at), table in progress(zip(candidates.units, tables), len(candidates.counts), "units: contents"):
            if at.stop > at.start:
                bits = packed(cuts, at)
                for counter in counters.values():
                    counter.add(table[counter.column], bits)
        found = {name: counter.counts(len(cuts.cuts)) for name, counter in counters.items()}
    if key is not None:
        found["duplicates"] = _duplicates(cuts, key)
    return found


def duplicates_by(candidates: Candidates) -> str | None:
    """The column by which rows count as duplicates; None if the run has none."""
    types = candidates.run.columns(candidates.after)
    return next((name for name in DUPLICATES if name in types), None)


Pairs = tuple[np.ndarray, np.ndarray]
"""Two arrays: a row, and the number of a thing that it has, such as a concept."""


class _Distinct:
    """Counts for each cut the distinct things that at least one kept row has."""

    def __init__(self, column: str, things: Callable[[pa.ChunkedArray], Pairs], cells: int = 0) -> None:
        """`things` finds the things in values of `column`. With `cells`, it numbers them by hashes below `cells`, and
        counts are estimated by linear counting."""
        self.column, self.things, self.cells = column, things, cells
        self.bits: np.ndarray | None = None
        """The cuts that keep a row with each thing, as bits: uint8 (things, bytes)."""

    def add(self, values: pa.ChunkedArray, bits: np.ndarray) -> None:
        """Adds the values of rows, and the cuts that keep each row, as bits: uint8 (rows, bytes)."""
        row, thing = self.things(values)
        if not len(thing):
            return
        size = int(thing.max()) + 1
        if self.bits is None:
            self.bits = np.zeros((size, bits.shape[1]), np.uint8)
        elif len(self.bits) < size:
            grown = np.zeros((max(size, 2 * len(self.bits)), bits.shape[1]), np.uint8)
            grown[: len(self.bits)] = self.bits
            self.bits = grown
        order = np.argsort(thing, kind="stable")
        first = np.flatnonzero(np.append(True, np.diff(thing[order]) != 0))
        self.bits[thing[order[first]]] |= np.bitwise_or.reduceat(bits[row[order]], first, axis=0)

    def counts(self, cuts: int) -> list[int]:
        if self.bits is None:
            return [0] * cuts
        used = [int((self.bits[:, n // 8] >> np.uint8(7 - n % 8) & np.uint8(1)).sum()) for n in range(cuts)]
        if not self.cells:
            return used
        return [round(-self.cells * np.log1p(-min(n, self.cells - 1) / self.cells)) for n in used]


def _words(captions: pa.ChunkedArray) -> Pairs:
    """The words of captions, in any case; the number of a word is the first WORD_BITS bits of its hash."""
    words = pc.split_pattern_regex(pc.utf8_lower(captions), r"[^\pL\pM\pN]+").combine_chunks()
    encoded = pc.list_flatten(words).dictionary_encode()
    cells = hash64(encoded.dictionary, purpose="concepts") >> np.uint64(64 - WORD_BITS)
    index = encoded.indices.to_numpy()
    real = np.array([bool(word) for word in encoded.dictionary.to_pylist()], bool)[index]
    row = pc.list_parent_indices(words).to_numpy()
    return row[real], cells.astype(np.int64)[index[real]]


def _distinct_values(known: dict[str, int], values: pa.ChunkedArray) -> Pairs:
    """The values themselves, numbered in `known` as they appear."""
    encoded = values.combine_chunks().dictionary_encode()
    numbers = np.array([known.setdefault(v, len(known)) for v in encoded.dictionary.to_pylist()], np.int64)
    row = np.flatnonzero(pc.is_valid(encoded.indices).to_numpy(zero_copy_only=False))
    return row, numbers[pc.fill_null(encoded.indices, 0).to_numpy()[row]] if len(row) else row


def _duplicates(cuts: Cuts, column: str) -> list[int]:
    """The rows that each cut keeps, less the distinct values of `column` among them."""
    candidates = cuts.candidates

    def keys(table: pa.Table) -> np.ndarray:
        texts = table[column].cast(pa.string())
        # A row without a value duplicates no other.
        places = zip(table["unit"].to_pylist(), table["row"].to_pylist())
        lone = pa.array([f"{unit}/{row}" for unit, row in places], pa.string())
        return hash64(pc.coalesce(texts, lone), purpose="duplicates")

    hashes = candidates.spooled(f"duplicates-{column}", np.uint64, [column], keys)
    found = np.zeros(len(cuts.cuts), np.int64)
    parts = -(-len(candidates) // GROUP)
    for part in range(parts):
        picked: list[np.ndarray] = []
        bits: list[np.ndarray] = []
        for at in candidates.blocks:
            in_part = np.flatnonzero(hashes[at] % np.uint64(parts) == part)
            picked.append(hashes[at][in_part])
            bits.append(packed(cuts, at)[in_part])
        values, kept = np.concatenate(picked), np.concatenate(bits)
        order = np.argsort(values, kind="stable")
        values, kept = values[order], kept[order]
        again = np.append(False, values[1:] == values[:-1])
        if not again.any():
            continue
        grouped = again | np.append(again[1:], False)
        values, kept = values[grouped], kept[grouped]
        first = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
        each = np.unpackbits(kept, axis=1)[:, : len(cuts.cuts)].sum(axis=0, dtype=np.int64)
        groups = np.unpackbits(np.bitwise_or.reduceat(kept, first, axis=0), axis=1)[:, : len(cuts.cuts)]
        found += each - groups.sum(axis=0, dtype=np.int64)
    return [int(n) for n in found]
