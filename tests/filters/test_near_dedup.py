from __future__ import annotations

import numpy as np
import pytest

from pipeline.filters.near_dedup import NearDedup
from tests.filters.barrier import check_barrier, decide
from tests.tables import make_batch

DUP = "near_dedup"
A, B = 0x0123456789ABCDEF, 0xFEDCBA9876543210


def pictures(*hashes: int | None, **columns: list) -> list[dict]:
    """Rows with the given hashes, and uids in the same order."""
    size = {"original_width": [9] * len(hashes), "original_height": [9] * len(hashes)}
    columns = {"uid": [f"{i:032x}" for i in range(len(hashes))], **size, **columns, "phash": list(hashes)}
    return [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("hashes", "expected"),
    [
        ([A, A, B], [None, DUP, None]),
        ([A, A ^ 0xF, B], [None, DUP, None]),
        ([A, A ^ 0x1F, B], [None, None, None]),
        ([A, A ^ 0x8000_0000_0000_0001, A ^ 0x8000_0001_0001_0001], [None, DUP, DUP]),
        # A chain: the ends are 8 bits apart, the middle links them.
        ([A, A ^ 0xFF, A ^ 0xF], [None, DUP, DUP]),
        ([None, None, A, None], [None, None, None, None]),
        ([0, 2**64 - 1, 1, 2**64 - 2], [None, None, DUP, DUP]),
    ],
)
def test_one_of_close_hashes_is_kept(hashes: list[int | None], expected: list[str | None]) -> None:
    check_barrier(NearDedup(), pictures(*hashes), expected)


def test_equal_hashes_only() -> None:
    check_barrier(NearDedup(max_hamming=0), pictures(A, A ^ 1, A), [None, None, DUP])


def test_a_wider_distance() -> None:
    check_barrier(NearDedup(max_hamming=10), pictures(A, A ^ 0x3FF, A ^ 0xFFF << 40), [None, DUP, None])


SIZES = {"original_width": [10, 30, 20, 30, None], "original_height": [10, 20, 30, 20, 999]}
CAPTIONS = {"caption": ["a cat", "cat", "a small cat", "a black cat", None]}


@pytest.mark.parametrize(
    ("keep", "columns", "kept"), [("resolution", SIZES, 1), ("caption", CAPTIONS, 2), ("uid", {}, 0)]
)
def test_which_row_is_kept(keep: str, columns: dict, kept: int) -> None:
    rows = pictures(A, A ^ 1, A, A ^ 2, A ^ 4, **columns)
    check_barrier(NearDedup(keep=keep), rows, [None if i == kept else DUP for i in range(5)])  # type: ignore[arg-type]


def test_the_detail_is_the_uid_of_the_kept_row() -> None:
    found = decide(NearDedup(keep="uid"), make_batch(pictures(A ^ 0xFF, A ^ 0xF, A, uid=["c", "b", "a"])))
    assert found == [(DUP, "a"), (DUP, "a"), None]


def test_among_equal_uids_the_first_position_is_kept() -> None:
    check_barrier(NearDedup(keep="uid"), pictures(A, A ^ 1, A, uid=["a", "a", "b"]), [None, DUP, DUP])


def test_many_clusters_over_many_partitions() -> None:
    rng = np.random.default_rng(5)
    centres = rng.integers(0, 2**64, 80, np.uint64)
    nearest = rng.integers(0, 80, 600)
    hashes = centres[nearest] ^ np.uint64(1) << rng.integers(0, 64, 600, np.uint64)
    found = decide(NearDedup(keep="uid"), make_batch(pictures(*hashes.tolist())))
    first_of_each = {centre: i for i, centre in reversed(list(enumerate(nearest.tolist())))}
    assert {i for i, drop in enumerate(found) if drop is None} == set(first_of_each.values())


def test_twice_is_once() -> None:
    rng = np.random.default_rng(7)
    hashes = np.uint64(A) ^ rng.integers(0, 2**14, 300, np.uint64)
    rows = pictures(*hashes.tolist())
    left = [row for row, drop in zip(rows, decide(NearDedup(), make_batch(rows))) if drop is None]
    check_barrier(NearDedup(), left, [None] * len(left))


def test_the_hash_column_can_be_chosen() -> None:
    rows = [{"dhash": A, "uid": "a"}, {"dhash": A, "uid": "b"}]
    step = NearDedup(column="dhash", keep="uid")
    assert step.needs == ("dhash",)
    check_barrier(step, rows, [None, DUP])


def test_hashes_that_went_through_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="'dhash' must hold uint64 hashes, found double"):
        decide(NearDedup(column="dhash", keep="uid"), make_batch([{"dhash": 0.5}]))


@pytest.mark.parametrize("max_hamming", [-1, 11])
def test_invalid_options_are_reported(max_hamming: int) -> None:
    assert [key for key, _ in NearDedup(max_hamming=max_hamming).check()] == ["max_hamming"]
