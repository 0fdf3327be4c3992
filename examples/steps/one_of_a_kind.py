"""A custom whole-run filter over vectors. In a recipe, with examples/ on PYTHONPATH: `- steps.one_of_a_kind`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.step import VectorFilter


@dataclass(kw_only=True)
class OneOfAKind(VectorFilter):
    """Keeps one row of each cell that random hyperplanes cut the embedding space into (SimHash; Charikar, 2002)."""

    planes: int = 12
    """Number of hyperplanes, from 1 to 20; there are 2 to that power of cells."""
    vector: str = "image_embedding"
    """The column of embeddings."""

    def __post_init__(self) -> None:
        self.needs = (self.vector,)  # type: ignore[misc]

    def fit(self, sample: np.ndarray, rows: int) -> np.ndarray:
        return np.zeros((1 << self.planes, 1), np.float32)  # one row per group; nothing is learned from the sample

    def groups(self, vectors: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        planes = np.random.default_rng(0).normal(size=(vectors.shape[1], self.planes))
        return (vectors @ planes > 0) @ (1 << np.arange(self.planes))

    def judge_group(self, rows: pa.Table, vectors: np.ndarray) -> tuple[pa.StringArray, pa.StringArray]:
        reasons = [None] + ["one_of_a_kind"] * (len(rows) - 1)  # rows are sorted by uid
        return pa.array(reasons, pa.string()), pa.nulls(len(rows), pa.string())
