from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.filters.image_quality import ImageQuality
from pipeline.step import apply
from tests.tables import check_filter, make_batch

GOOD = {"dark_score": 0.9, "light_score": 0.9, "blurry_score": 0.6, "low_information_score": 0.8}


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({}, None),
        ({"dark_score": 0.32}, None),
        ({"dark_score": 0.319}, "dark"),
        ({"light_score": 0.049}, "light"),
        ({"blurry_score": 0.28}, "blurry"),
        ({"low_information_score": 0.29}, "low_information"),
        ({"dark_score": 0.1, "blurry_score": 0.1}, "dark"),
        ({"light_score": 0.0, "low_information_score": 0.0}, "light"),
        ({"blurry_score": None}, "missing"),
        ({"blurry_score": float("nan"), "dark_score": 0.0}, "missing"),
    ],
)
def test_limits(scores: dict[str, Any], reason: str | None) -> None:
    check_filter(ImageQuality(), [GOOD, {**GOOD, **scores}], [None, reason])


def test_a_limit_of_zero_never_drops() -> None:
    check_filter(ImageQuality(dark=0, light=0, blurry=0, low_information=0), [dict.fromkeys(GOOD, 0.0)], [None])


def test_drops_tell_the_score_that_decided() -> None:
    rows = [{**GOOD, "light_score": 0.01}, {**GOOD, "blurry_score": 0.125}, {**GOOD, "dark_score": None}]
    _, drops = apply(ImageQuality(), make_batch(rows))
    assert drops["reason"].to_pylist() == ["light", "blurry", "missing"]
    assert drops["value"].to_pylist() == [0.01, 0.125, None]
    assert drops["value"].type == pa.float64()


def test_limits_are_from_0_to_1() -> None:
    assert list(ImageQuality(dark=32).check()) == [("dark", "must be from 0 to 1, found 32")]
