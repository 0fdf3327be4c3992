"""Headers that ask for hands off, and those that do not ask us."""

from __future__ import annotations

import pytest

from pipeline.fetch.opt_out import disallowed_directive, reserves_mining

DISALLOWED = ("noai", "noimageai", "noindex", "noimageindex")


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        ([], None),
        ([""], None),
        (["all"], None),
        (["noai"], "noai"),
        ([" NoAI "], "noai"),
        (["nofollow,noimageai"], "noimageai"),
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
    ],
)
def test_tdm_reservation(headers: list[str], reserved: bool) -> None:
    assert reserves_mining(headers) is reserved
