"""A custom stage on stored embeddings. In a recipe, with examples/ on PYTHONPATH: `- steps.vector_length`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.step import Stage


@dataclass(kw_only=True)
class VectorLength(Stage):
    """Measures the Euclidean length of a stored embedding: 1 for those of `clip_score`, to fp16's rounding."""

    needs = ("image_embedding",)
    adds = {"vector_length": pa.float32()}  # noqa: RUF012

    def process(self, batch: pa.Table) -> pa.Table:
        column = batch["image_embedding"].combine_chunks()
        vectors = column.flatten().to_numpy().astype(np.float32).reshape(len(batch), -1)
        return batch.append_column("vector_length", pa.array(np.linalg.norm(vectors, axis=1), pa.float32()))
