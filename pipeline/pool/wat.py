"""Reads the image links of Common Crawl's WAT files: the metadata of pages, as JSON in WARC records.

Format: https://commoncrawl.org/get-started, "WAT Format". fastwarc parses the records. A damaged record is reported and
skipped: reading resumes at the next gzip member. Common Crawl writes one member per record.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import fsspec

from pipeline.text.url import InvalidUrlError, WebAddress, web_address

MAX_RECORD = 16 << 20
"""Maximum bytes of a record. Common Crawl keeps 1 MiB of a page, so a larger record is damaged."""
IMAGES = ("IMG@/src", "IMG@/data-src")
"""The kinds of links that show a picture: `src`, and `data-src` for lazy loading."""
_GZIP, _WARC = b"\x1f\x8b\x08", b"WARC/1."
"""The first bytes of a gzip member and of an uncompressed record."""
_WINDOW = 1 << 20


class Link(NamedTuple):
    """An image link with alternative text, or a `problem` in place of one."""

    url: str = ""
    """Absolute: resolved against the page's `<base>`, or its address."""
    caption: str = ""
    page_url: str = ""
    problem: str | None = None
    """`bad_record` or `bad_url` (see `pool.REASONS`) if it cannot be used. The other fields hold what is known."""


def read_links(path: str) -> Iterator[Link]:
    """Yields the image links of a WAT file that have a caption, in order.

    `path` is a local or remote `.wat` or `.wat.gz`. Memory: one record. Raises OSError if the file cannot be opened,
    and ImportError without fastwarc.
    """
    with fsspec.open(path, "rb") as file:
        for record in _records(file):
            yield from [Link(problem="bad_record")] if record is None else _links(record)


def _records(file: IO[bytes]) -> Iterator[Any]:
    """Yields the JSON of each metadata record; None for a damaged one."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    magic = _GZIP if file.read(2) == _GZIP[:2] else _WARC
    at: int | None = 0
    while at is not None:
        begun, whole = at, False
        file.seek(at)
        records = ArchiveIterator(file, record_types=WarcRecordType.metadata, parse_http=False)
        try:
            for record in records:
                at = max(at, begun + record.stream_pos)
                size = record.content_length
                if size > MAX_RECORD:
                    break
                data = record.reader.read()
                if len(data) < size:
                    break
                try:
                    yield json.loads(data)
                except (ValueError, RecursionError):
                    yield None
            else:
                whole = True
        except OSError:  # not a gzip member, or not a WARC record
            pass
        if whole:
            if magic != _WARC and _is_cut(file, at):  # fastwarc ends silently if a file is cut within a record's header
                yield None
            return
        yield None
        at = _find_next(file, at + 1, magic)


def _is_cut(file: IO[bytes], at: int) -> bool:
    """Whether the gzip members from offset `at` on end prematurely."""
    file.seek(at)
    try:
        with gzip.open(file) as members:
            while members.read(_WINDOW):
                pass
    except (EOFError, OSError, zlib.error):
        return True
    return False


def _find_next(file: IO[bytes], start: int, magic: bytes) -> int | None:
    """The offset of the first `magic` at or after `start`; None if there is none."""
    file.seek(start)
    held = b""
    while block := file.read(_WINDOW):
        held += block
        if (found := held.find(magic)) >= 0:
            return start + found
        start += len(held) - len(magic) + 1
        held = held[len(held) - len(magic) + 1 :]
    return None


def _links(record: Any) -> Iterator[Link]:
    try:
        envelope = record["Envelope"]
        response = envelope["Payload-Metadata"].get("HTTP-Response-Metadata") or {}
        html = response.get("HTML-Metadata") or {}
        links = [link for link in html.get("Links") or () if link.get("path") in IMAGES and link.get("alt")]
        page = envelope["WARC-Header-Metadata"]["WARC-Target-URI"] if links else ""
        base = (html.get("Head") or {}).get("Base") or ""
    except (KeyError, TypeError, AttributeError):
        yield Link(problem="bad_record")
        return
    address = _address(base, _address(page, None)) or _address(page, None)
    for link in links:
        caption, url = str(link["alt"]).strip(), link.get("url")
        if caption:
            yield _resolved(url if isinstance(url, str) else "", caption, str(page), address)


def _resolved(url: str, caption: str, page: str, base: WebAddress | None) -> Link:
    url = url.strip()
    if url[:7].lower() == "http://" or url[:8].lower() == "https://":
        return Link(url, caption, page)
    found = _address(url, base) if url else None
    if found is None:
        return Link(url[:1000], caption, page, "bad_url")
    user = f"{found.user}@" if found.user else ""
    return Link(f"{found.scheme}://{user}{found.authority}{found.target}", caption, page)


def _address(text: Any, base: WebAddress | None) -> WebAddress | None:
    try:
        return web_address(text, base) if text and isinstance(text, str) else None
    except InvalidUrlError:
        return None
