from __future__ import annotations

from pipeline.filters.caption_frequency import CaptionFrequency
from tests.filters.barrier import check_barrier, decide
from tests.tables import make_batch

CUT = "caption_frequency"


def test_all_rows_of_a_too_frequent_caption_are_dropped() -> None:
    captions = ["logo", "a cat", " lo\u200bgo", "a dog", "l&#111;go\n", "a cat", "Logo", "logo!"]
    check_barrier(
        CaptionFrequency(max_count=2),
        [{"caption": caption} for caption in captions],
        [CUT, None, CUT, None, CUT, None, None, None],
    )


def test_rows_without_a_caption_are_kept() -> None:
    check_barrier(
        CaptionFrequency(max_count=1),
        [{"caption": caption} for caption in (None, None, "", "", "x")],
        [None, None, CUT, CUT, None],
    )


def test_the_limit_applies_across_units() -> None:
    rows = [{"caption": caption, "unit": i % 5} for i, caption in enumerate(["ten"] * 10 + ["eleven"] * 11)]
    check_barrier(CaptionFrequency(), rows, [None] * 10 + [CUT] * 11)


def test_the_detail_is_the_count() -> None:
    assert decide(CaptionFrequency(max_count=1), make_batch([{"caption": "x"}] * 3)) == [(CUT, "shared by 3 rows")] * 3


def test_invalid_options_are_reported() -> None:
    assert [key for key, _ in CaptionFrequency(max_count=0).check()] == ["max_count"]
