"""What a publisher says about the use of an image in its HTTP headers: X-Robots-Tag and TDMRep.

TDMRep (W3C Community Group report, 2024) offers three places for one statement. The header is read, on every hop; the
file `/.well-known/tdmrep.json` is not: it would cost one more request for each host, beside that for robots.txt, which
such a publisher can write as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

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
