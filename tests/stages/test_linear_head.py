"""Linear heads from the usual file formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import save_file

from pipeline.stages.linear_head import LinearHead

DIMENSION = 8
VECTOR = pa.list_(pa.float16(), DIMENSION)
WEIGHT, BIAS = np.linspace(-1, 1, DIMENSION, dtype=np.float32)[None], np.array([0.5], np.float32)


def save(path: Path, **arrays: np.ndarray) -> str:
    if path.suffix == ".pth":
        torch.save({name: torch.from_numpy(a) for name, a in arrays.items()}, path)
    elif path.suffix == ".safetensors":
        save_file(arrays, path)
    else:
        np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


@pytest.mark.parametrize("name", ["h.pth", "h.safetensors", "h.npz"])
@pytest.mark.parametrize("output", ["linear", "probability"])
def test_the_formula(name: str, output: str, tmp_path: Path) -> None:
    step = LinearHead(head=save(tmp_path / name, weight=WEIGHT, bias=BIAS), column="s", output=output)  # type: ignore[arg-type]
    assert not list(step.check())
    step.setup()
    rows = np.random.default_rng(0).normal(size=(20, DIMENSION)).astype(np.float16)
    values = [None if i == 3 else row for i, row in enumerate(rows)]
    found = step.process(pa.table({"image_embedding": pa.array(values, VECTOR)}))["s"].to_pylist()
    wide = rows.astype(np.float64)
    expected = (wide / np.linalg.norm(wide, axis=1, keepdims=True)) @ WEIGHT[0] + BIAS[0]
    if output == "probability":
        expected = 1 / (1 + np.exp(-expected))
    assert found.pop(3) is None
    np.testing.assert_allclose(found, np.delete(expected, 3), atol=1e-4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight": WEIGHT}, "found weight (1, 8)"),
        ({"weight": WEIGHT[0], "bias": BIAS}, "found weight (8,), bias (1,)"),
        ({"weight": np.ones((2, 8), np.float32), "bias": BIAS}, "found weight (2, 8)"),
        ({"a.weight": WEIGHT, "b.weight": WEIGHT, "bias": BIAS}, "expected one `weight`"),
        ({"weight": WEIGHT * np.inf, "bias": BIAS}, "NaN or infinity"),
    ],
)
def test_an_invalid_head_is_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    ((key, problem),) = LinearHead(head=save(tmp_path / "h.npz", **arrays), column="s").check()
    assert key == "head"
    assert message in problem


@pytest.mark.parametrize("name", ["h.pth", "h.safetensors", "h.npz", "h.csv"])
def test_invalid_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no weights at all")
    ((key, problem),) = LinearHead(head=str(tmp_path / name), column="s").check()
    assert key == "head"
    assert "not a linear head" in problem


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"weight": Bomb()}, tmp_path / "h.pth")
    assert [key for key, _ in LinearHead(head=str(tmp_path / "h.pth"), column="s").check()] == ["head"]
    assert not (tmp_path / "ran").exists()


def test_a_head_of_another_model(tmp_path: Path) -> None:
    step = LinearHead(head=save(tmp_path / "h.npz", weight=WEIGHT, bias=BIAS), column="s")
    ((key, problem),) = step.check_columns({"image_embedding": pa.list_(pa.float16(), 512)})
    assert key == "head"
    assert "expects 8 dimensions, but image_embedding has 512" in problem
