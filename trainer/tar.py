"""Where the samples of a tar lie, from its headers alone.

Samples are grouped as webdataset and open_clip group them: neighbouring members whose names agree up to the first dot
of the base name are one sample, a suffix met twice starts the next. Names are compared and never used as paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

BLOCK = 512
IMAGE_SUFFIXES = (b"jpg", b"png", b"jpeg", b"webp")
"""In open_clip's order: the first that a sample has is its image."""
ABSENT = -1
"""The size of a member that a sample does not have."""
_SUFFIXES = {*IMAGE_SUFFIXES, b"json", b"txt"}
_MAX_NAME = 1 << 20
_MAX_PADDING = 1 << 20  # tar pads to 10 KiB unless told otherwise

Read = Callable[[int, int], bytes]
"""`read(at, size)`: that many bytes from there, or fewer at the end of the file."""


class TarError(ValueError):
    """A file that is no whole tar; the message says at which byte."""


def index_tar(read: Read, size: int) -> tuple[np.ndarray, bytes]:
    """The byte ranges of every sample, and a digest of them and of the samples' keys.

    int64 (samples, 6): `image_offset, image_size, json_offset, json_size, txt_offset, txt_size`. What a sample lacks
    has size -1; if that is the image, its offset is that of another member, so that the sample still has a name.
    Raises TarError for a tar that is cut, damaged or without its end mark.
    """
    rows: list[tuple[int, ...]] = []
    digest = hashlib.sha256()
    key, found = b"", dict[bytes, tuple[int, int]]()

    def close() -> None:
        if found:
            nowhere = (next(iter(found.values()))[0], ABSENT)
            image = next((found[suffix] for suffix in IMAGE_SUFFIXES if suffix in found), nowhere)
            rows.append((*image, *found.get(b"json", (0, ABSENT)), *found.get(b"txt", (0, ABSENT))))
            digest.update(key + b"\0")

    for name, at, length in _members(read, size):
        folder, slash, base = name.rpartition(b"/")
        stem, dot, suffix = base.partition(b".")
        suffix = suffix.lower()
        if not (stem and dot):
            continue
        if (here := folder + slash + stem) != key or suffix in found:
            close()
            key, found = here, {}
        if suffix in _SUFFIXES:
            found[suffix] = (at, length)
    close()
    index = np.array(rows, np.int64).reshape(-1, 6)
    digest.update(index.tobytes())
    return index, digest.digest()


def member_name(header: bytes) -> bytes:
    """The name in a USTAR or GNU header."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        return prefix + b"/" + name
    return name


def _members(read: Read, size: int) -> Iterator[tuple[bytes, int, int]]:
    # Name, data offset and data size of every plain file.
    at, long_name, long_size = 0, None, None
    while True:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise TarError(f"cut at byte {size:,}: a tar ends with an end mark, and here is none")
        if not header.strip(b"\0"):
            # Tars laid end to end, and files of zeros that a broken download never filled, would lose samples here.
            if size - at > _MAX_PADDING or read(at, size - at).strip(b"\0"):
                raise TarError(f"{size - at:,} bytes follow the end mark at byte {at:,}")
            return
        if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], at):
            raise TarError(f"no tar header at byte {at:,}: its checksum is wrong")
        kind, data = header[156:157], at + BLOCK
        length = _number(header[124:136], at) if long_size is None or kind in b"xgLK" else long_size
        name = member_name(header) if long_name is None else long_name
        if kind in b"123456":
            length = 0  # links, devices and folders have no data, whatever their header says
        if data + length > size:
            raise TarError(f"cut at byte {size:,}, inside a member that starts at byte {at:,}")
        at = data + -(-length // BLOCK) * BLOCK
        if kind in b"xL":
            if length > _MAX_NAME:
                raise TarError(f"a name of {length:,} bytes at byte {data:,}")
            extra = read(data, length)
            if kind == b"L":
                long_name = extra.rstrip(b"\0")
            else:
                long_name, long_size = _pax(extra, data, long_name)
            continue
        if kind == b"S":
            raise TarError(f"a sparse member at byte {data:,}; shards hold plain files")
        if kind in b"07\0":
            yield name, data, length
        if kind not in b"gK":
            long_name = long_size = None


def _number(field: bytes, at: int) -> int:
    if field[0] == 0x80:  # GNU's form for what does not fit into octal digits
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise TarError(f"no tar header at byte {at:,}: {field!r} is not a number")
    return number


def _pax(extra: bytes, at: int, name: bytes | None) -> tuple[bytes | None, int | None]:
    # POSIX pax: records of "LENGTH KEY=VALUE\n", LENGTH counting the whole record.
    size, start = None, 0
    try:
        while start < len(extra):
            length = int(extra[start : extra.index(b" ", start)])
            key, equals, value = extra[start : start + length].partition(b" ")[2].partition(b"=")
            if length < 5 or not equals or extra[start + length - 1 : start + length] != b"\n":
                raise ValueError("a record has a wrong length")
            if key == b"path":
                name = value[:-1]
            elif key == b"size":
                size = int(value)
                if size < 0:
                    raise ValueError("a negative size")
            start += length
    except ValueError as error:
        raise TarError(f"a damaged extended header at byte {at:,}: {error}") from error
    return name, size
