"""Learning a mixture of scores: its results, the inputs it refuses, and the reproducibility of its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from scipy.stats import rankdata

from pipeline import open_run
from pipeline.learn import training_rows
from pipeline.learn.__main__ import NAME, main
from pipeline.learn.fit import Findings, fit
from pipeline.models import score_mixture
from pipeline.reader import describe
from pipeline.recipe import PoolSpec, Recipe
from pipeline.scheduler.passes import PoolPass, UnitPass, commit, new_attempt
from pipeline.scheduler.run_pass import UnitWriter
from pipeline.schema import DROP, SAMPLE
from pipeline.stages.learned_score import LearnedScore
from pipeline.step import Stage, drops_table
from pipeline.storage import Store, sealed
from tests.tables import make_batch, run_step

ROWS, WIDTH = 600, 4
VECTOR = pa.list_(pa.float16(), WIDTH)


@dataclass(kw_only=True)
class Measure(Stage):
    """Stands for the steps that computed the columns."""

    needs = ("caption",)
    adds = {  # noqa: RUF012
        "match": pa.float32(),
        "noise": pa.float32(),
        "empty": pa.float64(),
        "width": pa.int32(),
        "word": pa.string(),
        "image_embedding": VECTOR,
    }


def uid(number: int) -> str:
    return f"{number * 7919 % 65_521:032x}"


def good(number: int) -> bool:
    return number % 3 == 0


def columns(n: int = ROWS) -> dict[str, pa.Array]:
    """Scores of rows of which some are good.

    `match` is higher for good rows and missing in every tenth row. `width` is close to 100 for good rows and spread
    widely for bad ones. The embeddings of good rows are shifted in one direction. `noise` is independent of quality.
    """
    rng = np.random.default_rng(0)
    is_good = np.array([good(i) for i in range(n)])
    match = (rng.normal(size=n) + 1.5 * is_good).astype(np.float32)
    match[1] = np.nan
    width = np.where(is_good, rng.integers(90, 110, n), rng.integers(10, 190, n))
    vectors = rng.normal(size=(n, WIDTH)) + is_good[:, None] * np.array([2.0, 0, 0, 0])
    return {
        "match": pa.array(match, pa.float32(), mask=np.arange(n) % 10 == 7),
        "noise": pa.array(rng.normal(size=n), pa.float32()),
        "empty": pa.nulls(n, pa.float64()),
        "width": pa.array(width, pa.int32()),
        "word": pa.array(["w"] * n),
        "image_embedding": pa.array(list(vectors.astype(np.float16)), VECTOR),
    }


def measured(folder: Path, units: int = 1, gone: Mapping[int, str] | None = None, n: int = ROWS) -> Path:
    """Writes a run of `n` rows in `units` units without Ray. Rows of `gone` are dropped before they are measured."""
    values, dropped = columns(n), gone or {}
    recipe = Recipe(name="r", pool=PoolSpec(path="p.parquet"), run=str(folder), steps=[Measure()])
    first = PoolPass("k", "pool", adds={f.name: f.type for f in SAMPLE}, root=f"{folder}/passes/pool")
    second = UnitPass("k", "measure", recipe.steps, adds=dict(Measure.adds), root=f"{folder}/passes/measure")
    for unit in range(units):
        mine = np.arange(n)[np.arange(n) % units == unit]
        rows = pa.array(np.arange(len(mine), dtype=np.int32))
        uids = [uid(i) for i in mine]
        texts = pa.table({"row": rows, "uid": uids, "url": uids, "caption": uids})
        commit(first, unit, new_attempt(unit), len(mine), texts, None, DROP.empty_table(), {})
        writer = UnitWriter(second, unit, np.arange(len(mine)))
        batch = pa.table({"unit": pa.array([unit] * len(mine), pa.int32()), "row": rows})
        for name, array in values.items():
            batch = batch.append_column(name, array.take(pa.array(mine)))
        out = pa.array([i in dropped for i in mine])
        writer.drop(drops_table(batch.filter(out), "measure", "gone"))
        writer.add(batch.filter(pa.array([i not in dropped for i in mine])))
        writer.commit({})
    for p in (first, second):
        record = sealed({"pass": p.key, "units": units})
        p.store.write(p.complete_name, record)
    about = {"name": "r", "recipe": {}, "passes": describe([first, second], recipe)}
    Store(str(folder)).write("run.json", json.dumps(about).encode())
    return folder


def table(path: Path, header: str, lines: list[str]) -> str:
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


def labels(path: Path, n: int = ROWS) -> str:
    return table(path, "uid,label", [f"{uid(i)},{int(good(i))}" for i in range(n)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(tmp_path_factory.mktemp("run"), units=3)


def findings(run: Path, path: str, names: list[str], kind: str = "labels", **options: Any) -> Findings:
    target = training_rows.read_target(kind, Path(path))
    opened = open_run(run)
    sample = training_rows.draw(opened, target, names, "measure", **options)
    return fit(sample, names, target.unlabelled)


def test_a_mixture_beats_each_of_its_scores_and_reports_their_contributions(run: Path, tmp_path: Path) -> None:
    names = ["match", "width", "noise", "image_embedding"]
    found = findings(run, labels(tmp_path / "l.csv"), names)
    part = {p.column: p for p in found.parts}
    assert all(found.auc.value > p.alone.value for p in found.parts)
    assert found.best == "match"
    assert found.over_best is not None
    assert found.over_best.low > 0
    assert found.auc.low < found.auc.value < found.auc.high
    for name in ("match", "width", "image_embedding"):
        lost = part[name].lost
        assert lost is not None
        assert lost.low > 0, name
    assert part["noise"].lost is not None
    assert part["noise"].lost.low <= 0
    assert part["match"].missing == pytest.approx(0.1 + 1 / ROWS, abs=1e-3)
    assert part["noise"].weight < min(part[name].weight for name in ("match", "width", "image_embedding"))
    assert found.calibration < 0.08
    # Medium widths are good, which neither a single cut nor a linear score can express.
    width = found.mixture.columns["width"]
    at = width.contribution(pa.chunked_array([[20, 100, 180]]))
    assert at[1] > max(at[0], at[2]) + 1


def test_cross_fitting_shows_that_random_labels_carry_nothing(run: Path, tmp_path: Path) -> None:
    """Without cross-fitting, the 12 hinge features would always fit the sample better than chance."""
    lines = [f"{uid(i)},{i % 2}" for i in range(ROWS)]
    path = table(tmp_path / "l.csv", "uid,label", lines)
    target = training_rows.read_target("labels", Path(path))
    sample = training_rows.draw(open_run(run), target, ["noise"], "measure")
    design = score_mixture.Design.of(sample.table, ["noise"])
    logits = score_mixture.cross_fit(design.features, sample.good, sample.folds, 0)
    assert score_mixture.Ranking(logits, sample.good).auc(sample.weights) < 0.56


@pytest.mark.parametrize("kind", ["labels", "positives", "losses"])
def test_each_target_ranks_good_rows_high(run: Path, kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = {
        "labels": lambda: labels(tmp_path / "t.csv"),
        "positives": lambda: table(tmp_path / "t.csv", "uid", [uid(i) for i in range(0, ROWS, 6)]),
        "losses": lambda: table(
            tmp_path / "t.csv",
            "uid,loss",
            [
                f"{uid(i)},{loss}"
                for i, loss in enumerate(rng.normal(size=ROWS) - 3 * np.array([*map(good, range(ROWS))]))
            ],
        ),
    }[kind]()
    found = findings(run, path, ["match", "width"], kind)
    scores = found.mixture.logits(pa.table({name: columns()[name] for name in ("match", "width")}))
    truth = np.array([good(i) for i in range(ROWS)])
    assert score_mixture.Ranking(scores, truth).auc(np.ones(ROWS)) > 0.85


def test_the_file_depends_only_on_rows_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = labels(tmp_path / "l.csv")

    def written(units: int, *words: str) -> bytes:
        folder = tmp_path / f"run{units}"
        if not folder.exists():
            measured(folder, units)
        command = [str(folder), "--labels", path, "--columns", "match", "width", "--vectors", "image_embedding"]
        assert main([*command, "--rows", "150", *words]) == 0
        return (folder / "report" / NAME).read_bytes()

    one = written(1)
    assert written(1) == one
    monkeypatch.setattr(training_rows, "TABLES", 2)  # joined often, as in a run of many units
    assert written(7) == one
    assert written(7, "--seed", "1") != one


def test_the_printed_step_gives_the_scores_of_the_mixture(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a mixture: mine.json"
    command = [str(run), "--labels", labels(tmp_path / "l.csv"), "--columns", "match", "--out", str(out)]
    assert main([*command, "--keep", "0.4"]) == 0
    printed = capsys.readouterr().out
    assert "precision" in printed
    assert yaml.safe_load(printed[printed.index("  - learned_score") :]) == [
        {"learned_score": {"mixture": str(out)}},
        {"threshold": {"column": "learned_score", "top_fraction": 0.4}},
    ]
    step = LearnedScore(mixture=str(out))
    assert not list(step.check_columns(open_run(run).columns("measure")))
    batch = make_batch([{"match": value} for value in (-2.0, None, 4.0)])
    low, missing, high = run_step(step, batch)[0]["learned_score"].to_pylist()
    assert low < missing < high


def test_rows_dropped_before_are_counted_not_refused(tmp_path: Path) -> None:
    run = measured(tmp_path / "run", units=2, gone={0: "gone", 5: "gone"})
    target = training_rows.read_target("labels", Path(labels(tmp_path / "l.csv")))
    sample = training_rows.draw(open_run(run), target, ["match"], "measure")
    assert sample.gone == 2
    assert sum(sample.found) == ROWS - 2


def test_a_sample_is_weighted_to_represent_all_rows(run: Path, tmp_path: Path) -> None:
    target = training_rows.read_target("labels", Path(labels(tmp_path / "l.csv")))
    sample = training_rows.draw(open_run(run), target, ["match"], "measure", rows=50)
    assert [int(sample.good.sum()), len(sample.good)] == [50, 100]
    assert sample.found == (400, 200)
    assert sample.weights[sample.good].sum() == pytest.approx(200)
    assert sample.weights.sum() == pytest.approx(600)


LABELLED = [f"{uid(i)},{int(good(i))}" for i in range(100)]


@pytest.mark.parametrize(
    ("words", "header", "lines", "message"),
    [
        (["--labels"], "uid,label", [*LABELLED, "beef,1"], "1 of 101 uids are not in this run, the first beef"),
        (["--labels"], "uid,label", [f"{uid(i)},1" for i in range(50)], "all 50 rows are good; name some of both"),
        (["--labels"], "uid,label", LABELLED[:30], "10 good rows reach measure, expected at least 20"),
        (["--labels"], "uid,label", [*LABELLED, f"{uid(0)},0"], f"{uid(0)} is both good and bad"),
        (["--labels"], "uid,label", [*LABELLED, f"{uid(200)},2"], "'label' must be 0 or 1, or true or false, found 2"),
        (["--labels"], "uid,label", [*LABELLED, f"{uid(200)},nan"], "row 101: 'label' is empty, NaN or infinite"),
        (["--labels"], "uid,label", [f"{uid(0)},yes"], "'label' holds string, expected numbers"),
        (["--labels"], "id,label", LABELLED, "no column 'uid'; expected uid, label, found id, label"),
        (["--labels"], "uid,label", [], "no rows"),
        (["--losses"], "uid,loss", [f"{uid(i)},0.5" for i in range(50)], "all 50 rows are good; they must differ"),
        (["--losses"], "uid,loss", [f"{uid(i)},inf" for i in range(50)], "row 1: 'loss' is empty, NaN or infinite"),
        (["--positives"], "uid", [uid(0)], "1 good rows reach measure"),
        (["--columns", "mach", "--labels"], "uid,label", LABELLED, "did you mean match?"),
        (["--columns", "word", "--labels"], "uid,label", LABELLED, "the column 'word' holds string, expected numbers"),
        (
            ["--columns", "empty", "--labels"],
            "uid,label",
            LABELLED,
            "the column 'empty' has no value in the training rows",
        ),
        (["--vectors", "match", "--labels"], "uid,label", LABELLED, "the column 'match' holds float, expected vectors"),
        (["--columns", "match", "--after", "mesure", "--labels"], "uid,label", LABELLED, "no step 'mesure'"),
        (["--rows", "3", "--labels"], "uid,label", LABELLED, "--rows must be at least 20"),
        (["--folds", "1", "--labels"], "uid,label", LABELLED, "--folds must be from 2 to 20"),
        (["--keep", "30", "--labels"], "uid,label", LABELLED, "--keep must be above 0 and below 1"),
    ],
)
def test_bad_input_is_refused(
    run: Path,
    words: list[str],
    header: str,
    lines: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = table(tmp_path / "t.csv", header, lines)
    out = tmp_path / "m.json"
    columns = [] if "--columns" in words or "--vectors" in words else ["--columns", "match"]
    assert main([str(run), "--out", str(out), *columns, *words, path]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("run", "name", "message"),
    [
        ("nothing", "t.csv", "is not the folder of a run"),
        ("nothing", "none.csv", "none.csv: cannot be read: No such file"),
        ("nothing", "t.parquet", "t.parquet: not a CSV or Parquet table"),
        ("s3://bucket/run", "t.csv", "is remote, and the step reads a local file: give --out"),
    ],
)
def test_missing_things_are_named(
    run: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_bytes(b"no table")
    folder = run if "://" in run else str(tmp_path / run)
    assert main([folder, "--labels", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_auc_and_precision_by_their_definitions() -> None:
    rng = np.random.default_rng(0)
    scores, y = rng.integers(0, 9, 200).astype(float), rng.random(200) < 0.4
    ranking = score_mixture.Ranking(scores, y)
    ranks = rankdata(scores)
    auc = (ranks[y].sum() - y.sum() * (y.sum() + 1) / 2) / (y.sum() * (~y).sum())
    assert ranking.auc(np.ones(200)) == pytest.approx(auc)
    twice = np.repeat(np.arange(200), 2)  # a weight of two is a row that is there twice
    doubled = score_mixture.Ranking(scores[twice], y[twice]).auc(np.ones(400))
    assert ranking.auc(np.full(200, 2.0)) == pytest.approx(doubled)
    distinct = scores + rng.random(200) / 10
    kept = y[np.argsort(-distinct)[:50]]
    precision, recall = score_mixture.Ranking(distinct, y).kept(np.ones(200), 0.25)
    assert (precision, recall) == pytest.approx((kept.mean(), kept.sum() / y.sum()))
