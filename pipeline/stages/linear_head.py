from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.similarity import embeddings
from pipeline.step import FILE, Estimate, Stage, check_column_name
from pipeline.text.hashing import file_digest


@dataclass(kw_only=True)
class LinearHead(Stage):
    """Scores stored embeddings with a linear head: aesthetics, watermarks, unsafe pictures, or your own classifier.

    The score of an embedding with unit vector x is w·x + b, or the logistic function of that, rounded to 4 decimals.
    Use `threshold` to filter by it. LAION's aesthetic heads (such as `sa_0_4_vit_b_32_linear.pth` for ViT-B/32;
    LAION-Aesthetics, 2022) give about 1 to 10 and were used with thresholds from 4.5 to 6.5. A row without an embedding
    gets a null score.
    """

    head: str = field(metadata=FILE)
    """A file with `weight` of shape (1, d) and `bias` of shape (1,): `.pth`, `.pt`, `.safetensors` or `.npz`."""
    column: str
    """Name of the score column, such as `aesthetic_score`."""
    vector: str = "image_embedding"
    """The column of embeddings, from the model that the head was trained on."""
    output: Literal["linear", "probability"] = "linear"
    """`linear`: w·x + b; `probability`: its logistic function, from 0 to 1."""

    def __post_init__(self) -> None:
        self.needs = (self.vector,)  # type: ignore[misc]
        self.adds = {self.column: pa.float32()}  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 200_000, "rate assumed", stored=4)

    def check(self) -> Iterator[tuple[str, str]]:
        yield from check_column_name(self.column, "aesthetic_score")
        try:
            embeddings.load_head(self.head)
        except (OSError, ValueError) as error:
            yield "head", str(error)

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        problems = list(embeddings.check_vectors(types, vector=self.vector))
        yield from problems
        width = len(embeddings.load_head(self.head).weight)
        if self.vector in types and not problems and (found := types[self.vector].list_size) != width:
            yield "head", f"{self.head} expects {width} dimensions, but {self.vector} has {found}"

    def fingerprint(self) -> object:
        return file_digest(self.head)

    def setup(self) -> None:
        self._head = embeddings.load_head(self.head)

    def process(self, batch: pa.Table) -> pa.Table:
        valid, vectors = embeddings.finite_units(batch[self.vector])
        score = np.zeros(len(batch))
        # einsum sums each row in a fixed order. A matrix product may choose another order for another number of rows.
        score[valid] = np.einsum("nd,d->n", vectors, self._head.weight) + self._head.bias
        if self.output == "probability":
            score = 1 / (1 + np.exp(-score))
        return batch.append_column(self.column, pa.array(score.round(4), pa.float32(), mask=~valid))
