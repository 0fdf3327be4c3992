from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import is_number, wrong_type
from pipeline.step import Estimate, Filter

_KINDS = ("dark", "light", "blurry", "low_information")


@dataclass(kw_only=True)
class ImageQuality(Filter):
    """Drops pictures that are too dark, overexposed, blurry or without information, by the scores that `download` and
    `read_shards` measure with `image_quality: true` (`pipeline.fetch.quality`).

    Each score is from 0 to 1, and a low one indicates the defect. A row is dropped for the first of `dark`, `light`,
    `blurry`, `low_information` whose score is below its limit, or as `missing` if it lacks one of the scores. A limit
    of 0 never drops. The defaults are those of cleanvision 0.3 (Cleanlab, 2022), which were chosen for photographs.
    Inspect the drops: many product pictures on white are nearly as light as overexposed ones.
    """

    dark: float = 0.32
    """Lowest `dark_score` kept: the brightness that 1% of the pixels exceed."""
    light: float = 0.05
    """Lowest `light_score` kept: 1 − the brightness that 95% of the pixels exceed."""
    blurry: float = 0.29
    """Lowest `blurry_score` kept."""
    low_information: float = 0.3
    """Lowest `low_information_score` kept: entropy in bits / 10."""

    needs = tuple(f"{kind}_score" for kind in _KINDS)

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.97, 1e6, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        for kind in _KINDS:
            if not 0 <= getattr(self, kind) <= 1:
                yield kind, f"must be from 0 to 1, found {getattr(self, kind)}"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        for kind in _KINDS:
            yield from ((kind, problem) for problem in wrong_type(types, f"{kind}_score", is_number, "numbers"))

    def judge(self, batch: pa.Table) -> pa.StringArray:
        reason = pa.nulls(len(batch), pa.string())
        for kind in reversed(_KINDS):
            score = batch[f"{kind}_score"]
            reason = pc.if_else(pc.less(pc.fill_null(score, 2), getattr(self, kind)), kind, reason)
        for kind in _KINDS:
            reason = pc.if_else(pc.is_null(batch[f"{kind}_score"], nan_is_null=True), "missing", reason)
        return reason

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        found = self.judge(dropped).to_pylist()
        scores = {kind: dropped[f"{kind}_score"].to_pylist() for kind in _KINDS}
        values = [np.nan if reason == "missing" else scores[str(reason)][i] for i, reason in enumerate(found)]
        return pa.array(values, pa.float64(), from_pandas=True)
