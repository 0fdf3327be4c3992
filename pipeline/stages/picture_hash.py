from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import imagehash
import numpy as np
import pyarrow as pa

from pipeline.fetch.decoder import FLAT
from pipeline.step import Estimate, Stage
from trainer.pictures import decode
from trainer.shards import CorruptSampleError


@dataclass(kw_only=True)
class PictureHash(Stage):
    """Adds another perceptual hash of the stored picture, for the option `column` of `near_dedup`.

    `download` already computes `phash` (by DCT; the most robust against re-encoding and resizing). The other kinds
    respond to other differences: `dhash` compares neighbouring pixels, and so separates pictures of equal composition;
    `ahash` compares pixels with their mean; `whash` uses wavelets. All have 64 bits and come from the imagehash
    library. The hash is null for a flat picture, which has no structure to hash, and for one that cannot be decoded.
    """

    kind: Literal["dhash", "ahash", "whash"] = "dhash"
    """The kind of hash, and the name of its column."""

    needs = ("image",)

    def __post_init__(self) -> None:
        self.adds = {self.kind: pa.uint64()}  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 700, "rate measured for pictures of 256 pixels", stored=8)

    def process(self, batch: pa.Table) -> pa.Table:
        hashes = pa.array([self._hash(encoded) for encoded in batch["image"].to_pylist()], pa.uint64())
        return batch.append_column(self.kind, hashes)

    def _hash(self, encoded: bytes | None) -> int | None:
        if encoded is None:
            return None
        try:
            picture = decode(encoded, 64)
        except CorruptSampleError:
            return None
        if np.ptp(np.asarray(picture.convert("L").resize((32, 32)))) <= FLAT:
            return None
        compute = {"dhash": imagehash.dhash, "ahash": imagehash.average_hash, "whash": imagehash.whash}[self.kind]
        return int(str(compute(picture)), 16)
