"""Fits a mixture of scores to labelled rows and judges it by cross-fitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.learn.training_rows import (
    SEED,
    InputError,
    Sample,
)

if TYPE_CHECKING:
    import numpy as np

    from pipeline.models.score_mixture import Estimate, Mixture


@dataclass(frozen=True)
class Part:
    """What one column contributes."""

    column: str
    missing: float
    """Share of the rows without a value."""
    weight: float
    """Standard deviation of its contribution, in logits: the size of a standardised weight."""
    falling: bool
    """Whether the column alone ranks good rows low."""
    alone: Estimate
    """AUC of the column by itself: of the value (low ones first if `falling`, missing last), or of a cross-fitted head
    on the vectors."""
    lost: Estimate | None
    """By how much the AUC falls if the mixture is fitted without it; None if it is the only column."""


@dataclass(frozen=True)
class Findings:
    """A fitted mixture and its figures, all cross-fitted, with 95% bootstrap intervals."""

    mixture: Mixture
    parts: list[Part]
    penalty: float
    auc: Estimate
    over_best: Estimate | None
    """AUC of the mixture minus that of the best single score; None if there is no score beside the vectors."""
    best: str | None
    calibration: float
    """Expected calibration error: mean distance between predicted and observed share of good rows, in tenths."""
    logits: np.ndarray
    """The cross-fitted logit of each training row."""
    singles: dict[str, np.ndarray]
    """For each scalar column the values by which it ranks the training rows, highest first."""


def fit(sample: Sample, columns: Sequence[str], unlabelled: bool, seed: int = SEED) -> Findings:
    """Fits the mixture and measures it. Raises InputError for a column without a value, or if nothing is learned."""
    import numpy as np

    from pipeline.models import score_mixture as model

    y, weights = sample.good, sample.weights
    try:
        design = model.Design.of(sample.table, columns)
    except ValueError as error:
        raise InputError(str(error)) from None
    x = design.features
    logits = model.cross_fit(x, y, sample.folds, seed)
    ranking = model.Ranking(logits, y)
    auc = model.bootstrap(ranking.auc, weights, seed)
    if not auc.value > 0.5:
        raise InputError(f"the columns {', '.join(columns)} do not tell good rows from bad: cross-fitted AUC {auc}")
    penalty = model.choose_penalty(x, y, seed)
    mixture = design.mixture(*model.fit(x, y, penalty))
    # Calibrated on logits that no fit has seen (Platt, 1999), then moved from the shares of the sample to those of the
    # run, or to equal shares of named and unlabelled rows (King and Zeng, 2001).
    slope, shift = model.fit(logits[:, None], y, 1.0)
    drawn = math.log(y.sum() / (~y).sum())
    shift += (0.0 if unlabelled else math.log(sample.found[1] / sample.found[0])) - drawn
    mixture = mixture.scaled(float(slope[0]), shift)
    logits = float(slope[0]) * logits + shift
    balanced = np.where(y, sample.found[0] / sample.found[1], 1.0) if unlabelled else 1.0
    calibration = _calibration_error(model.sigmoid(logits), y, weights * balanced)

    parts, singles = [], {}
    for name in columns:
        where, _ = design.parts[name]
        contribution = mixture.columns[name].contribution(sample.table[name])
        if model.is_vector(sample.table[name].type):
            alone = model.cross_fit(x[:, where], y, sample.folds, seed, penalty)
            missing, falling = sample.table[name].null_count / len(y), False
        else:
            alone, falling = _oriented(model.scalars(sample.table[name]), y, weights)
            missing = float(np.isneginf(alone).mean())
            singles[name] = alone
        lost = None
        if len(columns) > 1:
            rest = model.Ranking(model.cross_fit(design.without([name]), y, sample.folds, seed, penalty), y)
            lost = model.bootstrap(lambda w, rest=rest: ranking.auc(w) - rest.auc(w), weights, seed)  # type: ignore[misc]
        single = model.bootstrap(model.Ranking(alone, y).auc, weights, seed)
        parts.append(Part(name, missing, float(contribution.std()), falling, single, lost))
    best = max((p for p in parts if p.column in singles), key=lambda p: p.alone.value, default=None)
    over = None
    if best:
        of_best = model.Ranking(singles[best.column], y)
        over = model.bootstrap(lambda w: ranking.auc(w) - of_best.auc(w), weights, seed)
    best_name = best.column if best else None
    return Findings(mixture, parts, penalty, auc, over, best_name, calibration, logits, singles)


def _oriented(values: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, bool]:
    """The values as a score whose high end is the good one, the lowest where missing, and whether it was turned."""
    import numpy as np

    from pipeline.models.score_mixture import Ranking

    there = np.isfinite(values)
    falling = Ranking(values[there], y[there]).auc(weights[there]) < 0.5
    return np.where(there, -values if falling else values, -np.inf), falling


def _calibration_error(probability: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    import numpy as np

    tenth = np.minimum((probability * 10).astype(int), 9)
    gaps = np.bincount(tenth, weights * probability, 10) - np.bincount(tenth, weights * y, 10)
    return float(np.abs(gaps).sum() / weights.sum())
