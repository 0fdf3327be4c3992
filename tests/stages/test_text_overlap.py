"""The share of a caption that is written in its picture, on pictures with text drawn by the tests."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

from pipeline.stages.clip_score import ClipScore, masked
from pipeline.stages.text_overlap import TextOverlap, overlap
from tests.conftest import HUNG
from tests.images import encoded
from tests.tables import check_filter, make_batch, run_step

RED = "tests.plugins:RedBox"


def with_box(box: tuple[int, int, int, int] | None, size: tuple[int, int] = (100, 50)) -> Image.Image:
    image = Image.new("RGB", size, (20, 120, 220))
    if box:
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 0, 0))
    return image


@pytest.mark.parametrize(
    ("caption", "text", "score"),
    [
        ("Summer Sale!", "SUMMER SALE", 1),
        ("Summer sale", "SUMMERSALE 50%", 1),  # the engine joined two words
        ("Summer sale", "summer", 0.6),
        ("a cat", "", 0),
        ("a cat", "plan b category", 0),  # short words count only as whole words
        ("a cat", "a\ncat", 1),
        ("50% off", "50 % off", 1),
        ("猫の写真", "猫の写真展", 1),
        ("Cafe\u0301", "CAFÉ", 1),
        ("...", "...", None),
        (None, "text", None),
        ("text", None, 0),
    ],
)
def test_the_share_of_the_caption(caption: str | None, text: str | None, score: float | None) -> None:
    columns = (pa.chunked_array([pa.array([value], pa.string())]) for value in (caption, text))
    assert overlap(*columns).to_pylist() == [score if score is None else pytest.approx(score)]


def test_the_columns_that_a_users_engine_gives() -> None:
    rows = [
        {"image": encoded(with_box((10, 20, 60, 30))), "caption": "something red"},
        {"image": encoded(with_box(None)), "caption": "something blue"},
    ]
    kept, drops = run_step(TextOverlap(engine=RED), make_batch(rows))
    assert not len(drops)
    assert kept["image_text"].to_pylist() == ["red", ""]
    first, second = kept["text_boxes"].to_pylist()
    assert first == [[pytest.approx(v) for v in (0.1, 0.4, 0.6, 0.6)]]
    assert second == []
    assert kept["text_overlap_score"].to_pylist() == [pytest.approx(3 / 12), 0]
    assert {name: kept.schema.field(name).type for name in TextOverlap.adds} == TextOverlap.adds


def test_only_pictures_that_cannot_be_decoded_are_dropped() -> None:
    rows = [{"image": encoded(with_box(None))}, {"image": b"GIF89a"}, {"image": None}]
    check_filter(TextOverlap(engine=RED), rows, [None, "decode_error", "decode_error"])


def test_a_missing_engine_is_reported() -> None:
    ((key, problem),) = TextOverlap(engine="no_such_package:Engine").check()
    assert (key, problem) == ("engine", "no module named no_such_package; is its folder on PYTHONPATH?")
    code = (
        "import sys; sys.modules['rapidocr'] = None\n"
        "from pipeline.stages.text_overlap import TextOverlap\n"
        "print(list(TextOverlap().check()))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=HUNG)
    assert "pip install 'winnow-clip[ocr]'" in output


def test_masked_boxes_take_the_colour_around_them() -> None:
    box = (10, 20, 60, 30)
    image = with_box(box)
    plain = np.asarray(with_box(None))
    np.testing.assert_array_equal(np.asarray(masked(image, [[0.1, 0.4, 0.6, 0.6]])), plain)
    np.testing.assert_array_equal(np.asarray(masked(image.convert("RGB"), [])), np.asarray(image))
    # Beyond the border, empty, and over the whole picture.
    odd = [[-1.0, 0.4, 0.6, 0.6], [0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.1, 0.1]]
    np.testing.assert_array_equal(np.asarray(masked(image, odd)), plain)
    whole = np.asarray(masked(image, [[0.0, 0.0, 1.0, 1.0]]))
    assert (whole == whole[0, 0]).all()


def test_the_masked_score_equals_the_score_of_the_picture_without_text(checkpoint: str) -> None:
    boxes = pa.array([[[0.1, 0.4, 0.6, 0.6]], [], None], pa.list_(pa.list_(pa.float32())))
    written = [encoded(with_box((10, 20, 60, 30))), encoded(with_box(None)), encoded(with_box(None))]
    batch = make_batch([{"image": image, "caption": "red"} for image in written]).append_column("text_boxes", boxes)
    options = {"model": checkpoint, "batch_size": 4, "precision": "fp32"}
    step = ClipScore(column="masked_clip_score", mask="text_boxes", **options)  # type: ignore[arg-type]
    assert step.needs == ("image", "caption", "text_boxes")
    assert not list(step.check_columns({"text_boxes": boxes.type}))
    ((key, problem),) = step.check_columns({"text_boxes": pa.list_(pa.float32())})
    assert key == "mask"
    assert "must hold lists of boxes, found type list<item: float>" in problem
    found = run_step(step, batch)[0]["masked_clip_score"].to_pylist()
    assert found[0] == found[1] == found[2]
    plain = run_step(ClipScore(**options), batch)[0]["clip_score"].to_pylist()  # type: ignore[arg-type]
    assert plain[1] == found[1]
    assert plain[0] != found[0]


WORDS = (
    "summer winter garden kitchen mountain river silver golden market travel holiday coffee orange purple window "
    "forest island castle bridge harbor planet rocket guitar camera bottle pillow jacket ladder button tunnel"
).split()


def drawn(words: list[str], seed: int) -> Image.Image:
    """A picture with two lines of text on a smooth, coloured background."""
    rng = random.Random(seed)
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for i, word in enumerate(words):
        at = (rng.randint(5, 120), 20 + 100 * i + rng.randint(0, 40))
        draw.text(at, word, fill="white", stroke_fill="black", stroke_width=2, font=ImageFont.load_default(34))
    return image


@pytest.mark.parametrize("pictures", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_the_default_engine_reads_drawn_words(pictures: int) -> None:
    pytest.importorskip("rapidocr")
    rng = random.Random(0)
    pairs = [rng.sample(WORDS, 2) for _ in range(pictures)]
    rows = [{"image": encoded(drawn(pair, i), "JPEG"), "caption": " ".join(pair)} for i, pair in enumerate(pairs)]
    rows.append({"image": encoded(drawn([], 99), "JPEG"), "caption": "nothing is written here"})
    kept, _ = run_step(TextOverlap(), make_batch(rows))
    *written, blank = kept["text_overlap_score"].to_pylist()
    assert np.mean(written) > 0.9, "recall of the letters of known words"
    assert blank == 0
    assert kept["image_text"].to_pylist()[-1] == ""
