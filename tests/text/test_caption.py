from __future__ import annotations

import sys
import unicodedata

import pyarrow as pa
import pytest

from pipeline.text.caption import normal, words


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A red car", "A red car"),
        ("  a \t\r\n red\u00a0car\u3000here\u2028 ", "a red car here"),
        ("a\0red\x1b[31m car\x85", "a red [31m car"),
        ("red\u200b car\u00ad \ufeff\u202eof\u2060 ours", "red car of ours"),
        ("ｒｅｄ　ｃａｒ！", "red car!"),
        ("\U0001d42b\U0001d41e\U0001d41d ﬁsh №1", "red fish No1"),
        ("cafe\u0301", "café"),
        ("Tom &amp; Jerry &quot;live&quot;&nbsp;&#8203;&#x41;", 'Tom & Jerry "live" A'),
        ("AT&T R&D a & b", "AT&T R&D a & b"),
        ("&amp;amp;", "&amp;"),
        ("&#xD800;&#0;", "\ufffd\ufffd"),
        ("\u200b \u00ad", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_normal_form(caption: str | None, expected: str) -> None:
    found = normal(pa.chunked_array([[caption], ["another"]], pa.string()))
    assert found.to_pylist() == [expected, "another"]


def test_format_characters_are_removed() -> None:
    unseen = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) == "Cf"]
    assert len(unseen) > 100
    assert set(normal(pa.array([f"a{c}b" for c in unseen])).to_pylist()) == {"ab"}


def test_invalid_utf8_does_not_fail_the_batch() -> None:
    raw = pa.array([b"a dog", b"a\xff\xed\xa0\x80dog", b""], pa.binary())
    claimed = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    assert normal(claimed).to_pylist() == ["a dog", "a\ufffd\ufffd\ufffd\ufffddog", ""]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("a red car", 3),
        ("a - b", 3),
        ("草地上的一只黑狗", 4),
        ("小さな猫が、窓で寝る。", 5),
        ("「猫」(黒)!!", 2),
        ("猫 dog猫", 3),
        ("แมวดำนั่ง", 3),
        ("བྱི་ལ་ནག་པོ་", 3),
        ("한국의 작은 집", 3),
    ],
)
def test_words(text: str, count: int) -> None:
    assert words(pa.array([text])).to_pylist() == [count]
