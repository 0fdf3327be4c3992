"""What the seeds of a study can say: intervals, comparisons, power.

All arms of a budget share their seeds: the same seed gives the same first weights and the same order of positions. So a
budget is a randomised block design, arms by seeds, metric = arm + seed + noise. The noise is estimated from all arms
together, with (arms − 1)(seeds − 1) degrees of freedom; it is taken to be equal in all arms. With three seeds a single
pair has two degrees of freedom and could show next to nothing.

A budget asks two questions of each cut, and the answers to a question are one family: is it better than no filter, so
that the cut is worth making, and than a random subset of equal size, so that it is the score that helps and not the
size? All intervals of a family hold at once at `LEVEL`: they use the distribution of the largest of its t statistics.
For comparisons with one control that is Dunnett's test (1955), for any others its generalisation (Hothorn, Bretz and
Westfall, 2008). So they also hold for the cut that was picked for being the best.
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
DRAWS = 100_000
"""Simulated trials, from which the distribution of the largest t of a family is taken: critical values are within 1%.
They are drawn from a fixed seed, so equal results give equal intervals."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its t interval; NaN bounds with one seed."""

    mean: float
    low: float
    high: float


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


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two arms, first minus second, with an interval that holds for its whole family; NaN
    bounds with one seed."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    """Adjusted for the family."""

    @property
    def better(self) -> bool:
        return self.low > 0

    @property
    def worse(self) -> bool:
        return self.high < 0


@dataclass(frozen=True)
class Family:
    """Comparisons that answer one question, and what more of them could show."""

    comparisons: list[Comparison]
    noise: Noise
    largest: np.ndarray = field(repr=False)
    """Float64 (DRAWS,): the largest absolute difference of simulated trials in which no arms differ, in standard errors
    that are known."""

    def ratios(self, seeds: int) -> np.ndarray:
        """The same in standard errors that are estimated with so many seeds: largest absolute t statistics."""
        df = self.noise.freedom(seeds)
        return np.asarray(self.largest / np.sqrt(np.random.default_rng(df).chisquare(df, DRAWS) / df))

    def power(self, difference: float, seeds: int) -> float:
        """The probability that one of the comparisons shows a true difference."""
        from scipy import stats

        df, limit = self.noise.freedom(seeds), float(np.quantile(self.ratios(seeds), LEVEL))
        shift = abs(difference) / (self.noise.sd * (2 / seeds) ** 0.5)
        return float(stats.nct.sf(limit, df, shift) + stats.nct.cdf(-limit, df, shift))

    @property
    def detectable(self) -> float:
        """The least true difference that these seeds show with probability POWER; NaN with one seed."""
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
        """The least number of seeds that shows a difference with probability POWER; None beyond MOST_SEEDS, or if the
        noise is not known."""
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
            # One more than counted: a finite number of draws shows no p of 0.
            p = float((1 + np.count_nonzero(ratios * error >= abs(d))) / (1 + DRAWS)) if d else 1.0
        family.comparisons.append(Comparison(first, second, d, d - half, d + half, p))
    return family


@lru_cache(maxsize=8)
def _largest(pairs: tuple[tuple[int, int], ...], block: int = 10_000) -> np.ndarray:
    """The largest absolute difference of pairs of arms, in standard errors, in trials whose arms are noise alone."""
    arms = 1 + max(chain(*pairs), default=0)
    generator, found = np.random.default_rng(0), np.zeros(DRAWS)
    for start in range(0, DRAWS, block):
        noise, mine = generator.standard_normal((arms, block)), found[start : start + block]
        for first, second in pairs:
            np.maximum(mine, np.abs(noise[first] - noise[second]), out=mine)
    return found / 2**0.5
