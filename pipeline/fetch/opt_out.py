"""Parses publishers' opt-outs: X-Robots-Tag, Content-Usage (IETF aipref) and TDMRep.

X-Robots-Tag comes from search engines (developers.google.com/search/docs/crawling-indexing/robots-meta-tag); DeviantArt
added the directives `noai` and `noimageai`, noml.info added `noml`. Content-Usage is a header and a robots.txt rule
(draft-ietf-aipref-attach-05, draft-ietf-aipref-vocab-08). TDMRep (W3C Community Group, final report of 2024) defines a
header and the file `/.well-known/tdmrep.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence

from pipeline.fetch.robots import Pattern

# Directives with a value after a colon. Any other name before a colon is the crawler that is addressed.
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
# Dates contain commas and colons too: "25 Jun 2030 15" in "Wed, 25 Jun 2030 15:00:00 GMT" is not a crawler name.
_NAME = re.compile(r"\*|[a-z_-][a-z0-9._/-]*")
_WORD = re.compile(r"""[^\s"']+""")


def disallowed_directive(headers: Iterable[str], user_agent_token: str, disallowed: Collection[str]) -> str | None:
    """The first directive in `headers` (the values of X-Robots-Tag) that disallows the image, or None.

    `otherbot: noai` applies only to otherbot, and so do the directives after it in the same header, up to the next name
    (developers.google.com/search/docs/crawling-indexing/robots-meta-tag). `none` means `noindex, nofollow`.
    `disallowed` must be lower case. Semicolons, blanks and quotation marks also separate directives: a mistake in the
    punctuation does not revoke a statement.
    """
    ours = user_agent_token.lower()
    for value in headers:
        addressed = True
        for item in re.split("[,;]", value):
            name, colon, rest = item.partition(":")
            directive = name.strip().lower()
            if colon and directive not in _VALUED and (_NAME.fullmatch(directive) or directive == ours):
                addressed = directive in (ours, "*")
                directive = rest.partition(":")[0].strip().lower()
            for word in _WORD.findall(directive) if addressed else ():
                if word in disallowed or (word == "none" and "noindex" in disallowed):
                    return word
    return None


def reserves_mining(headers: Iterable[str]) -> bool:
    """True if a `tdm-reservation` header reserves text and data mining rights."""
    # TDMRep defines 0 and 1. A proxy may have joined two headers. Punctuation as in X-Robots-Tag.
    return any(item.strip(" \t\"'") == "1" for value in headers for item in re.split("[,;]", value))


# --- Content-Usage ----------------------------------------------------------------------------------------------------

# A structured-fields dictionary (RFC 9651, 4.2.2), as strict as the RFC's parsing algorithm.
_KEY = r"[a-z*][a-z0-9_.*-]*"
_BARE_ITEM = (
    r"(?:-?[0-9]{1,12}\.[0-9]{1,3}|@?-?[0-9]{1,15}"  # decimal, integer, date
    r'|"(?:[ !#-\[\]-~]|\\["\\])*"|%"(?:[ !#-$&-~]|%[0-9a-f]{2})*"'  # string, display string
    r"|[A-Za-z*][!#-'*+.^`|~0-9A-Z_a-z:/-]*|:[A-Za-z0-9+/=]*:|\?[01])"  # token, bytes, boolean
)
_PARAMETERS = rf"(?:; *{_KEY}(?:={_BARE_ITEM})?)*"
_INNER_LIST = rf"\((?: *{_BARE_ITEM}{_PARAMETERS}(?=[ )]))* *\)"
_MEMBER = re.compile(rf"({_KEY})(?:=({_INNER_LIST}|{_BARE_ITEM}))?{_PARAMETERS}(?:[ \t]*(,)[ \t]*|$)")


MAX_EXPRESSION = 8190
"""Longest expression parsed, in characters: aiohttp's header limit."""


def preference(expression: str, categories: Sequence[str]) -> bool | None:
    """True if `expression` allows the use of an image, False if it disallows it, None if it states no preference.

    The first of `categories` ("train-ai") with a stated preference decides. A preference is the token y or n; the last
    value of a repeated key counts. An expression that is not an RFC 9651 dictionary states no preference
    (draft-ietf-aipref-vocab, "Processing Algorithm").
    """
    stated: dict[str, str] = {}
    expression = expression.strip(" ")
    at, more = 0, 0 < len(expression) <= MAX_EXPRESSION
    while more:
        member = _MEMBER.match(expression, at)
        if member is None:
            return None
        stated[member[1]] = member[2] or "?1"
        at, more = member.end(), bool(member[3])
    words = (stated.get(category) for category in categories)
    return next((word == "y" for word in words if word in ("y", "n")), None)


# --- tdmrep.json ------------------------------------------------------------------------------------------------------


class Reservations:
    """The rules of a `/.well-known/tdmrep.json`. The first rule whose `location` matches decides."""

    def __init__(self, rules: Iterable[tuple[str, bool | None]] = ()):
        """`rules`: robots.txt-style patterns with True if rights are reserved, False if not, None if invalid."""
        self._rules = [(Pattern(location), reserved) for location, reserved in rules]
        self.size = sum(len(pattern.text) + 200 for pattern, _ in self._rules)
        """Approximate memory use, in bytes."""

    def reserved(self, target: str) -> bool | None:
        """`target`: percent-encoded path and query. Returns None if no rule applies."""
        if not self._rules:
            return None
        return next((reserved for pattern, reserved in self._rules if pattern.matches(target)), None)


def reservations(text: bytes) -> Reservations:
    """Parses a tdmrep.json. Ignores anything that is not an array of rules, and rules without a location."""
    try:
        rules = json.loads(text)
    except (ValueError, RecursionError):
        return Reservations()
    found = []
    for rule in rules if isinstance(rules, list) else ():
        location = rule.get("location") if isinstance(rule, dict) else None
        if isinstance(location, str) and location:
            value = str(rule.get("tdm-reservation"))  # accept the string "1" as 1
            path = location if location[0] in "/*" else f"/{location}"
            found.append((path, {"0": False, "1": True}.get(value)))
    return Reservations(found)
