"""Decodes untrusted bytes into a clean, small image: 8-bit sRGB, upright, opaque, without metadata.

`decode` is a pure function of bytes and options; its arguments and results pickle. Decoders may crash on hostile input,
so run it in an expendable process (`pipeline.fetch.sandbox`).

The rules, the same for every format:

- The format is detected from the first bytes: JPEG, PNG, WebP, GIF or AVIF. File names and headers are ignored.
- The size in the file's header is checked before decoding.
- An animation yields its first frame and sets `animated`. A JPEG with further pictures (MPO) yields the first.
- The orientation from EXIF, or else from XMP, is applied. All sizes are those of the upright image.
- Colours with an ICC profile are converted to sRGB (relative colorimetric). A broken profile, any part of a profile
  beyond PROFILE_BYTES, and all other colour information are ignored. CMYK without a profile is converted by Pillow's
  formula.
- Transparency is composited on white.
- 16-bit channels keep their high byte; values are not clipped.
- Broken, huge or hostile metadata never fails the picture.
- A JPEG that supports it (`_has_scales`) is decoded at a reduced DCT scale that covers the target; see `Rules.decode`.
- Downscaling averages by area (`shrink`); upscaling uses Lanczos interpolation, as in img2dataset.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import exifread
import imagehash
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image, JpegImagePlugin, UnidentifiedImageError

from pipeline.fetch import quality
from pipeline.fetch.deny import DenyList
from pipeline.fetch.reasons import FetchError, one_line
from pipeline.models import plugin
from trainer.colour import srgb_transform, to_rgb
from trainer.formats import missing_bytes, sniff

ResizeMode = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
EncodeFormat = Literal["jpg", "png", "webp"]
DecodeMode = Literal["scaled", "fast", "exact"]
HashType = Literal["md5", "sha1", "sha256", "sha512"]
Box = Sequence[float]
"""x_min, y_min, x_max, y_max in the upright image, from 0 to 1."""

Detector = Callable[[np.ndarray], Sequence[Box]]
"""Finds boxes, such as faces, in (height, width, 3) uint8 RGB."""

MAX_SIDE = {"jpg": 65_500, "png": 65_500, "webp": 16_383}
"""Longest side in pixels that the encoders write; for png, the same as for jpg."""

# Smallest reduced decoding relative to the target, along both sides.
_COVER = {"scaled": 1.5, "fast": 1.0}
# Above this size, formats without reduced decoding are averaged down in two steps, except with `exact`.
_LARGE_PIXELS = 4_000_000
# A progressive JPEG has about ten scans. Each passes over the whole picture, so a small file with many takes minutes.
_MOST_SCANS = 100
# Most bytes read of an ICC profile. CMYK profiles have up to 3 MB.
PROFILE_BYTES = 4 << 20
# Most bytes read of a text chunk (XMP, EXIF in hex). The relevant fields come first.
_TEXT_BYTES = 1 << 20
# Limits of the column `exif`: characters per value, bytes of JSON. Longer values are cut; further tags are omitted.
_EXIF_VALUE, _EXIF_BYTES = 1_000, 1 << 16
# Most reads per EXIF block. A few thousand are usual; overlapping tables could cause millions.
_EXIF_READS = 20_000
_SAME_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Broken metadata is common on the web, and these warnings do not name the image.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("exifread").setLevel(logging.CRITICAL)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# One thread per image: images run in parallel.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Options of `decode`. Names and meanings are img2dataset's; see `pipeline.stages.download`."""

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
    image_quality: bool = False
    blur_detector: str | None = None
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
    """imagehash.phash of the picture as encoded: 64 bits, most significant bit first. None unless
    `Rules.compute_phash`, and for a flat picture."""
    exif: str | None
    hash: str | None = None
    """The digest selected by `Rules.compute_hash`."""
    hash_matches: bool | None = None
    """True if the body has the claimed digest; None without a claim."""
    dark_score: float | None = None
    """This and the next three: `quality.measure` of the picture as encoded. None unless `Rules.image_quality`."""
    light_score: float | None = None
    blurry_score: float | None = None
    low_information_score: float | None = None


def decode(
    body: bytes, rules: Rules, claim: str | None = None, blur: Sequence[Box] = (), detect: Detector | None = None
) -> Picture:
    """Decodes, resizes and re-encodes `body` by `rules`, and blurs the boxes in `blur` and those that `detect` finds.

    `claim` is the expected digest of the body in hex, of the kind `rules.verify_hash`.
    Raises only FetchError for bad input, and MemoryError.
    """
    try:
        return _decode(body, rules, claim, blur, detect)
    except (FetchError, MemoryError):
        raise
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(str(error)) from None
        raise FetchError("decode_error", str(error)) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FetchError("too_large", str(error)) from None
    except UnidentifiedImageError:  # the message has a memory address, so ledgers would differ between runs
        raise FetchError("decode_error", "broken header") from None
    except Exception as error:  # decoders raise all kinds of errors (struct.error, SyntaxError, ...) on broken files
        raise FetchError("decode_error", f"{type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Decoder:
    """`decode` with fixed rules, picklable for the process that runs it."""

    rules: Rules

    def __call__(self, body: bytes, claim: str | None = None, blur: Sequence[Box] = ()) -> Picture:
        return decode(body, self.rules, claim, blur, vars(self).get("_detect"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.rules.blur_detector:
            vars(self)["_detect"] = plugin.load(self.rules.blur_detector)
        if self.rules.compute_phash:
            # Load SciPy (imagehash imports it at first use) and allocate BLAS buffers now. Their 80 MB of address space
            # would otherwise count against the first picture's memory limit.
            phash(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8))


def _decode(body: bytes, rules: Rules, claim: str | None, blur: Sequence[Box], detect: Detector | None) -> Picture:
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
    boxes = [checked_box(box) for box in blur]
    decoded = _read_bare(body, kind, rules) or _read(body, kind, rules)
    if detect is not None:
        boxes += [checked_box(box) for box in detect(decoded.pixels)]
    pixels = _resize(decoded.pixels, decoded.plan, rules, boxes)
    denies_pictures = rules.deny_hashes is not None and rules.deny_hashes.holds_pictures
    bits = phash(pixels) if rules.compute_phash or denies_pictures else None
    if rules.deny_hashes is not None and (denied := rules.deny_hashes.find_picture(bits)):
        raise FetchError("denied_hash", denied)
    unchanged = kind == _SAME_FORMAT[rules.encode_format] and decoded.clean and not decoded.plan.resizes
    keep_bytes = rules.skip_reencode and unchanged and not boxes
    return Picture(
        image=body if keep_bytes else _encode(pixels, rules),
        width=pixels.shape[1],
        height=pixels.shape[0],
        original_width=decoded.size[0],
        original_height=decoded.size[1],
        original_bytes=len(body),
        original_format=kind.lower(),
        animated=decoded.animated,
        sha256=hashlib.sha256(body).hexdigest(),
        phash=bits if rules.compute_phash else None,
        exif=decoded.exif if rules.extract_exif else None,
        hash=hashlib.new(rules.compute_hash, body).hexdigest() if rules.compute_hash else None,
        hash_matches=matches,
        **(quality.measure(pixels) if rules.image_quality else {}),
    )


_COSINES = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))
"""(8, 32): the lowest frequencies of a DCT-II of 32 samples."""
_PILLOW_ONE = 1 << 22
"""1.0 in Pillow's fixed-point weights."""

FLAT = 2
"""Most grey levels, of 256, between the darkest and the brightest pixel of a flat picture: the noise of a JPEG of one
colour."""


def phash(pixels: np.ndarray) -> int | None:
    """Equals imagehash.phash of (height, width, 3) uint8 RGB, as an unsigned 64-bit integer, in under half the time.

    None for a flat picture: without structure, its hash would be noise, or the same for every colour.
    """
    image = Image.fromarray(pixels)
    small = _to_32(np.asarray(image.convert("L"))).astype(np.float64)
    if np.ptp(small) <= FLAT:
        return None
    low = _COSINES @ small @ _COSINES.T
    above = low - np.sort(low, axis=None)[31:33].mean()  # the median
    # If rounding decides a bit, use imagehash itself: it rounds as SciPy's DCT does.
    bits = above > 0 if np.abs(above).min() > 1e-6 else imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _to_32(grey: np.ndarray) -> np.ndarray:
    """Resizes (height, width) uint8 to 32 × 32: bit-exact Pillow Lanczos, as products of integer matrices."""
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
    """Pillow's resize weights from `side` to 32 pixels, (side, 32) float64, obtained by resizing unit pulses."""
    pulses = Image.fromarray(np.eye(side, dtype=np.int32) * _PILLOW_ONE)
    return np.asarray(pulses.resize((32, side), Image.Resampling.LANCZOS)).astype(np.float64)


@functools.lru_cache(maxsize=4096)
def _horizontal_first(width: int, height: int) -> bool | None:
    """Tries whether this Pillow resizes the horizontal axis first at this size. None if neither order reproduces it."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    wanted = np.asarray(Image.fromarray(noise).resize((32, 32), Image.Resampling.LANCZOS))
    return next((order for order in (True, False) if np.array_equal(_product(noise, order), wanted)), None)


class _Decoded(NamedTuple):
    """The decoded content of a file."""

    pixels: np.ndarray
    """(height, width, 3) uint8 RGB, upright; smaller than the picture if a reduced decoding covers the target."""
    size: tuple[int, int]
    """(width, height) of the full-size, upright picture."""
    plan: Plan
    clean: bool
    """True if these are the file's own samples, of its only frame: not rotated, colour-converted or composited."""
    animated: bool
    exif: str | None


def _read_bare(body: bytes, kind: str, rules: Rules) -> _Decoded | None:
    """Decodes pictures without metadata, which most on the web are, without Pillow. None for other or broken pictures.

    Pillow would take 5% longer for a JPEG and 50% longer for a PNG. For a WebP, which may be animated, it would take
    twice the time and three times the memory.
    """
    size = bare_size(body, kind)
    if size is None or (kind == "PNG" and size[0] * size[1] > _LARGE_PIXELS):  # OpenCV would hold two copies of it
        return None
    _check_size(*size, rules)
    plan = plan_resize(*size, rules)
    pixels = _turbo_pixels(body, size, plan.scaled, rules) if kind == "JPEG" else _opencv_pixels(body)
    return None if pixels is None else _Decoded(pixels, size, plan, clean=True, animated=False, exif="{}")


def _read(body: bytes, kind: str, rules: Rules) -> _Decoded:
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
    return _Decoded(pixels, (width, height), plan, clean, animated, exif)


def _pixels(source: Image.Image, body: bytes, target: tuple[int, int], rules: Rules) -> tuple[np.ndarray, bool]:
    """Returns (height, width, 3) uint8 RGB before rotation, and True if these are the file's own samples, neither
    colour-converted nor composited.

    `target` is the (width, height) to which the pixels will be resized, before rotation.
    """
    if "progressive" in source.info and (scans := body.count(b"\xff\xda")) > _MOST_SCANS:
        raise FetchError("decode_error", f"{scans} scans")
    if source.format == "JPEG":
        # In every mode: libjpeg-turbo detects damage that Pillow does not report.
        pixels = _turbo_pixels(body, source.size, target, rules)
        plain = source.mode == "RGB" or (source.mode == "L" and "icc_profile" not in source.info)
        if plain and pixels is not None:
            transform = srgb_transform(icc, "RGB") if (icc := source.info.get("icc_profile")) else None
            if transform:
                pixels = np.asarray(transform.apply(Image.fromarray(pixels)))
            return pixels, transform is None
    area = source.width * source.height
    cover = _COVER.get(rules.decode)
    wanted = _reduced_size(body, source.size, target, rules) if source.format == "JPEG" else None
    if wanted:
        # Keep the mode: a draft in RGB would no longer match a CMYK or grey profile.
        source.draft(source.mode, wanted)
    _load(source, area)
    clean = source.mode in ("RGB", "L") and not source.has_transparency_data and "icc_profile" not in source.info
    if source.format == "PNG" and body[24] > 8:  # bits per channel; Pillow converts to 8
        clean = False
    image = to_rgb(source)
    if cover and image.width * image.height > _LARGE_PIXELS:
        # Reduce before making a second copy: Pillow's own copy has four bytes per pixel.
        image = image.reduce(max(1, int(min(image.width / target[0], image.height / target[1]) / cover)))
    return np.asarray(image), clean


def _turbo_pixels(body: bytes, size: tuple[int, int], target: tuple[int, int], rules: Rules) -> np.ndarray | None:
    """Decodes a JPEG to (height, width, 3) uint8 RGB, ignoring any profile. None if libjpeg cannot read it or warns.

    Raises FetchError if the warning is about lost pixels, which libjpeg fills with grey. Pillow ignores such warnings.
    """
    least = _reduced_size(body, size, target, rules) or (0, 0)
    averaged = rules.decode in _COVER and min(size[0] / target[0], size[1] / target[1]) >= 1.5
    try:
        return simplejpeg.decode_jpeg(  # type: ignore[no-any-return]
            body,
            "RGB",
            min_width=least[0],
            min_height=least[1],
            # Subsampled chroma need not be interpolated if it is averaged afterwards.
            fastupsample=averaged,
            strict=True,
        )
    except ValueError as error:
        if "memory" in str(error):
            raise MemoryError(str(error)) from None
        if _LOST_PIXELS.search(str(error)):
            raise FetchError("decode_error", str(error)) from None
        return None


# libjpeg's warnings (jerror.h) about damaged pixels. A missing end of the file is not included: Pillow reports it.
_LOST_PIXELS = re.compile("premature end of data|bad Huffman code|bad arithmetic code|instead of RST")


def _opencv_pixels(body: bytes) -> np.ndarray | None:
    """Decodes to (height, width, 3) uint8 RGB. None if the picture is broken."""
    return cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR_RGB)


def _reduced_size(body: bytes, size: tuple[int, int], target: tuple[int, int], rules: Rules) -> tuple[int, int] | None:
    """The smallest of 1/2, 1/4 and 1/8 of `size` (rounded up) that covers `target` by `rules.decode`; None if there is
    none or the JPEG does not support scaling.

    libjpeg-turbo's other scales lack SIMD, and most take longer than decoding in full.
    """
    cover = _COVER.get(rules.decode)
    for divisor in (8, 4, 2):
        if cover and min(size[0] / target[0], size[1] / target[1]) >= cover * divisor:
            return (math.ceil(size[0] / divisor), math.ceil(size[1] / divisor)) if _has_scales(body) else None
    return None


def _open(body: bytes, kind: str, size: tuple[int, int] | None) -> Image.Image:
    """Opens the picture in Pillow, with its metadata, if any, in `info` as `exif`, `xmp` and `icc_profile`."""
    try:
        if kind == "PNG":
            picture, info, animated = _png_parts(body)
            source = Image.open(io.BytesIO(picture), formats=[kind])
            source.info.update(info, animated=animated)
        elif kind == "JPEG":
            # Image.open would parse the further pictures of an MPO file and fail if their table is broken.
            source = JpegImagePlugin.JpegImageFile(io.BytesIO(body))
            if source.width * source.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise FetchError("too_large", f"{source.width}x{source.height} pixels")
        else:
            source = Image.open(io.BytesIO(body), formats=[kind])
            if kind == "GIF":
                source.info["xmp"] = _gif_xmp(body)
    except OSError as error:
        # libwebp allocates a canvas and a copy of the last frame.
        if kind == "WEBP" and size and _lacks(8 * size[0] * size[1]):
            raise MemoryError(str(error)) from None
        raise
    if icc := source.info.get("icc_profile"):
        # Strip padding after the profile.
        source.info["icc_profile"] = icc[: min(int.from_bytes(icc[:4], "big"), PROFILE_BYTES)]
    return source


def _load(source: Image.Image, area: int) -> None:
    """Decodes the pixels. `area` is the number of pixels of the full-size picture, at whatever scale it is decoded."""
    try:
        source.load()
    except OSError as error:
        # Memory needed besides the pixels: libjpeg holds 16 bits per sample (at most `layers` samples per pixel),
        # libwebp an alpha plane and a few rows.
        layers = len(getattr(source, "layer", ())) if "progressive" in source.info else 0
        if _lacks({"JPEG": 2 * layers, "WEBP": 4}.get(source.format or "", 0) * area):
            raise MemoryError(str(error)) from None
        raise


def _lacks(size: int) -> bool:
    """True if this process cannot allocate `size` more bytes. Called when a decoder fails without giving the reason."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if not size or limit == resource.RLIM_INFINITY:
        return False
    return size > limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def header_size(body: bytes, kind: str) -> tuple[int, int] | None:
    """Parses (width, height) from the header without a decoder.

    Opening a WebP allocates its canvas, so its size must be checked before. None for formats that are safe to open
    (JPEG, AVIF), and for a GIF whose header has no size.
    """
    if kind == "PNG" and body[12:16] == b"IHDR":
        return int.from_bytes(body[16:20], "big"), int.from_bytes(body[20:24], "big")
    if kind == "GIF":
        size = int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
        return size if all(size) else None  # Pillow, like browsers, takes the size of the first frame
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


# JPEG segments that do not affect the interpretation of pixels: JFIF, comments, tables, restart intervals.
_BARE_SEGMENTS = frozenset({0xE0, 0xFE, 0xDB, 0xC4, 0xDD})
# JPEG markers of frame headers: C0 to CF except Huffman tables (C4), extensions (C8) and arithmetic coding (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers without a segment, or invalid before a frame: TEM, RST0 to RST7, SOI, EOI, SOS.
_LONE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDB), 0xFF})


def bare_size(body: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) of a baseline JPEG, an 8-bit PNG without a palette, or a WebP that has no metadata, profile,
    transparency or further frames. None for any other file, and for a PNG with a wrong checksum."""
    if kind == "PNG":
        return header_size(body, kind) if _is_bare_png(body) else None
    if kind == "WEBP":
        # VP8L: lossless; the bit is its alpha flag.
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
    """True if only _BARE_SEGMENTS come before it."""


def _jpeg_frame(body: bytes) -> _Frame | None:
    """Finds the first frame header. None if anything but segments precedes it: libjpeg may then find another one."""
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
    """True if a JPEG can be decoded at a reduced scale: baseline, extended or progressive, Huffman-coded, 8 bits.

    For a lossless JPEG, libjpeg-turbo ignores the scale and overflows the buffer sized for the reduced picture.
    """
    frame = _jpeg_frame(body)
    return frame is not None and frame.marker in (0xC0, 0xC1, 0xC2) and frame.bits == 8


# PNG chunks that hold pixels, or that do not affect them here (gamma is ignored).
_BARE_CHUNKS = frozenset({b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB"})


class _Chunk(NamedTuple):
    name: bytes
    data: memoryview
    whole: memoryview
    """Including length, name and checksum."""
    intact: bool
    """True if the checksum is correct."""


def _chunks(body: bytes) -> Iterator[_Chunk]:
    """The chunks of a PNG up to IEND, or up to the end of a truncated file."""
    view, at = memoryview(body), 8
    while at + 12 <= len(body):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if end > len(body):
            return
        intact = zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        name = body[at + 4 : at + 8]
        yield _Chunk(name, view[at + 8 : end - 4], view[at:end], intact)
        if name == b"IEND":
            return
        at = end


def _is_bare_png(body: bytes) -> bool:
    for chunk in _chunks(body):
        if not chunk.intact or chunk.name not in _BARE_CHUNKS:
            return False
        if chunk.name == b"IEND":
            # 8 bits per channel; grey or RGB.
            return body[12:16] == b"IHDR" and body[24] == 8 and body[25] in (0, 2)
    return False


def _png_parts(body: bytes) -> tuple[bytes, dict[str, bytes], bool]:
    """Returns the PNG without metadata and further frames; its EXIF, XMP and profile by Pillow's names; and True if it
    is animated.

    Pillow rejects a PNG with large or broken metadata, or with frames out of order; browsers show it. Like browsers,
    this ignores damage in ancillary chunks. Raises FetchError for damage in critical chunks: decoded pixels would be
    noise.
    """
    parts: list[bytes | memoryview] = [body[:8]]
    info: dict[str, bytes] = {}
    frames, pixels, name = 0, False, b""
    for name, data, whole, intact in _chunks(body):
        if not name[0] & 0x20:  # upper case: a critical chunk
            if not intact:
                raise FetchError("decode_error", f"wrong checksum of {name!r}")
            pixels = pixels or name == b"IDAT"
        elif not intact:
            continue
        elif name == b"acTL" and not pixels and not frames:
            frames = int.from_bytes(data[:4], "big")
        elif name == b"fcTL" and not pixels and frames:
            frames -= 1  # the default image is the first frame
        elif name != b"tRNS" and (found := _png_metadata(name, data)):
            info.setdefault(*found)
        if not name[0] & 0x20 or name == b"tRNS":
            parts.append(whole)
    if name != b"IEND":
        raise FetchError("decode_error", "truncated PNG file")
    if body[12:16] != b"IHDR":
        raise FetchError("decode_error", "a PNG that does not begin with its header")
    if missing := missing_bytes(body[16:29], (chunk.data for chunk in _chunks(body) if chunk.name == b"IDAT")):
        raise FetchError("decode_error", f"the pixels end {missing} bytes early")
    return b"".join(parts), info, 0 < frames < 1 << 31


# PNG text chunks with metadata, by keyword. The raw profiles are ImageMagick's, in hex.
_PNG_TEXTS = {
    b"XML:com.adobe.xmp": "xmp",
    b"Raw profile type xmp": "xmp",
    b"Raw profile type exif": "exif",
    b"Raw profile type APP1": "exif",
}


def _png_metadata(name: bytes, data: memoryview) -> tuple[str, bytes] | None:
    """The EXIF, XMP or profile in an ancillary chunk of a PNG, with Pillow's name. None if it has none or is broken."""
    if name == b"eXIf":
        return "exif", bytes(data)
    if name not in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
        return None
    keyword, _, rest = bytes(data).partition(b"\0")
    key = "icc_profile" if name == b"iCCP" else _PNG_TEXTS.get(keyword)
    if key is None:
        return None
    if name == b"tEXt":
        text, compressed = rest, False
    elif name == b"iTXt":
        text, compressed = rest[2:].split(b"\0", 2)[-1], rest[:1] == b"\1"
    else:
        text, compressed = rest[1:], True
    with contextlib.suppress(zlib.error, ValueError):
        if compressed:
            text = zlib.decompressobj().decompress(text, PROFILE_BYTES if name == b"iCCP" else _TEXT_BYTES)
        if key != "icc_profile" and keyword.startswith(b"Raw"):
            # A line with the kind, a line with the length, then hex digits.
            digits = b"".join(text.split()[2:])
            text = bytes.fromhex(digits[: len(digits) & ~1].decode("ascii", "replace"))
        return key, text
    return None


def _gif_xmp(body: bytes) -> bytes:
    """The XMP of a GIF: raw text between the application name `XMP DataXMP` and the "magic trailer" (Adobe's XMP
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
    """How to resize: scale, then crop or pad about the centre. Sizes are (width, height) in pixels."""

    scaled: tuple[int, int]
    final: tuple[int, int]
    resizes: bool
    enlarges: bool


def plan_resize(width: int, height: int, rules: Rules) -> Plan:
    """Plans by `resize_mode`; the sizes equal img2dataset's for every input. Raises FetchError("too_large")."""
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
    """Scales, blurs, and crops or pads `pixels`, (height, width, 3) uint8."""
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
    """Averages (height, width, 3) uint8 by area down to `size` (width, height), in a third of cv2.INTER_AREA's time.

    OpenCV has SIMD for linear interpolation and for 2 × 2 means, but not for other areas. So this interpolates linearly
    to `least` times the size, doubled until no pixel is skipped, and then halves. With `least` 2, the PSNR against
    INTER_AREA is 53 dB in the median and 45 dB at worst (photographs of benchmarks/corpus.py, ratios of 1.05 to 6).
    With `least` 1, for ratios under 2, it is 48 and 43 dB. JPEG at quality 95 has 39 dB.
    """
    if min(size) < 32:  # slivers are cheap, and the rounding of their sides matters
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    factor = least
    while min(pixels.shape[1] / size[0], pixels.shape[0] / size[1]) > 2 * factor:
        factor *= 2
    pixels = cv2.resize(pixels, (factor * size[0], factor * size[1]), interpolation=cv2.INTER_LINEAR)
    while factor > 1:
        factor //= 2
        pixels = cv2.resize(pixels, (factor * size[0], factor * size[1]), interpolation=cv2.INTER_AREA)
    return pixels


def checked_box(box: Any) -> Box:
    """The box as floats. Raises FetchError("bad_box") for an invalid one: its face would be stored unblurred.

    Boxes of detectors may reach beyond the border. A box that reaches beyond it by more than the picture's own size is
    in pixels, or has its sides in another order.
    """
    try:
        x_min, y_min, x_max, y_max = sides = [float(side) for side in box]
    except (TypeError, ValueError):
        raise FetchError("bad_box", f"found {box!r}") from None
    if not (all(-1 <= side <= 2 for side in sides) and x_min <= x_max and y_min <= y_max):
        raise FetchError("bad_box", f"found {sides}")
    return sides


def _blur(pixels: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """Blurs the boxes with soft edges. Each box is enlarged on all sides by 10% of its longer side; σ is 10% of the
    longest side of all boxes (Yang et al. 2022, "A Study of Face Obfuscation in ImageNet"; as in img2dataset)."""
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
    """Applies an EXIF orientation (2 to 8)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")


def _orientation(exif: object, xmp: object) -> int:
    """The EXIF orientation, 1 to 8, from EXIF or else from XMP; 1 (upright) if absent or broken."""
    if isinstance(exif, bytes):
        with contextlib.suppress(Exception):  # broken metadata must not fail the image
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
    except Exception:  # a broken second frame must not fail the first
        return False


def _exif(block: object) -> str | None:
    """The EXIF tags as a JSON object of strings, as in img2dataset; `{}` if there are none. None if they are broken or
    take more than _EXIF_READS reads."""
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
    except Exception:  # broken metadata must not fail the image
        return None


class _Metered(io.BytesIO):
    """Raises EOFError after _EXIF_READS reads. A read counts once, and once more for each full kilobyte."""

    left = _EXIF_READS

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.left -= 1 + len(data) // 1024
        if self.left < 0:
            raise EOFError
        return data
