from __future__ import annotations

import pyarrow as pa

from pipeline.filters.placeholder import Placeholder
from tests.filters.barrier import check_barrier, decide
from tests.tables import make_batch

CUT = "placeholder"


def test_a_picture_under_too_many_urls_goes_with_all_its_rows() -> None:
    rows = [
        {"sha256": sha, "unit": i % 4} for i, sha in enumerate(["gone"] * 3 + ["cat"] * 2 + ["dog", None, None, None])
    ]
    check_barrier(Placeholder(max_count=2), rows, [CUT] * 3 + [None] * 6)


def test_pictures_that_look_alike_count_together_by_phash() -> None:
    batch = make_batch([{"sha256": f"{i}"} for i in range(4)])
    batch = batch.append_column("phash", pa.array([2**63 + 1, 2**63 + 1, 7, None], pa.uint64()))
    assert decide(Placeholder(by="phash", max_count=1), batch) == [(CUT, "shared by 2 rows")] * 2 + [None] * 2
    assert decide(Placeholder(max_count=1), batch) == [None] * 4


def test_unusable_options_are_named() -> None:
    assert [key for key, _ in Placeholder(max_count=0).check()] == ["max_count"]
