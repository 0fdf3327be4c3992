"""Shared by all commands: progress, output without control characters or secrets, and exits on signals.

Column names, file names, URLs, captions and headers are untrusted. An escape sequence in them can clear the screen,
change the window title or hide what follows. `Console` makes such text safe and still emits rich's own sequences;
`guarded` does the same for `print`, argparse, warnings and tracebacks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar

import rich.console
from rich.segment import Segment

from trainer.errors import FailedError, InputError

PLAIN_EVERY = 10.0
"""Seconds between lines of progress if standard error is not a terminal."""
LOG_WIDTH = 140
"""Width, in columns, of output that does not go to a terminal."""
MASK = "***"

# C0 except tab and newline, C1, marks that reorder text, separators that may act as newlines, surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
# Parameter names such as X-Amz-Signature, sig, access_token or AWSAccessKeyId; hiding too much does no harm.
_SECRET_WORDS = "sig|token|secret|passw|pwd|auth|cred|key"
_PARAMETER = re.compile(rf"([?&;][^=&;#\s]*(?:{_SECRET_WORDS})[^=&;#\s]*=)[^&;#\s'\"]+", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(token|secret|passw|credential|(access|api|private|account)_?key)", re.IGNORECASE)
_SHORTEST_SECRET = 8

T = TypeVar("T")


def visible(text: str) -> str:
    """Replaces control characters by escapes, such as `\\x1b` for ESC. Keeps tabs and newlines."""
    return _CONTROL.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """As `visible`, but on one line, so that the text cannot imitate further lines of output."""
    return visible(text).replace("\n", "\\n")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def mask(text: str) -> str:
    """Removes secrets: users and passwords in URLs, signatures, tokens and keys in their queries, and the values of
    environment variables with names such as AWS_SECRET_ACCESS_KEY."""
    text = _PARAMETER.sub(rf"\1{MASK}", _USER.sub(f"{MASK}@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_VARIABLE.search(name):
            text = text.replace(value, MASK)
    return text


def masked(data: Any) -> Any:
    """Masks every text in plain data (mappings, lists, scalars)."""
    if isinstance(data, str):
        return mask(data)
    if isinstance(data, dict):
        return {masked(key): masked(value) for key, value in data.items()}
    return [masked(item) for item in data] if isinstance(data, list | tuple) else data


class Console(rich.console.Console):
    """Rich's console, but it escapes control characters, hides secrets and makes no emoji of `:a:`.

    `stderr=True` writes to standard error.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)  # `0.tar:a: no caption` names a file
        if not self.is_terminal:
            self.width = LOG_WIDTH

    @property
    def file(self) -> IO[str]:
        """The stream to write to, without the guard, which would escape rich's own sequences."""
        file = super().file
        return file.raw if isinstance(file, _Guarded) else file

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def say(self, text: str) -> None:
        """Prints a line of plain text without markup, highlighting or wrapping."""
        self.print(text, markup=False, highlight=False, soft_wrap=True)

    def error(self, problem: object) -> None:
        """Prints a line `error: …`."""
        self.say(f"error: {problem}")

    def print(self, *objects: Any, **options: Any) -> None:
        # Masks before wrapping, because a secret that is split over two lines would not be found.
        super().print(*(mask(one) if isinstance(one, str) else one for one in objects), **options)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        # All text passes through here, while cursor control is still separate from text.
        return super()._render_buffer(
            segment if segment.control else Segment(visible(mask(segment.text)), segment.style) for segment in buffer
        )


class _Guarded:
    """A text stream that escapes control characters and hides secrets."""

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
    """Raised on SIGTERM like KeyboardInterrupt on Ctrl-C, so that partial files are removed and claims are released."""


def interrupted(stop: KeyboardInterrupt) -> int:
    """The exit status of an interrupted command: 143 after SIGTERM, 130 after Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(stop, TerminatedError) else signal.SIGINT)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Applies `visible` and `mask` to everything written to standard output and standard error.

    On Ctrl-C or SIGTERM, the command prints a line and exits with the status of `interrupted`.
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


def entry_point(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Decorates the main function of a command: its output is `guarded`, and its errors become a line and a status.

    Returns 2 after an InputError, 1 after a FailedError or OSError, else what `main` returns, where None is 0.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        with guarded():
            try:
                return main(argv) or 0
            except (InputError, FailedError, OSError) as error:
                Console(stderr=True).error(error)
                return 2 if isinstance(error, InputError) else 1

    return run


@contextlib.contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Raises TerminatedError on SIGTERM, unless it is ignored or handled already."""
    owner = os.getpid()

    def caught(*_: object) -> None:
        if os.getpid() != owner:  # a forked child exits as it would without this handler
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
    """Yields the items and counts them on standard error: with a bar on a terminal, else a line every ten seconds."""
    # Imported here: it takes as long as a fifth of this module, and --help does not need it.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
