from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.filters.exact_dedup import ExactDedup
from pipeline.schema import CAPTIONS
from pipeline.step import to_pandas
from tests.filters.barrier import check_barrier, decide, partitionings
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
def test_it_is_a_barrier_only_without_the_url(by: list[str], scope: str, needs: set[str]) -> None:
    step = ExactDedup(by=by)
    assert (step.scope, set(step.needs)) == (scope, needs)


@pytest.mark.parametrize("by", [[], ["url", "url"]])
def test_invalid_options_are_reported(by: list[str]) -> None:
    assert [key for key, _ in ExactDedup(by=by).check()] == ["by"]


def test_an_empty_unit() -> None:
    kept, drops = run_step(ExactDedup(), make_batch([]))
    assert len(kept) == len(drops) == 0


# --- One picture, all its captions ------------------------------------------------------------------------------------

MERGE = [
    {"uid": "c", "url": "https://a.org/1", "caption": "third", "sha256": "x", "language": "de"},
    {"uid": "a", "url": "https://A.org/1#top", "caption": "first", "sha256": "x", "language": "en"},
    {"uid": "e", "url": "https://a.org/2", "caption": "alone", "sha256": "y", "language": "fr"},
    {"uid": "b", "url": "https://a.org/1", "caption": "second", "sha256": "x", "language": None},
    {"uid": "d", "url": "https://a.org/3", "caption": "no digest", "sha256": None, "language": "en"},
]
ALL = [
    {"caption": "first", "uid": "a", "language": "en"},
    {"caption": "second", "uid": "b", "language": None},
    {"caption": "third", "uid": "c", "language": "de"},
]


def merged(batch: pa.Table, step: ExactDedup) -> tuple[dict[str, object], dict[str, tuple[str, str]]]:
    """The `captions` of each kept row, and the reason and detail of each other row, by uid."""
    kept, drops = run_step(step, batch)
    uids = dict(zip(batch["row"].to_pylist(), batch["uid"].to_pylist()))
    fates = zip(drops["row"].to_pylist(), drops["reason"].to_pylist(), drops["detail"].to_pylist())
    return dict(zip(kept["uid"].to_pylist(), kept["captions"].to_pylist())), {uids[r]: (why, d) for r, why, d in fates}


def test_captions_of_one_url_are_kept_together() -> None:
    step = ExactDedup(by=["url"], captions="merge")
    captions, drops = merged(make_batch(MERGE), step)
    assert captions == {"a": ALL, "e": None, "d": None}
    assert drops == {"b": ("merged", "a"), "c": ("merged", "a")}
    without = [{k: v for k, v in row.items() if k != "language"} for row in MERGE]
    captions, _ = merged(make_batch(without), step)
    assert captions["a"] == [{**one, "language": None} for one in ALL]


def test_captions_merged_by_an_earlier_step_are_kept() -> None:
    first = ExactDedup(by=["url"], captions="merge")
    more = {"uid": "0", "url": "https://b.org/", "caption": "another", "sha256": "x", "language": "it"}
    batch, _ = run_step(first, make_batch([*MERGE, more]))
    captions, drops = merged(batch, ExactDedup(by=["url", "sha256"], captions="merge"))
    assert captions["a"] == ALL, "nothing to merge leaves the column as it is"
    assert drops == {}
    batch = batch.set_column(batch.column_names.index("url"), "url", pa.array(["https://one.org"] * len(batch)))
    captions, drops = merged(batch, ExactDedup(by=["url", "sha256"], captions="merge"))
    own = {"caption": "another", "uid": "0", "language": "it"}
    assert captions == {"0": [own, *ALL], "e": None, "d": None}
    assert drops == {"a": ("merged", "0")}


def test_only_the_first_thousand_rows_are_merged() -> None:
    rows = [{"uid": f"{i:04d}", "url": "https://spacer.example/", "caption": f"page {i}"} for i in range(1003)]
    captions, drops = merged(make_batch(rows[::-1]), ExactDedup(captions="merge"))
    assert [one["uid"] for one in captions["0000"]] == [f"{i:04d}" for i in range(1000)]  # type: ignore[attr-defined]
    assert {uid: why for uid, (why, _) in drops.items() if why != "merged"} == {f"{i}": DUP for i in range(1000, 1003)}


def test_nothing_to_merge() -> None:
    for rows in (MERGE[2:3], []):
        captions, drops = merged(make_batch(rows), ExactDedup(captions="merge"))
        assert list(captions.values()) == [None] * len(rows)
        assert drops == {}


def test_captions_of_a_whole_run_do_not_depend_on_partitions() -> None:
    step = ExactDedup(by=["sha256"], captions="merge")
    step.needs = (*step.needs, *step.wants)  # type: ignore[misc]
    have = [{**ALL[0], "uid": "z"}]
    batch = make_batch([{**row, "unit": i % 2} for i, row in enumerate(MERGE)])
    batch = batch.append_column("captions", pa.array([None, None, have, None, None], CAPTIONS))
    outcomes = []
    for pool in partitionings(to_pandas(batch)):
        drops = step.decide(pool).compute()
        lines = pa.Table.from_pandas(drops, preserve_index=False).sort_by([("unit", "ascending"), ("row", "ascending")])
        outcomes.append(lines.select(["unit", "row", "reason", "detail", "captions"]).to_pylist())
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert [(line["row"], line["reason"], line["detail"], line["captions"]) for line in outcomes[0]] == [
        (0, "merged", "a", None), (2, None, None, have), (1, None, None, ALL), (3, "merged", "a", None)
    ]  # fmt: skip
