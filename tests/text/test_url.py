from __future__ import annotations

import pytest

from pipeline.text.url import canonical, web_address


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://example.org/a/b.jpg?w=1&h=2", "https://example.org/a/b.jpg?w=1&h=2"),
        ("HTTPS://Example.ORG/A.jpg", "https://example.org/A.jpg"),
        ("http://example.org", "http://example.org/"),
        ("http://example.org?q", "http://example.org/?q"),
        ("http://example.org:80/a", "http://example.org/a"),
        ("https://example.org:443/a", "https://example.org/a"),
        ("https://example.org:80/a", "https://example.org:80/a"),
        ("http://example.org:/a", "http://example.org/a"),
        ("http://example.org:8080/a", "http://example.org:8080/a"),
        ("http://User:PW@Example.org/", "http://User:PW@example.org/"),
        ("http://[2001:DB8::1]:80/", "http://[2001:db8::1]/"),
        ("http://example.org/a#b", "http://example.org/a"),
        ("http://example.org/a#b?c/../d", "http://example.org/a"),
        ("http://example.org/a/./b/../c", "http://example.org/a/c"),
        ("http://example.org/../../a", "http://example.org/a"),
        ("http://example.org/a/..", "http://example.org/"),
        ("http://example.org/a/.", "http://example.org/a/"),
        ("http://example.org/a//b/../c", "http://example.org/a//c"),
        ("http://example.org/.hidden/a..b", "http://example.org/.hidden/a..b"),
        ("http://example.org/?a=/../b", "http://example.org/?a=/../b"),
        ("http://example.org/%e2%82%ac?x=%3d", "http://example.org/%E2%82%AC?x=%3D"),
        ("http://example.org/%7Ea", "http://example.org/%7Ea"),
        ("http://example.org/a?b=1&a=2", "http://example.org/a?b=1&a=2"),
        ("  http://example.org/a\n", "http://example.org/a"),
    ],
)
def test_canonical_form(url: str, expected: str) -> None:
    assert canonical(url) == expected


@pytest.mark.parametrize(
    "garbage",
    ["", "//", "http:", "http://", "http:///", "://", "a b", "http://[::1", "http://a:b:c@d:e", "%", "http://a/%zz",
     "data:image/png;base64,AA==", "\0", "http://\ud800/", "http://é.example/ü", "http://a\\b/c"],
)  # fmt: skip
def test_garbage_neither_raises_nor_changes_twice(garbage: str) -> None:
    assert canonical(canonical(garbage)) == canonical(garbage)


def test_a_port_may_have_any_number_of_leading_zeros() -> None:
    assert web_address(f"http://example.org:{'0' * 5000}8080/").port == 8080
