"""What is among the rows that each cut keeps: concepts, languages, duplicates.

One more scan of the run, of texts and hashes alone. Each candidate comes with one bit for each cut that keeps it, and a
concept collects the bits of its candidates, so a cut holds the concepts that have its bit.
"""

from __future__ import annotations

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
"""Distinct words are counted by linear counting (Whang et al., 1990) over 2^22 cells: exact in effect for a few
thousand words, within 0.1% for some million, in memory that does not grow."""
GROUP = 1 << 22
"""Hashes compared at a time when duplicates are counted."""
DUPLICATES = ("phash", "sha256")
"""The columns by which rows count as duplicates, the first that there is: equal perceptual hashes, or equal files."""


def find_concepts(run: Run, said: str | None) -> tuple[str, ...] | str | None:
    """What counts as a concept: entries, or `words`; None if they are not to be counted. Raises StudyError."""
    if said == "entries":
        return find_entries(run) or "words"
    if said is None or said == "words":
        return said
    try:
        entries = read_entries(said)
    except (OSError, ValueError) as error:
        raise StudyError(f"concepts: cannot read {said!r}: {error}") from None
    return entries


def contents(cuts: Cuts, concepts: tuple[str, ...] | str | None) -> dict[str, list[int]]:
    """For each cut, the distinct `concepts` and `languages`, and the rows that are `duplicates` of others that it keeps
    too; each only where the run has the columns."""
    candidates = cuts.candidates
    types = candidates.run.columns(candidates.after)
    counters: dict[str, _Distinct] = {}
    if concepts is not None:
        counters["concepts"] = _Entries(concepts) if isinstance(concepts, tuple) else _Words()
    if "language" in types:
        counters["languages"] = _Values("language")
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
    """The column by which rows count as duplicates."""
    types = candidates.run.columns(candidates.after)
    return next((name for name in DUPLICATES if name in types), None)


class _Distinct:
    """Counts the distinct things of which each cut keeps at least one."""

    column: str

    def __init__(self) -> None:
        self.bits: np.ndarray | None = None
        """uint8 (things, bytes): the cuts that keep a row with it"""

    def add(self, values: pa.ChunkedArray, bits: np.ndarray) -> None:
        """Adds the values of some rows, and the cuts that keep each row (rows, bytes)."""
        row, thing = self.things(values)
        if not len(thing):
            return
        size = int(thing.max()) + 1
        if self.bits is None or len(self.bits) < size:
            grown = np.zeros((max(size, 2 * (0 if self.bits is None else len(self.bits))), bits.shape[1]), np.uint8)
            if self.bits is not None:
                grown[: len(self.bits)] = self.bits
            self.bits = grown
        order = np.argsort(thing, kind="stable")
        first = np.flatnonzero(np.append(True, np.diff(thing[order]) != 0))
        self.bits[thing[order[first]]] |= np.bitwise_or.reduceat(bits[row[order]], first, axis=0)

    def things(self, values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a row and the number of a thing that it has."""
        raise NotImplementedError

    def counts(self, cuts: int) -> list[int]:
        if self.bits is None:
            return [0] * cuts
        return [
            int((self.bits[:, number // 8] >> np.uint8(7 - number % 8) & np.uint8(1)).sum()) for number in range(cuts)
        ]


class _Words(_Distinct):
    column = "caption"

    def things(self, values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        words = pc.split_pattern_regex(pc.utf8_lower(values), r"[^\pL\pM\pN]+").combine_chunks()
        encoded = pc.list_flatten(words).dictionary_encode()
        cells = hash64(encoded.dictionary, purpose="concepts") >> np.uint64(64 - WORD_BITS)
        index = encoded.indices.to_numpy()
        real = np.array([bool(word) for word in encoded.dictionary.to_pylist()], bool)[index]
        row = pc.list_parent_indices(words).to_numpy()
        return row[real], cells.astype(np.int64)[index[real]]

    def counts(self, cuts: int) -> list[int]:
        cells = 1 << WORD_BITS
        return [round(-cells * np.log1p(-min(used, cells - 1) / cells)) for used in super().counts(cuts)]


class _Entries(_Distinct):
    column = "caption"

    def __init__(self, entries: tuple[str, ...]) -> None:
        super().__init__()
        self.entries = entries

    def things(self, values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        return matches(values, self.entries)


class _Values(_Distinct):
    def __init__(self, column: str) -> None:
        super().__init__()
        self.column = column
        self.known: dict[str, int] = {}

    def things(self, values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        encoded = values.combine_chunks().dictionary_encode()
        numbers = np.array(
            [self.known.setdefault(v, len(self.known)) for v in encoded.dictionary.to_pylist()], np.int64
        )
        there = pc.is_valid(encoded.indices).to_numpy(zero_copy_only=False)
        row = np.flatnonzero(there)
        return row, numbers[pc.fill_null(encoded.indices, 0).to_numpy()[row]] if len(row) else row


def _duplicates(cuts: Cuts, column: str) -> list[int]:
    candidates = cuts.candidates

    def keys(table: pa.Table) -> np.ndarray:
        values = table[column]
        texts = values.cast(pa.string())
        # A row without a value is like no other.
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
            mine = np.flatnonzero(hashes[at] % np.uint64(parts) == part)
            picked.append(hashes[at][mine])
            bits.append(packed(cuts, at)[mine])
        values, kept = np.concatenate(picked), np.concatenate(bits)
        order = np.argsort(values, kind="stable")
        values, kept = values[order], kept[order]
        again = np.append(False, values[1:] == values[:-1])
        if not again.any():
            continue
        member = again | np.append(again[1:], False)
        values, kept = values[member], kept[member]
        first = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
        each = np.unpackbits(kept, axis=1)[:, : len(cuts.cuts)].sum(axis=0, dtype=np.int64)
        groups = np.unpackbits(np.bitwise_or.reduceat(kept, first, axis=0), axis=1)[:, : len(cuts.cuts)]
        found += each - groups.sum(axis=0, dtype=np.int64)
    return [int(n) for n in found]
