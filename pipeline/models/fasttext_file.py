"""Checks that the file of a fastText model is complete. The library loads a truncated file without an error, then
scores with whatever is in memory or allocates without end."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

_MAGIC, _VERSIONS = 793712314, (11, 12)
_ARGUMENTS = 12 * 4 + 8
_CENTROIDS = 256


def check(path: str) -> None:
    """Raises OSError, or ValueError if the file is not a complete fastText model (format versions 11 and 12)."""
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            raise ValueError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                end = _end(data)
            except struct.error:
                raise ValueError("it is truncated") from None
            if end != len(data):
                raise ValueError(f"it has {len(data):,} bytes, expected {end:,}")


def _end(data: mmap.mmap) -> int:
    """The size of the complete file, computed from the sizes stored in it."""
    at = 0

    def read(form: str) -> Iterator[int]:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return iter(values)

    def skip(size: int) -> None:
        nonlocal at
        if size < 0:
            raise ValueError("it is damaged: a part has a negative size")
        at += size

    def quantizer() -> None:
        dimension, *_ = read("4i")
        skip(dimension * _CENTROIDS * 4)

    def matrix(quantized: bool) -> None:
        if not quantized:
            rows, columns = read("2q")
            skip(rows * columns * 4)
            return
        norms, rows, _, codes = read("?qqi")
        skip(codes)
        quantizer()
        if norms:
            skip(rows)
            quantizer()

    magic, version = read("2i")
    if magic != _MAGIC or version not in _VERSIONS:
        raise ValueError("it does not start with fastText's magic number and version 11 or 12")
    skip(_ARGUMENTS)
    entries, _, _, _, pruned = read("3i2q")
    for _ in range(entries):
        text_end = data.find(b"\0", at)
        if text_end < 0:
            raise ValueError("it is truncated within its dictionary")
        at = text_end + 1 + 9  # a count and a type follow each word
    skip(8 * max(0, pruned))
    (quantized,) = read("?")
    matrix(bool(quantized))
    (quantized_output,) = read("?")
    matrix(bool(quantized and quantized_output))
    return at
