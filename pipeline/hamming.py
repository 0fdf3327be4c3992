"""Clusters of 64-bit hashes that lie close together, without comparing every two of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_ALL_BITS = (1 << 64) - 1
# Above so many members it is cheaper to divide a bucket once more than to compare all its pairs.
_LARGEST_BUCKET = 1024
# Found pairs are joined when there are so many, which bounds memory by the number of hashes, not of pairs.
_MOST_PENDING = 1 << 20


def masks(max_hamming: int, bits: int = _ALL_BITS) -> list[int]:
    """Bit masks, under at least one of which any two hashes that differ in at most `max_hamming` of `bits` are equal.

    The bits are cut into max_hamming + 2 blocks. Differences can touch all blocks but two at most (pigeonhole), so each
    mask is one pair of blocks: 15 masks of 21 or 22 bits for a distance of 4.
    """
    places = [place for place in range(64) if bits >> place & 1]
    blocks = [sum(1 << int(place) for place in block) for block in np.array_split(places, max_hamming + 2)]
    return [one | other for one, other in combinations(blocks, 2)]


def clusters(
    hashes: np.ndarray, max_hamming: int, probes: Iterable[tuple[int, np.ndarray]] | None = None
) -> np.ndarray:
    """The connected components of the graph that joins any two hashes at a Hamming distance ≤ `max_hamming`.

    `hashes`: distinct uint64, shape (n,). Returns int64 labels, shape (n,): each hash's label is the index of the first
    hash of its component. Exact. `probes` limits the search to pairs that are equal under one of these `(mask, indices
    of the hashes to compare)`; by default all hashes under each of `masks(max_hamming)`.

    Linear in practice: hashes are compared only within buckets that are equal under a mask; a crowded bucket is divided
    again, by the same pigeonhole, on the bits outside the mask; and one whose members are known to be connected is not
    looked into at all.
    """
    if probes is None:
        probes = [(mask, np.arange(len(hashes))) for mask in masks(max_hamming)]
    forest = Forest(len(hashes))
    # So many distinct hashes cannot be equal in all but max_hamming + 2 bits: what is divided has a bit for each block.
    largest = max(_LARGEST_BUCKET, 1 << max_hamming + 2)
    todo = list(probes)
    while todo:
        mask, members = todo.pop()
        members, starts, ends = _buckets(hashes, members, mask, forest)
        crowded = ends - starts > largest
        _join_close(hashes, members, starts[~crowded], ends[~crowded], max_hamming, forest)
        if crowded.any():
            # Hashes of several buckets still differ under `mask`, so under the finer masks they do not meet either.
            again = np.concatenate([members[start:end] for start, end in zip(starts[crowded], ends[crowded])])
            todo += [(mask | finer, again) for finer in masks(max_hamming, _ALL_BITS & ~mask)]
    return forest.roots(np.arange(len(hashes)))


class Forest:
    """Sets of connected nodes 0…n-1, each named by its smallest node."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)

    def roots(self, nodes: np.ndarray) -> np.ndarray:
        """The name of each node's set."""
        roots = self._parent[nodes]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[nodes] = roots
        return roots

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Unites the sets of left[i] and right[i] for every i."""
        nodes, ends = np.unique(self.roots(np.concatenate([left, right])), return_inverse=True)
        edges = coo_array((np.ones(len(left), bool), ends.reshape(2, -1)), shape=(len(nodes), len(nodes)))
        _, component = connected_components(edges, directed=False)
        _, first = np.unique(component, return_index=True)
        self._parent[nodes] = nodes[first][component]  # nodes ascend, so the first of a component is its smallest


def _buckets(
    hashes: np.ndarray, members: np.ndarray, mask: int, forest: Forest
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The members, those equal under the mask side by side, and where each bucket that is worth a look starts and ends."""
    key = hashes[members] & np.uint64(mask)
    order = np.argsort(key, kind="stable")
    members, key = members[order], key[order]
    starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
    ends = np.append(starts[1:], len(key))
    starts, ends = starts[ends - starts > 1], ends[ends - starts > 1]
    if len(starts):
        roots = forest.roots(members)
        bounds = np.column_stack([starts, ends]).ravel()
        bounds = bounds[:-1] if bounds[-1] == len(members) else bounds
        connected = (np.minimum.reduceat(roots, bounds) == np.maximum.reduceat(roots, bounds))[::2]
        starts, ends = starts[~connected], ends[~connected]
    return members, starts, ends


def _join_close(
    hashes: np.ndarray, members: np.ndarray, starts: np.ndarray, ends: np.ndarray, max_hamming: int, forest: Forest
) -> None:
    """Joins all close pairs within each bucket."""
    values, roots = hashes[members], forest.roots(members)
    end = np.repeat(ends, ends - starts)
    place = np.arange(len(end)) + np.repeat(ends - np.cumsum(ends - starts), ends - starts)
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    step = count = 0
    # Every member against the next one, then against the second next, and so on to the end of its bucket.
    while len(place):
        step += 1
        inside = place + step < end
        place, end = place[inside], end[inside]
        left = place[np.bitwise_count(values[place] ^ values[place + step]) <= max_hamming]
        left = left[roots[left] != roots[left + step]]
        if len(left):
            pending.append((members[left], members[left + step]))
            count += len(left)
        if count > _MOST_PENDING or (count and not len(place)):
            forest.join(*(np.concatenate(side) for side in zip(*pending)))
            roots, pending, count = forest.roots(members), [], 0
