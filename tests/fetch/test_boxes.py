"""Boxes to blur: which pixels change, and which values are rejected."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.fetch.decoder import Rules, decode
from pipeline.fetch.reasons import FetchError
from pipeline.stages.clip_score import ClipScore
from pipeline.stages.download import Download
from tests.images import encoded

WIDTH, HEIGHT = 400, 200
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
NAN, INF = math.nan, math.inf


BODY = encoded(NOISE)


def stored(boxes: Any = (), **options: Any) -> np.ndarray:
    rules = Rules(**{"encode_format": "png", "encode_quality": 1, "resize_mode": "no", **options})
    return np.asarray(Image.open(io.BytesIO(decode(BODY, rules, blur=boxes).image)))


def around(box: tuple[float, float, float, float], width: int, height: int, reach: float) -> np.ndarray:
    """Bool of shape (height, width): the pixels within `reach` times the box's longer side of it."""
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    more = reach * max(right - left, bottom - top)
    y, x = np.mgrid[:height, :width]
    return (x >= left - more) & (x < right + more) & (y >= top - more) & (y < bottom + more)


BOXES = [(0.25, 0.25, 0.5, 0.5), (0.0, 0.0, 0.1, 0.3), (0.85, 0.6, 1.1, 1.2), (-0.2, 0.4, 0.1, 0.6)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("image_size", [400, 120], ids=["as it is", "resized"])
def test_the_pixels_of_a_box_change_and_the_others_do_not(box: tuple[float, ...], image_size: int) -> None:
    options = {"resize_mode": "keep_ratio_largest", "image_size": image_size}
    plain, blurred = stored(**options), stored([box], **options)
    height, width = plain.shape[:2]
    assert width == image_size
    inside, near = around(box, width, height, 0), around(box, width, height, 0.6)  # type: ignore[arg-type]
    changed = (plain != blurred).any(axis=2)
    assert inside.any()
    assert changed[inside].mean() > 0.95
    assert blurred[inside].std() < 0.6 * plain[inside].std(), "noise is averaged away"
    assert not changed[~near].any()


def test_boxes_are_relative_to_the_picture_before_it_is_cropped_or_padded() -> None:
    """The picture is twice as wide as high: cropping keeps its middle half, padding adds white above and below."""
    box = (0.25, 0.0, 0.375, 0.25)  # 25 by 25 pixels of 200 by 100
    cropped = {"resize_mode": "center_crop", "image_size": 100}
    change = (stored(**cropped) != stored([box], **cropped)).any(axis=(0, 2))
    assert change[:25].all()
    assert not change[42:].any()
    padded = {"resize_mode": "border", "image_size": 200}
    change = (stored(**padded) != stored([box], **padded)).any(axis=(1, 2))
    assert not change[:50].any(), "the border stays white"
    assert change[50:75].all()
    assert not change[92:].any()


@pytest.mark.parametrize(
    "box",
    [
        (NAN, 0.1, 0.2, 0.2),
        (0.1, 0.1, INF, 0.2),
        (100, 40, 180, 120),  # pixels
        (0.6, 0.2, 0.1, 0.3),  # x, y, width, height
        (0.1, 0.6, 0.2, 0.3),
        (-5.0, -5.0, 6.0, 6.0),
        (0.1, 0.1, 0.2),
        (0.1, 0.1, 0.2, 0.2, 0.9),
        (0.1, None, 0.2, 0.2),
        None,
        0.5,
        [[0.1, 0.1, 0.2, 0.2]],
        "0.1 0.1 0.2 0.2",
    ],
    ids=str,
)
def test_a_picture_with_an_invalid_box_is_dropped_instead_of_stored_unblurred(box: Any) -> None:
    with pytest.raises(FetchError) as caught:
        stored([BOXES[0], box])
    assert caught.value.reason == "bad_box"
    detector = lambda pixels: [box]  # noqa: E731
    with pytest.raises(FetchError) as caught:
        decode(BODY, Rules(), detect=detector)
    assert caught.value.reason == "bad_box"


def test_an_empty_box_changes_nothing() -> None:
    for boxes in ([], [(0.5, 0.5, 0.5, 0.5)], [(1.5, 1.5, 1.6, 1.6)]):
        np.testing.assert_array_equal(stored(boxes), NOISE)


COLUMNS = [
    (pa.list_(pa.list_(pa.float64())), True),
    (pa.list_(pa.list_(pa.float32(), 4)), True),
    (pa.large_list(pa.list_(pa.int64())), True),
    (pa.list_(pa.null()), True),
    (pa.null(), True),
    (pa.list_(pa.float64()), False),
    (pa.list_(pa.list_(pa.string())), False),
    (pa.list_(pa.struct([("x", pa.float64())])), False),
    (pa.string(), False),
    (pa.list_(pa.list_(pa.list_(pa.float64()))), False),
]


@pytest.mark.parametrize(("dtype", "valid"), COLUMNS, ids=[str(dtype) for dtype, _ in COLUMNS])
def test_a_column_of_boxes_must_hold_lists_of_boxes(dtype: pa.DataType, valid: bool) -> None:
    for step, key in ((Download(bbox_col="faces"), "bbox_col"), (ClipScore(mask="faces"), "mask")):
        found = list(step.check_columns({"faces": dtype}))
        assert [option for option, _ in found] == ([] if valid else [key])
        assert all("must hold lists of boxes" in problem and str(dtype) in problem for _, problem in found)
