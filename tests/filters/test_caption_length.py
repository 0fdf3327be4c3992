from __future__ import annotations

import pytest

from pipeline.filters.caption_length import CaptionLength
from tests.tables import check_filter, make_batch, run_step


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red car", None),
        ("a b c", "too_short"),
        ("   a b c   \n", "too_short"),
        ("a b cd", None),
        ("", "too_short"),
        (None, "too_short"),
        ("photograph", "too_few_words"),
        ("red\u00a0car", "too_few_words"),
        ("red\u00a0car\u3000here", None),
        ("x" * 996 + " y z", None),
        ("x" * 997 + " y z", "too_long"),
        # Invisible characters and entities.
        ("a b\u200b\u200b\u200b c", "too_short"),
        ("\u200ba\u00ad \u2060b \ufeffcd", None),
        ("a&nbsp;b&#32;cd", None),
        ("a &amp; b", "too_short"),
        ("ａ　ｂ　ｃｄ", None),
        # Code points, not bytes: six letters of two bytes each, and an emoji of several code points.
        ("ж щ юя", None),
        ("🐈🐈🐈", "too_short"),
        # Scripts without spaces.
        ("草地上的一只黑狗", None),
        ("黑色的小狗", "too_short"),
        ("小さな猫が、窓で寝る。", None),
        ("コーヒーカップ", None),
        ("แมวดำนั่งอยู่บนหลังคา", None),
        ("แมวดำนั่ง", None),
        ("スター。。。！", "too_few_words"),
        ("（草地）", "too_short"),
        ("スター。。。!", "too_few_words"),
        ("ｺｰﾋｰｶｯﾌﾟ", None),
        ("ຫມາດໍາໃນຫຍ້າ", None),
        ("ឆ្មាខ្មៅនៅលើដំបូល", None),
        ("ကြောင်နက်ကလေးထိုင်", None),
        ("བྱི་ལ་ནག་པོ་ཞིག", None),
        ("བྱི་ལ་", "too_few_words"),
        ("한국의 작은 집", None),
        ("한국의작은집", "too_few_words"),
    ],
)
def test_defaults(caption: str | None, reason: str | None) -> None:
    check_filter(CaptionLength(), [{"caption": caption}], [reason])


def test_the_limits_are_options() -> None:
    step = CaptionLength(min_chars=0, min_words=1, max_chars=3)
    rows = [{"caption": caption} for caption in ("a", "abcd", "  ")]
    check_filter(step, rows, [None, "too_long", "too_few_words"])


def test_the_detail_has_both_lengths() -> None:
    _, drops = run_step(CaptionLength(), make_batch([{"caption": "Mona Lisa"}]))
    assert drops["detail"].to_pylist() == ["9 characters, 2 words"]
    assert drops["value"].to_pylist() == [2.0]


@pytest.mark.parametrize(
    ("options", "key"),
    [({"min_chars": -1}, "min_chars"), ({"min_words": -1}, "min_words"), ({"max_chars": 5}, "max_chars")],
)
def test_invalid_options_are_reported(options: dict, key: str) -> None:
    assert [k for k, _ in CaptionLength(**options).check()] == [key]
