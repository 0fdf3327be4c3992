from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import is_number, wrong_type
from pipeline.similarity import embeddings
from pipeline.step import Estimate, VectorFilter

_BLOCK = 256
"""Rows compared at a time with all earlier ones. Smaller blocks compute less above the diagonal."""


@dataclass(kw_only=True)
class SemanticDedup(VectorFilter):
    """Drops pictures that are semantic duplicates of others, by stored embeddings: SemDeDup (Abbas et al., 2023).

    Clusters the embeddings by spherical k-means, fitted to a sample. Within a cluster, rows are sorted by
    `keep_highest` (ties by lower uid), and a row is dropped if its cosine similarity to any earlier row is above
    1 − `eps`, as in the paper. The detail of a drop names the most similar earlier row. Rows of different clusters are
    not compared, so pairs across a cluster border are missed.

    The paper halves LAION-440M at a loss of under half a point of ImageNet accuracy (its ε, like `eps`, depends on the
    embedding model). Rows without an embedding are kept.
    """

    eps: float = 0.03
    """Maximum distance, 1 − cosine, of duplicates, from 0 to 1."""
    vector: str = "image_embedding"
    """The column of embeddings: `clip_score` with `embeddings: true` adds it."""
    keep_highest: str | None = None
    """A numeric column, such as `clip_score`: of two duplicates, the one with the higher value is kept. By default, the
    one with the lower uid is kept."""
    clusters: int | None = None
    """Number of clusters. Default: √rows, at which clustering and comparing cost the same."""
    seed: int = 0
    """Seed of k-means."""

    iterations: ClassVar[int] = 20
    per_cluster: ClassVar[int] = 64
    """Sampled vectors per centroid; faiss warns below 39."""

    def __post_init__(self) -> None:
        self.needs = (self.vector, *([self.keep_highest] if self.keep_highest else []))  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.7, 15_000, "keep assumed; the paper keeps half of LAION-440M at eps 0.03")

    def check(self) -> Iterator[tuple[str, str]]:
        if not 0 <= self.eps <= 1:
            yield "eps", f"must be from 0 to 1, found {self.eps}"
        yield from embeddings.check_clusters(self.clusters)

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        yield from super().check_columns(types)
        for problem in wrong_type(types, self.keep_highest or "", is_number, "numbers"):
            yield "keep_highest", problem

    def _k(self, rows: int) -> int:
        return self.clusters or max(1, round(rows**0.5))

    def sample_rows(self, rows: int) -> int:
        return self.per_cluster * self._k(rows)

    def fit(self, sample: np.ndarray, rows: int) -> np.ndarray:
        """Unit centroids, float32 of shape (k, d)."""
        return embeddings.spherical_kmeans(sample, self._k(rows), self.seed, self.iterations)

    def groups(self, vectors: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        return embeddings.nearest(vectors, fitted)

    def judge_group(self, rows: pa.Table, vectors: np.ndarray) -> tuple[pa.StringArray, pa.StringArray]:
        n = len(rows)
        order = np.arange(n)
        if self.keep_highest:
            value = pc.fill_null(rows[self.keep_highest].cast(pa.float64()), -np.inf).to_numpy()
            order = np.argsort(-np.nan_to_num(value, nan=-np.inf), kind="stable")  # rows are sorted by uid
        units = embeddings.unit(vectors[order])
        nearest, similarity = np.zeros(n, np.int64), np.full(n, -np.inf, np.float32)
        for low in range(0, n, _BLOCK):
            block = units[low : low + _BLOCK] @ units[: low + _BLOCK].T
            block[:, low:][~np.tri(len(block), k=-1, dtype=bool)] = -np.inf  # itself and those after it
            best = block.argmax(axis=1)
            nearest[low : low + len(block)] = best
            similarity[low : low + len(block)] = block[np.arange(len(block)), best]
        duplicate = similarity > 1 - self.eps
        uids = np.array(rows["uid"].to_pylist(), dtype=object)[order]
        reason, detail = np.full(n, None, dtype=object), np.full(n, None, dtype=object)
        reason[order[duplicate]] = self.name()
        detail[order[duplicate]] = [
            f"{uids[at]} at {cosine:.4f}" for at, cosine in zip(nearest[duplicate], similarity[duplicate])
        ]
        return pa.array(reason, pa.string()), pa.array(detail, pa.string())
