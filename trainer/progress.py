"""Progress of long work on standard error, and items in batches. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.terminal import Console

if TYPE_CHECKING:
    pass

PLAIN_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""


T = TypeVar("T")


def progress(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """Yields the items and counts them on standard error: a bar on a terminal, otherwise a line every ten seconds."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    printed, count = time.monotonic(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            count += 1
            bar.advance(task)
            if bar.disable and time.monotonic() - printed > PLAIN_EVERY:
                printed = time.monotonic()
                console.say(f"{count:,}{f' of {total:,}' if total else ''} {what}")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
