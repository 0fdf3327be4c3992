"""A score that is learned from labels, cut by a study, and the same cut made by a recipe."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import open_run
from pipeline.learn.__main__ import main as learn
from pipeline.study.__main__ import main
from tests import painted as runs


@pytest.mark.slow
def test_a_recipe_keeps_what_a_study_counts_for_a_learned_cut(
    painted: Path, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = next(iter(open_run(painted / "out").scan(["uid", "shade", "depth"], after="paint", units=[0])))
    rows = [row for row in table.to_pylist() if row["shade"] is not None]
    labels = [f"{row['uid']},{int(row['shade'] + row['depth'] > 1.2)}" for row in rows]
    Path("labels.csv").write_text("\n".join(["uid,label", *labels]) + "\n")
    words = ["--after", "paint", "--columns", "shade", "depth", "--labels", "labels.csv", "--out", "mixture.json"]
    assert learn([str(painted / "out"), *words]) == 0

    recipe = yaml.safe_load((painted / "r.yaml").read_text())
    at = next(i for i, step in enumerate(recipe["steps"]) if "threshold" in step)
    scored = {"learned_score": {"mixture": str(tmp_path / "mixture.json")}}
    recipe["steps"][at : at + 2] = [scored, {"threshold": {"column": "learned_score", "top_fraction": 0.25}}]
    (painted / "learned.yaml").write_text(yaml.safe_dump(recipe))
    runs.run(painted, ray_address, "learned.yaml", "run=learned", "reuse=out")

    Path("s.yaml").write_text(
        f"run: {painted}/learned\nout: study\ncuts:\n"
        "- learned_score: {top_fraction: [0.1, 0.25]}\n"
        "- learned_score: {min: 0.5}\n"
        "- learned_score: {top_fraction: 0.5}\n  depth: {min: 0.5}\n"
    )
    assert main(["s.yaml"]) == 0
    counted = {line["cut"]: line["rows"] for line in pq.read_table("study/table.parquet").to_pylist()}
    run = open_run(painted / "learned")
    assert counted["learned_score top 25%"] == run.funnel.lines["threshold"].kept
    scores = [score for table in run.scan("learned_score", after="learned_score") for score in table[2].to_pylist()]
    assert counted["learned_score ≥ 0.5"] == sum(score >= 0.5 for score in scores)
    assert 0 < counted["learned_score top 10%"] < counted["learned_score top 25%"]
    assert 0 < counted["learned_score top 50%, depth ≥ 0.5"] < counted["learned_score top 25%"] * 2 + 1
