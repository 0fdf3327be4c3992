"""What commands share: progress, output without control characters or secrets, and how signals end them.

Column names, file names, URLs, captions and headers are untrusted. An escape sequence in them can clear the screen,
change the window title or hide what follows. `Console` is rich's, whose own sequences pass; `guarded` does the
same for `print`, argparse, warnings and tracebacks.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeVar

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

PLAIN_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""
LOG_WIDTH = 140
"""Width in columns of output that does not go to a terminal."""
MASK = "***"

# C0 without tab and newline, C1, marks that reorder text, separators that some take for a newline, surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
# Parameter names such as X-Amz-Signature, sig, access_token or AWSAccessKeyId; hiding too much does no harm.
_SECRET_WORDS = "sig|token|secret|passw|pwd|auth|cred|key"
_PARAMETER = re.compile(rf"([?&;][^=&;#\s]*(?:{_SECRET_WORDS})[^=&;#\s]*=)[^&;#\s'\"]+", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(token|secret|passw|credential|(access|api|private|account)_?key)", re.IGNORECASE)
_SHORTEST_SECRET = 8

T = TypeVar("T")


def visible(text: str) -> str:
    """The text with control characters as escapes: `\\x1b` for an ESC. Tabs and newlines stay."""
    return _CONTROL.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """`visible` text on one line, so that it cannot imitate further lines of output."""
    return visible(text).replace("\n", "\\n")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def mask(text: str) -> str:
    """The text without secrets: user and password of URLs, signatures, tokens and keys in their queries, and the values
    of environment variables that are called like a secret."""
    text = _PARAMETER.sub(rf"\1{MASK}", _USER.sub(f"{MASK}@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_VARIABLE.search(name):
            text = text.replace(value, MASK)
    return text


def masked(data: Any) -> Any:
    """Plain data (mappings, lists, scalars) with every text in it masked."""
    if isinstance(data, str):
        return mask(data)
    if isinstance(data, dict):
        return {masked(key): masked(value) for key, value in data.items()}
    return [masked(item) for item in data] if isinstance(data, list | tuple) else data


class Console(rich.console.Console):
    """Rich's console, which shows control characters as escapes and hides secrets. On standard error: `stderr=True`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_terminal:
            self.width = LOG_WIDTH

    @property
    def file(self) -> IO[str]:
        """The stream that it writes to, without the guard: its own escape sequences are safe."""
        file = super().file
        return file.raw if isinstance(file, _Guarded) else file

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def say(self, text: str) -> None:
        """A line of plain text, as it is: without markup, highlighting or wrapping."""
        self.print(text, markup=False, highlight=False, soft_wrap=True)

    def error(self, problem: object) -> None:
        """A line `error: …`."""
        self.say(f"error: {problem}")

    def print(self, *objects: Any, **options: Any) -> None:
        # Masks before wrapping: a secret split over two lines would not be found.
        super().print(*(mask(one) if isinstance(one, str) else one for one in objects), **options)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        # All text passes here, with cursor control still separate from text.
        return super()._render_buffer(
            segment if segment.control else Segment(visible(mask(segment.text)), segment.style) for segment in buffer
        )


class _Guarded:
    """A text stream that shows control characters as escapes and hides secrets."""

    def __init__(self, raw: IO[str]) -> None:
        self.raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def write(self, text: str) -> int:
        # Libraries' progress bars return to the start of their line.
        back = text[: len(text) - len(text.lstrip("\r"))]
        self.raw.write(back + visible(mask(text[len(back) :])))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, raised in the main thread as Ctrl-C is, so that files being written are removed and claims released."""


def interrupted(stop: KeyboardInterrupt) -> int:
    """The exit status of a command that was ended so: 143 by SIGTERM, 130 by Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(stop, TerminatedError) else signal.SIGINT)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Makes everything written to standard output and standard error visible and masked.

    Ctrl-C and SIGTERM end the command with a line and the status of `interrupted`.
    """
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, _Guarded) else _Guarded(stream)  # type: ignore[assignment]
        for stream in kept
    )
    try:
        with _sigterm_raised():
            yield
    except KeyboardInterrupt as stop:
        print(f"interrupted by {'SIGTERM' if isinstance(stop, TerminatedError) else 'Ctrl-C'}", file=sys.stderr)
        raise SystemExit(interrupted(stop)) from None
    finally:
        sys.stdout, sys.stderr = kept


@contextlib.contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Raises TerminatedError on SIGTERM, unless it is ignored or handled already."""
    owner = os.getpid()

    def caught(*_: object) -> None:
        if os.getpid() != owner:  # a forked child ends as it would without this handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise TerminatedError

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, caught)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
