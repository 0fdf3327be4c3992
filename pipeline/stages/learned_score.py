from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.models import score_mixture
from pipeline.models.score_mixture import Direction
from pipeline.similarity import embeddings
from pipeline.step import FILE, Estimate, Stage, check_column_name
from pipeline.text.hashing import file_digest

DECIMALS = 6


@dataclass(kw_only=True)
class LearnedScore(Stage):
    """Combines stored scores into one: the probability that a row is good, by a model that `python -m pipeline.learn`
    fitted to labels, to a list of good rows, or to training losses.

    Adds `learned_score` (0 to 1, rounded to 6 decimals). Use `threshold` to filter by it. The best entries of
    DataComp's leaderboard (Gadre et al., 2023) also combine scores. The columns that the file names must come from
    earlier steps or from the pool. If a value is null, NaN or infinite, its column contributes what the fit learned for
    missing values; if the fit saw none in that column, its average. What the probability refers to depends on the
    labels: see [Learn a filter](learning.md).
    """

    mixture: str = field(metadata=FILE)
    """The JSON file that `python -m pipeline.learn RUN` wrote."""
    column: str = "learned_score"
    """Name of the score column."""

    def __post_init__(self) -> None:
        self.adds = {self.column: pa.float32()}  # type: ignore[misc]
        try:
            self.needs = tuple(score_mixture.load(self.mixture).columns)  # type: ignore[misc]
        except (OSError, ValueError):
            self.needs = ()  # type: ignore[misc]  # check() reports the file

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 200_000, "rate assumed", stored=4)

    def check(self) -> Iterator[tuple[str, str]]:
        yield from check_column_name(self.column, "learned_score")
        try:
            score_mixture.load(self.mixture)
        except FileNotFoundError:
            yield "mixture", f"no file {self.mixture}; write it with `python -m pipeline.learn RUN`"
        except (OSError, ValueError) as error:
            yield "mixture", str(error)

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        for name, part in score_mixture.load(self.mixture).columns.items():
            dtype = types.get(name)
            if dtype is None:
                continue
            if not isinstance(part, Direction):
                if not score_mixture.is_scalar(dtype):
                    yield "mixture", f"{self.mixture} expects numbers in {name!r}, but the column holds {dtype}"
            elif not embeddings.is_vector(dtype):
                yield "mixture", f"{self.mixture} expects vectors in {name!r}, but the column holds {dtype}"
            elif dtype.list_size != len(part.weight):
                widths = f"expects {len(part.weight)} dimensions, but {name!r} has {dtype.list_size}"
                yield "mixture", f"{self.mixture} {widths}: it was fitted to another model's embeddings"

    def fingerprint(self) -> object:
        return file_digest(self.mixture)

    def setup(self) -> None:
        self._mixture = score_mixture.load(self.mixture)

    def process(self, batch: pa.Table) -> pa.Table:
        score = score_mixture.sigmoid(self._mixture.logits(batch))
        return batch.append_column(self.column, pa.array(score.round(DECIMALS), pa.float32()))
