"""Reads the rows of a text file of a pool (csv, tsv, jsonl, json), however damaged or hostile, in bounded memory."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.compressed import open_plain
from pipeline.pool.files import PoolError, file_format, reading
from pipeline.recipe import PoolSpec

MAX_LINE = 64 << 20
"""Maximum characters of a line. A longer one is a `bad_line` and is never held whole."""
MAX_RECORD_LINES = 1_000
"""Maximum number of lines in a quoted csv record."""
_BLANK = re.compile(r"[ \t\r\n]*")


class JsonObject(dict[str, Any]):
    """A JSON object that lists its duplicate names in `twins`."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twins = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]


def text_rows(path: str, spec: PoolSpec, kind: type[JsonObject] | None = None) -> Iterator[dict[str, Any] | None]:
    """Yields the rows of a text file as dicts, or JSON objects as `kind`. Yields None for an invalid line."""
    with reading(path), _open_text(path) as text:
        if file_format(path) not in ("csv", "tsv"):
            yield from _json_rows(path, text, json.JSONDecoder(object_pairs_hook=kind))
            return
        records = _records(_lines(text), path, spec)
        header = _header(path, spec, records)
        for fields in records:
            yield dict(zip(header, fields)) if fields is not None and len(fields) == len(header) else None


def column_names(path: str, spec: PoolSpec) -> list[str]:
    """The column names of a csv or tsv file. Raises PoolError."""
    with reading(path), _open_text(path) as text:
        return _header(path, spec, _records(_lines(text), path, spec))


@contextlib.contextmanager
def _open_text(path: str) -> Iterator[io.TextIOBase]:
    """Opens a text file, decompressed. Invalid UTF-8 becomes lone surrogates, which are detected later.

    Detects UTF-16 and UTF-32, as saved by spreadsheets, by their byte order mark.
    """
    with open_plain(path) as raw:
        start = raw.peek(1 << 20)
        for magic, kind in ((b"PAR1", "parquet"), (b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"),
                            (b"BZh", "bzip2"), (b"PK\x03\x04", "zip or xlsx")):  # fmt: skip
            if start.startswith(magic):
                raise PoolError(f"path: {path} is {kind} by its first bytes; rename or unpack it accordingly")
        encoding, errors = "utf-8-sig", "surrogateescape"
        for mark, name in ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
                           (b"\xfe\xff", "utf-16")):  # fmt: skip
            if start.startswith(mark):
                encoding, errors = name, "surrogatepass"
                break
        else:
            if start[:4].count(0) > 1:
                raise PoolError(f"path: {path} is not text in UTF-8 (UTF-16 without a byte order mark?)")
        # csv handles "\r" itself. In other formats it ends a line only if the file has no other line ends.
        newline = "" if file_format(path) == "csv" else "\n" if b"\n" in start or b"\r" not in start else "\r"
        yield io.TextIOWrapper(raw, encoding, errors, newline=newline)


def _lines(text: io.TextIOBase, begun: str = "") -> Iterator[str | None]:
    """Yields lines with their ends; None for a line over MAX_LINE. `begun` is the start of the first, already read."""
    while line := begun + text.readline(MAX_LINE):
        begun = ""
        if len(line) < MAX_LINE or line.endswith(("\n", "\r")):
            yield line
            continue
        while (more := text.readline(MAX_LINE)) and len(more) == MAX_LINE and not more.endswith(("\n", "\r")):
            pass
        yield None


def _header(path: str, spec: PoolSpec, records: Iterator[list[str] | None]) -> list[str]:
    """The column names: `pool.names`, or the first line, which is consumed from `records`."""
    if spec.names is not None:
        return spec.names
    first = next(records, None)
    if first is None:
        raise PoolError(f"path: {path} is empty; expected a header line with column names")
    return [name or f"column_{i + 1}" for i, name in enumerate(first)]


def _records(lines: Iterator[str | None], path: str, spec: PoolSpec) -> Iterator[list[str] | None]:
    """Yields the fields of each non-blank line; None for a line over MAX_LINE.

    Quoted fields (RFC 4180) may span lines. An opening quotation mark without a valid closing one is an ordinary
    character, so it never swallows the following rows.
    """
    kind = file_format(path)
    delimiter = spec.delimiter or ("\t" if kind == "tsv" else ",")
    quoted = spec.quoted if spec.quoted is not None else kind == "csv"
    if not quoted:
        for line in lines:
            if line is None or line.strip("\r\n"):
                yield None if line is None else line.rstrip("\r\n").split(delimiter)
        return
    csv.field_size_limit(2 * MAX_LINE)
    waiting: deque[str | None] = deque()
    while True:
        if not waiting:
            line = next(lines, "")
            if line == "":
                return
            waiting.append(line)
        line = waiting.popleft()
        if line is None:
            yield None
        elif '"' not in line:
            if stripped := line.rstrip("\r\n"):
                yield stripped.replace("\0", "").split(delimiter)
        else:
            yield _record(line, waiting, lines, delimiter)


def _record(first: str, waiting: deque[str | None], lines: Iterator[str | None], delimiter: str) -> list[str]:
    """The record that begins with `first`. Consumes further lines if a quoted field spans them, else returns them."""
    taken: list[str | None] = []

    def pull() -> Iterator[str]:
        yield first.replace("\0", "")
        while len(taken) < MAX_RECORD_LINES:
            line = waiting.popleft() if waiting else next(lines, "")
            if not line:
                if line is None:
                    waiting.appendleft(None)
                return
            taken.append(line)
            yield line.replace("\0", "")

    try:
        return next(csv.reader(pull(), delimiter=delimiter, strict=True))
    except csv.Error:
        waiting.extendleft(reversed(taken))
        return [field.rstrip("\r\n") for field in next(csv.reader([first.replace("\0", "")], delimiter=delimiter))]


def _json_rows(path: str, text: io.TextIOBase, decoder: json.JSONDecoder) -> Iterator[dict[str, Any] | None]:
    """Yields the objects of a JSON Lines file, or of the array in a `.json` file that begins with a bracket."""
    first = text.read(1)
    while first.isspace():
        first = text.read(1)
    if first == "[" and file_format(path) == "json":
        yield from _array(path, text, decoder.raw_decode)
        return
    for line in _lines(text, first):
        if line is not None and not line.strip():
            continue
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = decoder.decode(line) if line is not None else None
        yield row if isinstance(row, dict) else None


def _array(
    path: str, text: io.TextIOBase, decode: Callable[[str, int], tuple[Any, int]]
) -> Iterator[dict[str, Any] | None]:
    """Yields the elements of a JSON array after its opening bracket. Holds little more than one element."""
    held, at, lines, want = "", 0, 1, 1 << 20
    expected = "an element"
    while True:
        at = _BLANK.match(held, at).end()  # type: ignore[union-attr]
        problem = f"expected {expected}"
        if at < len(held):
            if held[at] == "]" and expected != "an element after the comma":
                return
            if expected == "a comma or the closing bracket":
                if held[at] != ",":
                    break
                at, expected = at + 1, "an element after the comma"
                continue
            try:
                row, end = decode(held, at)
                # A number may continue in the part not yet read; objects, arrays and strings are complete.
                if end < len(held) or isinstance(row, dict | list | str):
                    at, expected = end, "a comma or the closing bracket"
                    yield row if isinstance(row, dict) else None
                    continue
            except RecursionError:
                problem = "nested too deeply"
                break
            except ValueError as error:
                problem = str(error)
            if len(held) - at > MAX_LINE:
                break
        # Double the size each time, so that a long element is parsed only a logarithmic number of times.
        more = text.read(want if at == len(held) else max(want, len(held) - at))
        if not more:
            problem = f"the array is not closed; the file may be truncated ({problem})"
            break
        lines += held.count("\n", 0, at)
        held, at = held[at:] + more, 0
    lines += held.count("\n", 0, at)
    raise PoolError(f"path: {path}: line {lines}: not a JSON array: {problem}")
