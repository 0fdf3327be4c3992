from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.similarity import embeddings
from pipeline.step import FILE, Estimate, Stage, check_column_name
from pipeline.text.hashing import file_digest

_BLOCK = 4096


@dataclass(kw_only=True)
class NormSim(Stage):
    """Measures how close a picture is to a target set, from stored embeddings: NormSim (Wang et al., NeurIPS 2024).

    For unit vectors f(x) of the row and t of the targets, `p: inf` gives max |f(x)·t| (0 to 1), and `p: 2` gives
    √Σ(f(x)·t)² over the targets (0 to √m for m targets). The paper uses the training pictures of ImageNet or of
    DataComp's 24 tasks as targets and keeps the highest scores; use `threshold` for this. A row without an embedding
    gets a null score.
    """

    target: str = field(metadata=FILE)
    """A `.npy` file of target embeddings of shape (m, d), from the same model."""
    p: Literal["inf", "2"] = "inf"
    """The norm over the target set."""
    vector: str = "image_embedding"
    """The column of embeddings: `clip_score` with `embeddings: true` adds it."""
    column: str = "norm_sim_score"
    """Name of the score column."""

    def __post_init__(self) -> None:
        self.needs = (self.vector,)  # type: ignore[misc]
        self.adds = {self.column: pa.float32()}  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 10_000, "rate assumed, for 10,000 targets of 512 dimensions", stored=4)

    def check(self) -> Iterator[tuple[str, str]]:
        try:
            embeddings.load_vectors(self.target)
        except (OSError, ValueError) as error:
            yield "target", str(error)
        yield from check_column_name(self.column, "norm_sim_score")

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        yield from embeddings.check_vectors(types, vector=self.vector)
        yield from (("target", problem) for problem in embeddings.check_width(types, self.vector, self.target))

    def fingerprint(self) -> object:
        return file_digest(self.target)

    def setup(self) -> None:
        targets = embeddings.unit(embeddings.load_vectors(self.target))
        # ‖T f‖ = ‖R f‖ for T = QR, and R has at most d rows, whatever the number of targets.
        self._targets: np.ndarray = targets if self.p == "inf" else np.asarray(np.linalg.qr(targets, mode="r"))

    def process(self, batch: pa.Table) -> pa.Table:
        valid, vectors = embeddings.finite_units(batch[self.vector])
        score = np.zeros(len(batch), np.float32)
        if self.p == "2":
            score[valid] = np.linalg.norm(vectors @ self._targets.T, axis=1)
        else:
            best = np.zeros(len(vectors), np.float32)
            for low in range(0, len(self._targets), _BLOCK):
                block = np.abs(vectors @ self._targets[low : low + _BLOCK].T)
                best = np.maximum(best, block.max(axis=1, initial=0))
            score[valid] = best
        return batch.append_column(self.column, pa.array(score, pa.float32(), mask=~valid))
