from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

from pipeline.similarity import hash_clusters
from pipeline.similarity.hash_clusters import clusters
from tests.trainer.test_hamming import flipped


def by_comparing_all(hashes: np.ndarray, max_hamming: int) -> np.ndarray:
    _, label = connected_components(np.bitwise_count(hashes[:, None] ^ hashes) <= max_hamming, directed=False)
    _, first = np.unique(label, return_index=True)
    return first[label]


@pytest.fixture(params=["as shipped", "small buckets of 3", "no small bucket", "every bucket divided"])
def _bucket_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as shipped":
        monkeypatch.setattr(hash_clusters, "_SMALL_BUCKET", 3 if request.param == "small buckets of 3" else 1)
    if request.param == "every bucket divided":
        monkeypatch.setattr(hash_clusters, "_LARGEST_BUCKET", 4)


@pytest.mark.usefixtures("_bucket_size")
@pytest.mark.parametrize("max_hamming", [0, 1, 2, 4, 7, 10])
@pytest.mark.parametrize(
    "crowd", ["random", "copies", "one centre", "equal but for some bits", "counting", "all sorts"]
)
def test_the_clusters_equal_those_of_comparing_all_pairs(crowd: str, max_hamming: int) -> None:
    rng = np.random.default_rng(max_hamming)
    random = rng.integers(0, 2**64, 300, np.uint64)
    kinds = {
        "random": random,
        "copies": flipped(np.repeat(random[:60], 6), max_hamming + 1, rng),
        "one centre": flipped(np.repeat(random[:1], 600), 9, rng),
        "equal but for some bits": random[0] & ~np.uint64(0x3FFF000) | rng.integers(0, 2**14, 500, np.uint64) << 12,
        "counting": np.arange(500, dtype=np.uint64) << np.uint64(30),
    }
    kinds["all sorts"] = np.concatenate(list(kinds.values()))
    hashes = rng.permutation(np.unique(kinds[crowd]))
    np.testing.assert_array_equal(clusters(hashes, max_hamming), by_comparing_all(hashes, max_hamming))


def compared(hashes: np.ndarray) -> int:
    """How many pairs a search compares that finds one cluster."""
    count = 0

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(np, name)

        def bitwise_count(self, values: np.ndarray) -> np.ndarray:
            nonlocal count
            count += len(values)
            return np.bitwise_count(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_clusters, "np", Counting())
        assert not clusters(hashes, 4).any()
    return count


def test_crowded_hashes_are_not_compared_pairwise() -> None:
    # All 16-bit numbers: no two blocks of the upper 48 bits distinguish any of them.
    hashes = np.arange(1 << 16, dtype=np.uint64)
    assert compared(hashes) < len(hashes) ** 2 / 100


def test_a_bucket_of_many_hashes_costs_linear_time() -> None:
    """200,000 hashes in one bucket of most masks: they agree in their first 40 bits."""
    rng = np.random.default_rng(0)
    half, whole = (
        compared(np.unique(np.uint64(0xABCDEF0123) << np.uint64(24) | rng.integers(0, 2**24, n, np.uint64)))
        for n in (100_000, 200_000)
    )
    assert whole < 200 * 200_000
    assert whole < 2.5 * half


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_hashes(n: int) -> None:
    assert clusters(np.arange(n, dtype=np.uint64), 4).tolist() == [0] * n
