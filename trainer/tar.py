"""Finds the samples of WebDataset tars and the byte ranges of their members, from the tar headers alone.

The `webdataset` package groups the members. It gets names and byte ranges instead of streams, so it opens nothing, runs
nothing (`pipe:`) and decodes nothing. Its rule: the key of a member includes its folder and ends at the first dot of
the base name, the rest after the dot is the suffix, in lower case, and consecutive members with the same key form a
sample. A repeated suffix starts the next sample, as in open_clip; webdataset itself would raise an error. Names are
only compared, never used as paths.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

BLOCK = 512
IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp", "gif", "avif")
"""The first of these that a sample has is its image; open_clip's suffixes come first, in its order."""
ABSENT = -1
"""Stands for the size of a missing member."""
DOTTED = -2
"""Stands for the size of an image if a sample has one only under a suffix with more dots, such as `v2.jpg` or
`seg.png`, which may be the picture or an annotation of it."""
_MAX_NAME = 1 << 20
_MAX_PADDING = 1 << 20  # tar pads to 10 KiB by default
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset reserves

Read = Callable[[int, int], bytes]
"""`read(at, size)` returns `size` bytes from offset `at`, or fewer at the end of the file."""


class TarError(ValueError):
    """A file is not a complete tar; the message gives the byte offset."""


class Place(NamedTuple):
    """Offset and size, in bytes, of the contents of a member in the tar."""

    at: int
    size: int


class Group(NamedTuple):
    """The members of a sample."""

    key: str
    """Includes the folder, as webdataset's `__key__`; bytes that are not UTF-8 become surrogates."""
    members: dict[str, Place]
    """By suffix, in lower case and without the first dot."""

    def image(self) -> Place:
        """The place of the picture. Without one, the size is ABSENT or DOTTED and the offset is the first member's."""
        for suffix in IMAGE_SUFFIXES:
            if suffix in self.members:
                return self.members[suffix]
        dotted = any(suffix.rpartition(".")[2] in IMAGE_SUFFIXES for suffix in self.members)
        return Place(next(iter(self.members.values())).at, DOTTED if dotted else ABSENT)


def samples(read: Read, size: int) -> Iterator[Group]:
    """Yields the samples of a tar of `size` bytes, in its order.

    Raises TarError if the tar is truncated, damaged or without its end mark, but only after yielding everything before
    the damage, including a member that is truncated by the end of the file.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys  # imports torch, which takes seconds

    damage: list[TarError] = []

    def files() -> Iterator[dict[str, Any]]:
        key, seen = None, set[str]()
        try:
            for raw, at, length in _members(read, size):
                name = raw.decode("utf-8", "surrogateescape")
                if _META.match(name):
                    continue
                prefix, suffix = base_plus_ext(name)
                if prefix is None or prefix.endswith("/"):  # hidden, such as the ._ files that macOS adds
                    continue
                if prefix != key:
                    key, seen = prefix, set()
                if suffix.lower() in seen:
                    yield {}  # ends the sample, as the end of a tar does
                    seen = set()
                seen.add(suffix.lower())
                yield {"fname": name, "data": Place(at, length), "__url__": None}
        except TarError as error:
            damage.append(error)

    for sample in group_by_keys(files()):
        yield Group(sample["__key__"], {name: place for name, place in sample.items() if isinstance(place, Place)})
    if damage:
        raise damage[0]


def index_tar(read: Read, size: int) -> tuple[np.ndarray, bytes]:
    """The index of all samples that have an image, a JSON or a text, and a digest of the index and the samples' keys.

    The index is int64 (samples, 6): `image_offset, image_size, json_offset, json_size, txt_offset, txt_size`. A missing
    member has size -1, or DOTTED. The offset of a missing image is another member's, so that the sample still has a
    name. Raises TarError as `samples` does.
    """
    rows: list[tuple[int, ...]] = []
    digest = hashlib.sha256()
    absent = Place(0, ABSENT)
    for group in samples(read, size):
        parts = group.image(), group.members.get("json", absent), group.members.get("txt", absent)
        if all(part.size == ABSENT for part in parts):
            continue
        rows.append(tuple(number for part in parts for number in part))
        digest.update(group.key.encode("utf-8", "surrogateescape") + b"\0")
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
    # Yields name, data offset and data size of every regular file.
    at, long_name, long_size = 0, None, None
    while True:
        header = read(at, BLOCK)
        if at == 0 and header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise TarError("a compressed tar has no random access; decompress it first")
        if len(header) < BLOCK:
            raise TarError(f"cut at byte {size:,}: the end mark is missing")
        if not header.strip(b"\0"):
            # Without this check, concatenated tars and broken downloads filled with zeros would silently lose samples.
            if size - at > _MAX_PADDING or read(at, size - at).strip(b"\0"):
                raise TarError(f"{size - at:,} bytes follow the end mark at byte {at:,}")
            return
        if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], at):
            raise TarError(f"no tar header at byte {at:,}: its checksum is wrong")
        kind, data = header[156:157], at + BLOCK
        length = _number(header[124:136], at) if long_size is None or kind in b"xgLK" else long_size
        name = member_name(header) if long_name is None else long_name
        if kind in b"123456":
            length = 0  # links, devices and folders have no data, whatever size their header gives
        cut = f"cut at byte {size:,}, inside a member that starts at byte {at:,}" if data + length > size else ""
        at = data + -(-length // BLOCK) * BLOCK
        if kind in b"xL":
            if length > _MAX_NAME or cut:
                raise TarError(cut or f"a name of {length:,} bytes at byte {data:,}")
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
        if cut:
            raise TarError(cut)
        if kind not in b"gK":
            long_name = long_size = None


def _number(field: bytes, at: int) -> int:
    if field[0] == 0x80:  # GNU's format for numbers that do not fit into the octal digits
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
