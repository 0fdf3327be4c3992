"""Parses robots.txt (RFC 9309, 2022) with the Content-Usage rules of draft-ietf-aipref-attach-05, section 3.

`pipeline.fetch.opt_out` parses the values of Content-Usage. `urllib.robotparser` is not used: it takes the first
matching rule instead of the longest, and does not support wildcards.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_BYTES = 500 * 1024
"""Bytes parsed of a file: the minimum required by RFC 9309, 2.5."""
MAX_CRAWL_DELAY = 10.0
"""Longest `Crawl-delay` honoured, in seconds. It is not in the RFC, and a delay of a day would amount to a ban."""

# As search engines read them (google/robotstxt): with common misspellings, and a blank in place of the colon if one
# word follows. A mistake in the spelling does not revoke a statement.
_RECORD = re.compile(
    rb"^[ \t]*(?:(?P<agent>user[ -]?agent)|(?:diss?all?[ao]w|diasllow)|(?P<other>allow|crawl-delay|content-usage))"
    rb"(?:[ \t]*:|[ \t](?=[ \t]*[^\s:#]+[ \t]*(?:#|$)))[ \t]*(?P<value>[^#\n]*)",
    re.IGNORECASE | re.M,
)
_PATH = re.compile(rb"(?:(/[^ \t]*)[ \t]*)?(.*)", re.DOTALL)
_TOKEN = re.compile(rb"\*(?=\s|$)|[A-Za-z0-9_-]+")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_SPELT = re.compile(rb"[\x21-\x24\x26-\x7e]*")
_OUTSIDE = re.compile(rb"[^\x21-\x7e]")
# Characters allowed unescaped in a path (RFC 3986, pchar), except `*` and `$`, which are special in a rule.
_PCHAR = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!&'()+,;=:@")
_IN_QUERY = _PCHAR | frozenset(b"/?")


class Pattern:
    """A robots.txt path with wildcards (RFC 9309, 2.2.3)."""

    __slots__ = ("_anchored", "_first", "_pieces", "text")

    def __init__(self, text: str):
        """`text` need not be normalised."""
        self.text = normal(text.encode("utf-8", "replace"), pattern=True)
        self._anchored = self.text.endswith("$")
        self._first, *self._pieces = self.text.removesuffix("$").split("*")

    def matches(self, target: str) -> bool:
        """`target`: percent-encoded path and query of a url."""
        return self.fits(comparable(target))

    def fits(self, target: str) -> bool:
        """Like `matches`, for a target normalised by `comparable`."""
        return target.startswith(self._first) and _fits(target, len(self._first), [*self._pieces], self._anchored)


class Rules(Generic[T]):
    """Maps patterns to values. A lookup returns the values of the longest matching patterns."""

    def __init__(self, rules: Mapping[str, T]):
        """`rules`: values by normalised pattern."""
        self.size = sum(map(len, rules)) + 100 * len(rules)
        """Approximate memory use, in bytes."""
        # Most rules are plain prefixes. They are looked up by hash, so a file of 10,000 lines costs no more than ten.
        self._plain = {rule: value for rule, value in rules.items() if "*" not in rule and not rule.endswith("$")}
        self._lengths = sorted(set(map(len, self._plain)), reverse=True)
        wild = sorted((rule for rule in rules if rule not in self._plain), key=len, reverse=True)
        self._wild = [(len(rule), Pattern(rule), rules[rule]) for rule in wild]

    def longest(self, target: str) -> list[T]:
        """`target`: percent-encoded path and query of a url."""
        if not self._plain and not self._wild:
            return []
        target = comparable(target)
        prefixes = (target[:length] for length in self._lengths if length <= len(target))
        longest = next((prefix for prefix in prefixes if prefix in self._plain), None)
        least = -1 if longest is None else len(longest)
        found = []
        for length, pattern, value in self._wild:
            if length < least:
                break
            if pattern.fits(target):
                least = length
                found.append(value)
        if longest is not None and len(longest) == least:
            found.append(self._plain[longest])
        return found


class Robots:
    """The rules of one file that concern us."""

    def __init__(
        self,
        access: Mapping[str, bool] | None = None,
        usage: Mapping[str, list[str]] | None = None,
        crawl_delay: float = 0.0,
        found: bool = False,
    ):
        """`access`: normalised patterns, True for Allow. `usage`: Content-Usage values by normalised pattern.

        `crawl_delay`: seconds between requests. `found`: whether the host has a robots.txt.
        """
        self.found = found
        self._access = Rules(access or {})
        self._usage = Rules(usage or {})
        self.crawl_delay = crawl_delay
        self.size = self._access.size + self._usage.size + sum(len(v) for vs in (usage or {}).values() for v in vs)
        """Approximate memory use, in bytes."""

    def allows(self, target: str) -> bool:
        """`target`: percent-encoded path and query of a url. `Allow` wins between rules of equal length."""
        found = self._access.longest(target)
        return any(found) if found else True

    def usage(self, target: str) -> list[str]:
        """The Content-Usage values that apply to `target`. Each of them may disallow a use."""
        return list(dict.fromkeys(value for values in self._usage.longest(target) for value in values))


def parse(text: bytes, token: str) -> Robots:
    """Parses the rules for the crawler `token`: all groups that name it, merged, else the groups for `*`."""
    if len(text) > MAX_BYTES:
        # Cut at a line end: a truncated rule is another rule ("/" is half of "/private").
        text = text[:MAX_BYTES]
        text = text[: max(text.rfind(b"\n"), text.rfind(b"\r")) + 1]
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = text.decode("utf-16", "replace").encode()
    text = text.removeprefix(codecs.BOM_UTF8).replace(b"\r", b"\n")
    ours = token.lower().encode()
    rules: dict[bytes, dict[str, bool]] = {}
    usage: dict[bytes, dict[str, list[str]]] = {}
    delays: dict[bytes, float] = {}
    agents: set[bytes] = set()
    in_rules = True
    for record in _RECORD.finditer(text):
        key, value = (record["other"] or b"").lower(), record["value"].strip()
        if record["agent"]:
            if in_rules:
                agents, in_rules = set(), False
            agent = _TOKEN.match(value)
            if agent and (name := agent[0].lower()) in (ours, b"*"):
                agents.add(name)
                rules.setdefault(name, {})
                usage.setdefault(name, {})
        elif key == b"crawl-delay":
            for agent_name in agents:
                delays[agent_name] = _seconds(value)
        elif key == b"content-usage":
            in_rules = True
            # The path is optional and begins with a slash.
            path, expression = _PATH.match(value).groups(b"")  # type: ignore[union-attr]
            for agent_name in agents:
                pattern = normal(path, pattern=True)
                usage[agent_name].setdefault(pattern, []).append(expression.decode("utf-8", "replace"))
        else:
            in_rules = True
            if agents and value:
                pattern = normal(value, pattern=True)
                for agent_name in agents:
                    group = rules[agent_name]
                    group[pattern] = group.get(pattern, False) or key == b"allow"
    chosen = ours if ours in rules else b"*"
    return Robots(rules.get(chosen), usage.get(chosen), delays.get(chosen, 0.0), found=True)


def comparable(target: str) -> str:
    """Normalises the path and query of a url for comparison with patterns."""
    if "%" in target or "*" in target or "$" in target:
        return normal(target.encode(), pattern=False)
    return target


def normal(path: bytes, *, pattern: bool) -> str:
    """Normalises a path or a pattern for comparison (RFC 9309, 2.2.2).

    Decodes unnecessary escapes, upper-cases the others, and escapes everything that is not printable ASCII. Escapes `*`
    and `$` in a url; in a pattern they are special (2.2.3).
    """
    text = path
    if not _SPELT.fullmatch(path):
        head, mark, query = path.partition(b"?")
        text = _spelling(head, _PCHAR) + mark + _spelling(query, _IN_QUERY)
    if not pattern:
        text = text.replace(b"*", b"%2A").replace(b"$", b"%24")
    elif b"$" in text:
        text = text[:-1].replace(b"$", b"%24") + text[-1:]
    return text.decode("ascii")


def _spelling(text: bytes, plain: frozenset[int]) -> bytes:
    if b"%" in text:
        text = _ESCAPE.sub(
            lambda escape: bytes([code]) if (code := int(escape[1], 16)) in plain else escape[0].upper(), text
        )
    return _OUTSIDE.sub(lambda byte: b"%%%02X" % byte[0][0], text)


def _fits(target: str, at: int, pieces: list[str], anchored: bool) -> bool:
    """Matches the pieces greedily from the left, without backtracking."""
    if not pieces:
        return not anchored or at == len(target)
    last = pieces.pop() if anchored else ""
    for piece in pieces:
        at = target.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return not anchored or (target.endswith(last) and len(target) - len(last) >= at)


def _seconds(text: bytes) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return min(seconds, MAX_CRAWL_DELAY) if seconds > 0 else 0.0
