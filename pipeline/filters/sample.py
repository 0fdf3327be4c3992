from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from pipeline.hashing import uniform
from pipeline.step import Estimate, Filter


@dataclass(kw_only=True)
class Sample(Filter):
    """Keeps a random fraction of the rows: the control arm of a study.

    A row is kept if u < fraction, where u is a hash of seed and uid. So with one seed a smaller sample is part of a
    larger one, and a second `sample` in a recipe wants a seed of its own. About 0.7 µs a row.
    """

    needs = ("uid",)

    fraction: float
    """Share of the rows to keep, between 0 and 1; the count kept is binomial, not exact."""
    seed: int = 0
    """Another seed draws another sample."""

    def estimate(self, rows: float) -> Estimate:
        return Estimate(self.fraction, 500_000, "keep as given")

    def check(self) -> Iterator[tuple[str, str]]:
        if not 0 < self.fraction <= 1:
            yield "fraction", f"must be above 0 and at most 1, found {self.fraction}"

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pa.array(uniform(batch["uid"], seed=self.seed, purpose="sample") < self.fraction)
