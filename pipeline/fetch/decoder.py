"""Bytes from the web to a clean, small image: 8-bit sRGB, upright, opaque, without metadata.

`decode` is a pure function from bytes and options to a picture, with arguments and results that pickle. It reads what
anyone sent: run it in a process that can be lost (`pipeline.fetch.sandbox`).

The rules, one per case, the same for every format:

- The format is what the first bytes say, and one of JPEG, PNG, WebP, GIF, AVIF; no name or header is believed.
- The size in the file's header is checked before anything is decoded.
- Of an animation, the first frame; `animated` says so. Of a JPEG with further pictures (MPO), the first.
- Orientation is applied, EXIF's or, where EXIF says none, that of XMP; sizes are those of the upright image.
- An ICC profile is converted to sRGB (relative colorimetric); a broken one, or a part beyond PROFILE_BYTES, is ignored,
  and so is everything else that a file says about its colours. CMYK without a profile is converted by Pillow's formula.
- Transparency is laid on white.
- Of 16 bits a channel, the high byte is taken, never clipped.
- Metadata is passed over: nothing in it, broken, huge or hostile, costs the picture.
- A JPEG is decoded at a reduced DCT scale that still covers the target, as `Rules.decode` says, if it is one that has
  such scales (`_has_scales`).
- What shrinks is averaged by area (`shrink`), what grows is interpolated by Lanczos, as img2dataset does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import re
import resource
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import exifread
import imagehash
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image, ImageCms, JpegImagePlugin, UnidentifiedImageError, features

from pipeline.fetch.deny import DenyList
from pipeline.fetch.reasons import FetchError, one_line

ResizeMode = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
EncodeFormat = Literal["jpg", "png", "webp"]
DecodeMode = Literal["scaled", "fast", "exact"]
HashType = Literal["md5", "sha1", "sha256", "sha512"]
Box = Sequence[float]
"""x_min, y_min, x_max, y_max of the upright image, from 0 to 1."""

# The longest side that the encoded format can express.
MAX_SIDE = {"jpg": 65_500, "png": 65_500, "webp": 16_383}

# How many times the target's size a reduced decoding has at least, in both directions.
_COVER = {"scaled": 1.5, "fast": 1.0}
# Formats without a reduced decoding are averaged down in steps from this size on, unless `exact`.
_LARGE_PIXELS = 4_000_000
# A progressive JPEG has some ten scans; each is a pass over all of it, so a small file of many takes minutes.
_MOST_SCANS = 100
# What is read of one ICC profile: CMYK profiles have up to 3 MB.
PROFILE_BYTES = 4 << 20
# What is read of one text (XMP, EXIF in hex): its beginning, where a writer puts what counts.
_TEXT_BYTES = 1 << 20
# The column `exif`: characters of a value, bytes of the JSON. Longer values are cut, further tags left out.
_EXIF_VALUE, _EXIF_BYTES = 1_000, 1 << 16
# Reads of a block of EXIF: a few thousand are usual, and overlapping tables could ask for millions.
_EXIF_READS = 20_000
_SAME_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Broken metadata is everyday on the web, and said of no image in particular it is noise.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("exifread").setLevel(logging.CRITICAL)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# One image, one thread: the images are what runs in parallel.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What to make of an image; names and meanings are img2dataset's."""

    image_size: int = 256
    resize_mode: ResizeMode = "keep_ratio_largest"
    resize_only_if_bigger: bool = True
    encode_format: EncodeFormat = "jpg"
    encode_quality: int = 95
    min_image_size: int = 0
    max_image_area: float = 36_000_000
    max_aspect_ratio: float = float("inf")
    extract_exif: bool = True
    skip_reencode: bool = False
    decode: DecodeMode = "scaled"
    compute_phash: bool = True
    compute_hash: HashType | None = None
    verify_hash: HashType | None = None
    hash_mismatch: Literal["reject", "flag"] = "reject"
    deny_hashes: DenyList | None = None


@dataclass(frozen=True)
class Picture:
    image: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    original_bytes: int
    original_format: str
    animated: bool
    sha256: str
    phash: int | None
    """imagehash.phash (64 bits, the first bit of its hex string highest) of the picture as it was encoded; None where
    it was not asked for."""
    exif: str | None
    hash: str | None = None
    """The digest that `Rules.compute_hash` asks for."""
    hash_matches: bool | None = None
    """Whether the body is the one that was claimed; None where nothing was."""


def decode(body: bytes, rules: Rules, claim: str | None = None, blur: Sequence[Box] = ()) -> Picture:
    """The picture in `body` by `rules`, with the parts in `blur` made unrecognisable.

    `claim` is the digest, in hex, that the body should have, where `rules.verify_hash` names its kind.
    Raises FetchError, and only that, for whatever is wrong with the bytes.
    """
    try:
        return _decode(body, rules, claim, blur)
    except (FetchError, MemoryError):
        raise
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(str(error)) from None
        raise FetchError("decode_error", str(error)) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FetchError("too_large", str(error)) from None
    except UnidentifiedImageError:  # its message holds a memory address, and equal runs have equal ledgers
        raise FetchError("decode_error", "broken header") from None
    except Exception as error:  # decoders raise about everything (struct.error, SyntaxError, ...) on broken files
        raise FetchError("decode_error", f"{type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Decoder:
    """`decode` by the same rules again and again, to be sent to the process where it is to run."""

    rules: Rules

    def __call__(self, body: bytes, claim: str | None = None, blur: Sequence[Box] = ()) -> Picture:
        return decode(body, self.rules, claim, blur)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.rules.compute_phash:
            # SciPy, which imagehash loads at first use, and the buffers of the BLAS: 80 MB of address space that would
            # count against the first picture, and an end of the process where that leaves too little.
            phash(np.zeros((512, 512, 3), np.uint8))


def _decode(body: bytes, rules: Rules, claim: str | None, blur: Sequence[Box]) -> Picture:
    if rules.deny_hashes is not None and (denied := rules.deny_hashes.find(body)):
        raise FetchError("denied_hash", denied)
    matches = None
    if rules.verify_hash and claim is not None:
        matches = hashlib.new(rules.verify_hash, body).hexdigest() == claim.strip().lower()
        if not matches and rules.hash_mismatch == "reject":
            raise FetchError("hash_mismatch", f"{rules.verify_hash} is not {claim}")
    kind = sniff(body)
    if kind is None:
        raise FetchError("not_an_image", f"starts with {body[:16]!r}")
    found = _read_bare(body, kind, rules) or _read(body, kind, rules)
    pixels = _resize(found.pixels, found.plan, rules, blur)
    as_it_came = kind == _SAME_FORMAT[rules.encode_format] and found.clean and not found.plan.resizes
    keep_bytes = rules.skip_reencode and as_it_came and not blur
    return Picture(
        image=body if keep_bytes else _encode(pixels, rules),
        width=pixels.shape[1],
        height=pixels.shape[0],
        original_width=found.size[0],
        original_height=found.size[1],
        original_bytes=len(body),
        original_format=kind.lower(),
        animated=found.animated,
        sha256=hashlib.sha256(body).hexdigest(),
        phash=phash(pixels) if rules.compute_phash else None,
        exif=found.exif if rules.extract_exif else None,
        hash=hashlib.new(rules.compute_hash, body).hexdigest() if rules.compute_hash else None,
        hash_matches=matches,
    )


_COSINES = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))
"""(8, 32): the lowest frequencies of the DCT-II of 32 samples."""
_PILLOW_ONE = 1 << 22
"""Pillow's weights are fixed-point numbers with so many parts."""


def phash(pixels: np.ndarray) -> int:
    """imagehash.phash of (height, width, 3) uint8 RGB as an unsigned 64-bit number, in less than half the time."""
    image = Image.fromarray(pixels)
    small = _to_32(np.asarray(image.convert("L"))).astype(np.float64)
    low = _COSINES @ small @ _COSINES.T
    above = low - np.sort(low, axis=None)[31:33].mean()  # the median
    # imagehash transforms by SciPy. Where rounding decides, it is to be its rounding.
    bits = above > 0 if np.abs(above).min() > 1e-6 else imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _to_32(grey: np.ndarray) -> np.ndarray:
    """Exactly Pillow's Lanczos resize of (height, width) uint8 to 32 by 32, by products of matrices of integers."""
    height, width = grey.shape
    horizontal_first = _horizontal_first(width, height) if 32 < width <= 512 and 32 < height <= 512 else None
    if horizontal_first is None:
        return np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.LANCZOS))
    return _product(grey, horizontal_first)


def _product(grey: np.ndarray, horizontal_first: bool) -> np.ndarray:
    height, width = grey.shape
    if horizontal_first:
        return _rounded(_weights(height).T @ _rounded(grey @ _weights(width)))
    return _rounded(_rounded(_weights(height).T @ grey) @ _weights(width))


def _rounded(sums: np.ndarray) -> np.ndarray:
    return np.floor((sums + _PILLOW_ONE // 2) / _PILLOW_ONE).clip(0, 255)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=256)
def _weights(side: int) -> np.ndarray:
    """(side, 32) float64, what each of `side` pixels adds to each of 32: Pillow's own, by resizing pulses."""
    pulses = Image.fromarray(np.eye(side, dtype=np.int32) * _PILLOW_ONE)
    return np.asarray(pulses.resize((32, side), Image.Resampling.LANCZOS)).astype(np.float64)


@functools.lru_cache(maxsize=4096)
def _horizontal_first(width: int, height: int) -> bool | None:
    """The order in which this Pillow resizes pictures of this size, found by trying; None: in another way."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    wanted = np.asarray(Image.fromarray(noise).resize((32, 32), Image.Resampling.LANCZOS))
    return next((order for order in (True, False) if np.array_equal(_product(noise, order), wanted)), None)


class _Found(NamedTuple):
    """What a file holds."""

    pixels: np.ndarray
    """(height, width, 3) RGB, upright; smaller than the picture where a reduced decoding covers the target."""
    size: tuple[int, int]
    """(width, height) of the whole, upright picture."""
    plan: Plan
    clean: bool
    """The pixels are the plain samples of the file: not turned, neither converted from another colour space nor laid on
    white, and the only ones."""
    animated: bool
    exif: str | None


def _read_bare(body: bytes, kind: str, rules: Rules) -> _Found | None:
    """A picture without anything about it, as most are on the web, without Pillow; None where it is not one, or broken.

    Opening a JPEG in Pillow takes a twentieth of the time of decoding it; a PNG as a whole takes half again as long
    there, and a WebP, since it might be animated, twice the time and thrice the memory.
    """
    size = bare_size(body, kind)
    if size is None or (kind == "PNG" and size[0] * size[1] > _LARGE_PIXELS):  # which OpenCV would hold twice
        return None
    _check_size(*size, rules)
    plan = plan_resize(*size, rules)
    pixels = _turbo_pixels(body, size, plan.scaled, rules) if kind == "JPEG" else _opencv_pixels(body)
    return None if pixels is None else _Found(pixels, size, plan, clean=True, animated=False, exif="{}")


def _read(body: bytes, kind: str, rules: Rules) -> _Found:
    size = header_size(body, kind)
    if size:
        _check_size(*size, rules)
    with _open(body, kind, size) as source:
        _check_size(source.width, source.height, rules)
        orientation = _orientation(source.info.get("exif"), source.info.get("xmp"))
        width, height = source.size if orientation < 5 else source.size[::-1]
        plan = plan_resize(width, height, rules)
        pixels, clean = _pixels(source, body, plan.scaled if orientation < 5 else plan.scaled[::-1], rules)
        if orientation > 1:
            pixels = _turn(pixels, orientation)
        animated = _is_animated(source)
        exif = _exif(source.info.get("exif")) if rules.extract_exif else None
    clean = clean and orientation == 1 and not animated
    return _Found(pixels, (width, height), plan, clean, animated, exif)


def _pixels(source: Image.Image, body: bytes, target: tuple[int, int], rules: Rules) -> tuple[np.ndarray, bool]:
    """The picture as (height, width, 3) RGB, not yet turned upright; and whether these are the plain samples of the
    file, neither converted from another colour space nor laid on white.

    `target` is the (width, height) that it will be resized to.
    """
    if "progressive" in source.info and (scans := body.count(b"\xff\xda")) > _MOST_SCANS:
        raise FetchError("decode_error", f"{scans} scans")
    if source.format == "JPEG" and (source.mode == "RGB" or (source.mode == "L" and "icc_profile" not in source.info)):
        pixels = _turbo_pixels(body, source.size, target, rules)
        if pixels is not None:
            transform = _srgb_transform(icc, "RGB") if (icc := source.info.get("icc_profile")) else None
            if transform:
                pixels = np.asarray(transform.apply(Image.fromarray(pixels)))
            return pixels, transform is None
    area = source.width * source.height
    cover = _COVER.get(rules.decode)
    wanted = _reduced_size(body, source.size, target, rules) if source.format == "JPEG" else None
    if wanted:
        # The mode is kept: draft to RGB would make a lie of a CMYK or grey profile.
        source.draft(source.mode, wanted)
    _load(source, area)
    clean = source.mode in ("RGB", "L") and not source.has_transparency_data and "icc_profile" not in source.info
    if source.format == "PNG" and body[24] > 8:  # bits a channel, which Pillow reads as 8
        clean = False
    image = _to_rgb(source)
    if cover and image.width * image.height > _LARGE_PIXELS:
        # Before there is a second copy of it: what Pillow holds takes four bytes a pixel already.
        image = image.reduce(max(1, int(min(image.width / target[0], image.height / target[1]) / cover)))
    return np.asarray(image), clean


def _turbo_pixels(body: bytes, size: tuple[int, int], target: tuple[int, int], rules: Rules) -> np.ndarray | None:
    """A JPEG in YCbCr, RGB or grey as (height, width, 3) RGB; None where it is broken: libjpeg mends what it can and
    only warns, Pillow knows a truncated file from another."""
    least = _reduced_size(body, size, target, rules) or (0, 0)
    averaged = rules.decode in _COVER and min(size[0] / target[0], size[1] / target[1]) >= 1.5
    try:
        return simplejpeg.decode_jpeg(  # type: ignore[no-any-return]
            body,
            "RGB",
            min_width=least[0],
            min_height=least[1],
            # Colour at half the resolution need not be interpolated where it is averaged right after.
            fastupsample=averaged,
            strict=True,
        )
    except ValueError as error:
        if "memory" in str(error):
            raise MemoryError(str(error)) from None
        return None


def _opencv_pixels(body: bytes) -> np.ndarray | None:
    """(height, width, 3) RGB; None where it is broken."""
    return cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR_RGB)


def _reduced_size(body: bytes, size: tuple[int, int], target: tuple[int, int], rules: Rules) -> tuple[int, int] | None:
    """The least of a half, a quarter and an eighth of `size` (rounded up) that covers `target` as `rules.decode` says;
    None where that is none, or the JPEG has no such scales.

    libjpeg-turbo knows other scales, but has no SIMD for them: most take longer than decoding in full.
    """
    cover = _COVER.get(rules.decode)
    for divisor in (8, 4, 2):
        if cover and min(size[0] / target[0], size[1] / target[1]) >= cover * divisor:
            return (math.ceil(size[0] / divisor), math.ceil(size[1] / divisor)) if _has_scales(body) else None
    return None


def _open(body: bytes, kind: str, size: tuple[int, int] | None) -> Image.Image:
    """The picture in Pillow, its metadata as `exif`, `xmp` and `icc_profile` in `info`, where there are any."""
    try:
        if kind == "PNG":
            picture, info, animated = _png_parts(body)
            source = Image.open(io.BytesIO(picture), formats=[kind])
            source.info.update(info, animated=animated)
        elif kind == "JPEG":
            # Image.open would go through the further pictures of an MPO file, and fail where their table is broken.
            source = JpegImagePlugin.JpegImageFile(io.BytesIO(body))
            if source.width * source.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise FetchError("too_large", f"{source.width}x{source.height} pixels")
        else:
            source = Image.open(io.BytesIO(body), formats=[kind])
            if kind == "GIF":
                source.info["xmp"] = _gif_xmp(body)
    except OSError as error:
        # libwebp's canvas, and its copy of the last frame.
        if kind == "WEBP" and size and _lacks(8 * size[0] * size[1]):
            raise MemoryError(str(error)) from None
        raise
    if icc := source.info.get("icc_profile"):
        # Whatever is padded on behind the profile is none of it.
        source.info["icc_profile"] = icc[: min(int.from_bytes(icc[:4], "big"), PROFILE_BYTES)]
    return source


def _load(source: Image.Image, area: int) -> None:
    """`area` is that of the whole picture, in pixels, whatever part or scale of it is decoded."""
    try:
        source.load()
    except OSError as error:
        # What a decoder holds beside the pixels: libjpeg 16 bits for each sample, of which Pillow tells the most that
        # there may be; libwebp a plane of transparency and some rows.
        layers = len(getattr(source, "layer", ())) if "progressive" in source.info else 0
        if _lacks({"JPEG": 2 * layers, "WEBP": 4}.get(source.format or "", 0) * area):
            raise MemoryError(str(error)) from None
        raise


def _lacks(size: int) -> bool:
    """Whether this process may not take `size` bytes more; asked where a decoder has failed and does not say why."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if not size or limit == resource.RLIM_INFINITY:
        return False
    return size > limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def sniff(body: bytes) -> str | None:
    """Pillow's name of the format that the first bytes announce, None where it is not on the allow list."""
    if body.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if body.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WEBP"
    if body[4:12] in (b"ftypavif", b"ftypavis") and features.check("avif"):
        return "AVIF"
    return None


def header_size(body: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) that the header claims, read without a decoder; None where opening decodes nothing (JPEG, AVIF).

    Opening a WebP makes the decoder allocate its canvas: the claim must be known before.
    """
    if kind == "PNG" and body[12:16] == b"IHDR":
        return int.from_bytes(body[16:20], "big"), int.from_bytes(body[20:24], "big")
    if kind == "GIF":
        return int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
    if kind == "WEBP":
        chunk = body[12:16]
        if chunk == b"VP8X":
            return int.from_bytes(body[24:27], "little") + 1, int.from_bytes(body[27:30], "little") + 1
        if chunk == b"VP8L":
            bits = int.from_bytes(body[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if chunk == b"VP8 ":
            sides = int.from_bytes(body[26:28], "little"), int.from_bytes(body[28:30], "little")
            return sides[0] & 0x3FFF, sides[1] & 0x3FFF
    return None


# Segments of a JPEG that say nothing about its pixels: JFIF, comments, tables, restart intervals.
_BARE_SEGMENTS = frozenset({0xE0, 0xFE, 0xDB, 0xC4, 0xDD})
# Markers of a JPEG with a frame header: all of C0 to CF but those for Huffman tables, extensions and arithmetic coding.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers that no segment follows, or none that may come before a frame: TEM, RST0 to RST7, SOI, EOI, SOS.
_LONE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDB), 0xFF})


def bare_size(body: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) of a baseline JPEG, a PNG of 8 bits without a palette, or a WebP, that has neither metadata nor a
    profile, transparency or further frames: its header is all there is to know. None for any other file, and for a PNG
    with a wrong checksum."""
    if kind == "PNG":
        return header_size(body, kind) if _is_bare_png(body) else None
    if kind == "WEBP":
        # The second: lossless, without its bit for transparency.
        opaque = body[12:16] == b"VP8 " or (body[12:16] == b"VP8L" and len(body) > 24 and not body[24] & 0x10)
        return header_size(body, kind) if opaque else None
    if kind == "JPEG" and (frame := _jpeg_frame(body)) and frame.bare and frame.marker in (0xC0, 0xC1):
        return frame.size if frame.bits == 8 and frame.components in (1, 3) else None
    return None


class _Frame(NamedTuple):
    """The frame header of a JPEG (ITU-T T.81, B.2.2)."""

    marker: int
    bits: int
    size: tuple[int, int]
    components: int
    bare: bool
    """Only _BARE_SEGMENTS come before it."""


def _jpeg_frame(body: bytes) -> _Frame | None:
    """None where something else than segments comes before it: then libjpeg may find another one."""
    at, bare = 2, True
    while at + 10 <= len(body) and body[at] == 0xFF:
        marker, length = body[at + 1], int.from_bytes(body[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            height, width = (int.from_bytes(body[at + i : at + i + 2], "big") for i in (5, 7))
            return _Frame(marker, body[at + 4], (width, height), body[at + 9], bare)
        if marker in _LONE_MARKERS or length < 2:
            return None
        bare = bare and marker in _BARE_SEGMENTS
        at += 2 + length
    return None


def _has_scales(body: bytes) -> bool:
    """Whether a JPEG can be decoded at a reduced scale: baseline, extended or progressive, Huffman-coded, 8 bits.

    libjpeg-turbo ignores the scale of a lossless one, and writes the whole picture into a buffer for the reduced one.
    """
    frame = _jpeg_frame(body)
    return frame is not None and frame.marker in (0xC0, 0xC1, 0xC2) and frame.bits == 8


# Chunks of a PNG that say nothing about its pixels, and those that hold them. (Its gamma is ignored.)
_BARE_CHUNKS = frozenset({b"IHDR", b"IDAT", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB"})


class _Chunk(NamedTuple):
    name: bytes
    data: memoryview
    whole: memoryview
    """With its length, name and checksum."""
    intact: bool
    """Its checksum is right."""


def _chunks(body: bytes) -> Iterator[_Chunk]:
    """The chunks of a PNG up to IEND, which does not come where the file is cut."""
    view, at = memoryview(body), 8
    while at + 12 <= len(body):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if end > len(body):
            return
        intact = zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        chunk = _Chunk(body[at + 4 : at + 8], view[at + 8 : end - 4], view[at:end], intact)
        yield chunk
        if chunk.name == b"IEND":
            return
        at = end


def _is_bare_png(body: bytes) -> bool:
    for chunk in _chunks(body):
        if not chunk.intact:
            return False
        if chunk.name == b"IEND":
            # Bits a channel; grey or RGB.
            return body[12:16] == b"IHDR" and body[24] == 8 and body[25] in (0, 2)
        if chunk.name not in _BARE_CHUNKS:
            return False
    return False


def _png_parts(body: bytes) -> tuple[bytes, dict[str, bytes], bool]:
    """A PNG without its metadata and further frames; its EXIF, XMP and profile as Pillow names them; and whether it has
    further frames.

    Pillow refuses a PNG for much or broken metadata, and for frames that are out of order; browsers show it. As they
    do, this passes over what is broken in a chunk that a reader need not know, and in no other: damage in the middle of
    the pixels would come out as noise. Raises FetchError.
    """
    parts: list[bytes | memoryview] = [body[:8]]
    info: dict[str, bytes] = {}
    frames, pixels, name = 0, False, b""
    for name, data, whole, intact in _chunks(body):
        if not name[0] & 0x20:  # a capital: critical
            if not intact:
                raise FetchError("decode_error", f"wrong checksum of {name!r}")
            pixels = pixels or name == b"IDAT"
        elif not intact:
            continue
        elif name == b"acTL" and not pixels and not frames:
            frames = int.from_bytes(data[:4], "big")
        elif name == b"fcTL" and not pixels and frames:
            frames -= 1  # the picture itself is the first of them
        elif name != b"tRNS":
            for key, value in _png_metadata(name, data):
                info.setdefault(key, value)
        if not name[0] & 0x20 or name == b"tRNS":
            parts.append(whole)
    if name != b"IEND":
        raise FetchError("decode_error", "truncated PNG file")
    return b"".join(parts), info, 0 < frames < 1 << 31


# Texts of a PNG that hold metadata, by their keyword; the raw profiles are ImageMagick's, in hex.
_PNG_TEXTS = {
    b"XML:com.adobe.xmp": "xmp",
    b"Raw profile type xmp": "xmp",
    b"Raw profile type exif": "exif",
    b"Raw profile type APP1": "exif",
}


def _png_metadata(name: bytes, data: memoryview) -> Iterator[tuple[str, bytes]]:
    """What an ancillary chunk of a PNG holds of EXIF, XMP or a profile, if anything."""
    if name == b"eXIf":
        yield "exif", bytes(data)
    if name not in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
        return
    keyword, _, rest = bytes(data).partition(b"\0")
    if name == b"iCCP":
        yield from _unpacked("icc_profile", rest[1:], PROFILE_BYTES)
    elif key := _PNG_TEXTS.get(keyword):
        if name == b"iTXt":
            text = rest[2:].split(b"\0", 2)[-1]
            found = _unpacked(key, text, _TEXT_BYTES) if rest[:1] == b"\1" else iter([(key, text)])
        else:
            found = _unpacked(key, rest[1:], _TEXT_BYTES) if name == b"zTXt" else iter([(key, rest)])
        for _, text in found:
            if keyword.startswith(b"Raw"):
                # A line with the kind, a line with the length, then hex.
                digits = b"".join(text.split()[2:])
                with contextlib.suppress(ValueError):
                    yield key, bytes.fromhex(digits[: len(digits) & ~1].decode("ascii", "replace"))
            else:
                yield key, text


def _unpacked(key: str, packed: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """The first `most` bytes at most; nothing where they are broken."""
    with contextlib.suppress(zlib.error):
        yield key, zlib.decompressobj().decompress(packed, most)


def _gif_xmp(body: bytes) -> bytes:
    """XMP stands in a GIF as it is, behind this name and before a trailer that leads out of it (Adobe's XMP
    Specification, Part 3)."""
    _, name, rest = body.partition(b"\x21\xff\x0bXMP DataXMP")
    return rest[:_TEXT_BYTES].partition(b"\x01\xff\xfe\xfd")[0] if name else b""


def _check_size(width: int, height: int, rules: Rules) -> None:
    if not width or not height:
        raise FetchError("decode_error", f"{width}x{height} pixels")
    if width * height > rules.max_image_area:
        raise FetchError("too_large", f"{width}x{height} pixels")
    if min(width, height) < rules.min_image_size:
        raise FetchError("too_small", f"{width}x{height} pixels")
    if max(width, height) / min(width, height) > rules.max_aspect_ratio:
        raise FetchError("aspect_ratio", f"{width}x{height} pixels")


@dataclass(frozen=True)
class Plan:
    """Sizes are (width, height) in pixels: first scale, then cut or pad about the middle."""

    scaled: tuple[int, int]
    final: tuple[int, int]
    resizes: bool
    enlarges: bool


def plan_resize(width: int, height: int, rules: Rules) -> Plan:
    """Sizes by `resize_mode`, equal to img2dataset's for every input. Raises FetchError("too_large") if huge."""
    mode, target = rules.resize_mode, rules.image_size
    side = min(width, height) if mode in ("keep_ratio", "center_crop") else max(width, height)
    if mode == "no" or (rules.resize_only_if_bigger and side <= target):
        scaled = final = (width, height)
    else:
        scale = target / side
        scaled = final = (max(1, round(width * scale)), max(1, round(height * scale)))
        if mode in ("center_crop", "border"):
            final = (target, target)
    for size in (scaled, final):
        if size[0] * size[1] > rules.max_image_area or max(size) > MAX_SIDE[rules.encode_format]:
            raise FetchError("too_large", f"{width}x{height} would become {size[0]}x{size[1]} pixels")
    return Plan(scaled, final, resizes=scaled != (width, height) or final != scaled, enlarges=scaled[0] > width)


def _resize(pixels: np.ndarray, plan: Plan, rules: Rules, blur: Sequence[Box]) -> np.ndarray:
    """`pixels` is (height, width, 3) uint8, as is the result."""
    width, height = plan.scaled
    if pixels.shape[1::-1] != plan.scaled:
        if plan.enlarges:
            pixels = cv2.resize(pixels, plan.scaled, interpolation=cv2.INTER_LANCZOS4)
        else:
            pixels = shrink(pixels, plan.scaled, least=1 if rules.decode == "fast" else 2)
    if blur:
        pixels = _blur(pixels, blur)
    if plan.final != plan.scaled:
        dx, dy = plan.final[0] - width, plan.final[1] - height
        if dx <= 0 and dy <= 0:
            left, top = -dx // 2, -dy // 2
            pixels = pixels[top : top + plan.final[1], left : left + plan.final[0]]
        else:
            left, top = dx // 2, dy // 2
            white = (255, 255, 255)
            pixels = cv2.copyMakeBorder(pixels, top, dy - top, left, dx - left, cv2.BORDER_CONSTANT, value=white)
    return pixels


def shrink(pixels: np.ndarray, size: tuple[int, int], least: int = 2) -> np.ndarray:
    """(height, width, 3) uint8 averaged by area down to `size` (width, height), in a third of cv2.INTER_AREA's time.

    OpenCV has SIMD for linear interpolation and for means of 2 by 2 pixels, but not for areas of other sizes. So:
    linearly to `least` times the size, or to twice that as often as it takes for no pixel to be missed, and means from
    there. With 2 that is a median 53 dB, and 45 dB at worst, from INTER_AREA, where encoding at quality 95 is 39
    (photographs of benchmarks/corpus.py, ratios of 1.05 to 6); with 1, for ratios under 2, 48 and 43.
    """
    if min(size) < 32:  # slivers: little to do, and what rounding does to their sides is much
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    factor = least
    while min(pixels.shape[1] / size[0], pixels.shape[0] / size[1]) > 2 * factor:
        factor *= 2
    pixels = cv2.resize(pixels, (factor * size[0], factor * size[1]), interpolation=cv2.INTER_LINEAR)
    while factor > 1:
        factor //= 2
        pixels = cv2.resize(pixels, (factor * size[0], factor * size[1]), interpolation=cv2.INTER_AREA)
    return pixels


def _blur(pixels: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """Blurs the boxes, each widened by a tenth of its longer side, with soft edges (Yang et al. 2022, "A Study of Face
    Obfuscation in ImageNet", as img2dataset does it): σ is a tenth of the longest side of any box."""
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width, 1), np.float32)
    longest = 0.0
    for x_min, y_min, x_max, y_max in boxes:
        left, top, right, bottom = x_min * width, y_min * height, x_max * width, y_max * height
        side = max(right - left, bottom - top)
        longest = max(longest, side)
        margin = 0.1 * side
        rows = slice(max(0, int(top - margin)), max(0, math.ceil(bottom + margin)))
        mask[rows, max(0, int(left - margin)) : max(0, math.ceil(right + margin))] = 1
    sigma = 0.1 * longest
    if not mask.any() or sigma <= 0:
        return pixels
    soft = cv2.GaussianBlur(mask, (0, 0), sigma)[..., None]
    blurred = cv2.GaussianBlur(pixels, (0, 0), sigma)
    return np.rint(pixels * (1 - soft) + blurred * soft).astype(np.uint8)


def _encode(pixels: np.ndarray, rules: Rules) -> bytes:
    flag = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "png": cv2.IMWRITE_PNG_COMPRESSION, "webp": cv2.IMWRITE_WEBP_QUALITY}
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(f".{rules.encode_format}", bgr, [flag[rules.encode_format], rules.encode_quality])
    if not done:
        raise ValueError(f"{rules.encode_format} encoder refused {pixels.shape[1]}x{pixels.shape[0]} pixels")
    return encoded.tobytes()


_ORIENTATION_TAG = 0x0112


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright pixels from those that EXIF calls turned and mirrored (2 to 8)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")


def _orientation(exif: object, xmp: object) -> int:
    """1 to 8 as EXIF counts them: EXIF's, else that of XMP; 1 (upright) where both have none or are broken."""
    if isinstance(exif, bytes):
        with contextlib.suppress(Exception):  # broken metadata does not make a broken image
            tags = Image.Exif()
            tags.load(exif)
            value = tags.get(_ORIENTATION_TAG)
            if isinstance(value, int) and 1 <= value <= 8:
                return value
    found = _XMP_ORIENTATION.search(xmp[:_TEXT_BYTES]) if isinstance(xmp, bytes) else None
    return int(found[1]) if found else 1


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(image.info.get("animated", getattr(image, "is_animated", False)))
    except Exception:  # a broken second frame does not make the first one broken
        return False


def _to_rgb(image: Image.Image) -> Image.Image:
    icc = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        image = _grey_from_16_bit(image)
    alpha = None
    if image.has_transparency_data:
        alpha = (image if image.mode in ("LA", "RGBA") else image.convert("RGBA")).getchannel("A")
    # A profile is made for one of these.
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if icc and (transform := _srgb_transform(icc, image.mode)):
        image = transform.apply(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is not None:
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=alpha)
        return opaque
    return image


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    wide = np.asarray(image)
    grey = (wide >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[wide == clear] = 255
    return Image.fromarray(grey)


# So few of them may be as large as PROFILE_BYTES, and what one image leaves behind counts against the next.
@functools.lru_cache(maxsize=16)
def _srgb_transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where the profile is sRGB already, is broken, or is meant for another kind of image."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(profile).lower():
            return None
        return ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # One transform serves many threads, and the library's one-pixel cache is not made for that.
            flags=ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _exif(block: object) -> str | None:
    """The EXIF tags as a JSON object of strings, as img2dataset stores them: `{}` without any, None where they are
    broken or take more than _EXIF_READS to read."""
    if not isinstance(block, bytes):
        return "{}"
    try:
        found: dict[str, str] = {}
        size = 2
        for name, value in exifread.process_file(_Metered(block.removeprefix(b"Exif\0\0")), details=False).items():
            text = one_line(str(value), _EXIF_VALUE)
            size += len(json.dumps({name: text}))
            if size > _EXIF_BYTES:
                break
            found[name] = text
        return json.dumps(found)
    except Exception:  # as with orientation: broken metadata does not make a broken image
        return None


class _Metered(io.BytesIO):
    """Raises EOFError when _EXIF_READS are used up, a read of a kilobyte or a part of one counted as one."""

    left = _EXIF_READS

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.left -= 1 + len(data) // 1024
        if self.left < 0:
            raise EOFError
        return data
