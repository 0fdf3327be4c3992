"""A mixture of stored scores: a calibrated additive model of columns, fitted to labels and read by `learned_score`.

The logit of a row is `bias` plus one contribution per column. A scalar contributes a function that is linear between a
few knots and constant outside them; a vector contributes w · x of the unit vector. A null, NaN or infinite value
contributes the column's `missing`, which is learned like the other weights, so it does not count as zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.schema import is_number, numbers
from pipeline.similarity import embeddings
from pipeline.similarity.embeddings import is_vector

FORMAT = "winnow.score_mixture/1"
QUANTILES = (0.005, 0.25, 0.5, 0.75, 0.995)
"""Quantiles of the training values at which a scalar has knots. Values beyond the outer two count as the outer two."""
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""L2 penalties tried on a hold-out inside each training fold, for features of unit variance. The smallest has almost no
effect; the largest leaves only strong scores."""
DIGITS = 6
"""Significant digits of a stored weight: more would store the rounding of sums."""


@dataclass(frozen=True)
class Curve:
    """Contribution of a scalar column in logits: `values` at `knots` (ascending), linear between, constant outside."""

    knots: tuple[float, ...]
    values: tuple[float, ...]
    missing: float

    def contribution(self, column: pa.ChunkedArray) -> np.ndarray:
        x = scalars(column)
        valid = np.isfinite(x)
        return np.where(valid, np.interp(np.where(valid, x, self.knots[0]), self.knots, self.values), self.missing)


@dataclass(frozen=True)
class Direction:
    """Contribution of a column of vectors in logits: `weight` · x for the unit vector x."""

    weight: tuple[float, ...]
    missing: float

    def contribution(self, column: pa.ChunkedArray) -> np.ndarray:
        valid, vectors = embeddings.finite_units(column)
        logits = np.full(len(column), self.missing)
        # einsum sums each row in a fixed order, whatever the number of rows. A matrix product may not.
        logits[valid] = np.einsum("nd,d->n", vectors.astype(np.float64), np.array(self.weight))
        return logits


@dataclass(frozen=True)
class Mixture:
    """An additive model. `columns` are the columns that it reads, in the order in which it sums them."""

    bias: float
    columns: Mapping[str, Curve | Direction]

    def logits(self, table: pa.Table) -> np.ndarray:
        """The logit of each row: float64 of shape (n,)."""
        total = np.full(len(table), self.bias)
        for name, part in self.columns.items():
            total += part.contribution(table[name])
        return total

    def scaled(self, factor: float, offset: float) -> Mixture:
        """The mixture with logits `factor` · logits + `offset`."""

        def times(part: Curve | Direction) -> Curve | Direction:
            if isinstance(part, Curve):
                return Curve(part.knots, tuple(factor * v for v in part.values), factor * part.missing)
            return Direction(tuple(factor * w for w in part.weight), factor * part.missing)

        return Mixture(factor * self.bias + offset, {name: times(part) for name, part in self.columns.items()})

    def to_bytes(self, about: Mapping[str, Any]) -> bytes:
        """The mixture as JSON, with `about` for people. Equal mixtures give equal bytes."""
        columns: dict[str, dict[str, Any]] = {}
        for name, part in self.columns.items():
            if isinstance(part, Curve):
                columns[name] = {"knots": part.knots, "values": [*map(_rounded, part.values)]}
            else:
                columns[name] = {"weight": [*map(_rounded, part.weight)]}
            columns[name]["missing"] = _rounded(part.missing)
        content = {"format": FORMAT, "about": about, "bias": _rounded(self.bias), "columns": columns}
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def load(path: str | Path) -> Mixture:
    """Reads a file written by `Mixture.to_bytes`. Raises OSError, or ValueError with the file and the problem."""
    data = Path(path).read_bytes()
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {FORMAT!r}")
        columns: dict[str, Curve | Direction] = {}
        for name, part in content["columns"].items():
            if "weight" in part:
                columns[name] = Direction(_numbers(part["weight"]), _number(part["missing"]))
                continue
            curve = Curve(_numbers(part["knots"]), _numbers(part["values"]), _number(part["missing"]))
            if not curve.knots or len(curve.knots) != len(curve.values):
                found = f"{len(curve.knots)} knots and {len(curve.values)} values"
                raise ValueError(f"{name}: found {found}, expected equally many and at least one")
            if any(a >= b for a, b in pairwise(curve.knots)):
                raise ValueError(f"{name}: its knots must ascend")
            columns[name] = curve
        if not columns:
            raise ValueError("it has no columns")
        return Mixture(_number(content["bias"]), columns)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        cure = "write it with `python -m pipeline.learn RUN`"
        raise ValueError(f"{path}: not a mixture of scores: {problem[:200]}; {cure}") from None


def scalars(column: pa.ChunkedArray) -> np.ndarray:
    """A numeric or boolean column as float64, NaN for null."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    return np.array(numbers(column))


def is_scalar(dtype: pa.DataType) -> bool:
    return is_number(dtype) or pa.types.is_boolean(dtype)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(map(_number, values))


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("it holds NaN or infinity")
    return number


# --- Fitting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """The features of the training rows, and how weights on them become a mixture.

    A scalar with k knots has k − 1 features: its value within the outer knots, and its excess over each inner one. A
    vector of d dimensions has d features. A column with missing values has one more, which marks them. All features are
    centred and have about unit variance, so that one penalty suits all.
    """

    features: np.ndarray
    """float64 of shape (n, p)."""
    parts: Mapping[str, tuple[slice, Callable[[np.ndarray], tuple[Curve | Direction, float]]]]
    """For each column: the slice of its features, and a function from their weights to its part of the mixture and its
    share of the bias."""

    @classmethod
    def of(cls, table: pa.Table, columns: Sequence[str]) -> Design:
        """The features of these columns of a table. Raises ValueError for a column without a single value."""
        blocks: list[np.ndarray] = []
        parts = {}
        at = 0
        for name in columns:
            make = _vector_block if is_vector(table[name].type) else _scalar_block
            try:
                block, to_part = make(table[name])
            except ValueError as error:
                raise ValueError(f"the column {name!r} {error}") from None
            parts[name] = (slice(at, at + block.shape[1]), to_part)
            at += block.shape[1]
            blocks.append(block)
        return cls(np.concatenate(blocks, axis=1), parts)

    def mixture(self, weights: np.ndarray, bias: float) -> Mixture:
        columns: dict[str, Curve | Direction] = {}
        for name, (where, to_part) in self.parts.items():
            columns[name], share = to_part(weights[where])
            bias += share
        return Mixture(bias, columns)

    def without(self, names: Sequence[str]) -> np.ndarray:
        """The features of the other columns."""
        kept = [self.features[:, where] for name, (where, _) in self.parts.items() if name not in names]
        return np.concatenate(kept, axis=1)


def _scalar_block(column: pa.ChunkedArray) -> tuple[np.ndarray, Callable[[np.ndarray], tuple[Curve, float]]]:
    x = scalars(column)
    valid = np.isfinite(x)
    if not valid.any():
        raise ValueError("has no value in the training rows; leave it out of `--columns`")
    # Quantiles that are values of the column, so they do not depend on how the mean of two values is rounded.
    knots = np.unique(np.quantile(x[valid], QUANTILES, method="inverted_cdf"))
    basis = _hinges(x[valid], knots)
    mean, scale = basis.mean(axis=0), _scale(basis)
    block = np.zeros((len(x), basis.shape[1]))
    block[valid] = (basis - mean) / scale
    block, indicator = _with_indicator(block, valid)

    def part(weights: np.ndarray) -> tuple[Curve, float]:
        at_knots = ((_hinges(knots, knots) - mean) / scale) @ weights[: len(mean)]
        missing, present = indicator(weights)
        return Curve(tuple(knots.tolist()), tuple((at_knots + present).tolist()), missing), 0.0

    return block, part


def _vector_block(column: pa.ChunkedArray) -> tuple[np.ndarray, Callable[[np.ndarray], tuple[Direction, float]]]:
    valid, units = embeddings.finite_units(column)
    if not valid.any():
        raise ValueError("has no vector in the training rows; leave it out of `--vectors`")
    vectors = units.astype(np.float64)
    mean, scale = vectors.mean(axis=0), 1 / math.sqrt(vectors.shape[1])  # one scale, to preserve directions
    block = np.zeros((len(column), vectors.shape[1]))
    block[valid] = (vectors - mean) / scale
    block, indicator = _with_indicator(block, valid)

    def part(weights: np.ndarray) -> tuple[Direction, float]:
        weight = weights[: len(mean)] / scale
        missing, present = indicator(weights)
        shift = present - float(mean @ weight)  # added to the bias, so subtracted from `missing`
        return Direction(tuple(weight.tolist()), missing - shift), shift

    return block, part


def _with_indicator(
    block: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, Callable[[np.ndarray], tuple[float, float]]]:
    """Appends a feature that marks missing values, if there are any. Also returns a function from the weights of the
    block to the contributions of this feature for a missing and a present value."""
    share = 1 - valid.mean()
    if share == 0:
        return block, lambda weights: (0.0, 0.0)
    scale = math.sqrt(share * (1 - share))
    column = ((~valid) - share) / scale
    block = np.concatenate([block, column[:, None]], axis=1)
    return block, lambda weights: (float(weights[-1] * (1 - share) / scale), float(-weights[-1] * share / scale))


def _hinges(x: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """The value within the outer knots, then its excess over each inner knot; no features for a constant column."""
    x = np.clip(x, knots[0], knots[-1])[:, None]
    return np.maximum(x - knots[None, :-1], 0)


def _scale(basis: np.ndarray) -> np.ndarray:
    deviation = basis.std(axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def fit(features: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Weights of shape (p,) and a bias that minimise Σ log loss + penalty / 2 · ‖weights‖². `labels`: bool (n,)."""
    import torch

    from trainer.evaluate import logistic

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the sums of a matrix product depend on the number of threads
    try:
        x, y = torch.from_numpy(np.ascontiguousarray(features)), torch.from_numpy(labels.astype(np.int64))
        # The two classes get weights ±w/2, whose squares sum to half of w's, so the penalty is doubled.
        weights, biases = logistic.fit(x, y, 2, 2 * penalty)
    finally:
        torch.set_num_threads(threads)
    return (weights[1] - weights[0]).numpy(), float(biases[1] - biases[0])


def choose_penalty(features: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """The penalty of `PENALTIES` with the lowest log loss on a tenth of each class held out."""
    import torch

    from trainer.evaluate import logistic

    held = logistic.hold_out(torch.from_numpy(labels.astype(np.int64)), seed).numpy()
    losses = []
    for penalty in PENALTIES:
        weights, bias = fit(features[~held], labels[~held], penalty)
        logits = np.einsum("np,p->n", features[held], weights) + bias
        losses.append(log_loss(logits, labels[held]))
    return PENALTIES[int(np.argmin(losses))]


def cross_fit(
    features: np.ndarray, labels: np.ndarray, folds: np.ndarray, seed: int, penalty: float | None = None
) -> np.ndarray:
    """The logit of each row, by a fit to the rows of the other folds. Without `penalty`, each fit chooses its own."""
    logits = np.empty(len(labels))
    for fold in np.unique(folds):
        inside = folds != fold
        chosen = penalty or choose_penalty(features[inside], labels[inside], seed)
        weights, bias = fit(features[inside], labels[inside], chosen)
        logits[~inside] = np.einsum("np,p->n", features[~inside], weights) + bias
    return logits


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log likelihood, in nats."""
    return float(np.logaddexp(0, np.where(labels, -logits, logits)).mean())


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))


# --- Measuring --------------------------------------------------------------------------------------------------------


class Ranking:
    """Rows grouped by score. Computes AUC, precision and recall for any weights of the rows in linear time."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """`scores`: float of shape (n,), with the lowest value for rows without a score. `labels`: bool (n,)."""
        _, self._group = np.unique(scores, return_inverse=True)
        self._labels = labels

    def auc(self, weights: np.ndarray) -> float:
        """The probability that a positive row has a higher score than a negative one; ties count half."""
        positive = np.bincount(self._group, weights * self._labels)
        negative = np.bincount(self._group, weights * ~self._labels)
        below = np.cumsum(negative) - negative / 2
        total = positive.sum() * negative.sum()
        return float(positive @ below / total) if total else math.nan

    def kept(self, weights: np.ndarray, share: float) -> tuple[float, float]:
        """Precision and recall if the `share` of rows with the highest scores is kept, and ties at the cut in part."""
        all_rows = np.bincount(self._group, weights)[::-1]
        positive = np.bincount(self._group, weights * self._labels)[::-1]
        room = share * all_rows.sum() - (np.cumsum(all_rows) - all_rows)
        part = np.divide(room, all_rows, out=np.zeros_like(room), where=all_rows > 0).clip(0, 1)
        caught, kept = float(part @ positive), float(part @ all_rows)
        return (caught / kept if kept else math.nan), (caught / positive.sum() if positive.any() else math.nan)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval, from the bootstrap over rows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(figure: Callable[[np.ndarray], float], weights: np.ndarray, seed: int, resamples: int = 200) -> Estimate:
    """The figure for the rows as they are, and its percentile interval over resamples (Efron, 1979).

    `figure` maps weights of shape (n,) to a number. To compare two figures, bootstrap their difference as one figure.
    Calls with equal seeds use the same resamples.
    """
    rng = np.random.default_rng(seed)
    n = len(weights)
    figures = [figure(weights * np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(resamples)]
    low, high = np.nanquantile(figures, [0.025, 0.975])
    return Estimate(figure(weights), float(low), float(high))
