from __future__ import annotations

import pytest

from pipeline.filters.aspect_ratio import AspectRatio
from tests.tables import check_filter, make_batch, run_step


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (600, 200, None),
        (200, 600, None),
        (601, 200, "too_elongated"),
        (200, 601, "too_elongated"),
        (0, 0, "too_elongated"),
        (300, 0, "too_elongated"),
        (None, 300, "too_elongated"),
    ],
)
def test_landscape_and_portrait_pictures_are_treated_alike(width: int | None, height: int, reason: str | None) -> None:
    check_filter(AspectRatio(), [{"original_width": width, "original_height": height}], [reason])


def test_the_detail_is_the_ratio() -> None:
    rows = [{"original_width": 120, "original_height": 4000}, {"original_width": None, "original_height": 300}]
    _, drops = run_step(AspectRatio(), make_batch(rows))
    assert drops["detail"].to_pylist() == ["33.33", "unknown"]
    assert [value and round(value, 2) for value in drops["value"].to_pylist()] == [33.33, None]


@pytest.mark.parametrize("limit", [0.5, float("nan")])
def test_a_limit_that_drops_everything_is_refused(limit: float) -> None:
    assert [key for key, _ in AspectRatio(max=limit).check()] == ["max"]
