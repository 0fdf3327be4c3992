"""Scores of picture quality, compared with a second implementation of cleanvision's formulas in Pillow."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageStat

from pipeline.fetch.decoder import Rules, decode
from pipeline.fetch.quality import SCORES, measure
from pipeline.stages.download import Download
from pipeline.stages.read_shards import check_image
from tests.images import encoded


def scene(width: int = 300, height: int = 200) -> np.ndarray:
    """A picture with structure at all scales, uint8 RGB."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64):
        pixels += cv2.resize(rng.random((cells, cells, 3)).astype(np.float32), (width, height))
    return np.asarray((pixels / 3 * 255).round(), np.uint8)


def by_pillow(pixels: np.ndarray) -> dict[str, float]:
    image = Image.fromarray(pixels)
    red, green, blue = (pixels[..., i].astype(float) for i in range(3))
    brightness = np.sqrt(0.241 * red**2 + 0.691 * green**2 + 0.068 * blue**2) / 255
    ratio = max(image.size) / 64
    small = image.resize((int(image.width / ratio), int(image.height / ratio))) if ratio > 1 else image
    grey = small.convert("L")
    edges = ImageStat.Stat(grey.filter(ImageFilter.FIND_EDGES)).var[0]
    contrast = 1 - math.exp(-float(np.std(grey.histogram())) / 100)
    blurry = 1 - math.exp(-math.sqrt(edges) / 100) + (contrast if contrast > 0.18 else 0)
    return {
        "dark_score": float(np.percentile(brightness, 99)),
        "light_score": 1 - float(np.percentile(brightness, 5)),
        "blurry_score": min(1.0, blurry),
        "low_information_score": min(1.0, image.entropy() / 10),
    }


@pytest.mark.parametrize(
    "pixels",
    [
        scene(),
        scene(64, 64),
        scene(120, 700),
        (scene() * 0.2).astype(np.uint8),
        (255 - scene() * 0.1).astype(np.uint8),
        np.full((50, 70, 3), 255, np.uint8),
        np.zeros((9, 9, 3), np.uint8),
    ],
    ids=["scene", "small", "tall", "dark", "light", "white", "black"],
)
def test_the_formulas(pixels: np.ndarray) -> None:
    expected = by_pillow(pixels)
    found = measure(pixels)
    assert list(found) == list(SCORES)
    # Blur is measured on a reduced picture, and Pillow's bicubic reduction is a little sharper than the mean.
    allowed = {"blurry_score": 0.05}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=allowed.get(name, 0.005)), name


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 1)])
def test_slivers(size: tuple[int, int]) -> None:
    assert all(0 <= score <= 1 for score in measure(np.full((*size, 3), 128, np.uint8)).values())


def test_each_defect_lowers_its_own_score() -> None:
    good = measure(scene())
    assert min(good.values()) > 0.32
    assert measure((scene() * 0.25).astype(np.uint8))["dark_score"] < 0.32
    assert measure((255 - (255 - scene().astype(int)) * 0.04).astype(np.uint8))["light_score"] < 0.05
    noise = cv2.GaussianBlur(np.random.default_rng(0).random((200, 300)), (0, 0), 25)
    ranks = noise.argsort(axis=None).argsort().reshape(noise.shape)  # all greys equally often, almost no edges
    assert measure(np.dstack([(ranks * 256 // noise.size).astype(np.uint8)] * 3))["blurry_score"] < 0.29
    assert measure(np.full((64, 64, 3), 77, np.uint8))["low_information_score"] < 0.3


def test_scores_are_measured_at_decoding_on_request() -> None:
    body = encoded(scene())
    plain, scored = decode(body, Rules()), decode(body, Rules(image_quality=True))
    assert plain.dark_score is None
    assert plain.image == scored.image
    assert scored.blurry_score is not None
    assert scored.blurry_score > 0.29
    assert check_image(body, max_image_area=1e6, image_quality=True).dark_score == measure(scene())["dark_score"]
    assert Download(image_quality=True).adds.keys() - Download().adds.keys() == SCORES.keys()
    ((key, problem),) = Download(image_quality=True, engine="img2dataset").check()
    assert (key, problem) == ("image_quality", "not supported by the engine img2dataset; leave `engine` out")
