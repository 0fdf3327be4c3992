from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.filters.url_filter import UrlFilter
from tests.tables import check_filter, make_batch, run_step


def urls(*values: str | None) -> list[dict]:
    return [{"url": value} for value in values]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.org/a.jpg", None),
        ("HTTP://EXAMPLE.ORG/A.JPG", None),
        ("  http://example.org/a b.jpg\n", None),
        ("http://example.org", None),
        ("http://example.org.:8080/a.jpg?w=1#x", None),
        ("http://user:p@ss@example.org/a.jpg", None),
        ("http://[2001:db8::1]:80/a.jpg", None),
        ("http://192.0.2.7/a.jpg", None),
        ("http://bücher.example/ä.jpg", None),
        ("http://under_score-.example.org/a.jpg", None),
        ("http://example.org:/a.jpg", None),
        ("http://example.org:65535/", None),
        ("http://example.org:65536/", "bad_url"),
        ("http://example.org:123456789012/", "bad_url"),
        ("http://example.org:80x/", "bad_url"),
        (None, "bad_url"),
        ("", "bad_url"),
        ("no url at all", "bad_url"),
        ("//cdn.example.org/a.jpg", "bad_url"),
        ("/relative.jpg", "bad_url"),
        ("http:///a.jpg", "bad_url"),
        ("http:example.org/a.jpg", "bad_url"),
        ("http://exa mple.org/a.jpg", "bad_url"),
        ("http://a..example.org/", "bad_url"),
        ("http://good.example\\@evil.example/a.jpg", "bad_url"),
        ("http://exam%70le.org/a.jpg", None),
        ("http://exam%00le.org/a.jpg", "bad_url"),
        ("http://example.org/a\0.jpg", "bad_url"),
        ("http://example.org/a\n.jpg", "bad_url"),
        ("http://" + "a" * 64 + ".example/", "bad_url"),
        ("http://" + "é" * 5000 + "/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://" + "@" * 9000, "bad_url"),
        ("data:image/png;base64,iVBORw0KGgo=", "scheme"),
        ("ftp://example.org/a.jpg", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("javascript:alert(1)", "scheme"),
        ("http://example.org/logo.SVG?x=1", "extension"),
        ("http://example.org/picture.php", None),
        ("http://example.org/page?file=logo.svg", None),
        ("http://svg/", None),
        ("http://example.org/" + "a" * 1981, None),
        ("http://example.org/" + "a" * 1982, "too_long"),
    ],
)
def test_defaults(url: str | None, reason: str | None) -> None:
    check_filter(UrlFilter(), urls(url), [reason])


def test_a_blocked_host_covers_its_subdomains_in_every_spelling() -> None:
    step = UrlFilter(block_hosts=["Example.org.", "straße.example", "192.0.2.7"])
    rows = {
        "http://example.org/a.jpg": "blocked_host",
        "http://img.cdn.EXAMPLE.org/a.jpg": "blocked_host",
        "http://example.org./a.jpg": "blocked_host",
        "http://user@example.org:81/a.jpg": "blocked_host",
        "http://example.org@other.example/a.jpg": None,
        "http://badexample.org/a.jpg": None,
        "http://example.org.evil.example/a.jpg": None,
        "http://other.example/?u=http://example.org/": None,
        "http://STRASSE.example/a.jpg": None,
        "http://STRAßE.example/a.jpg": "blocked_host",
        "http://xn--strae-oqa.example/a.jpg": "blocked_host",
        "http://192.0.2.7/a.jpg": "blocked_host",
        "http://0xc0.519/a.jpg": "blocked_host",
        "http://exam%70le.org/a.jpg": "blocked_host",
        "http://ex\u00adample.org/a.jpg": "blocked_host",
        "http://ｅｘａｍｐｌｅ。org/a.jpg": "blocked_host",
    }
    check_filter(step, urls(*rows), list(rows.values()))


def test_an_allow_list_keeps_only_listed_hosts_and_blocking_wins() -> None:
    step = UrlFilter(allow_hosts=["example.org"], block_hosts=["bad.example.org"])
    rows = urls("http://img.example.org/1", "http://example.net/1", "http://bad.example.org/1")
    check_filter(step, rows, [None, "not_allowed_host", "blocked_host"])


def test_a_list_can_be_a_file(tmp_path: Path) -> None:
    listed = tmp_path / "hosts.txt"
    listed.write_text("# opted out\nexample.org  # all of it\n\nbücher.example\n", encoding="utf-8")
    step = UrlFilter(block_hosts=str(listed))
    rows = urls("http://a.example.org/", "http://xn--bcher-kva.example/", "http://example.net/")
    check_filter(step, rows, ["blocked_host", "blocked_host", None])
    before = step.fingerprint()
    listed.write_text("example.net\n", encoding="utf-8")
    assert step.fingerprint() != before


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"block_hosts": "no/such/file"}, "block_hosts"),
        ({"block_hosts": ["http://example.org/"]}, "block_hosts"),
        ({"allow_hosts": ["two words"]}, "allow_hosts"),
        ({"block_extensions": [".svg"]}, "block_extensions"),
        ({"schemes": []}, "schemes"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_invalid_options_are_reported(options: dict, key: str) -> None:
    assert [k for k, _ in UrlFilter(**options).check()] == [key]


def test_the_detail_is_the_host() -> None:
    batch = make_batch(urls("http://img.example.org/a.svg", "no url"))
    _, drops = run_step(UrlFilter(), batch)
    assert drops["detail"].to_pylist() == ["img.example.org", None]
