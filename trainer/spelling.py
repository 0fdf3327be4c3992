"""The nearest known name, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The `count` known names most similar to `name`, best first; `cutoff` is the least ratio (difflib's, 0 to 1)."""
    return difflib.get_close_matches(str(name), list(known), n=count, cutoff=cutoff)


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean X?`, to append to a message; empty if no name is similar."""
    close = nearest(name, known, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""
