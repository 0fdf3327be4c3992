"""Inspects the bytes of a picture before it is decoded: its format, and whether a PNG has all of its rows.

The decoders of fetched and of stored pictures share this module, so that both accept the same files.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

from PIL import features


def sniff(body: bytes) -> str | None:
    """Pillow's name for the format that the first bytes indicate; None if it is not supported."""
    if body.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if body.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WEBP"
    if body[4:8] == b"ftyp" and features.check("avif"):
        # HEIC uses the generic brands too, so one of the compatible brands must be AVIF's.
        brands = {body[at : at + 4] for at in (8, *range(16, min(int.from_bytes(body[:4], "big"), 256) - 3, 4))}
        if body[8:12] in (b"avif", b"avis", b"mif1", b"msf1") and brands & {b"avif", b"avis"}:
            return "AVIF"
    return None


_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples per pixel, by the colour type of a PNG."""
# The passes of an interlaced PNG: first column and row, steps between columns and rows.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def missing_bytes(header: bytes, pixels: Iterable[bytes | memoryview]) -> int:
    """The number of row bytes that a PNG lacks, from its IHDR and IDAT chunks. Pillow leaves missing rows black.

    Inflates no more than the header announces. Raises zlib.error or struct.error for broken chunks.
    """
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    missing = 0
    for x, y, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((x - width) // dx), -((y - height) // dy)
        if columns > 0 and rows > 0:
            missing += rows * (1 + -(-columns * bits * _CHANNELS.get(colour, 0) // 8))
    inflate = zlib.decompressobj()
    for data in pixels:
        while missing > 0 and data and (rows_data := inflate.decompress(data, 1 << 16)):
            missing -= len(rows_data)
            data = inflate.unconsumed_tail
    return max(missing, 0)
