"""Tests of each rule of the decoder. Broken bytes always give one of its reasons."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from pipeline.fetch.decoder import Rules, _has_scales, bare_size, decode, header_size, plan_resize, sniff
from pipeline.fetch.reasons import REASONS, FetchError
from tests.fetch.hostile_images import chunk, jpeg_lossless
from tests.images import encoded

NO = Rules(resize_mode="no", encode_format="png", encode_quality=1)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def scene(width: int = 320, height: int = 200, mode: str = "RGB") -> Image.Image:
    """A smooth picture with four different corners."""
    coarse = np.random.default_rng(7).integers(0, 255, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def pixels(body: bytes, rules: Rules = NO) -> np.ndarray:
    """The decoded picture as (height, width, 3) RGB."""
    image = Image.open(io.BytesIO(decode(body, rules).image))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def reason(body: bytes, rules: Rules = NO) -> str | None:
    try:
        decode(body, rules)
    except FetchError as failure:
        return failure.reason
    return None


def close(found: np.ndarray, expected: Image.Image | tuple[int, ...], tolerance: float = 3) -> bool:
    return bool(np.abs(found - np.asarray(expected).astype(int)).mean() <= tolerance)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG of raw `rows` without filter bytes, in bit depths and with chunks that Pillow cannot write."""
    stride = len(rows) // height
    raw = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


FORMATS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded(scene(), "JPEG", quality=95),
    "jpeg_progressive": lambda: encoded(scene(), "JPEG", quality=95, progressive=True),
    "jpeg_444": lambda: encoded(scene(), "JPEG", quality=95, subsampling=0),
    "jpeg_cmyk": lambda: encoded(scene(mode="CMYK"), "JPEG", quality=95),
    "png": lambda: encoded(scene(), "PNG"),
    "webp": lambda: encoded(scene(), "WEBP", quality=95),
    "webp_lossless": lambda: encoded(scene(), "WEBP", lossless=True),
    "avif": lambda: encoded(scene(), "AVIF", quality=95),
}


@pytest.mark.parametrize("name", FORMATS)
def test_colour_formats_give_the_same_picture(name: str) -> None:
    assert close(pixels(FORMATS[name]()), scene())


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("PNG", "L"), ("PNG", "1"), ("PNG", "P"), ("GIF", "P")])
def test_grey_and_palette_become_rgb(kind: str, mode: str) -> None:
    image = scene().convert(mode)
    assert close(pixels(encoded(image, kind)), image.convert("RGB"))


BARE: dict[str, bytes] = {
    "jpeg": encoded(scene(), "JPEG", quality=95),
    "jpeg_grey": encoded(scene(mode="L"), "JPEG"),
    "jpeg_444": encoded(scene(), "JPEG", quality=95, subsampling=0, comment=b"nothing"),
    "png": encoded(scene(), "PNG", dpi=(72, 72)),
    "png_grey": encoded(scene(mode="L"), "PNG"),
    "webp": encoded(scene(), "WEBP", quality=95),
    "webp_lossless": encoded(scene(), "WEBP", lossless=True),
}


def with_metadata(body: bytes) -> bytes:
    """The same picture with metadata that changes nothing."""
    if body.startswith(b"RIFF"):
        size = struct.pack("<I", 319)[:3] + struct.pack("<I", 199)[:3]
        chunks = b"VP8X\x0a\0\0\0" + bytes(4) + size + body[12:] + b"none\x02\0\0\0ab"
        return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks
    if body.startswith(b"\x89PNG"):
        text = b"tEXtTitle\0nothing"
        return body[:33] + struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text)) + body[33:]
    return body[:2] + b"\xff\xed\0\x04ab" + body[2:]


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("rules", [NO, Rules(image_size=64), Rules(image_size=64, decode="exact")])
def test_the_fast_path_for_bare_pictures_gives_the_same_result(name: str, rules: Rules) -> None:
    body = BARE[name]
    bare, other = decode(body, rules), decode(with_metadata(body), rules)
    assert bare_size(body, sniff(body) or "") == (320, 200)
    assert bare_size(with_metadata(body), sniff(body) or "") is None
    differ = {k for k, v in vars(bare).items() if vars(other)[k] != v}
    assert differ <= {"sha256", "original_bytes"}
    assert (
        reason(body[: len(body) // 2], rules) == reason(with_metadata(body)[: len(body) // 2], rules) == "decode_error"
    )


@pytest.mark.parametrize(
    "body",
    [
        FORMATS["jpeg_cmyk"](),
        FORMATS["jpeg_progressive"](),
        encoded(scene(), "JPEG", exif=b"Exif\0\0"),
        encoded(scene(), "JPEG", icc_profile=b"profile"),
        encoded(Image.new("RGBA", (20, 10), (255, 0, 0, 128)), "WEBP"),
        encoded(Image.new("RGBA", (20, 10), (255, 0, 0, 128)), "WEBP", lossless=True),
        encoded(scene(), "WEBP", icc_profile=b"profile"),
        encoded(scene(), "WEBP", save_all=True, append_images=[Image.new("RGB", (320, 200))]),
        encoded(scene(mode="P"), "PNG"),
        encoded(scene(mode="RGBA"), "PNG"),
        encoded(scene(mode="I;16"), "PNG"),
        encoded(scene(), "PNG", transparency=RED),
        encoded(scene(), "PNG", exif=b"Exif\0\0"),
        encoded(scene(), "PNG", icc_profile=b"profile"),
        encoded(scene(), "PNG", save_all=True, append_images=[Image.new("RGB", (320, 200))]),
        BARE["png"][:-1],
        BARE["png"][:-4] + bytes(4),
        BARE["jpeg"][:20],
        b"\xff\xd8\xff\xe0\0\0" + bytes(20),
    ],
)
def test_pictures_with_metadata_are_not_bare(body: bytes) -> None:
    assert bare_size(body, sniff(body) or "") is None


def test_broken_files_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for name, body in BARE.items():
        for size in (21, 26, 31, 100, len(body) - 9):
            assert reason(body[:size]) == "decode_error", (name, size)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("mode", ["exact", "scaled", "fast"])
@pytest.mark.parametrize("side", [64, 256, 600])
def test_a_lossless_jpeg_is_decoded_in_full(side: int, mode: Any) -> None:
    image = scene(side, side)
    body = jpeg_lossless(np.asarray(image))
    rules = Rules(image_size=32, decode=mode, encode_format="png", encode_quality=1)
    assert close(pixels(body), image, 0)
    assert close(pixels(body, rules), cv2.resize(np.asarray(image), (32, 32), interpolation=cv2.INTER_AREA), 2)


@pytest.mark.parametrize(
    ("change", "scales"),
    [
        (lambda body: body, True),
        (lambda body: body.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc3\0\x11\x08"), False),
        (lambda body: body.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc9\0\x11\x08"), False),
        (lambda body: body.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), False),
        (lambda body: body[:2] + b"\xff\xfe\0\x04\xff\xc3" + body[2:], True),  # in a comment
        (lambda body: body[:2] + b"\0" + body[2:], False),
        (lambda body: body[:2] + b"\xff\xff" + body[3:], False),
        (lambda body: body[:2] + b"\xff\xfe\0\0" + body[2:], False),
        (lambda body: body[:2] + b"\xff\xd8" + body[2:], False),
        (lambda body: body[:20], False),
    ],
)
def test_which_jpegs_have_scales(change: Callable[[bytes], bytes], scales: bool) -> None:
    assert _has_scales(change(BARE["jpeg"])) == scales


def test_a_multi_picture_jpeg_yields_its_first_picture() -> None:
    body = encoded(scene(), "MPO", save_all=True, append_images=[Image.new("RGB", (320, 200), RED)])
    assert Image.open(io.BytesIO(body)).n_frames == 2  # type: ignore[attr-defined]
    picture = decode(body, NO)
    assert close(pixels(body), scene(), 4)
    assert (picture.original_format, picture.animated) == ("jpeg", False)
    at = body.index(b"MPF\0")
    assert close(pixels(body[: at + 12] + b"\xff" * 60 + body[at + 72 :]), scene(), 4)  # its table is broken


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in (RED, GREEN, BLUE)]
    for kind in ("GIF", "WEBP", "PNG", "AVIF"):
        body = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
        assert close(pixels(body), RED)
        assert decode(body, NO).animated
        assert not decode(encoded(frames[0], kind), NO).animated


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_orientation_is_applied_and_sizes_are_upright(orientation: int, kind: str) -> None:
    upright = scene()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse transpose methods of Pillow
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encoded(stored, kind, exif=exif.tobytes(), quality=95)
    picture = decode(body, NO)
    assert (picture.original_width, picture.original_height) == (320, 200)
    assert close(pixels(body), upright, 4)
    small = decode(body, Rules(image_size=64))
    assert (small.width, small.height) == (64, 40)
    assert "exif" not in Image.open(io.BytesIO(small.image)).info


def xmp(orientation: int, form: str = 'tiff:Orientation="{}"/>') -> bytes:
    head = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    inner = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {form.format(orientation)}'
    return f"{head}{inner}</rdf:RDF></x:xmpmeta>".encode()


def with_xmp(kind: str, data: bytes, **options: Any) -> bytes:
    """The scene in some format, with this XMP."""
    if kind == "GIF":
        body = encoded(scene().quantize(64), kind)
        trailer = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
        at = 13 + 3 * (2 << (body[10] & 7))
        return body[:at] + b"\x21\xff\x0bXMP DataXMP" + data + trailer + body[at:]
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", data.decode(), zip=True)
        return encoded(scene(), kind, pnginfo=info, **options)
    return encoded(scene(), kind, xmp=data, quality=95, **options)


WITH_METADATA = ["JPEG", "PNG", "WEBP", "AVIF"]


@pytest.mark.parametrize("kind", [*WITH_METADATA, "GIF"])
@pytest.mark.parametrize("form", ['tiff:Orientation="{}"/>', "tiff:Orientation = '{}'/>", "><tiff:Orientation>{}<"])
def test_orientation_in_xmp_is_applied_like_exif(kind: str, form: str) -> None:
    size = {0: (320, 200), 1: (320, 200), 6: (200, 320), 8: (200, 320), 9: (320, 200), 66: (320, 200)}
    for orientation, expected in size.items():
        picture = decode(with_xmp(kind, xmp(orientation, form)), NO)
        assert (picture.original_width, picture.original_height) == expected, orientation
    turned = scene().transpose(Image.Transpose.ROTATE_270)
    assert close(pixels(with_xmp(kind, xmp(6, form))), turned, 20 if kind == "GIF" else 4)


@pytest.mark.parametrize("kind", WITH_METADATA)
@pytest.mark.parametrize(("in_exif", "turned"), [(1, False), (3, False), (None, True), (0, True), (9, True)])
def test_exif_comes_before_xmp(kind: str, in_exif: int | None, turned: bool) -> None:
    if kind == "AVIF" and in_exif == 1:
        pytest.skip("Pillow does not write it")
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    if in_exif is not None:
        exif[0x0112] = in_exif
    picture = decode(with_xmp(kind, xmp(6), exif=exif.tobytes()), NO)
    assert (picture.original_width < picture.original_height) == turned


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(kind: str) -> None:
    body = with_xmp(kind, xmp(6), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode(body, NO).original_width == 200


def test_transparency_is_composited_on_white() -> None:
    half = Image.new("RGBA", (20, 10), (255, 0, 0, 128))
    for kind in ("PNG", "WEBP"):
        assert close(pixels(encoded(half, kind, lossless=True)), (255, 127, 127), 1)
    assert close(pixels(encoded(Image.new("LA", (20, 10), (0, 0)), "PNG")), WHITE)
    palette = Image.new("P", (20, 10), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for kind in ("PNG", "GIF"):
        assert close(pixels(encoded(palette, kind, transparency=1)), WHITE)
        assert close(pixels(encoded(palette, kind, transparency=0)), RED)
    assert close(pixels(encoded(Image.new("RGB", (20, 10), RED), "PNG", transparency=RED)), WHITE)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 257, 32896, 65407, 65535]], ">u2")
    assert pixels(png(6, 1, 16, 0, values.tobytes()))[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]
    colour = np.array([[0, 32896, 65535]], ">u2")
    assert pixels(png(1, 1, 16, 2, colour.tobytes()))[0, 0].tolist() == [0, 128, 255]
    clear = png(6, 1, 16, 0, values.tobytes(), tRNS=struct.pack(">H", 257))
    assert pixels(clear)[0, :, 0].tolist() == [0, 0, 255, 128, 255, 255]


def test_profiles_are_converted_to_srgb() -> None:
    image = scene()
    lab = ImageCms.createProfile("LAB")
    assert close(pixels(encoded(image, "PNG", icc_profile=SRGB)), image, 0)
    # A profile that is broken or for another mode must not fail the picture.
    assert close(pixels(encoded(image, "PNG", icc_profile=b"nonsense")), image, 0)
    assert close(pixels(encoded(image, "PNG", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())), image, 0)
    swapped = swapped_primaries(SRGB)
    assert close(pixels(encoded(Image.new("RGB", (8, 8), RED), "PNG", icc_profile=swapped)), GREEN, 12)
    assert close(pixels(encoded(Image.new("RGB", (8, 8), RED), "JPEG", icc_profile=swapped, quality=95)), GREEN, 12)


@pytest.mark.parametrize("kind", WITH_METADATA)
def test_a_profile_is_converted_in_every_format(kind: str) -> None:
    swapped = swapped_primaries(SRGB)
    red = Image.new("RGB", (32, 32), RED)
    for profile in (swapped, swapped + bytes(3_000_000)):
        if kind == "JPEG" or len(profile) < 1_000_000:
            assert close(pixels(encoded(red, kind, icc_profile=profile, quality=95)), GREEN, 12)
    see_through = Image.new("RGBA", (32, 32), (255, 0, 0, 128))
    if kind != "JPEG":
        assert close(pixels(encoded(see_through, kind, icc_profile=swapped, quality=95)), (127, 255, 127), 12)
    if kind == "PNG":
        palette = red.quantize(4)
        assert close(pixels(encoded(palette, kind, icc_profile=swapped)), GREEN, 12)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "I;16")])
def test_a_grey_profile_is_converted_with_and_without_transparency(kind: str, mode: str) -> None:
    value = {"LA": (128, 255), "I;16": 128 * 257}.get(mode, 128)
    body = encoded(Image.new(mode, (32, 32), value), kind, icc_profile=grey_profile())
    assert close(pixels(body), (188, 188, 188), 2)  # half of the light in sRGB


def grey_profile() -> bytes:
    """A linear grey ICC profile (version 2)."""
    tags = [(b"wtpt", b"XYZ \0\0\0\0" + struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)),
            (b"kTRC", b"curv\0\0\0\0" + struct.pack(">IHH", 1, 0x0100, 0))]  # fmt: skip
    table, data = struct.pack(">I", len(tags)), b""
    for name, tag in tags:
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(tag))
        data += tag
    head = b"\0\0\0\0" + b"lcms\x02\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D) + bytes(48)
    profile = head + table + data
    return struct.pack(">I", len(profile)) + profile[4:]


MUCH = b"x" * 2_000_000
MANY = zlib.compress(bytes(10_000_000))
METADATA = {
    "zTXt": [(b"zTXt", b"workflow\0\0" + zlib.compress(MUCH))],
    "iTXt": [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(MUCH))],
    "tEXt": [(b"tEXt", b"parameters\0" + MUCH)],
    "iCCP": [(b"iCCP", b"p\0\0" + zlib.compress(SRGB + MUCH))],
    "bombs": [(b"zTXt", b"%d\0\0" % i + MANY) for i in range(300)],
    "broken zlib": [(b"zTXt", b"a\0\0no"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no"), (b"iCCP", b"p\0\0no")],
    "no keyword": [(b"tEXt", b""), (b"zTXt", b""), (b"iTXt", b"\xff"), (b"iCCP", b""), (b"eXIf", b"")],
    "other methods": [(b"zTXt", b"a\0\7" + zlib.compress(b"a")), (b"iCCP", b"p\0\7" + zlib.compress(b"a"))],
    "short": [(b"gAMA", b""), (b"cHRM", b""), (b"pHYs", b""), (b"sRGB", b""), (b"acTL", b""), (b"fcTL", b"")],
    "frames": [(b"fcTL", struct.pack(">IIIIIHHBB", 7, 9, 9, 900, 900, 1, 1, 0, 0)), (b"fdAT", b"\0\0\0\5")],
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("behind", [33, -12], ids=["before the pixels", "behind them"])
def test_any_metadata_of_a_png_is_ignored(name: str, behind: int) -> None:
    body = encoded(scene(), "PNG")
    extra = b"".join(chunk(kind, data) for kind, data in METADATA[name])
    found = body[:behind] + extra + body[behind:]
    picture = decode(found, NO)
    assert close(pixels(found), scene(), 1 if name == "iCCP" else 0)
    assert (picture.exif, picture.animated) == ("{}", False)


def test_only_damage_to_critical_chunks_fails_a_png() -> None:
    body = encoded(scene(mode="RGBA"), "PNG")
    broken = chunk(b"tEXt", b"Title\0a")[:-1] + b"!"
    assert close(pixels(body[:33] + broken + body[33:]), scene(), 0)
    assert reason(body[:-12]) == reason(body[:-13]) == "decode_error"
    for name in (b"IHDR", b"IDAT"):
        at = body.index(name)
        assert reason(body[: at + 6] + bytes([body[at + 6] ^ 1]) + body[at + 7 :]) == "decode_error"


def test_an_animated_png_yields_its_first_frame_even_if_others_are_broken() -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in (RED, GREEN, BLUE)]
    body = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    apart = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    for whole in (body, apart):
        for found in (whole, whole.replace(b"fdAT", b"fdAX"), whole.replace(b"fcTL\0\0\0\1", b"fcTL\0\0\0\7")):
            assert close(pixels(found), RED, 0)
            assert decode(found, NO).animated


def swapped_primaries(profile: bytes) -> bytes:
    """An ICC profile without a name that swaps red and green (two signatures exchanged in its tag table)."""
    table = bytearray(profile)
    for entry in range(struct.unpack(">I", table[128:132])[0]):
        at = 132 + 12 * entry
        signature = bytes(table[at : at + 4])
        table[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(signature, signature)
    return bytes(table).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_a_profile_is_judged_by_its_contents_not_by_its_name() -> None:
    named = swapped_primaries(SRGB).replace("swap".encode("utf-16-be"), "sRGB".encode("utf-16-be"))
    image = Image.new("RGB", (64, 64), (200, 20, 20))
    assert close(pixels(encoded(image, "PNG", icc_profile=SRGB)), (200, 20, 20), 0)
    assert pixels(encoded(image, "PNG", icc_profile=named))[0, 0].argmax() == 1


def gif(screen: tuple[int, int]) -> bytes:
    """A red frame of 80 × 60 in the corner of a screen of another size."""
    body = encoded(Image.new("P", (80, 60)), "GIF")
    at = 6 + 7
    return body[:6] + struct.pack("<HH", *screen) + body[10:at] + bytes(RED) + body[at + 3 :]


@pytest.mark.parametrize("screen", [(0, 0), (80, 0), (80, 60), (10, 10), (100, 90)])
def test_the_screen_of_a_gif_is_transparent(screen: tuple[int, int]) -> None:
    found = pixels(gif(screen))
    assert found.shape[1::-1] == (max(80, screen[0]), max(60, screen[1]))
    assert close(found[:60, :80], RED, 0)
    assert (found[60:] == 255).all()
    assert (found[:, 80:] == 255).all()


@pytest.mark.parametrize("brand", [b"avif", b"mif1"])
def test_an_avif_is_known_by_its_compatible_brands(brand: bytes) -> None:
    body = encoded(scene(), "AVIF", quality=95)
    assert b"avif" in body[16:40]
    assert close(pixels(body[:8] + brand + body[12:]), scene())
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic") is None
    # A compatible brand counts only within its box.
    assert sniff(b"\0\0\0\x14ftypmif1\0\0\0\0heicavif") is None


@pytest.mark.parametrize("name", ["grey", "rgb", "progressive", "cmyk", "restarts", "profile"])
@pytest.mark.parametrize("mode", ["exact", "scaled"])
def test_a_jpeg_with_lost_pixels_fails_even_if_its_end_is_there(name: str, mode: Any) -> None:
    image = scene(900, 700, {"grey": "L", "cmyk": "CMYK"}.get(name, "RGB"))
    options: dict[str, Any] = {
        "progressive": {"progressive": True},
        "restarts": {"restart_marker_rows": 4},
        "profile": {"icc_profile": SRGB},
    }.get(name, {})
    body = encoded(image, "JPEG", quality=90, **options)
    rules = Rules(decode=mode)
    assert reason(body, rules) is None
    at = body.index(b"\xff\xda")
    assert reason(body[: at + (len(body) - at) // 2] + b"\xff\xd9", rules) == "decode_error"


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [2, 3])
def test_a_png_with_lost_rows_fails_even_if_its_end_is_there(channels: int, interlaced: bool) -> None:
    colour = {2: 4, 3: 2}[channels]
    row = 1 + 81 * channels
    size = sum_of_passes(81, 61, channels) if interlaced else row * 61
    whole, lost = zlib.compress(bytes(size)), zlib.compress(bytes(size - row))

    def file(data: bytes) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 81, 61, 8, colour, 0, 0, interlaced))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    assert reason(file(whole)) is None
    assert reason(file(whole + b"more")) is None
    assert reason(file(lost)) == "decode_error"
    assert reason(file(whole).replace(b"IHDR", b"IHDX", 1)) == "decode_error"


def sum_of_passes(width: int, height: int, channels: int) -> int:
    """The size in bytes of an interlaced 8-bit PNG, summed pixel by pixel over its passes (PNG, 8.2)."""
    order = "16462646 77777777 56565656 77777777 36463646 77777777 56565656 77777777".split()
    rows: dict[tuple[str, int], int] = {}
    for y in range(height):
        for x in range(width):
            key = (order[y % 8][x % 8], y)
            rows[key] = rows.get(key, 0) + channels
    return sum(rows.values()) + len(rows)


OFF_THE_LIST = [
    b"", b"<html>", b"<svg/>", b"%!PS-Adobe-3.0 EPSF", b"%PDF-1.7", b"II*\0" + bytes(50), b"BM" + bytes(60),
    b"\0\0\x01\0", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x18ftypmp42", b"\0\0\0\x1cftypheic", b"qoif", b"\xff\xd8",
]  # fmt: skip


@pytest.mark.parametrize("body", OFF_THE_LIST)
def test_unsupported_formats_are_not_opened(body: bytes) -> None:
    assert sniff(body) is None
    assert reason(body) == "not_an_image"


def test_formats_are_detected_by_first_bytes() -> None:
    assert decode(encoded(scene(), "PNG") + b"<script>alert(1)</script>", NO).original_format == "png"
    assert {k: decode(encoded(scene(), k), NO).original_format for k in ("JPEG", "GIF", "WEBP", "AVIF")} == {
        "JPEG": "jpeg",
        "GIF": "gif",
        "WEBP": "webp",
        "AVIF": "avif",
    }


def claims(kind: str, width: int, height: int) -> bytes:
    """A small file whose header claims a given size."""
    if kind == "PNG":
        return png(width, height, 8, 2, bytes(3 * height) if height < 1000 else bytes(height))
    if kind == "GIF":
        body = bytearray(encoded(scene(8, 8), "GIF"))
        body[6:10] = struct.pack("<HH", width, height)
        return bytes(body)
    if kind == "WEBP":
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF\x26\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + size + b"VP8L\x0d\0\0\0\x2f" + bytes(13)
    body = bytearray(encoded(scene(8, 8), "JPEG"))
    at = body.index(b"\xff\xc0") + 5
    body[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(body)


@pytest.mark.parametrize(("kind", "side"), [("PNG", 100_000), ("GIF", 65_535), ("WEBP", 16_384), ("JPEG", 65_500)])
def test_a_pixel_bomb_is_rejected_by_its_header(kind: str, side: int) -> None:
    assert reason(claims(kind, side, side)) == "too_large"
    assert reason(claims(kind, side, side), Rules(max_image_area=float("inf"))) in ("too_large", "decode_error")


def test_header_sizes() -> None:
    for kind, options in [
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"E"}),
    ]:
        assert header_size(encoded(scene(321, 123), kind, **options), kind) == (321, 123)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((100, 50), {"min_image_size": 51}, "too_small"),
        ((100, 50), {"min_image_size": 50}, None),
        ((100, 50), {"max_image_area": 4999}, "too_large"),
        ((100, 50), {"max_image_area": 5000}, None),
        ((100, 50), {"max_aspect_ratio": 1.9}, "aspect_ratio"),
        ((50, 100), {"max_aspect_ratio": 2.0}, None),
        ((3000, 1), {"resize_mode": "keep_ratio", "resize_only_if_bigger": False}, "too_large"),
        ((3000, 1), {}, None),
    ],
)
def test_limits_on_sizes(size: tuple[int, int], options: dict[str, Any], expected: str | None) -> None:
    assert reason(encoded(scene(*size), "PNG"), Rules(**options)) == expected


SIZES = [(320, 200), (200, 320), (100, 60), (256, 256), (257, 256), (255, 256), (641, 3), (3, 641), (1000, 999), (1, 1)]
MODES = ["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]


@pytest.mark.filterwarnings("ignore")
def test_sizes_and_pixels_are_those_of_img2dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with img2dataset's Resizer: sizes for all cases, pixels for lossless input."""
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise its import accesses the network
    from img2dataset.resizer import Resizer

    compared = 0
    for mode in MODES:
        for only_if_bigger in (True, False):
            rules = Rules(resize_mode=mode, resize_only_if_bigger=only_if_bigger, encode_format="png", encode_quality=1)  # type: ignore[arg-type]
            peer = Resizer(256, mode, only_if_bigger, encode_quality=1, encode_format="png")
            for size in SIZES:
                if not only_if_bigger and mode in ("keep_ratio", "center_crop") and max(size) / min(size) > 100:
                    continue  # we refuse it: see test_limits_on_sizes
                body = encoded(scene(*size), "PNG")
                theirs, width, height, original_width, original_height, error = peer(io.BytesIO(body))
                assert error is None
                ours = decode(body, rules)
                case = (mode, only_if_bigger, size)
                assert (ours.width, ours.height) == (width, height), case
                assert (ours.original_width, ours.original_height) == (original_width, original_height), case
                plan = plan_resize(*size, rules)
                assert plan.final == (width, height), case
                expected = np.asarray(Image.open(io.BytesIO(theirs))).astype(int)
                assert np.abs(pixels(body, rules) - expected).mean() < 1, case
                compared += 1
    assert compared == 96


@pytest.mark.parametrize(("mode", "decibels"), [("exact", 40), ("scaled", 36), ("fast", 32)])
@pytest.mark.parametrize(
    ("width", "height", "options"),
    [
        (2000, 1500, {}),
        (1100, 800, {"progressive": True}),
        (700, 500, {"subsampling": 0}),
        (401, 900, {"subsampling": 1}),
        (760, 520, {"subsampling": 2, "quality": 80}),
    ],
)
def test_a_reduced_decoding_is_close_to_the_full_one(
    width: int, height: int, options: dict[str, Any], mode: Any, decibels: float
) -> None:
    rng = np.random.default_rng(3)
    grain = rng.normal(0, 12, (height, width, 1))  # reduced decoding must handle detail too
    image = Image.fromarray((np.asarray(scene(width, height)) + grain).clip(0, 255).astype(np.uint8))
    body = encoded(image, "JPEG", **{"quality": 90, **options})
    scaled = plan_resize(width, height, Rules()).scaled
    full = cv2.resize(np.asarray(Image.open(io.BytesIO(body))), scaled, interpolation=cv2.INTER_AREA)
    ours = pixels(body, Rules(encode_format="png", encode_quality=1, decode=mode))
    assert ((ours - full.astype(int)) ** 2).mean() < 255**2 / 10 ** (decibels / 10)


def test_a_damaged_jpeg_fails_and_a_repairable_one_is_kept() -> None:
    body = encoded(scene(900, 700), "JPEG", quality=90)
    assert reason(body[: len(body) // 2], Rules()) == "decode_error"
    # Bytes between two markers: libjpeg and browsers skip them.
    at = body.index(b"\xff\xdb")
    padded = body[:at] + b"padding" + body[at:]
    assert close(pixels(padded, Rules(encode_format="png", encode_quality=1)), scene(900, 700).resize((256, 199)), 4)


def test_a_jpeg_of_a_thousand_scans_is_not_decoded() -> None:
    body = encoded(scene(900, 700), "JPEG", progressive=True)
    assert reason(body, Rules()) is None
    last = body.rindex(b"\xff\xda")
    assert reason(body[:-2] + body[last:-2] * 1000 + body[-2:], Rules()) == "decode_error"


def test_bytes_are_kept_only_if_nothing_changes() -> None:
    keep = Rules(skip_reencode=True)
    jpeg = encoded(scene(), "JPEG")
    assert decode(jpeg, Rules(skip_reencode=True, image_size=320)).image == jpeg
    assert decode(jpeg, Rules(image_size=320)).image != jpeg
    assert decode(jpeg, keep).image != jpeg  # resized
    small = scene(80, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    for changed in (
        encoded(small, "JPEG", exif=exif.tobytes()),
        encoded(small.convert("CMYK"), "JPEG"),
        encoded(small, "JPEG", icc_profile=swapped_primaries(SRGB)),
        encoded(small, "PNG"),
    ):
        assert decode(changed, keep).image != changed
    png_rules = Rules(skip_reencode=True, encode_format="png", encode_quality=1)
    flat = encoded(small, "PNG")
    assert decode(flat, png_rules).image == flat
    deep = png(1, 1, 16, 2, bytes(6))
    animated = encoded(small, "PNG", save_all=True, append_images=[scene(80, 60).rotate(90)])
    for changed in (encoded(small.convert("RGBA"), "PNG"), deep, animated):
        assert decode(changed, png_rules).image != changed
    assert decode(jpeg, Rules(skip_reencode=True, image_size=320), blur=[(0, 0, 0.5, 0.5)]).image != jpeg


def test_boxes_are_blurred_and_the_rest_is_not() -> None:
    rng = np.random.default_rng(5)
    body = encoded(Image.fromarray(rng.integers(0, 255, (400, 600, 3), np.uint8)), "PNG")
    plain, blurred = (
        np.asarray(Image.open(io.BytesIO(decode(body, Rules(encode_format="png", encode_quality=1), blur=boxes).image)))
        for boxes in ([], [(0.5, 0.25, 0.75, 0.5)])
    )
    height, width = plain.shape[:2]
    inside = (slice(int(0.3 * height), int(0.45 * height)), slice(int(0.55 * width), int(0.7 * width)))
    assert blurred[inside].std() < 0.35 * plain[inside].std()
    assert (blurred[:, : int(0.25 * width)] == plain[:, : int(0.25 * width)]).all()
    assert decode(body, Rules(), blur=[(0.2, 0.2, 0.2, 0.2)]).image == decode(body, Rules()).image  # nothing in it


def test_encodings() -> None:
    body = encoded(scene(), "PNG")
    for encode_format, kind in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        quality = 6 if encode_format == "png" else 95
        picture = decode(body, Rules(encode_format=encode_format, encode_quality=quality))  # type: ignore[arg-type]
        assert Image.open(io.BytesIO(picture.image)).format == kind
        assert picture == decode(body, Rules(encode_format=encode_format, encode_quality=quality))  # type: ignore[arg-type]
    small, large = (len(decode(body, Rules(encode_quality=q)).image) for q in (40, 95))
    assert small < large


def test_measurements() -> None:
    body = encoded(scene(), "PNG")
    picture = decode(body, Rules())
    assert picture.original_bytes == len(body)
    assert picture.sha256 == hashlib.sha256(body).hexdigest()
    stored = Image.open(io.BytesIO(decode(body, Rules(encode_format="png", encode_quality=1)).image))
    assert f"{picture.phash:016x}" == str(imagehash.phash(stored))
    flat = decode(encoded(Image.new("RGB", (64, 64), WHITE), "PNG"), Rules())
    assert flat.phash is None
    assert pickle.loads(pickle.dumps(picture)) == picture


def test_exif_is_the_json_of_img2dataset() -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Maker", "Model"
    body = encoded(scene(), "JPEG", exif=exif.tobytes())
    stored = json.loads(decode(body, Rules()).exif or "")
    assert stored["Image Make"] == "Maker"
    assert decode(encoded(scene(), "JPEG"), Rules()).exif == "{}"
    assert decode(body, Rules(extract_exif=False)).exif is None


@pytest.mark.parametrize("kind", WITH_METADATA)
def test_exif_is_the_same_in_every_format(kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x9286] = "Maker", b"comment"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    found = json.loads(decode(encoded(scene(), kind, exif=exif.tobytes()), Rules()).exif or "")
    assert found["Image Make"] == "Maker"
    assert found["EXIF DateTimeOriginal"] == "2020:01:02 03:04:05"


def test_exif_in_hex_as_imagemagick_writes_it() -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    digits = f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", digits, zip=True)
    picture = decode(encoded(scene(), "PNG", pnginfo=info), NO)
    assert json.loads(picture.exif or "")["Image Make"] == "Maker"
    assert (picture.original_width, picture.original_height) == (200, 320)
    info.add_text("Raw profile type APP1", "no hex")
    assert decode(encoded(scene(), "PNG", pnginfo=info), NO).original_width == 200


def ifd(entries: list[tuple[int, int, int, bytes]], following: int = 0) -> bytes:
    """An EXIF table: tag, type, count, and value or offset of each entry."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + body + struct.pack("<I", following)


def test_exif_is_bounded_and_never_fails_the_picture() -> None:
    long = Image.Exif()
    long[0x010F] = "M\0" + "x" * 5_000
    long[0x010E] = "y" * 40_000
    found = json.loads(decode(encoded(scene(), "WEBP", exif=long.tobytes()), Rules()).exif or "")
    assert {name: len(value) for name, value in found.items()} == {"Image ImageDescription": 1000, "Image Make": 1}
    names = [struct.pack("<I", 8)] * 600
    place = 8 + len(ifd([(0, 2, 900, b"")] * 600))
    many = b"II*\0\x08\0\0\0" + ifd([(0x8000 + i, 2, 900, struct.pack("<I", place)) for i in range(600)]) + b"z" * 900
    stored = decode(encoded(scene(), "PNG", exif=b"Exif\0\0" + many), Rules()).exif or ""
    assert 60_000 < len(stored) <= 1 << 16
    assert len(names) > len(json.loads(stored)) > 60


def test_parsing_of_exif_is_bounded() -> None:
    # Chained, overlapping tables of thousands of entries.
    at = range(8, 60_000, 12)
    hostile = bytearray(b"II*\0\x08\0\0\0" + b"\x88\x13\x07\0\x01\0\0\0\xe7\x03\0\0" * len(at))
    picture = decode(encoded(scene(), "WEBP", exif=b"Exif\0\0" + bytes(hostile)), Rules())
    assert picture.exif is None
    loop = b"II*\0\x08\0\0\0" + ifd([(0x8769, 4, 1, struct.pack("<I", 8))])
    assert decode(encoded(scene(), "PNG", exif=b"Exif\0\0" + loop), Rules()).width == 256


def test_failures_can_be_pickled() -> None:
    failure = pickle.loads(pickle.dumps(FetchError("decode_error", "because")))
    assert (failure.reason, failure.detail, failure.transient) == ("decode_error", "because", False)


def mutants(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    image = scene(90, 60)
    originals = [
        encoded(image, "JPEG"),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "PNG"),
        encoded(image.convert("P"), "PNG", transparency=3),
        encoded(image, "GIF", save_all=True, append_images=[image.rotate(5)]),
        encoded(image, "WEBP"),
        encoded(image, "WEBP", lossless=True),
        encoded(image, "AVIF"),
    ]
    cases = []
    for _ in range(count):
        body = bytearray(rng.choice(originals))
        match rng.randrange(3):
            case 0:
                for _ in range(rng.choice((1, 4, 32))):
                    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            case 1:
                del body[rng.randrange(len(body)) :]
            case _:
                other = rng.choice(originals)
                body[rng.randrange(len(body)) :] = other[rng.randrange(len(other)) :]
        cases.append(bytes(body))
    return cases


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_give_a_picture_or_a_reason(count: int) -> None:
    for body in mutants(count, seed=1):
        assert (reason(body, Rules(image_size=32)) or "decode_error") in REASONS
