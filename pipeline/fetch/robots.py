"""robots.txt: which paths of a site we may ask for, read exactly as RFC 9309 (2022) says.

`urllib.robotparser` is no help: it takes the first rule that fits instead of the longest, and knows no wildcards.
"""

from __future__ import annotations

import re
from typing import Any

MAX_BYTES = 500 * 1024
"""What is read of a file: the least that RFC 9309, 2.5 asks for."""
MAX_CRAWL_DELAY = 10.0
"""The longest `Crawl-delay` that is granted, in seconds: it is no part of the RFC, and a day of it would be a ban."""

_RECORD = re.compile(rb"^[ \t]*(user-agent|allow|disallow|crawl-delay)[ \t]*:[ \t]*([^#\n]*)", re.IGNORECASE | re.M)
_TOKEN = re.compile(rb"\*(?=\s|$)|[A-Za-z0-9_-]+")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_SPELT = re.compile(rb"[\x21-\x24\x26-\x7e]*")
_OUTSIDE = re.compile(rb"[^\x21-\x7e]")
# What may stand in a path as it is (RFC 3986, pchar), less the two characters that mean something in a rule.
_PCHAR = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!&'()+,;=:@")
_IN_QUERY = _PCHAR | frozenset(b"/?")


class Robots:
    """The rules of one file that concern us: the longest that fits decides, and `Allow` where two are as long."""

    def __init__(self, rules: dict[str, bool] | None = None, crawl_delay: float = 0.0):
        """`rules`: normalised patterns, True where they allow. `crawl_delay`: seconds between two requests."""
        rules = rules or {}
        self.crawl_delay = crawl_delay
        self.size = sum(map(len, rules)) + 100 * len(rules)
        """Bytes that the rules take in memory, roughly."""
        # Plain prefixes, most of all rules, are looked up: a file of 10,000 lines costs no more than one of ten.
        self._plain = {rule: allow for rule, allow in rules.items() if "*" not in rule and not rule.endswith("$")}
        self._lengths = sorted(set(map(len, self._plain)), reverse=True)
        wild = [(len(rule), allow, rule) for rule, allow in rules.items() if rule not in self._plain]
        self._wild: list[Any] = [  # length, allow, anchored, the pieces between the wildcards
            (length, allow, rule.endswith("$"), *rule.removesuffix("$").split("*"))
            for length, allow, rule in sorted(wild, reverse=True)
        ]

    def allows(self, target: str) -> bool:
        """`target`: path and query of a url, percent-encoded."""
        if not self._lengths and not self._wild:
            return True
        if "%" in target or "*" in target or "$" in target:
            target = normal(target.encode(), pattern=False)
        longest, allowed = 0, True
        for length in self._lengths:
            found = self._plain.get(target[:length]) if length <= len(target) else None
            if found is not None:
                longest, allowed = length, found
                break
        for length, allow, anchored, first, *pieces in self._wild:
            if length < longest or (length == longest and allowed):
                break
            if target.startswith(first) and _fits(target, len(first), pieces, anchored):
                return allow
        return allowed


def parse(text: bytes, token: str) -> Robots:
    """What a robots.txt says to the crawler `token`: all groups that name it together, else those for `*`."""
    if len(text) > MAX_BYTES:
        # Half a rule would be another rule: "/" is half of "/private".
        text = text[:MAX_BYTES]
        text = text[: max(text.rfind(b"\n"), text.rfind(b"\r")) + 1]
    text = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n")
    ours = token.lower().encode()
    rules: dict[bytes, dict[str, bool]] = {}
    delays: dict[bytes, float] = {}
    agents: set[bytes] = set()
    in_rules = True
    for record in _RECORD.finditer(text):
        key, value = record[1].lower(), record[2].strip()
        if key == b"user-agent":
            if in_rules:
                agents, in_rules = set(), False
            agent = _TOKEN.match(value)
            if agent and (name := agent[0].lower()) in (ours, b"*"):
                agents.add(name)
                rules.setdefault(name, {})
        elif key == b"crawl-delay":
            for agent_name in agents:
                delays[agent_name] = _seconds(value)
        else:
            in_rules = True
            if agents and value:
                pattern = normal(value, pattern=True)
                for agent_name in agents:
                    group = rules[agent_name]
                    group[pattern] = group.get(pattern, False) or key == b"allow"
    chosen = ours if ours in rules else b"*"
    return Robots(rules.get(chosen), delays.get(chosen, 0.0))


def normal(path: bytes, *, pattern: bool) -> str:
    """A path or a pattern in the one spelling in which they are compared (RFC 9309, 2.2.2).

    Escapes that need not be are resolved, the others are in upper case, and what is no printable ASCII is escaped.
    `*` and `$` of a url are escaped; those of a pattern mean something (2.2.3).
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
    """Piece by piece from the left, each as early as possible: no pattern makes this go back and try again."""
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
