"""Cuts keep exactly the rows that `threshold` keeps, whatever the units are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import open_run
from pipeline.condition import Boundary, Ceiling, Condition, highest
from pipeline.filters.threshold import Threshold
from pipeline.studio.cuts import default_step
from pipeline.study.candidates import Candidates, open_candidates
from pipeline.study.kept import Cuts, cut_rows, jaccard, largest, overlaps
from pipeline.study.study_plan import Cut
from tests.filters.barrier import decide
from tests.study.made import make_run, samples
from tests.tables import make_batch

ROWS = samples(300)
COLUMNS = ["clip_score", "other", "width"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    folder = tmp_path_factory.mktemp("cuts")
    run = open_run(make_run(folder / "run", ROWS))
    return open_candidates(run, default_step(run), COLUMNS, folder / "candidates")


def uids(candidates: Candidates, cut: Cut) -> set[str]:
    held = [uid for table in candidates.run.scan("uid", candidates.after) for uid in table["uid"].to_pylist()]
    return {held[place] for place in cut_rows(Cuts(candidates, [cut]), 0)}


def by_threshold(rows: list[dict[str, Any]], condition: Condition) -> list[dict[str, Any]]:
    """What the step keeps."""
    step = Threshold(column=condition.column, **{condition.rule: condition.value})
    names = ["uid", condition.column]
    batch = make_batch([{name: row[name] for name in names} for row in rows])
    if step.scope == "row":
        return [row for row, reason in zip(rows, step.judge(batch).to_pylist()) if reason is None]
    return [row for row, drop in zip(rows, decide(step, batch)) if drop is None]


def conditions(*parts: str) -> Cut:
    """`clip_score top_fraction 0.3` and so on."""
    split = (part.split() for part in parts)
    return Cut(tuple(Condition(column, rule, float(value)) for column, rule, value in split))


@pytest.mark.parametrize(
    "parts",
    [
        ["clip_score top_fraction 0.3"],
        ["clip_score top_fraction 1"],  # rows without a score are not kept
        ["clip_score top_fraction 0.001"],
        ["clip_score min 0.25"],
        ["other top_fraction 0.07"],  # many ties
        ["other top_fraction 0.5"],
        ["width top_fraction 0.25"],
        ["other min 3"],
        ["other max 3"],
        ["clip_score max 0.25"],
        ["width max 300", "clip_score top_fraction 0.5"],
        ["clip_score top_fraction 0.5", "other top_fraction 0.5"],  # half of the half
        ["other min 2", "width top_fraction 0.4", "clip_score top_fraction 0.3"],
        ["clip_score min 9", "other top_fraction 0.5"],  # nothing is left to take half of
    ],
)
def test_a_cut_keeps_what_the_lines_of_a_recipe_keep(opened: Candidates, parts: list[str]) -> None:
    cut, expected = conditions(*parts), ROWS
    for condition in cut.conditions:
        expected = by_threshold(expected, condition) if expected else []
    assert uids(opened, cut) == {row["uid"] for row in expected}
    assert [line.split()[1] for line in cut.recipe_lines] == ["threshold:"] * len(parts)


def test_units_and_their_order_do_not_matter(opened: Candidates, tmp_path: Path) -> None:
    again = open_run(make_run(tmp_path / "run", ROWS[::-1], units=7))
    other = open_candidates(again, default_step(again), COLUMNS, tmp_path / "candidates")
    for part in ("other top_fraction 0.3", "width top_fraction 0.5", "clip_score top_fraction 0.2"):
        assert uids(opened, conditions(part)) == uids(other, conditions(part))


def test_equal_uids_are_distinguished_by_their_place(tmp_path: Path) -> None:
    rows = [{**row, "uid": "0" * 32, "other": 1.0} for row in ROWS[:40]]
    run = open_run(make_run(tmp_path / "run", rows, units=1))
    candidates = open_candidates(run, default_step(run), ["other"], tmp_path / "candidates")
    kept = cut_rows(Cuts(candidates, [conditions("other top_fraction 0.3")]), 0)
    assert kept.tolist() == list(range(28, 40)), "the last places, as `threshold` decides"


@pytest.mark.parametrize("value", [0.3, 0.1, 0.25, -0.7])
def test_min_compares_in_float64_as_threshold_does(value: float) -> None:
    near = [
        np.float32(value),
        np.nextafter(np.float32(value), np.float32(9)),
        np.nextafter(np.float32(value), np.float32(-9)),
    ]
    kept = Boundary(value).keeps(np.array(near), np.uint64, np.int64)
    assert kept.tolist() == [float(v) >= value for v in near]


@pytest.mark.parametrize("dtype", [pa.float16(), pa.float32(), pa.float64()])
def test_max_keeps_its_own_value_in_the_precision_of_the_column(dtype: pa.DataType) -> None:
    stored = pa.array([0.1, 0.2], dtype).cast(pa.float32() if dtype == pa.float16() else dtype).to_numpy()
    assert Ceiling(highest(0.1, dtype)).keeps(stored).tolist() == [True, False]


def test_overlaps_are_those_of_sets(opened: Candidates) -> None:
    cuts = [conditions(f"clip_score top_fraction {f}") for f in (0.1, 0.5, 1)]
    cuts += [
        conditions("other min 3"),
        conditions("other min 99"),
        conditions("other min 2", "clip_score top_fraction 0.5"),
    ]
    kept = [uids(opened, cut) for cut in cuts]
    both = overlaps(Cuts(opened, cuts))
    assert both.tolist() == [[len(a & b) for b in kept] for a in kept]
    index = jaccard(both)
    assert index[0, 1] == len(kept[0]) / len(kept[1])
    assert math.isnan(index[4, 4])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint64])
@pytest.mark.parametrize("draw", ["spread", "few values", "sorted"])
def test_largest_is_exact(monkeypatch: pytest.MonkeyPatch, dtype: type, draw: str) -> None:
    monkeypatch.setattr("pipeline.study.kept.SAMPLE", 256)
    rng = np.random.default_rng(1)
    values = rng.integers(0, 5 if draw == "few values" else 1 << 40, 50_000).astype(dtype)
    if draw == "sorted":  # the worst order for a sample at equal distances is none
        values.sort()
    ranks = [1, 2, 777, 25_000, 25_000, 49_999, 50_000]

    def blocks() -> Any:
        return (values[start : start + 1_234] for start in range(0, len(values), 1_234))

    descending = np.sort(values)[::-1]
    expected = [(v := descending[rank - 1], int((values > v).sum()), int((values == v).sum())) for rank in ranks]
    assert largest(blocks, len(values), ranks) == expected


def test_a_sample_that_misleads_costs_a_pass_and_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.study.kept.SAMPLE", 64)
    step = 1000 // 100
    values = np.zeros(1000)
    values[::step] = np.arange(100) + 1.0  # the sample sees none of the zeros
    blocks: Callable[[], Any] = lambda: iter([values])  # noqa: E731
    assert largest(blocks, 1000, [500]) == [(0.0, 100, 900)]
