"""Fits a mixture of scores to labelled rows and measures it by cross-fitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.learn.training_rows import SEED, Sample
from trainer.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from pipeline.models.score_mixture import Estimate, Mixture


@dataclass(frozen=True)
class Part:
    """What one column contributes."""

    column: str
    missing: float
    """Share of the training rows without a value."""
    weight: float
    """Standard deviation of its contribution to the logit, comparable to a standardised weight."""
    falling: bool
    """Whether low values of the column indicate good rows."""
    alone: Estimate
    """AUC of the column alone: of its values (low ones first if `falling`, missing ones last), or of a head fitted to
    its vectors."""
    lost: Estimate | None
    """How much the AUC of the mixture falls without the column; None if it is the only one."""


@dataclass(frozen=True)
class Findings:
    """A fitted mixture and its figures: cross-fitted, with 95% bootstrap intervals."""

    mixture: Mixture
    parts: list[Part]
    penalty: float
    auc: Estimate
    over_best: Estimate | None
    """AUC of the mixture minus the AUC of the best single score; None if all columns are vectors."""
    best: str | None
    """The column of the best single score."""
    calibration: float
    """Expected calibration error: the mean absolute difference between predicted and observed share of good rows, in
    tenths of the predicted probability."""
    logits: np.ndarray
    """The cross-fitted logit of each training row."""
    singles: dict[str, np.ndarray]
    """For each scalar column, its values, negated if `falling`; -inf where missing."""


def fit(sample: Sample, columns: Sequence[str], unlabelled: bool, seed: int = SEED) -> Findings:
    """Fits the mixture and measures it. Raises InputError for a column without values, or if nothing is learned."""
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
    # Calibrate on the cross-fitted logits (Platt, 1999), then move the prior from the shares of the sample to those of
    # the run, or to equal shares of named and unlabelled rows (King and Zeng, 2001).
    slope, shift = model.fit(logits[:, None], y, 1.0)
    sample_prior = math.log(y.sum() / (~y).sum())
    shift += (0.0 if unlabelled else math.log(sample.found[1] / sample.found[0])) - sample_prior
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
        best_ranking = model.Ranking(singles[best.column], y)
        over = model.bootstrap(lambda w: ranking.auc(w) - best_ranking.auc(w), weights, seed)
    best_column = best.column if best else None
    return Findings(mixture, parts, penalty, auc, over, best_column, calibration, logits, singles)


def _oriented(values: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, bool]:
    """The values, negated if low ones indicate good rows, -inf where missing; and whether they were negated."""
    import numpy as np

    from pipeline.models.score_mixture import Ranking

    valid = np.isfinite(values)
    falling = Ranking(values[valid], y[valid]).auc(weights[valid]) < 0.5
    return np.where(valid, -values if falling else values, -np.inf), falling


def _calibration_error(probability: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    import numpy as np

    tenth = np.minimum((probability * 10).astype(int), 9)
    gaps = np.bincount(tenth, weights * probability, 10) - np.bincount(tenth, weights * y, 10)
    return float(np.abs(gaps).sum() / weights.sum())
