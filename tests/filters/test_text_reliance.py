from __future__ import annotations

from pipeline.filters.text_reliance import TextReliance
from pipeline.step import apply
from tests.tables import check_filter, make_batch


def test_a_score_that_falls_with_the_text() -> None:
    pairs = [(0.3, 0.25), (0.3, 0.15), (0.2, 0.3), (None, 0.3), (0.3, None), (0.3, float("nan"))]
    rows = [{"clip_score": score, "masked_clip_score": masked} for score, masked in pairs]
    expected = [None, "text_reliance", None, "missing", "missing", "missing"]
    check_filter(TextReliance(max_drop=0.1), rows, expected)
    _, drops = apply(TextReliance(max_drop=0.1), make_batch(rows[:2]))
    assert abs(drops["value"].to_pylist()[0] - 0.15) < 1e-6


def test_other_columns_and_limits() -> None:
    step = TextReliance(max_drop=-1, score="a", masked_score="b")
    assert step.needs == ("a", "b")
    assert list(step.check()) == [("max_drop", "must be 0 or more, found -1")]
