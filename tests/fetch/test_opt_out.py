"""Headers that opt out, and headers that do not address us."""

from __future__ import annotations

import json
import time

import pytest

from pipeline.fetch.opt_out import disallowed_directive, preference, reservations, reserves_mining

DISALLOWED = ("noai", "noimageai", "noml", "noindex", "noimageindex")


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        ([], None),
        ([""], None),
        (["all"], None),
        (["noai"], "noai"),
        ([" NoAI "], "noai"),
        (["nofollow,noimageai"], "noimageai"),
        (["noml"], "noml"),
        (["none"], "none"),
        (["nofollow", "noindex"], "noindex"),
        (["indexifembedded, nosnippet, notranslate"], None),
        (["noaix, xnoai, no ai"], None),
        # Values, and dates with commas and colons
        (["noindex, unavailable_after: 25 Jun 2030 15:00:00 PST"], "noindex"),  # img2dataset takes it for a scope
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noindex"], "noindex"),
        (["unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noindex"], "noindex"),
        (["unavailable_after: Wednesday, 25-Jun-30 15:00:00 GMT, noai"], "noai"),
        (["unavailable_after: 2030-06-25T15:00:00+01:00, noai"], "noai"),
        (["otherbot: unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai"], None),
        (["max-image-preview:none"], None),
        (["max-image-preview: none, max-snippet: 0, max-video-preview: -1"], None),
        (["max-image-preview: large, noai"], "noai"),
        # Scopes
        (["otherbot: noai"], None),
        (["otherbot: noai, noindex"], None),
        (["otherbot: nofollow, noai", "noindex"], "noindex"),
        (["otherbot: noai", "winnow: noindex"], "noindex"),
        (["winnow: noai"], "noai"),
        (["WINNOW :NOAI"], "noai"),
        (["winnow: nofollow, noai"], "noai"),
        (["otherbot: noai, winnow: nofollow, noindex"], "noindex"),
        (["winnow: nofollow, otherbot: noai"], None),
        (["noindex, otherbot: nofollow"], "noindex"),
        (["*: noai"], "noai"),
        (["otherbot: nofollow, *: noai"], "noai"),
        (["googlebot-news/1.0: noai"], None),
        (["winnowing: noai"], None),
        (["winnow"], None),
        ([":noai"], None),
        # Mistakes in the punctuation
        (["nofollow; noai"], "noai"),
        (["nofollow noimageai"], "noimageai"),
        (['"noai, noimageai"'], "noai"),
        (["'noindex'"], "noindex"),
        (["max-snippet: 5; none"], "none"),
        (["noai max-image-preview: large"], "noai"),
        (["otherbot: nofollow; noai"], None),
        (["otherbot: nofollow noai"], None),
        (["winnow: nofollow noai"], "noai"),
        ([",,:,"], None),
    ],
)
def test_x_robots_tag(headers: list[str], directive: str | None) -> None:
    assert disallowed_directive(headers, "Winnow", DISALLOWED) == directive


def test_only_what_the_user_disallows() -> None:
    assert disallowed_directive(["noindex, noai"], "winnow", ("noai",)) == "noai"
    assert disallowed_directive(["none"], "winnow", ("noai",)) is None
    assert disallowed_directive(["noindex"], "winnow", ()) is None


@pytest.mark.parametrize(
    ("headers", "reserved"),
    [
        ([], False),
        (["1"], True),
        ([" 1 "], True),
        (["0"], False),
        (["0, 1"], True),
        (["0", "1"], True),
        (["yes"], False),
        (['"1"'], True),
        (["1; policy"], True),
        (["10"], False),
    ],
)
def test_tdm_reservation(headers: list[str], reserved: bool) -> None:
    assert reserves_mining(headers) is reserved


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        # The examples of draft-ietf-aipref-vocab
        ("train-ai=n", False),
        ("train-ai=y, search=n", True),
        ("train-ai=y, train-genai=n", True),
        ('train-ai=y, train-ai, search=n, search="n"', None),
        ('train-ai=y, train-ai="n", train-genai=n, train-genai, all=n, all=()', None),
        ("train-ai;allow=n, train-ai=y", True),
        ('train-ai;has;parameters="?";', None),
        # The last of a repeated key counts, the more specific category before the more general one
        ("train-ai=y, train-ai=n", False),
        ("all=n", False),
        ("all=n, train-ai=y", True),
        ("all=y, train-ai=n", False),
        ("all=n, train-ai=maybe", False),
        # All item types of a dictionary
        ('a=1, b=-1.5;x, c="q\\"", d=:aGk=:, e=?0, f=@17, g=%"%c3%bc", h=(1 "b" c;d);e, i, train-ai=n;j=k', False),
        ("ai-use=n,search=n", None),
        (" train-ai=n ", False),
        ("train-ai=n\t , \tsearch=y", False),
        ("train-ai=n; a; b=1", False),
        ("train-ai=*n", None),
        ("train-ai=N", None),
        ("train-ai=nope", None),
        ("train-ai=?0", None),
        ("train-ai=0", None),
        # Invalid dictionaries state nothing
        ("", None),
        ("TRAIN-AI=n", None),
        ("train-ai=n,", None),
        (",train-ai=n", None),
        ("train-ai=n search=y", None),
        ("train-ai = n", None),
        ("train-ai: n", None),
        ("train-ai=n, X=1", None),
        ("train-ai=n, x=(1", None),
        ('train-ai=n, x="', None),
        ("train-ai=n, x=1.2345", None),
        ("train-ai=n, ü", None),
        ("train-ai=n" + ", a" * 5000, None),
    ],
)
def test_preference(expression: str, allowed: bool | None) -> None:
    assert preference(expression, ("train-ai", "all")) is allowed


def test_only_the_categories_that_the_user_names() -> None:
    assert preference("train-ai=n, search=y", ("search",)) is True
    assert preference("train-ai=n", ()) is None


@pytest.mark.parametrize("piece", ["a=(", 'a="\\', "a;", 'a=("b" ', "a=1;b=2;", 'a=%"%c3', "a, "])
def test_no_expression_takes_long(piece: str) -> None:
    started = time.process_time()
    for _ in range(20):
        preference(piece * (8000 // len(piece)) + "é", ("train-ai",))
    assert time.process_time() - started < 2


# The two examples of the report, and variants: (file, reserved, not reserved, unspecified).
EVERYTHING = [{"location": "/", "tdm-reservation": 1}]
THREE_GROUPS = [
    {"location": "/directory-a/", "tdm-reservation": 1},
    {
        "location": "/directory-b/html/",
        "tdm-reservation": 1,
        "tdm-policy": "https://provider.com/policies/policy.json",
    },
    {"location": "/directory-b/images/*.jpg", "tdm-reservation": 0},
]
FILES: dict[str, tuple[object, list[str], list[str], list[str]]] = {
    "everything": (EVERYTHING, ["/", "/a?b"], [], []),
    "three groups": (
        THREE_GROUPS,
        ["/directory-a/x.pdf", "/directory-b/html/"],
        ["/directory-b/images/a/b.jpg?c"],
        ["/", "/Directory-A/x", "/directory-b/images/a.png"],
    ),
    "the first match decides": (
        [{"location": "/a/", "tdm-reservation": 0}, *EVERYTHING],
        ["/b"],
        ["/a/b"],
        [],
    ),
    "the end": ([{"location": "/a$", "tdm-reservation": 1}], ["/a"], [], ["/a/b", "/a?b"]),
    "escapes": (
        [{"location": "/foo-%24/é", "tdm-reservation": 1}],
        ["/foo-$/%C3%A9", "/f%6Fo-%24/%c3%a9"],
        [],
        ["/foo-/%C3%A9"],
    ),
    "a wrong value": ([{"location": "/a", "tdm-reservation": 2}, *EVERYTHING], ["/b"], [], ["/a"]),
    "a number as text": ([{"location": "/", "tdm-reservation": "1"}], ["/a"], [], []),
    "a slash forgotten": ([{"location": "a/", "tdm-reservation": 1}], ["/a/b"], [], ["/b"]),
    "a boolean": ([{"location": "/", "tdm-reservation": True}], [], [], ["/a"]),
    "no array": (EVERYTHING[0], [], [], ["/"]),
    "no objects": ([1, None, "/", {}, {"location": 1, "tdm-reservation": 1}, *EVERYTHING], ["/a"], [], []),
}


@pytest.mark.parametrize("name", FILES)
def test_tdmrep_json(name: str) -> None:
    file, reserved, free, open_ = FILES[name]
    rules = reservations(json.dumps(file).encode())
    expected = {**dict.fromkeys(reserved, True), **dict.fromkeys(free, False), **dict.fromkeys(open_, None)}
    assert {path: rules.reserved(path) for path in expected} == expected


@pytest.mark.parametrize("text", [b"", b"<html>", b"\xff", b"[" * 200_000, b'[{"location": "/"', b"NaN"])
def test_an_invalid_tdmrep_json_reserves_nothing(text: bytes) -> None:
    assert reservations(text).reserved("/") is None
