"""Exact search for 64-bit hashes within a Hamming distance, without comparing all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

_ALL_BITS = (1 << 64) - 1


def masks(max_hamming: int, bits: int = _ALL_BITS) -> list[int]:
    """Bit masks such that any two hashes that differ in at most `max_hamming` of `bits` agree under one of the masks.

    Splits the bits into max_hamming + 2 blocks (Manku et al., WWW 2007). At least two blocks are equal (pigeonhole),
    so there is a mask for each pair of blocks: 15 masks of 21 or 22 bits for a distance of 4.
    """
    places = [place for place in range(64) if bits >> place & 1]
    blocks = [sum(1 << int(place) for place in block) for block in np.array_split(places, max_hamming + 2)]
    return [one | other for one, other in combinations(blocks, 2)]


class Index:
    """Finds which of many known hashes are within a Hamming distance of others."""

    def __init__(self, hashes: np.ndarray, max_hamming: int) -> None:
        """`hashes` is uint64 (m,). Takes about 250 bytes of memory per hash at a distance of 4."""
        self._hashes, self._first, self._inverse = np.unique(
            np.asarray(hashes, np.uint64), return_index=True, return_inverse=True
        )
        self._max = max_hamming
        self._tables = []
        for mask in masks(max_hamming):
            keys = self._hashes & np.uint64(mask)
            order = np.argsort(keys, kind="stable")
            self._tables.append((np.uint64(mask), keys[order], order))

    def nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each query, uint64 (n,): the index of the nearest known hash, or −1 if none is near enough, and its
        distance. Of equally near hashes the lowest is taken; of equal hashes, the first."""
        queries = np.asarray(queries, np.uint64)
        best = np.full(len(queries), self._far(self._hashes))
        for query, known, distance in self._compare(queries):
            best[query] = np.minimum(best[query], distance * (len(self._hashes) + 1) + known)
        return self._split(best, self._first)

    def nearest_query(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The reverse of `nearest`: for each known hash, the index of the nearest query, or −1, and its distance."""
        queries, first = np.unique(np.asarray(queries, np.uint64), return_index=True)
        best = np.full(len(self._hashes), self._far(queries))
        for query, known, distance in self._compare(queries):
            np.minimum.at(best, known, distance * (len(queries) + 1) + query)
        return self._split(best[self._inverse], first)

    def _compare(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields all pairs that agree under a mask, in parts: indices of queries and known hashes, and distances."""
        for mask, keys, order in self._tables:
            low, high = (np.searchsorted(keys, queries & mask, side) for side in ("left", "right"))
            while len(query := np.flatnonzero(low < high)):  # one candidate per bucket at a time
                known = order[low[query]]
                yield query, known, np.bitwise_count(queries[query] ^ self._hashes[known]).astype(np.int64)
                low[query] += 1

    # Distance and index are combined into one number, so that the smallest number is the nearest hash.

    def _far(self, places: np.ndarray) -> int:
        return (self._max + 1) * (len(places) + 1)

    def _split(self, best: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distance, place = np.divmod(best, len(first) + 1)
        found = distance <= self._max
        return np.where(found, first[np.where(found, place, 0)] if len(first) else -1, -1), distance
