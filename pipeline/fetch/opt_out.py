"""X-Robots-Tag: what a publisher says about the use of an image in its HTTP headers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

# Directives that carry a value after a colon; any other word before a colon names the crawler that is addressed.
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


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
            if colon and directive not in _VALUED:
                addressed = directive in (ours, "*")
                directive = rest.partition(":")[0].strip().lower()
            implied = "noindex" if directive == "none" else directive
            if addressed and (directive in disallowed or implied in disallowed):
                return directive
    return None
