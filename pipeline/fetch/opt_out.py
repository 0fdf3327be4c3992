"""What publishers say about the use of an image: X-Robots-Tag, Content-Usage (IETF aipref) and TDMRep.

X-Robots-Tag is of the search engines (developers.google.com/search/docs/crawling-indexing/robots-meta-tag), its
directives `noai` and `noimageai` of DeviantArt, `noml` of noml.info. Content-Usage is a header and a rule of robots.txt
(draft-ietf-aipref-attach-05, draft-ietf-aipref-vocab-08). TDMRep (W3C Community Group, final report of 2024) has a
header and the file `/.well-known/tdmrep.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence

from pipeline.fetch.robots import Pattern

# Directives that carry a value after a colon; any other name before a colon is that of the crawler that is addressed.
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
# A comma may stand within a date as well: in "Wed, 25 Jun 2030 15:00:00 GMT", "25 Jun 2030 15" is nobody's name.
_NAME = re.compile(r"\*|[a-z_-][a-z0-9._/-]*")


def disallowed_directive(headers: Iterable[str], user_agent_token: str, disallowed: Collection[str]) -> str | None:
    """The first directive of `headers` (the values of X-Robots-Tag) that forbids us the image, or None.

    `otherbot: noai` concerns otherbot alone, and so does what follows it in the same header, up to the next name
    (developers.google.com/search/docs/crawling-indexing/robots-meta-tag). `none` means `noindex, nofollow`.
    `disallowed` is in lower case.
    """
    ours = user_agent_token.lower()
    for value in headers:
        addressed = True
        for item in value.split(","):
            name, colon, rest = item.partition(":")
            directive = name.strip().lower()
            if colon and directive not in _VALUED and (_NAME.fullmatch(directive) or directive == ours):
                addressed = directive in (ours, "*")
                directive = rest.partition(":")[0].strip().lower()
            implied = "noindex" if directive == "none" else directive
            if addressed and (directive in disallowed or implied in disallowed):
                return directive
    return None


def reserves_mining(headers: Iterable[str]) -> bool:
    """True if a value of `tdm-reservation` reserves the rights in text and data mining."""
    # The report knows 0 and 1; a proxy may have joined two headers.
    return any(item.strip() == "1" for value in headers for item in value.split(","))


# --- Content-Usage ----------------------------------------------------------------------------------------------------

# A dictionary of structured fields (RFC 9651, 4.2.2), each alternative as strict as the RFC's algorithm.
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
"""Characters of an expression that is read: as much as the parser of headers lets through."""


def preference(expression: str, categories: Sequence[str]) -> bool | None:
    """True if `expression` allows the use of an image, False if it disallows it, None if it says neither.

    The first of `categories` ("train-ai") with a stated preference decides. A preference is one of the tokens y and n,
    the last one of a repeated key; an expression that is not a dictionary of RFC 9651 states none
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
    """The rules of one `/.well-known/tdmrep.json`: the first whose `location` matches decides."""

    def __init__(self, rules: Iterable[tuple[str, bool | None]] = ()):
        """`rules`: patterns as in robots.txt; True where rights are reserved, None where the value is an error."""
        self._rules = [(Pattern(location), reserved) for location, reserved in rules]
        self.size = sum(len(pattern.text) + 200 for pattern, _ in self._rules)
        """Bytes that the rules take in memory, roughly."""

    def reserved(self, target: str) -> bool | None:
        """`target`: path and query of a url, percent-encoded. None where the file says nothing."""
        if not self._rules:
            return None
        return next((reserved for pattern, reserved in self._rules if pattern.matches(target)), None)


def reservations(text: bytes) -> Reservations:
    """A tdmrep.json. What is not an array of rules says nothing, and neither does a rule without a location."""
    try:
        rules = json.loads(text)
    except (ValueError, RecursionError):
        return Reservations()
    found = []
    for rule in rules if isinstance(rules, list) else ():
        location = rule.get("location") if isinstance(rule, dict) else None
        if isinstance(location, str) and location:
            value = str(rule.get("tdm-reservation"))  # "1" in quotes is a slip that means 1
            path = location if location[0] in "/*" else f"/{location}"
            found.append((path, {"0": False, "1": True}.get(value)))
    return Reservations(found)
