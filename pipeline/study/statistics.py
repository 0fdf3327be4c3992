"""Computes intervals, comparisons and statistical power from the seeds of a study.

All arms of a budget share their seeds: the same seed gives the same initial weights and the same order of positions. So
a budget is a randomised block design, arms by seeds: metric = arm + seed + noise. The noise is assumed to be equal in
all arms and is estimated from all of them together, with (arms − 1)(seeds − 1) degrees of freedom. A single pair of
arms with three seeds would have two degrees of freedom, too few to show almost anything.

Each cut is compared twice: with no filter, to see whether it is worth making, and with a random subset of equal size,
to see whether the score helps and not only the size. The comparisons of each kind form a family. All intervals of a
family hold simultaneously at `LEVEL`, because they use the distribution of the family's largest t statistic. For
comparisons with one control this is Dunnett's test (1955), for others its generalisation (Hothorn, Bretz and Westfall,
2008). So the intervals also hold for a cut that was picked for being the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

import numpy as np

LEVEL = 0.95
"""Confidence of all intervals."""
POWER = 0.8
"""The usual power of a trial (Cohen, 1988)."""
MOST_SEEDS = 1000
"""Most seeds that `Family.seeds_for` suggests."""
DRAWS = 100_000
"""Simulated trials that give the distribution of a family's largest t statistic: critical values are within 1%. The
seed of the simulation is fixed, so equal results give equal intervals."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with an interval at LEVEL; NaN bounds with one seed."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Noise:
    """The noise of a training, estimated from all arms of a budget."""

    sd: float
    """Standard deviation of the metric of one training, without the effect that a seed has on all arms alike; NaN with
    one seed."""
    arms: int
    seeds: int
    p_arms: float
    """p value of the F test that all arms have the same mean. If it is large, the trial cannot distinguish any arms."""

    @property
    def half(self) -> float:
        """Half the width of an arm's interval at LEVEL, without the common effect of a seed; NaN with one seed."""
        from scipy import stats

        df = self.freedom(self.seeds)
        return float(stats.t.ppf((1 + LEVEL) / 2, df) * self.sd / self.seeds**0.5) if df else float("nan")

    def freedom(self, seeds: int) -> int:
        """The degrees of freedom of the noise with so many seeds."""
        return (self.arms - 1) * (seeds - 1)


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two arms, first minus second, with an interval that holds simultaneously with those of
    its family; NaN bounds with one seed."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    """The p value, adjusted for the family."""

    def __str__(self) -> str:
        return f"{self.difference:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    @property
    def better(self) -> bool:
        return self.low > 0

    @property
    def worse(self) -> bool:
        return self.high < 0


@dataclass(frozen=True)
class Family:
    """Comparisons that answer one question, and what they could show with more seeds."""

    comparisons: list[Comparison]
    noise: Noise
    largest: np.ndarray = field(repr=False)
    """Float64 (DRAWS,): the largest absolute difference in each simulated trial without true differences, in units of
    the true standard error."""

    def ratios(self, seeds: int) -> np.ndarray:
        """The same in units of a standard error estimated with so many seeds: the largest absolute t statistics."""
        df = self.noise.freedom(seeds)
        return np.asarray(self.largest / np.sqrt(np.random.default_rng(df).chisquare(df, DRAWS) / df))

    def power(self, difference: float, seeds: int) -> float:
        """The probability that a comparison shows a true difference of this size with so many seeds."""
        from scipy import stats

        df, limit = self.noise.freedom(seeds), float(np.quantile(self.ratios(seeds), LEVEL))
        shift = abs(difference) / (self.noise.sd * (2 / seeds) ** 0.5)
        return float(stats.nct.sf(limit, df, shift) + stats.nct.cdf(-limit, df, shift))

    @property
    def detectable(self) -> float:
        """The smallest true difference that these seeds show with probability POWER; NaN with one seed."""
        sd, seeds = self.noise.sd, self.noise.seeds
        if not sd > 0:
            return sd
        low, high = 0.0, sd
        while self.power(high, seeds) < POWER:
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.power(middle, seeds) < POWER else (low, middle)
        return high

    def seeds_for(self, difference: float) -> int | None:
        """The fewest seeds that show a difference with probability POWER; None if over MOST_SEEDS, or if the difference
        is zero, or the noise zero or unknown."""
        if not self.noise.sd > 0 or not difference:
            return None
        low, high = 1, 2
        while self.power(difference, high) < POWER:
            low, high = high, 2 * high
            if high > 2 * MOST_SEEDS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.power(difference, middle) < POWER else (low, middle)
        return high if high <= MOST_SEEDS else None


def interval(values: np.ndarray) -> Interval:
    """The mean of the values of an arm by seed, float64 (seeds,), with its t interval."""
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return Interval(mean, mean - half, mean + half)


def noise_of(values: np.ndarray) -> Noise:
    """Estimates the noise from the values of all arms, float64 (arms, seeds)."""
    from scipy import stats

    arms, seeds = values.shape
    df = (arms - 1) * (seeds - 1)
    if df < 1:
        return Noise(float("nan"), arms, seeds, float("nan"))
    arm_means, seed_means = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    residuals = values - arm_means - seed_means + values.mean()
    variance = float((residuals**2).sum() / df)
    between = float(seeds * ((arm_means - values.mean()) ** 2).sum() / (arms - 1))
    p = float(stats.f.sf(between / variance, arms - 1, df)) if variance else float(between == 0)
    return Noise(variance**0.5, arms, seeds, p)


def compare(arms: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], noise: Noise) -> Family:
    """Compares pairs of arms as one family. `arms` holds the values of each arm by seed."""
    places = {name: place for place, name in enumerate(dict.fromkeys(chain(*pairs)))}
    family = Family([], noise, _largest(tuple((places[first], places[second]) for first, second in pairs)))
    error, unknown = noise.sd * (2 / noise.seeds) ** 0.5, float("nan")
    ratios = family.ratios(noise.seeds) if noise.freedom(noise.seeds) else np.array([])
    half = float(np.quantile(ratios, LEVEL)) * error if len(ratios) else unknown
    for first, second in pairs:
        d, p = float((arms[first] - arms[second]).mean()), unknown
        if len(ratios):
            # Plus one, because a finite number of draws cannot show a p of 0.
            p = float((1 + np.count_nonzero(ratios * error >= abs(d))) / (1 + DRAWS)) if d else 1.0
        family.comparisons.append(Comparison(first, second, d, d - half, d + half, p))
    return family


@lru_cache(maxsize=8)
def _largest(pairs: tuple[tuple[int, int], ...], block: int = 10_000) -> np.ndarray:
    """The largest absolute difference of the pairs, in standard errors, in each of DRAWS trials of pure noise."""
    arms = 1 + max(chain(*pairs), default=0)
    generator, found = np.random.default_rng(0), np.zeros(DRAWS)
    for start in range(0, DRAWS, block):
        noise, largest = generator.standard_normal((arms, block)), found[start : start + block]
        for first, second in pairs:
            np.maximum(largest, np.abs(noise[first] - noise[second]), out=largest)
    return found / 2**0.5
