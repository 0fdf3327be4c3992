"""Pictures made to hurt whoever decodes them, and honest ones for comparison; all are made here, byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.fetch.server import jpeg


def encoded(kind: str, width: int = 120, height: int = 80, **options: object) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg(width, height))).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"", *, bits: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG that claims this size; `pixels` are the scan lines before compression, `extra` further chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")


def gif(screen: tuple[int, int], frame: tuple[int, int], data: bytes = b"\x02\x02\x44\x01\x00") -> bytes:
    """A GIF whose one frame may be larger than its screen; `data` are the pixels: 1 × 1 if not said."""
    descriptor = b"\x2c" + struct.pack("<HHHHB", 0, 0, *frame, 0)
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6) + descriptor + data + b"\x3b"


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP that claims a canvas of this size around a small picture."""
    simple = encoded("WEBP")[12:]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides + simple
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossless(width: int, height: int) -> bytes:
    """A lossless WebP that claims this size, at most 16384 × 16384, and holds nothing."""
    bits = (width - 1) | (height - 1) << 14
    data = b"\x2f" + struct.pack("<I", bits) + bytes(11)
    body = b"WEBP" + b"VP8L" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_claiming(width: int, height: int, *, progressive: bool = False) -> bytes:
    """A small JPEG whose frame header says another size."""
    body = bytearray(encoded("JPEG", progressive=progressive))
    at = body.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    body[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(body)


def jpeg_lossless(pixels: np.ndarray) -> bytes:
    """(height, width, 3) uint8 RGB as a lossless JPEG (ITU-T T.81, annex H): each sample as its difference from the one
    on its left, the first of a row from the one above it."""
    height, width, _ = pixels.shape
    samples = pixels.astype(np.int32)
    before = np.roll(samples, 1, axis=1)
    before[1:, 0] = samples[:-1, 0]
    before[0, 0] = 128
    bits = []
    for step in (samples - before).ravel().tolist():
        category = abs(step).bit_length()
        bits.append(f"{category:04b}")  # every category from 0 to 9 has a code of four bits
        bits.append(f"{step if step >= 0 else step + (1 << category) - 1:0{category}b}" if category else "")
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    scan = bytes(int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)).replace(b"\xff", b"\xff\0")

    def segment(marker: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data

    codes = bytes([0, *(10 if length == 4 else 0 for length in range(1, 17)), *range(10)])
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"R\x11\0G\x11\0B\x11\0"
    head = segment(0xC4, codes) + segment(0xC3, frame) + segment(0xDA, b"\x03R\0G\0B\0\x01\0\0")
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


def noise(width: int, height: int, kind: str = "JPEG", seed: int = 0, **options: object) -> bytes:
    """A picture that does not compress: the largest body for its size."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def smooth(width: int, height: int, mode: str, kind: str, **options: object) -> bytes:
    """A picture of much area in few bytes."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 100, width // 100, 4), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(np.arange(width * height, dtype=np.uint32).astype(np.uint16).reshape(height, width))
    else:
        small = Image.fromarray(coarse).convert("RGB" if mode == "P" else mode)
        # Whole squares instead of slopes, where every slope costs bytes.
        lossless = kind in ("PNG", "GIF")
        image = small.resize((width, height), Image.Resampling.NEAREST if lossless else Image.Resampling.BILINEAR)
        if mode == "P":
            image = image.quantize(64)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
