from __future__ import annotations

from pipeline.filters.image_size import ImageSize
from tests.tables import check_filter, make_batch, run_step


def test_the_shorter_side_decides() -> None:
    sizes = {
        (200, 200): None,
        (199, 4000): "too_small",
        (4000, 199): "too_small",
        (4000, 200): None,
        (0, 0): "too_small",
    }
    sizes[(None, 300)] = "too_small"
    check_filter(ImageSize(), [{"original_width": w, "original_height": h} for w, h in sizes], list(sizes.values()))


def test_the_detail_is_the_size() -> None:
    rows = [{"original_width": 120, "original_height": 4000}, {"original_width": None, "original_height": 300}]
    _, drops = run_step(ImageSize(), make_batch(rows))
    assert drops["detail"].to_pylist() == ["120x4000", "unknown"]
    assert drops["value"].to_pylist() == [120.0, None]


def test_a_limit_that_keeps_everything_is_refused() -> None:
    assert [key for key, _ in ImageSize(min_side=0).check()] == ["min_side"]
