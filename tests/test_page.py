"""Pages show any given value as plain text."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from pipeline import page
from tests.images import encoded

HOSTILE = [
    ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
    ('" onerror="alert(1)', "&#34; onerror=&#34;alert(1)"),
    ("javascript:alert(1)", "javascript:alert(1)"),
    ("{{ 7 * 7 }} {% raw %}", "{{ 7 * 7 }} {% raw %}"),
    ("a\u202eb\u2066c", "a⟨U+202E⟩b⟨U+2066⟩c"),
    ("zero\u200bwidth", "zero⟨U+200B⟩width"),
    ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
    ("broken \ud800", "broken \ufffd"),
    ("http://user:secret@h/x", "http://***@h/x"),
    (None, ""),
    (12, "12"),
]


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_untrusted_text_is_escaped(text: object, expected: str) -> None:
    assert page.shown(text) == f"<bdi>{expected}</bdi>"


def test_long_text_is_folded_and_then_cut() -> None:
    html = page.shown("x" * 1_000_000)
    assert "<details" in html
    assert len(html) < page.LONGEST + 300
    assert "996,000 more characters" in html


def test_tables_and_pictures_escape() -> None:
    environment = page.environment()
    table = page.Table(["<b>"], [["<i>"], [3], [None]])
    html = environment.get_template("table.html").module.table(table)
    assert "&lt;b&gt;" in html
    assert "<bdi>&lt;i&gt;</bdi>" in html
    items = [page.Picture(None, "<script>", ["<u>"])]
    html = environment.get_template("pictures.html").module.pictures(items, "x")
    assert "<script>" not in html
    assert "<u>" not in html


def test_a_chart_is_described_and_follows_the_theme() -> None:
    spec = {
        "data": {"values": [{"x": '"><script>', "n": 1}]},
        "mark": {"type": "bar", "color": page.KEPT},
        "encoding": {"x": {"field": "x"}, "y": {"field": "n", "type": "quantitative"}},
    }
    html = str(page.chart(spec, 'one "bar"', page.Table(["x", "n"], [["a", 1]])))
    assert 'role="img" aria-label="one &#34;bar&#34;"' in html
    assert "var(--kept)" in html
    assert "<script" not in html
    assert not re.search(r'"#0[0-9a-b]0', html), "a placeholder colour was left"


def test_thumbnails_are_small_and_bounded() -> None:
    picture = encoded(Image.effect_noise((900, 600), 90).convert("RGB"), "JPEG")
    thumbnails = page.Thumbnails(9_000)
    made = [thumbnails(picture) for _ in range(9)]
    assert made[0] is not None
    assert len(made[0]) < 12_000
    assert made[-1] is None
    assert page.Thumbnails()(b"no picture") is None
