"""What the seeds of a study can say: intervals, comparisons, power.

All arms of a budget share their seeds: the same seed gives the same first weights and the same order of positions. So a
budget is a randomised block design, arms by seeds, metric = arm + seed + noise. The noise is estimated from all arms
together, with (arms − 1)(seeds − 1) degrees of freedom; it is taken to be equal in all arms. With three seeds a single
pair has two degrees of freedom and could show next to nothing.

The question of a budget is one family of comparisons: each cut against no filter, and against a random subset of equal
size. The first says that the cut is worth making, the second that it is the score that helps and not the size. Tests
are adjusted by Holm's method (1979), and intervals by Bonferroni's, so all of them hold at once at `LEVEL`. A cut is
recommended if it is better in both; among those, the one with the highest mean. The cuts that cannot be told from it
are a second family, adjusted by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Confidence of all intervals."""
POWER = 0.8
"""The usual power of a trial (Cohen, 1988)."""
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its t interval; NaN bounds with one seed."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two arms, first minus second, with an interval that holds for its whole family."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    """Adjusted for the family."""

    @property
    def better(self) -> bool:
        return self.difference > 0 and self.p < 1 - LEVEL

    @property
    def differs(self) -> bool:
        return self.p < 1 - LEVEL


@dataclass(frozen=True)
class Noise:
    """The noise of a budget's arms, estimated from all of them."""

    sd: float
    """Standard deviation of one training, seeds' common effect aside; NaN with one seed."""
    arms: int
    seeds: int
    p_arms: float
    """Of the F test that all arms have the same mean: if it is large, the trial tells nothing apart."""

    @property
    def half(self) -> float:
        """Half the width of an interval of one mean at LEVEL, the seeds' common effect aside; NaN with one seed."""
        from scipy import stats

        df = self.freedom(self.seeds)
        return float(stats.t.ppf((1 + LEVEL) / 2, df) * self.sd / self.seeds**0.5) if df else float("nan")

    def freedom(self, seeds: int) -> int:
        return (self.arms - 1) * (seeds - 1)

    def power(self, difference: float, seeds: int, comparisons: int) -> float:
        """The probability to show a true difference of two arms, one of so many comparisons, two-sided."""
        from scipy import stats

        df = self.freedom(seeds)
        limit = stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, df)
        shift = abs(difference) / (self.sd * (2 / seeds) ** 0.5)
        return float(stats.nct.sf(limit, df, shift) + stats.nct.cdf(-limit, df, shift))

    def detectable(self, comparisons: int) -> float:
        """The least true difference that these seeds show with probability POWER; NaN with one seed."""
        if not self.sd > 0:
            return self.sd
        low, high = 0.0, self.sd
        while self.power(high, self.seeds, comparisons) < POWER:
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.power(middle, self.seeds, comparisons) < POWER else (low, middle)
        return high

    def seeds_for(self, difference: float, comparisons: int) -> int | None:
        """The least number of seeds that shows a difference with probability POWER; None beyond MOST_SEEDS, or if the
        noise is not known."""
        if not self.sd > 0 or not difference:
            return None
        low, high = 1, 2
        while self.power(difference, high, comparisons) < POWER:
            low, high = high, 2 * high
            if high > 2 * MOST_SEEDS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.power(difference, middle, comparisons) < POWER else (low, middle)
        return high if high <= MOST_SEEDS else None


def interval(values: np.ndarray) -> Interval:
    """The mean of some seeds and its t interval."""
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)


def noise_of(values: np.ndarray) -> Noise:
    """The noise of arms by seeds, float64 (arms, seeds)."""
    from scipy import stats

    arms, seeds = values.shape
    df = (arms - 1) * (seeds - 1)
    if df < 1:
        return Noise(float("nan"), arms, seeds, float("nan"))
    of_arm, of_seed = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    left = values - of_arm - of_seed + values.mean()
    variance = float((left**2).sum() / df)
    between = float(seeds * ((of_arm - values.mean()) ** 2).sum() / (arms - 1))
    p = float(stats.f.sf(between / variance, arms - 1, df)) if variance else float(between == 0)
    return Noise(variance**0.5, arms, seeds, p)


def compare(arms: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], noise: Noise) -> list[Comparison]:
    """Compares pairs of arms as one family. `arms` holds the values of each arm by seed."""
    from scipy import stats

    if not pairs:
        return []
    differences = np.array([float((arms[first] - arms[second]).mean()) for first, second in pairs])
    df = noise.freedom(noise.seeds)
    if df < 1:
        return [Comparison(*pair, d, float("nan"), float("nan"), float("nan")) for pair, d in zip(pairs, differences)]
    error = noise.sd * (2 / noise.seeds) ** 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(np.nan_to_num(differences / error, nan=0.0, posinf=np.inf, neginf=-np.inf)), df)
    half = float(stats.t.ppf(1 - (1 - LEVEL) / 2 / len(pairs), df) * error)
    adjusted = holm(p)
    return [
        Comparison(*pair, float(d), float(d - half), float(d + half), float(q))
        for pair, d, q in zip(pairs, differences, adjusted)
    ]


def holm(p: np.ndarray) -> np.ndarray:
    """P values adjusted for the family that they form (Holm, 1979)."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, steps)
    return adjusted
