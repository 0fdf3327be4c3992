"""NormSim against its formulas in plain NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.stages.norm_sim import NormSim

DIMENSION = 8
VECTOR = pa.list_(pa.float16(), DIMENSION)


def batch(matrix: np.ndarray, missing: int) -> pa.Table:
    values = [None if i == missing else row.astype(np.float16) for i, row in enumerate(matrix)]
    return pa.table({"image_embedding": pa.array(values, VECTOR)})


def units(matrix: np.ndarray) -> np.ndarray:
    wide = matrix.astype(np.float16).astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@pytest.mark.parametrize("p", ["inf", "2"])
@pytest.mark.parametrize("targets", [3, 50])
def test_the_formula(p: str, targets: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, target = rng.normal(size=(40, DIMENSION)), rng.normal(size=(targets, DIMENSION)).astype(np.float16)
    np.save(tmp_path / "t.npy", target)
    step = NormSim(target=str(tmp_path / "t.npy"), p=p)  # type: ignore[arg-type]
    assert not list(step.check())
    step.setup()
    found = step.process(batch(rows, missing=7))["norm_sim_score"].to_pylist()
    similar = np.abs(units(rows) @ units(target).T)
    expected = similar.max(axis=1) if p == "inf" else np.sqrt((similar**2).sum(axis=1))
    assert found[7] is None, "a row without an embedding has no score, and not that of zeros"
    del found[7]
    np.testing.assert_allclose(found, np.delete(expected, 7), rtol=1e-5)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (np.zeros(8), "expected vectors of shape (m, d), found (8,)"),
        (np.zeros((0, 8)), "expected vectors of shape (m, d), found (0, 8)"),
        (np.zeros((3, 8), np.int64), "expected finite floats, found int64"),
        (np.full((3, 8), np.nan), "expected finite floats"),
        (np.array([{}]), "not a .npy file of numbers"),
    ],
)
def test_an_invalid_target_set_is_refused(saved: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", saved)
    ((key, problem),) = NormSim(target=str(tmp_path / "t.npy")).check()
    assert key == "target"
    assert message in problem
    assert "t.npy" in problem


def test_a_target_set_of_another_model(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.ones((3, 16), np.float32))
    step = NormSim(target=str(tmp_path / "t.npy"))
    ((key, problem),) = step.check_columns({"image_embedding": VECTOR})
    assert key == "target"
    assert "has shape (3, 16), and image_embedding has 8 dimensions" in problem
    ((key, problem),) = step.check_columns({"image_embedding": pa.string()})
    assert (key, problem) == (
        "vector",
        "the column 'image_embedding' holds string, expected vectors: a fixed-size list of floats",
    )
