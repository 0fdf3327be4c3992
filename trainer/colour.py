"""Converts the colours of a decoded picture to opaque 8-bit sRGB, by the same rules for fetched and stored pictures."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to opaque 8-bit RGB: ICC profile applied, 16 bits cut to 8, transparency composited over white."""
    icc = image.info.get("icc_profile")
    frame = getattr(image, "dispose_extent", None) or (0, 0, *image.size)  # a GIF's frame may be smaller
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        image = _grey_from_16_bit(image)
    alpha = None
    if image.has_transparency_data:
        alpha = (image if image.mode in ("LA", "RGBA") else image.convert("RGBA")).getchannel("A")
    # ICC profiles apply only to these modes.
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if icc and (transform := srgb_transform(icc, image.mode)):
        image = transform.apply(image)
    if image.mode != "RGB":  # otherwise it would be copied
        image = image.convert("RGB")
    if frame != (0, 0, *image.size):
        # Pillow fills the area around the frame with palette colour 0, but that area is transparent.
        screen = Image.new("RGB", image.size, "white")
        screen.paste(image.crop(frame), frame)
        image = screen
    if alpha is None:
        return image
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=alpha)
    return opaque


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    wide = np.asarray(image)
    grey = (wide >> 8).clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[wide == clear] = 255
    return Image.fromarray(grey)


_PROBE = Image.fromarray(np.indices((5, 5, 5)).reshape(3, 1, 125).transpose(1, 2, 0).astype(np.uint8) * 63)
"""5 × 5 × 5 colours."""
_SRGB_LEVELS = 10
"""Most levels that a true sRGB profile changes, by rounding. Linear sRGB, also called sRGB, changes up to 73."""


# Small because a profile may take a megabyte and a sandboxed decoder has a memory limit.
@functools.lru_cache(maxsize=16)
def srgb_transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None if the profile already is sRGB, is broken, or is for another mode."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # Threads share the transform, and lcms's one-pixel cache is not thread-safe.
            flags=ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(profile).lower():
            change = np.asarray(transform.apply(_PROBE)).astype(int) - np.asarray(_PROBE)
            return None if np.abs(change).max() <= _SRGB_LEVELS else transform
        return transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
