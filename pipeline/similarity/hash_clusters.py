"""Clusters 64-bit hashes by Hamming distance without comparing all pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from trainer.hamming import masks

# Largest bucket that is compared pairwise. Larger ones are cheaper to split.
_LARGEST_BUCKET = 256
# Buckets of at most this many members are compared pairwise, without checking which members are already connected.
_SMALL_BUCKET = 64
# Members of a bucket that are compared with all others first. In dense buckets, this connects most members and saves
# most of the remaining comparisons.
_PIVOTS = 8
# Pairs are joined once this many are found, so memory is bounded by the number of hashes, not of pairs.
_MAX_PENDING = 1 << 20


def clusters(
    hashes: np.ndarray, max_hamming: int, probes: Iterable[tuple[int, np.ndarray]] | None = None
) -> np.ndarray:
    """Connected components of the graph that links hashes at a Hamming distance ≤ `max_hamming`. Exact.

    `hashes` are distinct uint64 of shape (n,). Returns int64 labels of shape (n,): for each hash, the index of the
    first hash in its component. `probes` are pairs `(mask, indices of the hashes to compare)`; only pairs of hashes
    that are equal under one of these masks are found. By default, all hashes are compared under each of
    `masks(max_hamming)`. A pair that is equal under several masks may be compared only under the first.

    Hashes are compared only within buckets of hashes that are equal under a mask. Crowded buckets are split again by
    the same pigeonhole argument on the bits that vary in them, and members known to be connected are not compared.
    """
    probes = list(probes if probes is not None else [(mask, np.arange(len(hashes))) for mask in masks(max_hamming)])
    forest = Forest(len(hashes))
    links = _Links(forest)
    order = np.argsort(hashes)
    ascending = hashes[order]

    def places(values: np.ndarray) -> np.ndarray:
        return order[np.searchsorted(ascending, values)]

    todo = []
    for number, (mask, members) in enumerate(probes):
        earlier = [other for other, _ in probes[:number]]
        todo.append((mask, _link_in_small_buckets(hashes[members], mask, earlier, max_hamming, places, links), _PIVOTS))
    links.join()
    # More distinct hashes than this vary in over max_hamming + 2 bits, so there is a bit for every block of a split.
    largest = max(_LARGEST_BUCKET, 1 << max_hamming + 2)
    while todo:
        mask, members, most = todo.pop()
        members, sizes, minors = _buckets(hashes, members, mask, forest)
        crowded = (sizes * minors > largest**2) & (most > _PIVOTS)
        compare = np.repeat(~crowded, sizes)
        _link_close(hashes, members[compare], sizes[~crowded], np.minimum(minors, most)[~crowded], max_hamming, links)
        links.join()
        if (unfinished := minors > most).any():
            todo.append((mask, members[np.repeat(unfinished, sizes)], len(hashes)))
        if crowded.any():
            # Hashes of different buckets differ under `mask`, so the finer masks separate them too.
            members, sizes = members[~compare], sizes[crowded]
            first = np.repeat(members[np.cumsum(sizes) - sizes], sizes)
            varying = int(np.bitwise_or.reduce(hashes[members] ^ hashes[first]))
            todo += [(mask | finer, members, _PIVOTS) for finer in masks(max_hamming, varying)]
    return forest.roots(np.arange(len(hashes)))


class Forest:
    """Disjoint sets of the nodes 0 to n − 1. Each set is identified by its smallest node."""

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)

    def roots(self, nodes: np.ndarray) -> np.ndarray:
        """The smallest node of each node's set."""
        roots = self._parent[nodes]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[nodes] = roots
        return roots

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Merges the sets of left[i] and right[i] for every i."""
        nodes, ends = np.unique(self.roots(np.concatenate([left, right])), return_inverse=True)
        edges = coo_array((np.ones(len(left), bool), ends.reshape(2, -1)), shape=(len(nodes), len(nodes)))
        _, component = connected_components(edges, directed=False)
        _, first = np.unique(component, return_index=True)
        self._parent[nodes] = nodes[first][component]  # nodes ascend, so the first of a component is its smallest


class _Links:
    """Collects pairs of close hashes and joins many at a time."""

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self._pending: list[np.ndarray] = []
        self._count = 0

    def add(self, pairs: np.ndarray) -> bool:
        """Adds pairs of nodes, of shape (2, n). Returns True if all pairs so far have now been joined."""
        self._pending.append(pairs)
        self._count += pairs.shape[1]
        full = self._count > _MAX_PENDING
        if full:
            self.join()
        return full

    def join(self) -> None:
        if self._count:
            self.forest.join(*np.concatenate(self._pending, axis=1))
        self._pending, self._count = [], 0


def _link_in_small_buckets(
    hashes: np.ndarray,
    mask: int,
    earlier: list[int],
    max_hamming: int,
    places: Callable[[np.ndarray], np.ndarray],
    links: _Links,
) -> np.ndarray:
    """Links all close pairs in buckets of at most `_SMALL_BUCKET` members. Returns the members of larger buckets.

    Skips pairs that are also equal under one of the `earlier` masks, which were found then. `places` maps hashes to
    their indices.

    Moves the bits of the mask to the front of each hash. The moved values sort by bucket and differ in as many bits as
    the hashes, so neither an argsort nor a gather is needed: each member of a bucket is compared with those 1, 2, …
    places after it.
    """
    moves = _moves(mask)
    values = _move(hashes, moves)
    values.sort()
    rest = np.uint64(64 - mask.bit_count())
    starts = np.flatnonzero(_begins(values >> rest))
    sizes = np.diff(starts, append=len(values))
    large = np.repeat(sizes > _SMALL_BUCKET, sizes)
    crowd = places(_move_back(values[large], moves))
    size = np.repeat(np.minimum(sizes, _SMALL_BUCKET + 1).astype(np.uint8), sizes)
    active = (size > 1) & ~large
    for offset in range(1, _SMALL_BUCKET):
        # Only whole buckets are removed, so the members of the others stay adjacent.
        if offset == 1 or np.count_nonzero(active := size > offset) < 0.875 * len(size):
            values, size = values[active], size[active]
        if len(values) <= offset:
            break
        differ = values[offset:] ^ values[:-offset]
        near = np.flatnonzero(np.bitwise_count(differ) <= max_hamming)
        if len(near):
            pairs = _move_back(np.stack([values[near], values[near + offset]]), moves)
            apart = pairs[0] ^ pairs[1]
            new = (apart & np.uint64(mask)) == 0
            for other in earlier:
                new &= (apart & np.uint64(other)) != 0
            links.add(places(pairs[:, new]))
    return crowd


def _moves(mask: int) -> list[tuple[int, int]]:
    """Each run of equal bits in a mask, and how far to shift it left so that the set bits come first."""
    edges = [bit for bit in range(65) if bit in (0, 64) or (mask >> bit ^ mask >> bit - 1) & 1]
    runs = [(high, (1 << high) - (1 << low)) for low, high in pairwise(edges)]
    moves, top = [], 64
    for high, run in sorted(runs, key=lambda high_and_run: (not high_and_run[1] & mask, -high_and_run[0])):
        moves.append((run, top - high))
        top -= run.bit_count()
    return moves


def _move(hashes: np.ndarray, moves: list[tuple[int, int]]) -> np.ndarray:
    moved = np.zeros_like(hashes)
    for run, left in moves:
        bits = hashes & np.uint64(run)
        moved |= bits << np.uint64(left) if left >= 0 else bits >> np.uint64(-left)
    return moved


def _move_back(moved: np.ndarray, moves: list[tuple[int, int]]) -> np.ndarray:
    hashes = np.zeros_like(moved)
    for run, left in moves:
        hashes |= (moved >> np.uint64(left) if left >= 0 else moved << np.uint64(-left)) & np.uint64(run)
    return hashes


def _buckets(
    hashes: np.ndarray, members: np.ndarray, mask: int, forest: Forest
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The buckets with unconnected members: their concatenated members, and the size and number of minors of each.

    Minors are the members outside the bucket's largest connected set. They come first, because every pair that is left
    to compare contains a minor.
    """
    key = hashes[members] & np.uint64(mask)
    order = np.argsort(key)
    members, key = members[order], key[order]
    bucket = np.cumsum(_begins(key)) - 1
    shared = np.bincount(bucket, minlength=1)[bucket] > 1
    members, bucket = members[shared], bucket[shared]
    if not len(members):
        return members, members, members
    roots = forest.roots(members)
    order = np.argsort(bucket * len(hashes) + roots)
    members, bucket, roots = members[order], bucket[order], roots[order]
    starts = np.flatnonzero(_begins(bucket))
    runs = np.flatnonzero(_begins(bucket) | _begins(roots))
    lengths = np.diff(runs, append=len(members))
    rank = lengths * len(runs) + np.arange(len(runs))  # the index breaks ties
    longest = np.maximum.reduceat(rank, np.flatnonzero(_begins(bucket[runs])))
    major = np.repeat(np.isin(rank, longest), lengths)
    sizes = np.diff(starts, append=len(members))
    minors = np.add.reduceat((~major).astype(np.int64), starts)
    unsettled = np.repeat(minors > 0, sizes)
    order = np.argsort(bucket[unsettled] * 2 + major[unsettled])
    return members[unsettled][order], sizes[minors > 0], minors[minors > 0]


def _link_close(
    hashes: np.ndarray, members: np.ndarray, sizes: np.ndarray, minors: np.ndarray, max_hamming: int, links: _Links
) -> None:
    """Links every close pair within a bucket that includes one of its first `minors` members."""
    values, roots = hashes[members], links.forest.roots(members)
    right = np.arange(len(members))
    left = np.repeat(np.cumsum(sizes) - sizes, sizes)
    last = left + np.repeat(minors, sizes)
    # Compare the first member of each bucket with all others of the bucket, then the second, and so on.
    while len(right):
        near = np.flatnonzero(np.bitwise_count(values[left] ^ values[right]) <= max_hamming)
        near = near[roots[left[near]] != roots[right[near]]]
        if len(near) and links.add(members[np.stack([left[near], right[near]])]):
            roots = links.forest.roots(members)
        left += 1
        active = (left < last) & (left < right)
        # Compacting costs as much as comparing, so it waits until an eighth of the entries are finished.
        if np.count_nonzero(active) < 0.875 * len(active) or left[-1] >= len(values):
            left, right, last = left[active], right[active], last[active]


def _begins(values: np.ndarray) -> np.ndarray:
    """True where a value differs from the one before it."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]
