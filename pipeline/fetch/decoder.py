"""Bytes from the web to a clean, small image: 8-bit sRGB, upright, opaque, without metadata.

`decode` is a pure function from bytes and options to a picture, with arguments and results that pickle: it runs on any
`concurrent.futures.Executor`. On threads (Pillow and OpenCV release the GIL) a decoder that dies takes the worker with
it; on a process pool the same call costs its row alone.

The rules, one per case:

- The format is what the first bytes say, and one of JPEG, PNG, WebP, GIF; no name or header is believed.
- The size in the file's header is checked before anything is decoded.
- Of an animation, the first frame.
- EXIF orientation is applied; sizes are those of the upright image.
- An ICC profile is converted to sRGB (relative colorimetric); a broken one is ignored. CMYK without a profile is
  converted by Pillow's formula.
- Transparency is laid on white.
- 16 bits a channel are scaled to 8 (x / 257, rounded, for grey; the high byte for colour), never clipped.
- A JPEG is decoded at the smallest DCT scale that leaves at least 1.5 times the target in both directions.
- Everything is resized with area averaging when it shrinks and Lanczos when it grows, as img2dataset does.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import threading
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import cv2
import exifread
import imagehash
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from pipeline.fetch.reasons import FetchError

ResizeMode = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
EncodeFormat = Literal["jpg", "png", "webp"]

# The longest side that the encoded format can express.
MAX_SIDE = {"jpg": 65_500, "png": 65_500, "webp": 16_383}

_COVER = 1.5
_LARGE_PIXELS = 4_000_000
# A 36-megapixel progressive JPEG takes 200 MB to decode, whatever the scale. One such at a time bounds the memory of a
# worker without a limit that would lose honest photographs.
_one_large_image = threading.Lock()

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Broken metadata is everyday on the web, and said of no image in particular it is noise.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("exifread").setLevel(logging.CRITICAL)


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


@dataclass(frozen=True)
class Picture:
    image: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    original_bytes: int
    original_format: str
    sha256: str
    phash: int
    exif: str | None


def decode(body: bytes, rules: Rules) -> Picture:
    """The picture in `body` by `rules`. Raises FetchError, and only that, for whatever is wrong with the bytes."""
    try:
        return _decode(body, rules)
    except FetchError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FetchError("too_large", str(error)) from None
    except UnidentifiedImageError:  # its message holds a memory address, and equal runs have equal ledgers
        raise FetchError("decode_error", "broken header") from None
    except Exception as error:  # decoders raise about everything (struct.error, SyntaxError, ...) on broken files
        raise FetchError("decode_error", f"{type(error).__name__}: {error}") from None


def _decode(body: bytes, rules: Rules) -> Picture:
    kind = sniff(body)
    if kind is None:
        raise FetchError("not_an_image", f"starts with {body[:16]!r}")
    if size := header_size(body, kind):
        _check_size(size[0], size[1], rules)
    if kind == "PNG":
        # Loading skips the checksums of the pixels: damage in the middle of them would come out as noise.
        with Image.open(io.BytesIO(body), formats=[kind]) as source:
            source.verify()
    with Image.open(io.BytesIO(body), formats=[kind]) as source:
        _check_size(source.width, source.height, rules)
        orientation = _orientation(source)
        upright = source.size if orientation < 5 else source.size[::-1]
        plan = plan_resize(upright[0], upright[1], rules)
        with _one_large_image if source.width * source.height > _LARGE_PIXELS else nullcontext():
            if kind == "JPEG" and not plan.enlarges:
                scaled = plan.scaled if orientation < 5 else plan.scaled[::-1]
                # The mode is kept: draft to RGB would make a lie of a CMYK or grey profile.
                source.draft(source.mode, (int(scaled[0] * _COVER) + 1, int(scaled[1] * _COVER) + 1))
            source.load()
            image = _to_rgb(source)
            if orientation > 1:
                image = image.transpose(_UPRIGHT[orientation])
            pixels = _resize(np.asarray(image), plan)
            phash = np.packbits(imagehash.phash(image).hash).tobytes()
    return Picture(
        image=_encode(pixels, rules),
        width=pixels.shape[1],
        height=pixels.shape[0],
        original_width=upright[0],
        original_height=upright[1],
        original_bytes=len(body),
        original_format=kind.lower(),
        sha256=hashlib.sha256(body).hexdigest(),
        phash=int.from_bytes(phash, "big"),
        exif=_exif(body, kind) if rules.extract_exif else None,
    )


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
    return None


def header_size(body: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) that the header claims, read without a decoder; None for JPEG, whose opening decodes nothing.

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


def _resize(pixels: np.ndarray, plan: Plan) -> np.ndarray:
    """`pixels` is (height, width, 3) uint8, as is the result. The input may be a reduced decoding of the original."""
    width, height = plan.scaled
    if pixels.shape[1::-1] != plan.scaled:
        pixels = cv2.resize(pixels, plan.scaled, interpolation=cv2.INTER_LANCZOS4 if plan.enlarges else cv2.INTER_AREA)
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


def _encode(pixels: np.ndarray, rules: Rules) -> bytes:
    flag = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "png": cv2.IMWRITE_PNG_COMPRESSION, "webp": cv2.IMWRITE_WEBP_QUALITY}
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(f".{rules.encode_format}", bgr, [flag[rules.encode_format], rules.encode_quality])
    if not done:
        raise ValueError(f"{rules.encode_format} encoder refused {pixels.shape[1]}x{pixels.shape[0]} pixels")
    return encoded.tobytes()


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF counts them; 1 (upright) where there is none or it is broken."""
    if "exif" not in image.info and image.format != "PNG":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata does not make a broken image
        return 1
    return value if value in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    icc = image.info.get("icc_profile")
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        image = _grey_from_16_bit(image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
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
    wide = np.asarray(image).astype(np.uint32)
    grey = ((wide + 128) // 257).clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[wide == clear] = 255
    return Image.fromarray(grey)


@functools.lru_cache(maxsize=64)
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


_EXIF_MARK = {"JPEG": b"Exif\0\0", "PNG": b"eXIf", "WEBP": b"EXIF"}


def _exif(body: bytes, kind: str) -> str | None:
    """The EXIF tags as a JSON object of strings, `{}` without any, as img2dataset stores them."""
    mark = _EXIF_MARK.get(kind)
    # Most images have none, and the pure-Python reader would hold the GIL to find that out.
    if mark is None or mark not in body:
        return "{}"
    try:
        tags = exifread.process_file(io.BytesIO(body), details=False)
        return json.dumps({name: str(value).strip() for name, value in tags.items() if value is not None})
    except Exception:  # as with orientation: broken metadata does not make a broken image
        return None
