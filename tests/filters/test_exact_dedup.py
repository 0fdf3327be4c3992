from __future__ import annotations

import pytest

from pipeline.filters.exact_dedup import ExactDedup
from tests.filters.barrier import check_barrier, decide
from tests.tables import check_filter, make_batch, run_step

DUP = "exact_dedup"


def test_the_lowest_uid_of_a_url_is_kept() -> None:
    rows = [
        {"uid": "c", "url": "https://a.org/1.jpg"},
        {"uid": "a", "url": "https://A.org:443/x/../1.jpg#top"},
        {"uid": "b", "url": "https://a.org/1.jpg"},
        {"uid": "d", "url": "http://a.org/1.jpg"},
        {"uid": "e", "url": "https://a.org/1.JPG"},
    ]
    check_filter(ExactDedup(), rows, [DUP, None, DUP, None, None])


def test_among_equal_uids_the_first_position_is_kept() -> None:
    rows = [{"uid": "a", "url": "https://a.org/"}, {"uid": "a", "url": "https://a.org/"}]
    check_filter(ExactDedup(), rows, [None, DUP])
    swapped = [{**rows[0], "row": 7}, {**rows[1], "row": 3}]
    check_filter(ExactDedup(), swapped, [DUP, None])


def test_all_columns_must_agree() -> None:
    rows = [
        {"uid": "a", "url": "https://a.org/", "caption": "a cat"},
        {"uid": "b", "url": "https://a.org", "caption": "a cat"},
        {"uid": "c", "url": "https://a.org/", "caption": "a dog"},
        {"uid": "d", "url": "https://b.org/", "caption": "a cat"},
    ]
    check_filter(ExactDedup(by=["url", "caption"]), rows, [None, DUP, None, None])


def test_a_null_equals_nothing() -> None:
    rows = [{"uid": u, "sha256": s} for u, s in [("a", None), ("b", None), ("d", "00"), ("c", "00"), ("e", "")]]
    check_barrier(ExactDedup(by=["sha256"]), rows, [None, None, DUP, None, None])


def test_integers_beyond_double_precision_stay_distinct() -> None:
    rows = [{"phash": 2**63 + i} for i in (0, 1, 2, 1)]
    found = decide(ExactDedup(by=["phash"]), make_batch([{**row, "uid": f"{i}"} for i, row in enumerate(rows)]))
    assert found == [None, None, None, (DUP, str(2**63 + 1))]


def test_the_detail_is_the_shared_value() -> None:
    _, drops = run_step(ExactDedup(), make_batch([{"url": "HTTPS://a.org"}, {"url": "https://a.org/"}]))
    assert drops["detail"].to_pylist() == ["https://a.org/"]


@pytest.mark.parametrize(
    ("by", "scope", "needs"),
    [
        (["url"], "unit", {"uid", "url"}),
        (["caption", "url"], "unit", {"uid", "caption", "url"}),
        (["sha256"], "run", {"uid", "sha256"}),
    ],
)
def test_only_without_the_url_it_is_a_barrier(by: list[str], scope: str, needs: set[str]) -> None:
    step = ExactDedup(by=by)
    assert (step.scope, set(step.needs)) == (scope, needs)


@pytest.mark.parametrize("by", [[], ["url", "url"]])
def test_invalid_options_are_reported(by: list[str]) -> None:
    assert [key for key, _ in ExactDedup(by=by).check()] == ["by"]


def test_an_empty_unit() -> None:
    kept, drops = run_step(ExactDedup(), make_batch([]))
    assert len(kept) == len(drops) == 0
