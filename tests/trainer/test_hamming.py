from __future__ import annotations

import numpy as np
import pytest

from trainer.hamming import Index, masks


def flipped(hashes: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Each hash with up to `most` random bits changed."""
    for _ in range(most):
        flips = np.uint64(1) << rng.integers(0, 64, len(hashes), np.uint64)
        hashes = hashes ^ np.where(rng.random(len(hashes)) < 0.7, flips, np.uint64(0))
    return hashes


@pytest.mark.parametrize("max_hamming", range(11))
def test_any_two_close_hashes_are_equal_under_a_mask(max_hamming: int) -> None:
    rng = np.random.default_rng(0)
    differences = flipped(np.zeros(2000, np.uint64), max_hamming, rng)
    met = np.any([differences & np.uint64(mask) == 0 for mask in masks(max_hamming)], axis=0)
    assert met.all()


@pytest.mark.parametrize("max_hamming", [0, 1, 4, 10])
def test_the_index_finds_what_comparing_all_pairs_finds(max_hamming: int) -> None:
    rng = np.random.default_rng(max_hamming)
    known = rng.integers(0, 2**64, 300, np.uint64)
    known = np.concatenate([known, known[:20], known[:50] ^ np.uint64(3)])
    queries = flipped(known[rng.integers(0, len(known), 400)], 6, rng)
    index = Index(known, max_hamming)
    every = np.bitwise_count(queries[:, None] ^ known[None])
    for (place, distance), pairs in ((index.nearest(queries), every), (index.nearest_query(queries), every.T)):
        found = place >= 0
        assert found.any()
        assert (found == (pairs.min(axis=1) <= max_hamming)).all()
        assert (distance[found] == pairs.min(axis=1)[found]).all()
        assert (pairs[np.flatnonzero(found), place[found]] == distance[found]).all()


def test_an_index_without_hashes_or_queries_finds_nothing() -> None:
    some, none = np.arange(3, dtype=np.uint64), np.empty(0, np.uint64)
    assert Index(none, 4).nearest(some)[0].tolist() == Index(some, 4).nearest_query(none)[0].tolist() == [-1] * 3


def test_a_million_equal_hashes_are_one() -> None:
    place, distance = Index(np.zeros(3, np.uint64), 4).nearest_query(np.zeros(1_000_000, np.uint64))
    assert (place.tolist(), distance.tolist()) == ([0, 0, 0], [0, 0, 0])
