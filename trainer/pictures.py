"""Decodes pictures from any source to upright and opaque 8-bit sRGB.

The rules are the same as for fetched pictures (`pipeline.fetch.decoder`; a test compares the two), so a model sees the
same pixels whichever tool wrote the shards:

- The format is detected from the first bytes, and must be JPEG, PNG, WebP, GIF or AVIF.
- The size in the header is checked before anything is decoded.
- Only the first frame of an animation is decoded.
- The orientation (from EXIF, or from XMP if there is no EXIF) is applied.
- Colours with an ICC profile are converted to sRGB; a broken profile is ignored. CMYK without a profile is converted by
  Pillow's formula.
- Transparency is composited over white. 16-bit channels keep their high byte.
- Other metadata is ignored. Broken metadata never makes a picture corrupt.

Only the fetcher rejects a JPEG that lost pixels before its end marker. Here these pixels are grey: Pillow does not
report them, and finding them would take a second decoding.
"""

from __future__ import annotations

import io
import math
import warnings
import zlib

from PIL import AvifImagePlugin, Image, JpegImagePlugin

from trainer.colour import to_rgb
from trainer.formats import missing_bytes, sniff
from trainer.shards import CorruptSampleError

MAX_PIXELS = 64_000_000
"""A picture with more pixels (8000 x 8000) is treated as corrupt and not decoded."""
COVER = 1.5
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side is still this many times the target."""
# A progressive JPEG has about ten scans. Each is a pass over the whole picture, so a small file of many takes minutes.
_MOST_SCANS = 100
_MAX_METADATA = 1 << 20  # Pillow's own limit on a text or profile of a PNG

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Broken metadata is common on the web, and Pillow's warnings do not name the picture.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # pictures are decoded side by side


def decode(encoded: bytes, size: int | None = None) -> Image.Image:
    """Decodes a picture to RGB. Raises CorruptSampleError, and nothing else, whatever the bytes are.

    With `size`, a large JPEG is decoded smaller, with its shorter side at least 1.5 x size: libjpeg then skips the high
    frequencies that resizing to `size` would discard anyway.
    """
    kind = sniff(encoded)
    if kind is None:
        raise CorruptSampleError(f"not a JPEG, PNG, WebP, GIF or AVIF: it starts with {encoded[:16]!r}")
    try:
        return _decode(encoded, kind, size)
    except CorruptSampleError:
        raise
    except Image.UnidentifiedImageError as error:  # its own message contains a memory address
        raise CorruptSampleError(f"no whole header of a {kind}") from error
    # Pillow's decoders raise nearly any exception on hostile bytes.
    except Exception as error:
        raise CorruptSampleError(f"{type(error).__name__}: {error}") from error


def _decode(encoded: bytes, kind: str, size: int | None) -> Image.Image:
    if kind == "WEBP":
        _check_size(*_webp_size(encoded))  # opening one allocates its canvas
    if kind == "PNG":
        encoded = _essential(encoded)
    file = io.BytesIO(encoded)
    # Image.open would look for more pictures in a JPEG, and fail if their table is broken.
    opened = JpegImagePlugin.JpegImageFile(file) if kind == "JPEG" else Image.open(file, formats=[kind])
    with opened as image:
        _check_size(*image.size)
        if "progressive" in image.info and (scans := encoded.count(b"\xff\xda")) > _MOST_SCANS:
            raise CorruptSampleError(f"a JPEG of {scans} scans")
        # libjpeg-turbo decodes a lossless JPEG in full size, even into a buffer for a reduced one.
        if size and kind == "JPEG" and _frame_type(encoded) in (0xC0, 0xC1, 0xC2):
            least = math.ceil(size * COVER)
            image.draft(None, (least, least))
        image.load()
        if kind == "GIF":  # a GIF stores it uncompressed between this name and a trailer
            image.info["xmp"] = encoded.partition(b"\x21\xff\x0bXMP DataXMP")[2].partition(b"\x01\xff\xfe\xfd")[0]
        turn = _orientation(image)
        opaque = to_rgb(image)
    return opaque if turn is None else opaque.transpose(turn)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise CorruptSampleError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """The width and height in the header."""
    chunk = encoded[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(encoded[24:27], "little") + 1, int.from_bytes(encoded[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(encoded[26:28], "little") & 0x3FFF, int.from_bytes(encoded[28:30], "little") & 0x3FFF


def _essential(png: bytes) -> bytes:
    """The PNG with its first frame and only the metadata that affects pixels: EXIF, XMP and the ICC profile.

    Without this, Pillow would refuse a PNG with large or broken metadata. Damaged ancillary chunks are dropped. Damage
    in a critical chunk raises CorruptSampleError, because Pillow does not verify the checksums of pixel data and would
    decode noise.
    """
    parts, pixels, at, kind = [png[:8]], [], 8, b""
    while at + 12 <= len(png) and kind != b"IEND":
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        kind, data = png[at + 4 : at + 8], png[at + 8 : end - 4]
        critical = not kind[0] & 0x20  # upper case
        if zlib.crc32(png[at + 4 : end - 4]) == int.from_bytes(png[end - 4 : end], "big"):
            if critical or kind in (b"tRNS", b"eXIf") or _is_small(kind, data):
                parts.append(png[at:end])
            if kind == b"IDAT":
                pixels.append(data)
        elif critical:
            raise CorruptSampleError(f"damaged or cut at byte {at:,}")
        at = end
    if kind != b"IEND":
        raise CorruptSampleError("cut: it has no IEND chunk")
    if png[12:16] != b"IHDR" or missing_bytes(png[16:29], pixels):
        raise CorruptSampleError("cut: rows are missing")
    return b"".join(parts)


def _is_small(kind: bytes, data: bytes) -> bool:
    """Whether a chunk is an ICC profile or uncompressed XMP within Pillow's size limit."""
    if kind == b"iCCP":
        try:
            profile = zlib.decompressobj().decompress(data.partition(b"\0")[2][1:], _MAX_METADATA + 1)
        except zlib.error:
            return False
        return len(profile) <= _MAX_METADATA
    return kind == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0\0") and len(data) <= _MAX_METADATA


def _frame_type(jpeg: bytes) -> int | None:
    """The marker of the first frame header: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, 0xC3 lossless, …"""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return None


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes the picture upright; None if it is upright or its metadata is broken."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata does not make a broken picture
        return None
