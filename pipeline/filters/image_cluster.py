from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.similarity import embeddings
from pipeline.step import FILE, Estimate, Filter, Fitted
from pipeline.text.hashing import file_digest


@dataclass(kw_only=True)
class ImageCluster(Fitted, Filter):
    """Keeps pictures similar to those of a target set: DataComp's image-based filter (Gadre et al., 2023).

    Clusters the run's embeddings by spherical k-means, fitted to a sample. A cluster is kept if its centroid is the
    nearest one to any vector of the target set. Rows of other clusters are dropped as `image_cluster`, rows without an
    embedding as `missing`.

    DataComp uses CLIP ViT-L/14 embeddings, the training pictures of ImageNet as targets and 100,000 clusters, after a
    caption filter (English, more than one word and five characters); the clusters of the medium to xlarge pools are
    fitted to samples, too.
    """

    target: str = field(metadata=FILE)
    """A `.npy` file of target embeddings of shape (m, d), from the same model."""
    vector: str = "image_embedding"
    """The column of embeddings: `clip_score` with `embeddings: true` adds it."""
    clusters: int | None = None
    """Number of clusters. Default: √rows, at most 100,000; for 10 million rows, a CPU fits them in minutes. DataComp
    has one for every 128 rows of the small pool, fitted on 8 GPUs. With fewer, larger clusters, more rows are kept."""
    seed: int = 0
    """Seed of k-means."""

    per_cluster: ClassVar[int] = 64
    """Sampled vectors per centroid; faiss warns below 39."""

    def __post_init__(self) -> None:
        self.needs = (self.vector,)  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        # DataComp, small: 3.0 of 12.8 million rows.
        return Estimate(0.24, 15_000, "keep: DataComp's small pool, caption filter included; rate assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        try:
            embeddings.load_vectors(self.target)
        except (OSError, ValueError) as error:
            yield "target", str(error)
        yield from embeddings.check_clusters(self.clusters)

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        yield from embeddings.check_vectors(types, vector=self.vector)
        yield from (("target", problem) for problem in embeddings.check_width(types, self.vector, self.target))

    def fingerprint(self) -> object:
        return file_digest(self.target)

    def _k(self, rows: int) -> int:
        return self.clusters or min(100_000, max(1, round(rows**0.5)))

    def sample_rows(self, rows: int) -> int:
        return self.per_cluster * self._k(rows)

    def fit(self, sample: pa.Table, rows: int) -> pa.Table:
        """The centroids, and which of their clusters are wanted."""
        vectors = embeddings.matrix(sample[self.vector])
        centroids = embeddings.spherical_kmeans(vectors, self._k(rows), self.seed) if len(vectors) else vectors
        wanted = np.zeros(len(centroids), bool)
        if len(centroids):
            wanted[embeddings.nearest(embeddings.load_vectors(self.target), centroids)] = True
        width = sample.schema.field(self.vector).type.list_size
        column = pa.FixedSizeListArray.from_arrays(pa.array(centroids.reshape(-1), pa.float32()), width)
        return pa.table({"centroid": column, "wanted": pa.array(wanted)})

    def use(self, fitted: pa.Table) -> None:
        self._centroids = embeddings.matrix(fitted["centroid"])
        self._wanted = fitted["wanted"].to_numpy()

    def judge(self, batch: pa.Table) -> pa.StringArray:
        valid = embeddings.finite(batch[self.vector])
        kept = np.zeros(len(batch), bool)
        vectors = embeddings.matrix(batch[self.vector].filter(pa.array(valid)))
        if len(vectors):
            kept[valid] = self._wanted[embeddings.nearest(vectors, self._centroids)]
        reason = pc.if_else(pa.array(valid), self.name(), "missing")
        return pc.if_else(pa.array(kept), pa.scalar(None, pa.string()), reason)
