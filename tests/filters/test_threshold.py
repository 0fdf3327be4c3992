from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from pipeline.filters.threshold import Threshold
from tests.filters.barrier import check_barrier, decide
from tests.tables import check_filter, make_batch, run_step

CUT, MISSING, NAN = "threshold", "missing", math.nan


def scored(values: list[float | None]) -> list[dict]:
    return [{"clip_score": value} for value in values]


def test_min_is_inclusive() -> None:
    rows = scored([0.25, 0.2499, 0.3, None, NAN, math.inf, -math.inf])
    check_filter(Threshold(column="clip_score", min=0.25), rows, [None, CUT, None, MISSING, MISSING, None, CUT])


def test_max_is_inclusive() -> None:
    rows = scored([0.1, 0.1001, -math.inf, None, NAN, math.inf])
    check_filter(Threshold(column="clip_score", max=0.1), rows, [None, CUT, None, MISSING, MISSING, CUT])
    rows = scored([0.1, 0.2, 0.3, 0.4])
    step = Threshold(column="clip_score", min=0.2, max=0.3)
    check_filter(step, rows, [CUT, None, None, CUT])
    assert run_step(step, make_batch(rows))[1]["detail"].to_pylist() == ["0.1, cut at 0.2", "0.4, cut at 0.3"]


@pytest.mark.parametrize(
    ("fraction", "values", "kept"),
    [
        (0.3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], {8, 9, 10}),
        (0.31, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], {7, 8, 9, 10}),
        (0.5, [-2.5, 3e-9, -0.25, 0.5], {3e-9, 0.5}),
        (0.01, [-1, -2, -3], {-1}),
        (1.0, [-1, 0, math.inf, -math.inf], {-1, 0, math.inf, -math.inf}),
        (0.25, [0.1, math.inf, -math.inf, 0.2], {math.inf}),
    ],
)
def test_top_fraction_keeps_the_highest(fraction: float, values: list[float], kept: set[float]) -> None:
    expected = [None if value in kept else CUT for value in values]
    rows = [{"score": float(value)} for value in values]
    check_barrier(Threshold(column="score", top_fraction=fraction), rows, expected)


def test_rows_without_a_value_do_not_count() -> None:
    rows = scored([NAN, 0.1, None, 0.4, 0.3, NAN, 0.2])
    expected = [MISSING, CUT, MISSING, None, None, MISSING, CUT]
    check_barrier(Threshold(column="clip_score", top_fraction=0.5), rows, expected)
    check_barrier(Threshold(column="clip_score", top_fraction=0.5), scored([None, NAN]), [MISSING, MISSING])
    assert decide(Threshold(column="clip_score", top_fraction=0.5), make_batch([{"clip_score": 1.0}])) == [None]


@pytest.mark.parametrize(("fraction", "n"), [(0.07, 100), (0.3, 1000), (0.29, 777), (0.1, 30), (0.999, 50)])
@pytest.mark.parametrize("distinct", [1, 3, 10**6])
def test_the_count_is_exact_despite_ties(fraction: float, n: int, distinct: int) -> None:
    values = np.random.default_rng(n).integers(-distinct, distinct, n) / 7
    found = decide(Threshold(column="score", top_fraction=fraction), make_batch([{"score": v} for v in values]))
    kept = sorted(value for value, drop in zip(values, found) if drop is None)
    # In exact thousandths: binary rounding must not add a row.
    assert len(kept) == -(-round(fraction * 1000) * n // 1000)
    assert kept == sorted(values)[-len(kept) :]


def test_minus_zero_equals_zero() -> None:
    found = [
        decide(
            Threshold(column="score", top_fraction=0.5),
            make_batch([{"score": s, "uid": f"{i}"} for i, s in enumerate(v)]),
        )
        for v in ([0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0])
    ]
    assert [drop is None for drop in found[0]] == [drop is None for drop in found[1]]


def test_ties_are_broken_by_uid_not_by_position() -> None:
    uids = [f"{i:032x}" for i in range(40)]
    step = Threshold(column="score", top_fraction=0.5)
    forth = decide(step, make_batch([{"uid": uid, "score": 1.0} for uid in uids]))
    back = decide(step, make_batch([{"uid": uid, "score": 1.0} for uid in reversed(uids)]))
    assert forth == back[::-1]
    assert forth[:20].count(None) not in (0, 20)


def test_the_count_is_exact_even_if_all_rows_have_one_uid() -> None:
    found = decide(Threshold(column="score", top_fraction=0.4), make_batch([{"uid": "a", "score": 1.0}] * 10))
    assert found.count(None) == 4


def test_the_detail_has_the_value_and_the_cut() -> None:
    batch = make_batch([{"score": s} for s in (0.5, 0.25, 0.125, None)])
    assert run_step(Threshold(column="score", min=0.3), batch)[1]["detail"].to_pylist() == [
        "0.25, cut at 0.3",
        "0.125, cut at 0.3",
        None,
    ]
    assert decide(Threshold(column="score", top_fraction=0.6), batch) == [
        None,
        None,
        (CUT, "0.125, cut at 0.25"),
        (MISSING, None),
    ]


def test_a_column_of_text_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'caption' must hold numbers, found string"):
        run_step(Threshold(column="caption", min=1), make_batch([{}]))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "min"),
        ({"min": 0.3, "top_fraction": 0.3}, "min"),
        ({"max": 0.3, "top_fraction": 0.3}, "min"),
        ({"min": NAN}, "min"),
        ({"max": NAN}, "max"),
        ({"min": 0.3, "max": 0.2}, "max"),
        ({"top_fraction": 0.0}, "top_fraction"),
        ({"top_fraction": 30.0}, "top_fraction"),
    ],
)
def test_invalid_options_are_reported(options: dict, key: str) -> None:
    assert [k for k, _ in Threshold(column="clip_score", **options).check()] == [key]


def test_only_a_fraction_is_a_barrier() -> None:
    assert Threshold(column="x", min=1).scope == "row"
    assert Threshold(column="x", top_fraction=1).scope == "run"
    assert Threshold(column="x", min=1).needs == ("x",)


def test_a_column_without_numbers_is_refused_before_the_start() -> None:
    step = Threshold(column="score", min=0.3)
    assert not list(step.check_columns({"score": pa.decimal128(5, 2)}))
    assert list(step.check_columns({"score": pa.string()})) == [
        ("column", "the column 'score' must hold numbers, found type string")
    ]
