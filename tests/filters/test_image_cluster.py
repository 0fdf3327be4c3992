"""What image_cluster refuses before a run. Its decisions are tested in tests/scheduler/test_vectors.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.filters.image_cluster import ImageCluster


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (np.zeros(8), "expected vectors of shape (m, d), found (8,)"),
        (np.zeros((3, 8), np.int64), "expected finite floats, found int64"),
        (None, "No such file"),
    ],
)
def test_unusable_target_sets(saved: np.ndarray | None, message: str, tmp_path: Path) -> None:
    if saved is not None:
        np.save(tmp_path / "t.npy", saved)
    ((key, problem),) = ImageCluster(target=str(tmp_path / "t.npy")).check()
    assert key == "target"
    assert message in problem
    assert "t.npy" in problem


def test_columns_and_clusters(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.ones((3, 16), np.float32))
    step = ImageCluster(target=str(tmp_path / "t.npy"), clusters=0)
    assert list(step.check()) == [("clusters", "must be from 1 to 1,000,000, found 0")]
    ((key, problem),) = step.check_columns({"image_embedding": pa.list_(pa.float16(), 8)})
    assert key == "target"
    assert "has shape (3, 16), and image_embedding has 8 dimensions" in problem
    ((key, problem),) = step.check_columns({"image_embedding": pa.list_(pa.float16())})
    assert key == "vector"
    assert "expected vectors" in problem
    assert not list(step.check_columns({"image_embedding": pa.list_(pa.float16(), 16)}))
