"""Boxes that a detector finds are blurred before the picture is resized and stored."""

from __future__ import annotations

import asyncio
import pickle

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.fetch.decoder import Decoder, Rules, decode
from pipeline.fetch.reasons import FetchError
from pipeline.fetch.sandbox import Sandbox
from pipeline.stages.download import Download
from tests.images import encoded

RULES = Rules(encode_format="png", encode_quality=1, image_size=100)


def body(box: tuple[int, int, int, int] | None) -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 120, (200, 400, 3), np.uint8))
    if box:
        ImageDraw.Draw(image).rectangle(box, fill=(255, 0, 0))
    return encoded(image)


def decoder(detector: str | None) -> Decoder:
    rules = Rules(**{**vars(RULES), "blur_detector": detector})
    return pickle.loads(pickle.dumps(Decoder(rules)))  # as the decoding process receives it


def test_detected_boxes_are_blurred_like_given_boxes() -> None:
    picture = body((100, 50, 199, 99))
    found = decoder("tests.plugins:FaceBox")(picture)
    assert found.image == decode(picture, RULES, blur=[(0.25, 0.25, 0.5, 0.5)]).image
    assert found.image != decode(picture, RULES).image
    assert found.sha256 == decode(picture, RULES).sha256
    both = decoder("tests.plugins:FaceBox")(picture, None, [(0.7, 0.7, 0.9, 0.9)])
    assert both.image == decode(picture, RULES, blur=[(0.7, 0.7, 0.9, 0.9), (0.25, 0.25, 0.5, 0.5)]).image


def test_a_picture_without_boxes_is_not_changed() -> None:
    assert decoder("tests.plugins:FaceBox")(body(None)).image == decode(body(None), RULES).image


@pytest.mark.parametrize(("detector", "reason"), [("Broken", "bad_box"), ("Failing", "decode_error")])
def test_a_picture_on_which_the_detector_fails_is_dropped(detector: str, reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        decoder(f"tests.plugins:{detector}")(body(None))
    assert caught.value.reason == reason


def test_the_detector_runs_in_the_decoding_process() -> None:
    async def one() -> bytes:
        target = Decoder(Rules(**{**vars(RULES), "blur_detector": "tests.plugins:FaceBox"}))
        async with Sandbox(target, processes=1, seconds=20, memory=200_000_000) as sandbox:
            return (await sandbox(body((100, 50, 199, 99)))).image

    assert asyncio.run(one()) == decode(body((100, 50, 199, 99)), RULES, blur=[(0.25, 0.25, 0.5, 0.5)]).image


def test_a_missing_detector_is_reported() -> None:
    ((key, problem),) = Download(blur_detector="no_such_package:Faces").check()
    assert (key, problem) == ("blur_detector", "no module named no_such_package; is its folder on PYTHONPATH?")
