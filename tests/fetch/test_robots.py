"""robots.txt: the rules of RFC 9309 that publishers rely on."""

from __future__ import annotations

import time

import pytest

from pipeline.fetch.robots import MAX_BYTES, MAX_CRAWL_DELAY, parse


def disallow(*patterns: str) -> bytes:
    return "\n".join(["User-agent: *", *(f"Disallow: {p}" for p in patterns)]).encode()


# (file, allowed, disallowed)
FILES: dict[str, tuple[bytes, list[str], list[str]]] = {
    "empty": (b"", ["/", "/a"], []),
    "no_rule_for_us": (b"User-agent: other\nDisallow: /", ["/a"], []),
    "all": (disallow("/"), [], ["/", "/a?b"]),
    "empty_disallow": (disallow(""), ["/a"], []),
    "prefix": (disallow("/fish"), ["/Fish.asp", "/catfish", "/"], ["/fish", "/fish.html", "/fish/a", "/fish?id=1"]),
    "folder": (disallow("/fish/"), ["/fish", "/fish.html"], ["/fish/", "/fish/a.jpg"]),
    "longest": (b"User-agent: *\nAllow: /p\nDisallow: /", ["/page"], ["/a"]),
    "longest_whatever_order": (b"User-agent: *\nDisallow: /\nAllow: /folder/page", ["/folder/page"], ["/folder/a"]),
    "tie": (b"User-agent: *\nDisallow: /folder\nAllow: /folder", ["/folder/page"], []),
    "tie_other_order": (b"User-agent: *\nAllow: /folder\nDisallow: /folder", ["/folder/page"], []),
    "tie_wild": (b"User-agent: *\nDisallow: /a*b\nAllow: /axb$", ["/axb"], ["/a-b"]),
    "wild_longer": (b"User-agent: *\nAllow: /page\nDisallow: /*.htm", ["/page"], ["/page.htm"]),
    "plain_longer": (b"User-agent: *\nDisallow: /*.jpg\nAllow: /public/", ["/public/a.jpg"], ["/a.jpg"]),
    "anchored_longer": (b"User-agent: *\nAllow: /$\nDisallow: /", ["/"], ["/page.htm"]),
    "extension": (disallow("/*.php"), ["/", "/windows.PHP"], ["/index.php", "/a/b.php5", "/a.php?x=/"]),
    "extension_at_end": (disallow("/*.php$"), ["/a.php?x", "/a.php/", "/a.php5"], ["/a.php", "/x/.php.php"]),
    "two_wildcards": (disallow("/a*/b*.gif"), ["/a/b.jpg", "/b/a/b.gif"], ["/a/b.gif", "/ax/y/bz.gif?q"]),
    "dollar_inside": (disallow("/a$b"), ["/a"], ["/a$b", "/a%24bc"]),
    "no_overlap": (disallow("/ab*ba$"), ["/aba"], ["/abba", "/abcba"]),
    "star_alone": (disallow("*"), [], ["/", "/a"]),
    "star_at_end": (disallow("/fish*"), ["/a"], ["/fish", "/fishy"]),
    "literal_star": (disallow("/a-%2A.html"), ["/a-b.html"], ["/a-*.html", "/a-%2a.html"]),
    "no_slash": (disallow("fish"), ["/fish"], []),
    "escaped_unreserved": (disallow("/%62%61%7A"), ["/ba"], ["/baz", "/b%61z"]),
    "escape_case": (disallow("/%e3%83%84"), ["/%E3%83%85"], ["/%E3%83%84", "/%e3%83%84/a"]),
    "utf8": ("User-agent: *\nDisallow: /ツ".encode(), ["/"], ["/%E3%83%84"]),
    "latin1": (b"User-agent: *\nDisallow: /\xe9", ["/%C3%A9"], ["/%E9"]),
    "escaped_slash": (disallow("/a%2Fb"), ["/a/b"], ["/a%2fb"]),
    "query": (disallow("/a?u=https://x.y"), ["/a?u=http://x.y"], ["/a?u=https%3A%2F%2Fx.y"]),
    "query_only": (disallow("/*?"), ["/a"], ["/a?", "/?x"]),
    "own_group": (b"User-agent: *\nDisallow: /\n\nUser-agent: Winnow\nDisallow: /no", ["/yes"], ["/no"]),
    "own_group_allows": (b"User-agent: winnow\n\nUser-agent: *\nDisallow: /", [], ["/"]),
    "own_empty_group": (b"User-agent: winnow\nDisallow:\n\nUser-agent: *\nDisallow: /", ["/"], []),
    "version": (b"User-agent: WINNOW/2.0\nDisallow: /", [], ["/"]),
    "longer_name": (b"User-agent: winnowing\nDisallow: /", ["/"], []),
    "shorter_name": (b"User-agent: winn\nDisallow: /", ["/"], []),
    "merged": (b"User-agent: winnow\nDisallow: /a\n\nUser-agent: b\nDisallow: /b\n\nUser-agent: winnow\nDisallow: /c",
               ["/b"], ["/a", "/c"]),
    "shared": (b"User-agent: a\nUser-agent: winnow\nUser-agent: b\nDisallow: /a", ["/b"], ["/a"]),
    "shared_through_others": (b"User-agent: winnow\nSitemap: /s\n\nFoo: x\nUser-agent: b\nDisallow: /a", [], ["/a"]),
    "rules_end_a_group": (b"User-agent: winnow\nAllow: /x\nUser-agent: b\nDisallow: /a", ["/a"], []),
    "before_any_group": (b"Disallow: /\nUser-agent: winnow\nAllow: /x", ["/a"], []),
    "comments": (b"#\nUser-agent: winnow # us\n# User-agent: other\nDisallow: /a # all of it\n", ["/b"], ["/a"]),
    "spaces": (b" \tuser-AGENT \t: \twinnow\t\n  DISALLOW:/a  \n", ["/"], ["/a"]),
    "byte_order_mark": (b"\xef\xbb\xbfUser-agent: winnow\nDisallow: /", [], ["/a"]),
    "crlf": (b"User-agent: winnow\r\nDisallow: /a\r\n", ["/b"], ["/a"]),
    "cr": (b"User-agent: winnow\rDisallow: /a\rAllow: /a/b\r", ["/b", "/a/b"], ["/a"]),
    "html": (b"<!doctype html><p>User-agent: *<p>Disallow: /</p>", ["/"], []),
    "zeros": (bytes(1000) + b"\nUser-agent: *\nDisallow: /a\x00b", ["/a"], ["/a%00b"]),
    "no_colon": (b"User-agent *\nDisallow /a # all\nDisallow\t /b \nDisallow /c d", ["/", "/c"], ["/a", "/b"]),
    "prose": (b"User-agent: *\nAllow: /x\nUser agents are welcome\nDisallow: /a", ["/b"], ["/a"]),
    "misspelt": (b"Useragent: x\nUser agent: winnow\nDissallow: /a\nDisalow: /b\nDiasllow: /c\nDisallaw: /d",
                 ["/"], ["/a", "/b", "/c", "/d"]),
    "other_words": (b"User-agent: *\nDisallowed: /\nX-Disallow: /\nDis-allow: /\nDisallow-x: /", ["/"], []),
    "utf16": ("\ufeffUser-agent: *\r\nDisallow: /\u30c4".encode("utf-16-le"), ["/"], ["/%E3%83%84"]),
    "utf16_big": ("\ufeffUser-agent: *\r\nDisallow: /".encode("utf-16-be"), [], ["/"]),
    "utf16_broken": (b"\xff\xfeU\0s\0\x00\xd8\n", ["/"], []),
    "no_newline_spanning": (b"User-agent:\nDisallow: /", ["/"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_access_rules(name: str) -> None:
    text, allowed, disallowed = FILES[name]
    robots = parse(text, "winnow")
    assert {path: robots.allows(path) for path in (*allowed, *disallowed)} == {
        **dict.fromkeys(allowed, True),
        **dict.fromkeys(disallowed, False),
    }


# The example of draft-ietf-aipref-attach, with and without the path required by some revisions.
ATTACH = """\
User-Agent: *
Allow: /
Disallow: /never/
Content-Usage: {}train-ai=n
Content-Usage: /ai-ok/ train-ai=y

User-Agent: ExampleBot
Allow: /
Content-Usage: {}train-ai=y
"""
# (file, the preferences by path)
USAGE: dict[str, tuple[str, dict[str, list[str]]]] = {
    "draft": (ATTACH.format("", ""), {"/test": ["train-ai=n"], "/ai-ok/test": ["train-ai=y"]}),
    "draft_with_paths": (ATTACH.format("/ ", "/ "), {"/test": ["train-ai=n"], "/ai-ok/test": ["train-ai=y"]}),
    "first_example": ("User-Agent: *\nAllow: /\nContent-Usage: train-ai=n", {"/": ["train-ai=n"]}),
    "none": ("User-Agent: *\nDisallow: /a", {"/": []}),
    "own_group": (
        "User-agent: *\nContent-Usage: train-ai=n\nUser-agent: winnow\nContent-Usage: search=n",
        {"/a": ["search=n"]},
    ),
    "own_group_without": ("User-agent: *\nContent-Usage: train-ai=n\nUser-agent: winnow\nAllow: /", {"/a": []}),
    "before_any_group": ("Content-Usage: train-ai=n\nUser-agent: *\nAllow: /", {"/a": []}),
    "groups_merged": (
        "User-agent: *\nContent-Usage: /a a=n\n\nUser-agent: *\nContent-Usage: /b b=n",
        {"/a": ["a=n"], "/b": ["b=n"]},
    ),
    "longest": (
        "User-agent: *\nContent-Usage: /a a=n\nContent-Usage: /a/b/ b=n\nContent-Usage: /*.jpg c=n",
        {"/a/x": ["a=n"], "/a/b/x": ["b=n"], "/x.jpg": ["c=n"], "/a/b/x.jpg": ["c=n"], "/": []},
    ),
    "equal_paths_apply_separately": (
        "User-agent: *\nContent-Usage: /a train-ai=y\nContent-Usage: /%61 train-ai=n\nContent-Usage: /* x=n",
        {"/a": ["x=n", "train-ai=y", "train-ai=n"], "/b": ["x=n"]},
    ),
    "anchored": ("User-agent: *\nContent-Usage: /a$ a=n\nContent-Usage: b=n", {"/a": ["a=n"], "/ab": ["b=n"]}),
    "blanks_and_comments": (
        " user-agent : * \n\tCONTENT-usage\t:\t/a%20b \t a=n , b=y # not us\n",
        {"/a%20b": ["a=n , b=y"], "/a": []},
    ),
    "path_alone": ("User-agent: *\nContent-Usage: /a", {"/a": [""]}),
}


@pytest.mark.parametrize("name", USAGE)
def test_content_usage(name: str) -> None:
    text, preferences = USAGE[name]
    robots = parse(text.encode(), "winnow")
    assert {path: robots.usage(path) for path in preferences} == preferences


def test_only_whole_lines_of_the_first_500_kib_count() -> None:
    head = b"User-agent: *\nDisallow: /early\n"
    filler = b"#" * (MAX_BYTES - len(head) - len(b"\nDisallow: /")) + b"\n"
    robots = parse(head + filler + b"Disallow: /late", "winnow")  # the limit is right after the slash
    assert not robots.allows("/early")
    assert robots.allows("/late")
    assert robots.allows("/other")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"User-agent: *\nCrawl-delay: 2.5\nDisallow:", 2.5),
        (b"User-agent: *\nCrawl-delay: 86400", MAX_CRAWL_DELAY),
        (b"User-agent: *\nCrawl-delay: inf", MAX_CRAWL_DELAY),
        (b"User-agent: *\nCrawl-delay: -1", 0.0),
        (b"User-agent: *\nCrawl-delay: nan", 0.0),
        (b"User-agent: *\nCrawl-delay: soon", 0.0),
        (b"User-agent: *\nCrawl-delay: 5\nUser-agent: winnow\nDisallow: /a", 0.0),
        (b"User-agent: *\nCrawl-delay: 5\nDisallow:\nUser-agent: winnow\nDisallow: /a", 0.0),
        (b"User-agent: other\nCrawl-delay: 5", 0.0),
    ],
)
def test_crawl_delay(text: bytes, seconds: float) -> None:
    assert parse(text, "winnow").crawl_delay == seconds


def test_no_pattern_takes_long() -> None:
    robots = parse(disallow("/" + "*a" * 2000 + "b$", "/" + "*" * 5000 + "c"), "winnow")
    many = parse(disallow(*(f"/folder{n}/" for n in range(30_000))), "winnow")
    started = time.process_time()
    for _ in range(20):
        assert robots.allows("/" + "a" * 4000)
        assert many.allows("/folder1")
        assert not many.allows("/folder77/x")
    assert time.process_time() - started < 1  # a backtracking matcher would never finish
