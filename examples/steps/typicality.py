"""A custom stage that is fitted to all rows. In a recipe, with examples/ on PYTHONPATH: `- steps.typicality`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.similarity import embeddings
from pipeline.step import Fitted, Stage


@dataclass(kw_only=True)
class Typicality(Fitted, Stage):
    """Measures how typical a picture is of the run: the cosine between its embedding and the mean embedding."""

    needs = ("image_embedding",)
    adds = {"typicality_score": pa.float32()}  # noqa: RUF012

    def fit(self, sample: pa.Table, rows: int) -> pa.Table:
        mean = embeddings.unit(embeddings.matrix(sample["image_embedding"])).mean(axis=0)
        return pa.table({"mean": np.asarray(mean, np.float32)})

    def use(self, fitted: pa.Table) -> None:
        self._mean = fitted["mean"].to_numpy()

    def process(self, batch: pa.Table) -> pa.Table:
        usable = embeddings.finite(batch["image_embedding"])
        vectors = embeddings.unit(embeddings.matrix(batch["image_embedding"].filter(pa.array(usable))))
        score = np.zeros(len(batch), np.float32)
        score[usable] = vectors @ embeddings.unit(self._mean[None])[0]
        return batch.append_column("typicality_score", pa.array(score, mask=~usable))
