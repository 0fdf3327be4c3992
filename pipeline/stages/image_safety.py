from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.models import plugin
from pipeline.models.safety import check_score, scored, with_score
from pipeline.step import Estimate, Stage


@dataclass(kw_only=True)
class ImageSafety(Stage):
    """Scores how unsafe a picture is, with a scorer that you supply, and drops rows with a score above `max_score`
    (reason `unsafe`).

    Adds `image_unsafe_score`, 0 to 1. No classifier comes with Winnow. CommonPool (Gadre et al., 2023, section 3.2 and
    appendix E) removed unsafe pictures by the score of a classifier of CLIP embeddings. If you have a linear classifier
    of stored embeddings, two other steps need no second pass over the pictures:

        - linear_head: {head: FILE, column: unsafe_score, output: probability}
        - threshold: {column: unsafe_score, max: 0.1}
    """

    scorer: str
    """Import path of a scorer, `my_package.my_module:MyClass`. It is called without arguments once per worker, and
    returns a callable that maps a list of n pictures, uint8 RGB of shape (height, width, 3), to n scores from 0 to 1;
    NaN means no score."""
    max_score: float | None = 0.1
    """Highest score kept; null keeps all rows. The default is ours, and strict: choose your own on pictures that you
    have labelled. Rows without a score, such as pictures that cannot be decoded, are dropped as `missing`."""
    column: str = "image_unsafe_score"
    """Name of the score column."""
    runs_on: Literal["cpu", "gpu"] = "cpu"
    """What a worker occupies: `gpu` is a GPU if the cluster has one."""

    needs = ("image",)
    version = 2
    expensive = True

    def __post_init__(self) -> None:
        self.adds = {self.column: pa.float32()}  # type: ignore[misc]
        self.resource = self.runs_on  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.98, 50, "assumed", stored=4)

    def check(self) -> Iterator[tuple[str, str]]:
        if (found := plugin.problem(self.scorer)) is not None:
            yield "scorer", found
        yield from check_score(self.column, self.max_score)

    def setup(self) -> None:
        self._scorer = plugin.load(self.scorer)

    def process(self, batch: pa.Table) -> pa.Table:
        pictures = [_decoded(image.as_buffer()) for image in batch["image"]]
        decoded = np.array([picture is not None for picture in pictures], bool)
        scores = np.full(len(batch), np.nan)
        if decoded.any():
            found = [picture for picture in pictures if picture is not None]
            scores[decoded] = scored(self.scorer, self._scorer, found)
        return with_score(batch, self.column, scores, self.max_score)


def _decoded(image: pa.Buffer | None) -> np.ndarray | None:
    from trainer.pictures import decode
    from trainer.shards import CorruptSampleError

    try:
        return np.asarray(decode(image.to_pybytes() if image else b""))
    except CorruptSampleError:
        return None
