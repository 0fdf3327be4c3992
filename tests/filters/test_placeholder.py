from __future__ import annotations

import pyarrow as pa

from pipeline.filters.placeholder import Placeholder
from tests.filters.barrier import check_barrier, decide
from tests.tables import make_batch

CUT = "placeholder"


def test_all_rows_of_a_too_frequent_picture_are_dropped() -> None:
    rows = [
        {"sha256": sha, "unit": i % 4} for i, sha in enumerate(["gone"] * 3 + ["cat"] * 2 + ["dog", None, None, None])
    ]
    check_barrier(Placeholder(max_count=2), rows, [CUT] * 3 + [None] * 6)


def test_similar_pictures_count_together_by_phash() -> None:
    batch = make_batch([{"sha256": f"{i}"} for i in range(4)])
    batch = batch.append_column("phash", pa.array([2**63 + 1, 2**63 + 1, 7, None], pa.uint64()))
    assert decide(Placeholder(by="phash", max_count=1), batch) == [(CUT, "shared by 2 rows")] * 2 + [None] * 2
    assert decide(Placeholder(max_count=1), batch) == [None] * 4


def test_invalid_options_are_reported() -> None:
    assert [key for key, _ in Placeholder(max_count=0).check()] == ["max_count"]
