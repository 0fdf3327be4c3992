"""The YAML of a study: its meaning, and that all of its problems are reported together."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.study.study_plan import Plan, StudyError, load
from tests.conftest import ROOT

GOOD = """
run: runs/demo
out: runs/study
budgets: [512, 256]
cuts:
  - clip_score: {top_fraction: [0.1, 0.30]}
  - clip_score: {min: 0.25}
    aesthetic_score: {min: [4, 5]}
train:
  config: train.yaml
  evaluate: [{zeroshot: {data: heldout}}]
  metric: zeroshot/heldout/acc1
"""


def read(tmp_path: Path, text: str, *overrides: str) -> Plan:
    (tmp_path / "s.yaml").write_text(text)
    return load(str(tmp_path / "s.yaml"), overrides)


def test_grids_budgets_and_overrides(tmp_path: Path) -> None:
    plan = read(tmp_path, GOOD, "train.seeds=[7, 8]", "concepts=null")
    assert [str(cut) for cut in plan.cuts] == [
        "clip_score top 10%",
        "clip_score top 30%",
        "clip_score ≥ 0.25, aesthetic_score ≥ 4",
        "clip_score ≥ 0.25, aesthetic_score ≥ 5",
    ]
    assert plan.cuts[1].recipe_lines == ["- threshold: {column: clip_score, top_fraction: 0.3}"]
    assert plan.budgets == (256, 512)
    assert plan.concepts is None
    assert plan.train is not None
    assert plan.train.seeds == (7, 8)
    assert read(tmp_path, GOOD, "train=null").train is None


@pytest.mark.parametrize(
    ("before", "after", "problems"),
    [
        ("run: runs/demo\n", "", ["run: missing"]),
        ("run: runs/demo", "rum: runs/demo", ["rum: no such key; did you mean run?", "run: missing"]),
        ("0.30", "0", ["cuts.0.clip_score.top_fraction: found 0, expected a number above 0 and at most 1"]),
        ("0.30", "1.5", ["found 1.5, expected a number above 0"]),
        ("top_fraction", "fraction", ["cuts.0.clip_score: found", "expected {min: …}, {max: …} or {top_fraction: …}"]),
        ("[4, 5]", "[]", ["cuts.1.aesthetic_score.min: found no values"]),
        ("[4, 5]", "[.nan]", ["found nan, expected a number"]),
        ("out: runs/study", "out: s3://b/study", ["expected a local folder"]),
        ("[512, 256]", "[0]", ["budgets: found [0], expected whole numbers, at least 1"]),
        ("budgets: [512, 256]\n", "", ["budgets: missing"]),
        ("512, 256", str(10**30), ["budgets: found", "below 2^63"]),
        ("[4, 5]", str(10**400), ["cuts.1.aesthetic_score.min: found", "expected a number"]),
        ("  config: train.yaml", "  config: train.yaml\n  seeds: 1000000000000", ["from 1 to 1,000"]),
        ("  config: train.yaml", "  config: train.yaml\n  workers: -1", ["train.workers: found [-1]"]),
        ("  metric: zeroshot/heldout/acc1\n", "", ["train.metric: missing"]),
        ("  config: train.yaml", "  config: train.yaml\n  seeds: 0", ["train.seeds: expected a number of seeds"]),
        ("  config: train.yaml", "  config: train.yaml\n  halving: 2", ["train.halving: found 2, expected true or"]),
        ("[{zeroshot: {data: heldout}}]", "zeroshot", ["train.evaluate: found 'zeroshot', expected a list of tasks"]),
    ],
)
def test_problems_name_line_key_and_what_is_expected(
    tmp_path: Path, before: str, after: str, problems: list[str]
) -> None:
    assert before in GOOD
    with pytest.raises(StudyError) as caught:
        read(tmp_path, GOOD.replace(before, after))
    for problem in problems:
        assert problem in str(caught.value)
    assert "s.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "cuts: 3", "- a list", "cuts: [clip_score]", "{"])
def test_a_file_that_is_not_a_study_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(StudyError):
        read(tmp_path, text)


def test_the_shipped_study_is_sound() -> None:
    plan = load(str(ROOT / "conf/study.yaml"))
    assert (len(plan.cuts), len(plan.budgets)) == (7, 2)
    assert plan.train is not None
    assert len(plan.train.seeds) == 3
