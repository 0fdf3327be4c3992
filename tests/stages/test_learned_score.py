"""A mixture read from its file: what it adds up to, which files and columns it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.models.score_mixture import Curve, Direction, Mixture, load
from pipeline.stages.learned_score import LearnedScore
from tests.tables import make_batch, run_step

CURVE = Curve((0.0, 0.5, 1.0), (-2.0, 0.0, 1.0), -3.0)
VECTOR = pa.list_(pa.float16(), 2)
MIXTURE = Mixture(0.25, {"clip_score": CURVE, "image_embedding": Direction((1.0, -1.0), 0.5)})


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "m.json"
    path.write_bytes(MIXTURE.to_bytes({"run": "r"}))
    return str(path)


@pytest.mark.parametrize(
    ("score", "vector", "logit"),
    [
        (0.25, [1, 0], 0.25 - 1 + 1),  # halfway between two knots
        (0.5, [3, 4], 0.25 + 0.6 - 0.8),  # vectors count as unit vectors
        (7.0, [0, 1], 0.25 + 1 - 1),  # beyond the knots: as the last
        (-7.0, [0, 1], 0.25 - 2 - 1),
        (None, [1, 0], 0.25 - 3 + 1),  # never as a zero
        (math.nan, [1, 0], 0.25 - 3 + 1),
        (math.inf, [1, 0], 0.25 - 3 + 1),
        (0.5, None, 0.25 + 0.5),
        (0.5, [math.nan, 0], 0.25 + 0.5),
        (0.5, [0, 0], 0.25),
    ],
)
def test_the_sum(file: str, score: float | None, vector: list[float] | None, logit: float) -> None:
    batch = make_batch([{"clip_score": score}])
    vectors = pa.array([None if vector is None else np.array(vector, np.float16)], VECTOR)
    kept, drops = run_step(LearnedScore(mixture=file), batch.append_column("image_embedding", vectors))
    assert not len(drops)
    assert kept["learned_score"].to_pylist() == pytest.approx([1 / (1 + math.exp(-logit))], abs=1e-6)


def test_a_score_does_not_depend_on_the_other_rows(file: str) -> None:
    rng = np.random.default_rng(0)
    batch = make_batch([{"clip_score": float(x)} for x in rng.normal(size=300)])
    vectors = pa.array(list(rng.normal(size=(300, 2)).astype(np.float16)), VECTOR)
    batch = batch.append_column("image_embedding", vectors)
    step = LearnedScore(mixture=file)
    whole = run_step(step, batch)[0]["learned_score"]
    parts = [run_step(step, batch.slice(start, 7))[0]["learned_score"] for start in range(0, 300, 7)]
    assert whole.to_pylist() == pa.chunked_array([c for p in parts for c in p.chunks]).to_pylist()


def test_the_file_is_read_as_it_was_written(file: str) -> None:
    assert load(file) == MIXTURE
    step = LearnedScore(mixture=file, column="good_score")
    assert (step.needs, list(step.adds)) == (("clip_score", "image_embedding"), ["good_score"])
    assert step.fingerprint() == LearnedScore(mixture=file).fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "2"}, "its format is '2'"),
        ({"columns": {}}, "it has no columns"),
        ({"bias": None}, "not a mixture"),
        ({"bias": math.nan}, "NaN or infinity"),
        ({"columns": {"a": {"knots": [0], "values": [1, 2], "missing": 0}}}, "a: found 1 knots and 2 values"),
        ({"columns": {"a": {"knots": [], "values": [], "missing": 0}}}, "a: found 0 knots"),
        (
            {"columns": {"a": {"knots": [1, 0], "values": [1, 2], "missing": 0}}},
            "a: its knots must ascend",
        ),
        ({"columns": {"a": {"knots": [0], "values": [1]}}}, "'missing' is missing"),
        ({"columns": {"a": 3}}, "not a mixture"),
    ],
)
def test_an_invalid_file_is_refused(file: str, change: dict[str, Any], message: str) -> None:
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | change))
    ((key, problem),) = LearnedScore(mixture=file).check()
    assert key == "mixture"
    assert file in problem
    assert message in problem
    assert "pipeline.learn" in problem


@pytest.mark.parametrize(("name", "content"), [("none.json", None), ("cut.json", b'{"format'), ("b.json", b"\xff")])
def test_a_file_that_is_none_is_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ((key, problem),) = LearnedScore(mixture=str(tmp_path / name)).check()
    assert key == "mixture"
    assert name in problem
    assert "pipeline.learn" in problem


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"clip_score": pa.string()}, "expects numbers in 'clip_score', but the column holds string"),
        ({"image_embedding": pa.list_(pa.float16(), 512)}, "expects 2 dimensions, but 'image_embedding' has 512"),
        ({"image_embedding": pa.float32()}, "expects vectors in 'image_embedding', but the column holds float"),
        ({"clip_score": pa.int64(), "image_embedding": VECTOR}, None),
    ],
)
def test_columns_of_other_types_are_refused(file: str, types: dict[str, pa.DataType], message: str | None) -> None:
    problems = [problem for _, problem in LearnedScore(mixture=file).check_columns(types)]
    assert len(problems) == (message is not None)
    assert all(str(message) in problem for problem in problems)
