"""Intervals, comparisons and power against figures worked out otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.study.statistics import compare, holm, interval, noise_of
from pipeline.study.table import NO_FILTER, analyse

RNG = np.random.default_rng(0)


def arms(gain: float, sd: float, seeds: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """No filter, a cut that gains, one that does not, and their random subsets; seeds shift all arms."""
    shift = rng.normal(0, 0.2, seeds)
    means = {NO_FILTER: 0.5, "cut 0": 0.5 + gain, "cut 1": 0.5, "random 10": 0.5, "random 20": 0.5}
    return {name: mean + shift + rng.normal(0, sd, seeds) for name, mean in means.items()}


SIZES = {NO_FILTER: 40, "cut 0": 10, "cut 1": 20, "random 10": 10, "random 20": 20}


def test_interval_is_the_t_interval_of_scipy() -> None:
    values = RNG.normal(size=5)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(interval(values[:1]).low)


def test_noise_of_two_arms_is_that_of_the_paired_t_test() -> None:
    values = RNG.normal(size=(2, 6))
    noise = noise_of(values)
    (found,) = compare({"a": values[0], "b": values[1]}, [("a", "b")], noise)
    expected = stats.ttest_rel(values[0], values[1])
    assert found.p == pytest.approx(expected.pvalue)
    bounds = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))
    assert noise.p_arms == pytest.approx(expected.pvalue), "F of two arms is the square of t"


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the example of R's p.adjust
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.02], [0.02]),
    ],
)
def test_holm(p: list[float], expected: list[float]) -> None:
    assert holm(np.array(p)) == pytest.approx(expected)


def test_power_is_that_of_simulated_trials() -> None:
    rng = np.random.default_rng(3)
    noise = noise_of(RNG.normal(size=(5, 4)))
    difference = noise.detectable(4)
    shown, trials = 0, 2000
    for _ in range(trials):
        values = rng.normal(0, noise.sd, (5, 4))
        values[0] += difference
        limit = stats.t.ppf(1 - 0.05 / 8, 12) * noise_of(values).sd * (2 / 4) ** 0.5
        shown += abs((values[0] - values[1]).mean()) > limit
    assert shown / trials == pytest.approx(0.8, abs=0.03)
    assert noise.seeds_for(difference, 4) == 4
    assert noise.seeds_for(difference / 2, 4) > 10
    assert noise.seeds_for(1e-9, 4) is None


def test_no_more_than_one_study_in_twenty_recommends_what_does_not_help() -> None:
    rng = np.random.default_rng(4)
    wrong = sum(analyse(1, of := arms(0, 0.05, 4, rng), SIZES, list(of)).best is not None for _ in range(300))
    assert wrong / 300 < 0.05


def test_a_cut_that_helps_is_recommended() -> None:
    rng = np.random.default_rng(5)
    found = [analyse(1, of := arms(0.3, 0.03, 4, rng), SIZES, list(of)).best for _ in range(20)]
    assert found.count(0) == 20


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_and_equal_results_raise_nothing(seeds: int) -> None:
    of = {name: np.full(seeds, 0.5) for name in SIZES}
    outcome = analyse(1, of, SIZES, list(of))
    assert outcome.best is None
    assert outcome.noise.seeds_for(0.1, 4) is None
