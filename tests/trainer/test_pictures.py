"""The trainer decodes by the rules of the pipeline's decoder: the same bodies give the same pixels in both."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.fetch.decoder import Rules
from pipeline.fetch.decoder import decode as fetched
from pipeline.fetch.reasons import FetchError
from tests import images
from tests.fetch import hostile_images as hostile
from trainer.model import MAX_ASPECT
from trainer.pictures import decode, sniff
from trainer.shards import CorruptSampleError

SCENE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)).resize((160, 100))
TURNED = Image.Exif()
TURNED[0x0112] = 6


def encoded(kind: str, image: Image.Image = SCENE, **options: Any) -> bytes:
    return images.encoded(image, kind, **options)


def profile(swap: bool) -> bytes:
    """The sRGB profile, or one that swaps red and green."""
    found = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if not swap:
        return found
    red, green = found.index(b"rXYZ"), found.index(b"gXYZ")
    table = bytearray(found)
    table[red : red + 4], table[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(table).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def png(pixels: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return hostile.png(
        pixels.shape[1] // (3 if colour == 2 else 1), pixels.shape[0], rows, bits=16, colour=colour, extra=extra
    )


def half(mode: str) -> Image.Image:
    image = SCENE.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


WIDE = np.linspace(0, 65535, 120, dtype=np.uint16)
PICTURES: dict[str, bytes] = {
    **{f"{kind} {mode}": encoded(kind, SCENE.convert(mode)) for kind, mode in [
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "1"), ("PNG", "P"),
        ("GIF", "P"), ("WEBP", "RGB"), ("AVIF", "RGB"),
    ]},
    "JPEG 4:4:4": encoded("JPEG", subsampling=0),
    "JPEG progressive": encoded("JPEG", progressive=True),
    **{f"{kind} turned": encoded(kind, exif=TURNED.tobytes()) for kind in ("JPEG", "PNG", "WEBP", "AVIF")},
    **{f"{kind} animated": encoded(kind, save_all=True, append_images=[SCENE.rotate(180)])
       for kind in ("GIF", "WEBP", "PNG", "AVIF")},
    **{f"{kind} {name} profile": encoded(kind, icc_profile=data) for kind in ("JPEG", "PNG", "WEBP")
       for name, data in (("sRGB", profile(False)), ("other", profile(True)), ("broken", b"nonsense"))},
    "JPEG grey with a colour profile": encoded("JPEG", SCENE.convert("L"), icc_profile=profile(True)),
    "PNG RGBA": encoded("PNG", half("RGBA")),
    "PNG LA": encoded("PNG", half("LA")),
    "WEBP RGBA": encoded("WEBP", half("RGBA"), lossless=True),
    "PNG clear colour": encoded("PNG", transparency=SCENE.getpixel((3, 3))),
    "PNG clear palette": encoded("PNG", SCENE.quantize(16), transparency=3),
    "GIF clear": encoded("GIF", SCENE.quantize(16), transparency=3),
    "PNG grey 16": png(WIDE.reshape(10, 12), 0),
    "PNG grey 16 clear": png(WIDE.reshape(10, 12), 0, hostile.chunk(b"tRNS", struct.pack(">H", int(WIDE[7])))),
    "PNG RGB 16": png(WIDE.reshape(10, 12), 2),
    "PNG trailing bytes": encoded("PNG") + b"<script>",
    "AVIF of a generic brand": encoded("AVIF").replace(b"ftypavif", b"ftypmif1", 1),
    **{f"GIF on a screen of {screen}": encoded("GIF")[:6] + struct.pack("<HH", *screen) + encoded("GIF")[10:]
       for screen in ((0, 0), (500, 400))},
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_are_those_of_a_fetched_picture(name: str) -> None:
    body = PICTURES[name]
    by_pipeline = Image.open(io.BytesIO(fetched(body, Rules(resize_mode="no", encode_format="png")).image))
    found, expected = np.asarray(decode(body)).astype(int), np.asarray(by_pipeline.convert("RGB")).astype(int)
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        *[(body, "not_an_image") for body in (b"", b"<html>", b"<svg/>", b"%!PS-Adobe", b"II*\0", b"BM" + bytes(60))],
        (encoded("TIFF"), "not_an_image"),
        *[(encoded(kind)[:200], "decode_error") for kind in ("JPEG", "PNG", "GIF", "WEBP", "AVIF")],
        (encoded("PNG")[:-30] + b"?" + encoded("PNG")[-29:], "decode_error"),
        (hostile.png(80, 60, bytes(59 * 241)), "decode_error"),
        (hostile.png(60_000, 60_000), "too_large"),
        (hostile.gif((60_000, 60_000), (1, 1)), "too_large"),
        (hostile.webp_canvas(16_000, 16_000), "too_large"),
        (hostile.webp_lossless(16_000, 16_000), "too_large"),
        (hostile.jpeg_claiming(60_000, 60_000), "too_large"),
        (hostile.jpeg_claiming(60_000, 60_000, progressive=True), "too_large"),
    ],
)
def test_a_picture_that_a_fetch_would_drop_is_a_corrupt_sample(body: bytes, reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetched(body, Rules())
    assert caught.value.reason == reason
    for size in (None, 64):
        with pytest.raises(CorruptSampleError):
            decode(body, size)


def test_a_jpeg_of_a_thousand_scans_is_not_decoded() -> None:
    body = encoded("JPEG", progressive=True)
    scan = body.rindex(b"\xff\xda")
    with pytest.raises(CorruptSampleError, match="scans"):
        decode(body[:-2] + body[scan:-2] * 1000 + b"\xff\xd9")


def xmp(orientation: int) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
    ) % orientation


def gif_with(extension: bytes) -> bytes:
    body = encoded("GIF", SCENE.convert("P"))
    at = 13 + 3 * 2 ** ((body[10] & 7) + 1)
    return body[:at] + extension + body[at:]


def png_with(*chunks: bytes) -> bytes:
    body = encoded("PNG")
    return body[:33] + b"".join(chunks) + body[33:]


@pytest.mark.parametrize(
    "make",
    [
        lambda: encoded("JPEG", xmp=xmp(6)),
        lambda: encoded("WEBP", xmp=xmp(6)),
        lambda: encoded("AVIF", xmp=xmp(6)),
        lambda: gif_with(b"\x21\xff\x0bXMP DataXMP" + xmp(6) + b"\1" + bytes(range(255, -1, -1)) + b"\0"),
        lambda: png_with(hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))),
    ],
)
def test_orientation_in_xmp_counts_in_every_format(make: Callable[[], bytes]) -> None:
    found = decode(make())
    assert found.size == (100, 160)
    close = np.asarray(found).astype(int) - np.asarray(SCENE.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert abs(close).mean() < 30


def test_the_metadata_of_a_png_costs_nothing() -> None:
    text = [
        hostile.chunk(b"tEXt", b"Comment\0" + b"x" * (2 << 20)),
        hostile.chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(8 << 20))),
        hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(8 << 20))),
    ]
    broken = [b"\0\0\0\2tIMEab\0\0\0\0", hostile.chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(8 << 20)))]
    assert np.array_equal(np.asarray(decode(png_with(*text, *text, *broken))), np.asarray(SCENE))


def test_a_reduced_decoding_does_not_change_the_orientation() -> None:
    large = SCENE.resize((1600, 1000), Image.Resampling.BICUBIC)
    found = decode(encoded("JPEG", large, exif=TURNED.tobytes()), 64)
    assert found.size == (125, 200)


def test_only_a_jpeg_that_libjpeg_can_scale_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    large = encoded("JPEG", SCENE.resize((1600, 1000)))
    assert decode(large, 64).size == (200, 125)
    monkeypatch.setattr("trainer.pictures._frame_type", lambda _: 0xC3)  # nothing at hand writes a lossless one
    assert decode(large, 64).size == (1600, 1000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_mutants_end_in_a_picture_or_a_reason(kind: str) -> None:
    rng = np.random.default_rng(0)
    body = np.frombuffer(encoded(kind), np.uint8)
    assert sniff(body.tobytes()) == kind
    for _ in range(60):
        mutant = body.copy()
        mutant[rng.integers(0, len(body), 8)] = rng.integers(0, 256, 8)
        try:
            assert decode(mutant.tobytes(), 64).mode == "RGB"
        except CorruptSampleError:
            continue


def test_a_sliver_is_not_blown_up(encoder: Any) -> None:
    with pytest.raises(ValueError, match="times as long as wide"):
        encoder.preprocess.pixels(Image.new("RGB", (MAX_ASPECT * 3 + 1, 3)))
