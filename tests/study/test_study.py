"""Whole studies of small runs: the counts, the trainings, the files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.study import arms
from pipeline.study.__main__ import main
from tests.conftest import environment
from tests.study import killed
from tests.study.killed import PLACES
from tests.study.made import make_run, samples
from tests.trainer.shards import COLOURS, jpeg, picture

STUDY = """
run: run
out: study
budgets: [64, 160]
cuts:
  - clip_score: {top_fraction: [0.3, 0.6]}
  - other: {min: [1, -1]}
"""
TRAIN = """
train:
  config: train.yaml
  seeds: 2
  evaluate: [{zeroshot: {data: heldout, name: colour}}]
  metric: colour/acc1
"""
CONFIG = """
shards: unused
output: unused
model: scorer-64
batch_size: 32
lr: 1e-3
warmup: 1
workers: 0
threads: 1
precision: fp32
"""
ROWS = samples(120)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_run(tmp_path / "run", ROWS)
    (tmp_path / "s.yaml").write_text(STUDY)
    (tmp_path / "t.yaml").write_text(STUDY + TRAIN)
    (tmp_path / "train.yaml").write_text(CONFIG)
    for name in COLOURS:
        (tmp_path / "heldout" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "heldout" / name / f"{i}.jpg").write_bytes(jpeg(picture(name, 900 + i)))
    return tmp_path


def lines(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / "study/table.parquet").to_pylist()
    return found


def test_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["s.yaml"]) == 0
    output = capsys.readouterr().out
    assert "64 samples are more" not in output
    assert "160 samples are more than 4 epochs of clip_score top 30% (4.7). Beyond" in output
    scored = [row for row in ROWS if row["clip_score"] is not None]
    top = sorted(scored, key=lambda row: -row["clip_score"])
    kept = [top[: -(-3 * len(top) // 10)], top[: -(-6 * len(top) // 10)]]
    kept += [[row for row in ROWS if row["other"] >= 1], ROWS]
    table = lines(folder)
    assert len(table) == 8
    for line, rows in zip(table, kept):
        assert line["rows"] == len(rows)
        assert line["kept"] == len(rows) / len(ROWS)
        assert line["concepts"] == len({word for row in rows for word in row["caption"].split()})
        assert line["languages"] == len({row["language"] for row in rows})
        assert line["duplicates"] == len(rows) - len({row["phash"] for row in rows})
        assert line["epochs"] == 64 / len(rows)
    overlap = {
        (r["cut"], r["other"]): r["jaccard"] for r in pq.read_table(folder / "study/overlap.parquet").to_pylist()
    }
    assert overlap["clip_score top 30%", "clip_score top 60%"] == len(kept[0]) / len(kept[1])
    page = (folder / "study/index.html").read_text()
    assert "This study only counts" in page


@pytest.mark.parametrize("rows", [0, 1])
def test_units_without_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", ROWS[:rows])
    (tmp_path / "s.yaml").write_text(STUDY)
    assert main(["s.yaml"]) == 0
    table = lines(tmp_path)
    assert [line["rows"] for line in table[:4]] == [rows] * 4
    assert [line["kept"] for line in table[:4]] == [1.0 if rows else None] * 4
    assert [line["duplicates"] for line in table[:4]] == [0] * 4


def test_concepts_as_entries_and_nothing_read_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "entries.txt").write_text("red picture\ngreen picture\nunicorn\n")
    assert main(["s.yaml", "concepts=entries.txt"]) == 0
    assert [line["concepts"] for line in lines(folder)[:4]] == [2, 2, 2, 2]
    before = (folder / "study/candidates/column-clip_score").stat().st_mtime_ns
    assert main(["s.yaml", "concepts=null", "cuts=[{clip_score: {min: 0.2}}, {width: {min: 11}}]"]) == 0
    assert (folder / "study/candidates/column-clip_score").stat().st_mtime_ns == before, "it was scanned before"
    assert "concepts" not in lines(folder)[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=nowhere", "is not the folder of a run"),
        ("after=scroe", "no step 'scroe'; did you mean score?"),
        ("cuts=[{clip_scroe: {min: 1}}]", "no column 'clip_scroe'"),
        ("cuts=[{language: {min: 1}}]", "the column 'language' must hold numbers, found string"),
        ("concepts=nowhere.txt", "concepts: cannot read 'nowhere.txt'"),
        ("cuts=[{row: {min: 1}}]", "cuts: 'row' is the place of a row"),
        ("cuts=[{unit: {min: 1}}]", "cuts: 'unit' is the place of a row"),
        ("out=run/study", "lies in the run"),
        ("out=s.yaml/study", "out: found s.yaml/study, which is or lies in a file"),
        ("train.config=nowhere.yaml", "nowhere.yaml"),
        ("train.evaluate=[{zeroshoot: {data: heldout}}]", "did you mean zeroshot?"),
        ("budgets=[16]", "budgets: found 16, expected at least one batch (train.yaml: batch_size 32)"),
        ("cuts=[{clip_score: {top_fraction: 0.05}}]", "keeps 6 samples, fewer than a batch of 32"),
    ],
)
def test_wrong_studies(folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    assert main(["t.yaml", override, "train.seeds=1"]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_two_studies_in_one_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.study.__main__ import claimed

    with claimed(folder / "study"):
        assert main(["s.yaml"]) == 2
    assert "in use by another study" in capsys.readouterr().err


def test_hostile_names_only_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", samples(20), name="<script>alert(1)</script>\u202e")
    (tmp_path / "s.yaml").write_text(STUDY)
    assert main(["s.yaml"]) == 0
    page = (tmp_path / "study/index.html").read_text()
    assert "<script>alert" not in page
    assert "\u202e" not in page


def test_a_study_trains_and_judges(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["t.yaml", "train.halving=true", "cuts=[{clip_score: {top_fraction: [0.3]}}, {other: {min: -1}}]"]
    assert main(words) == 0
    out = capsys.readouterr()
    assert "colour/acc1 after 64 samples, 2 seeds" in out.out
    assert "Successive halving saw" in out.out
    trained = pq.read_table(folder / "study/arms.parquet").to_pylist()
    # Of 64 samples: no filter (a cut that keeps all rows is the same arm), the cut, the random subset.
    assert [arm["budget"] for arm in trained].count(64) == 3 * 2
    assert len({(arm["subset"], arm["budget"], arm["seed"]) for arm in trained}) == len(trained)
    table = lines(folder)
    assert [line["seeds"] for line in table[:2]] == [2, 2]
    assert [line["seeds"] for line in table[2:]].count(None) == 1, "half of the cuts were stopped"
    gain = table[0]["metric"] - table[0]["random"]
    assert table[0]["gain_over_random"] == pytest.approx(gain)
    assert table[0]["gain_random_low"] < gain < table[0]["gain_random_high"]
    assert not list((folder / "study/training").iterdir()), "models are not kept"
    page = (folder / "study/index.html").read_text()
    assert 'href="#cut-0"' in page
    assert "no filter" in page

    before = {path: path.stat().st_mtime_ns for path in (folder / "study/arms").iterdir()}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "study/arms").iterdir()} == before
    assert lines(folder) == table, "given again, it trains nothing and says the same"
    capsys.readouterr()
    assert main([*words, "train.metric=colour/acc7"]) == 2
    assert "the tasks give no number 'colour/acc7'; they give loss" in capsys.readouterr().err


def test_subsets_are_those_of_the_cuts(folder: Path) -> None:
    from pipeline import open_run
    from pipeline.study.candidates import open_candidates
    from trainer.data import open_shards

    run = open_run(folder / "run")
    candidates = open_candidates(run, "score", ["clip_score"], folder / "c")
    numbers = arms.index_pictures(candidates, folder / "pictures")
    held = [row for t in run.scan(["caption", "uid"], "score") for row in t.to_pylist()]
    pictures = {row["uid"]: row["image"] for row in ROWS}
    places = np.array([3, 50, 51, 119])
    path, count = arms.write_subset(places, numbers, folder / "subsets")
    assert count == 4
    subset = open_shards(str(folder / "pictures"), path)
    found = sorted(subset.read(number) for number in subset.order(np.arange(4), seed=1, epoch=2).tolist())
    assert found == sorted((pictures[held[p]["uid"]], held[p]["caption"]) for p in places.tolist())
    chosen = [set(arms.random_places(candidates, numbers, size, 1).tolist()) for size in (10, 40, 120)]
    assert list(map(len, chosen)) == [10, 40, 120]
    assert chosen[0] < chosen[1] < chosen[2]
    assert chosen[0] != set(arms.random_places(candidates, numbers, 10, 2).tolist())


@pytest.mark.slow
def test_a_study_killed_at_five_places_resumes_to_the_same_table(folder: Path) -> None:
    words = ["t.yaml", "budgets=[96]", "cuts=[{clip_score: {top_fraction: 0.5}}]"]
    (folder / "train.yaml").write_text(CONFIG + "checkpoint_every: 1\n")
    assert main(words) == 0
    (folder / "study").rename(folder / "whole")
    records = []
    for place in PLACES:
        command = [sys.executable, killed.__file__, place, *words]
        process = subprocess.run(command, env=environment(), check=False)
        assert process.returncode == -signal.SIGKILL, place
        records.append(len(list((folder / "study/arms").glob("*"))))
    assert records == [0, 0, 0, 2, 6]
    assert main(words) == 0
    for name in ("table.parquet", "table.csv", "overlap.parquet", "index.html"):
        assert (folder / "study" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    trained = [pq.read_table(folder / study / "arms.parquet").drop_columns("seconds") for study in ("study", "whole")]
    assert trained[0].equals(trained[1])


@pytest.mark.slow
def test_a_training_that_fails_says_which_and_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train.yaml").write_text(CONFIG.replace("scorer-64", "no-such-model"))
    assert main(["t.yaml", "train.seeds=1"]) == 1
    error = capsys.readouterr().err
    assert "no-such-model" in error
    assert "log.txt" in error
    assert json.loads((folder / "study/candidates/pictures/pictures.json").read_text())["format"] == "winnow-pictures/1"
