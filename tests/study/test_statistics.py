"""Intervals, comparisons and power, against SciPy and simulated trials."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pipeline.study.statistics import Family, Noise, compare, interval, noise_of
from pipeline.study.study_plan import Condition, Cut, Plan
from pipeline.study.table import NO_FILTER, Outcome, analyse, verdict

RNG = np.random.default_rng(0)


def arms(gain: float, sd: float, seeds: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Results of no filter, of a cut that helps by `gain`, of one that does not, and of random subsets as large as the
    cuts. Each seed shifts all arms equally."""
    shift = rng.normal(0, 0.2, seeds)
    means = {NO_FILTER: 0.5, "cut 0": 0.5 + gain, "cut 1": 0.5, "random 10": 0.5, "random 20": 0.5}
    return {name: mean + shift + rng.normal(0, sd, seeds) for name, mean in means.items()}


SIZES = {NO_FILTER: 40, "cut 0": 10, "cut 1": 20, "random 10": 10, "random 20": 20}


def analysed(values: dict[str, np.ndarray], sizes: dict[str, int] = SIZES) -> Outcome:
    return analyse(1, values, sizes, list(values))


def test_interval_is_the_t_interval_of_scipy() -> None:
    values = RNG.normal(size=5)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(interval(values[:1]).low)


def test_noise_of_two_arms_is_that_of_the_paired_t_test() -> None:
    values = RNG.normal(size=(2, 6))
    noise = noise_of(values)
    [found] = compare({"a": values[0], "b": values[1]}, [("a", "b")], noise).comparisons
    expected = stats.ttest_rel(values[0], values[1])
    assert found.p == pytest.approx(expected.pvalue, rel=0.02)
    bounds = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), rel=0.02)
    assert noise.p_arms == pytest.approx(expected.pvalue), "F of two arms is the square of t"


@pytest.mark.parametrize(("cuts", "each", "seeds"), [(1, 6, 11), (3, 4, 5), (6, 7, 8)])
def test_many_cuts_and_one_control_are_dunnetts_test(cuts: int, each: int, seeds: int) -> None:
    samples = RNG.normal(size=(cuts + 1, each))
    expected = stats.dunnett(*samples[1:], control=samples[0], random_state=np.random.default_rng(0))
    width = expected.confidence_interval(0.95).high - samples[1:].mean(axis=1) + samples[0].mean()
    limit = width[0] / (samples.var(axis=1, ddof=1).mean() * 2 / each) ** 0.5
    names = [NO_FILTER, *(f"cut {n}" for n in range(cuts))]
    noise = noise_of(RNG.normal(size=(cuts + 1, seeds)))
    assert noise.freedom(seeds) == (cuts + 1) * (each - 1), "so the limits are the same"
    family = compare({n: RNG.normal(size=seeds) for n in names}, [(n, NO_FILTER) for n in names[1:]], noise)
    assert np.quantile(family.ratios(seeds), 0.95) == pytest.approx(limit, rel=0.01)


def test_power_is_that_of_simulated_trials() -> None:
    rng = np.random.default_rng(3)
    names = [NO_FILTER, *(f"cut {n}" for n in range(4))]
    pairs = [(name, NO_FILTER) for name in names[1:]]

    def trial(gain: float) -> Family:
        values = rng.normal(0, 1, (5, 4))
        values[1] += gain
        return compare(dict(zip(names, values)), pairs, noise_of(values))

    family = replace(trial(0), noise=Noise(1, 5, 4, 1))
    difference = family.detectable
    shown = [trial(difference).comparisons[0].better for _ in range(400)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.07)
    assert family.seeds_for(difference) == 4
    assert family.seeds_for(difference / 2) > 10  # type: ignore[operator]
    assert family.seeds_for(1e-9) is None


def test_no_more_than_one_study_in_twenty_recommends_what_does_not_help() -> None:
    rng = np.random.default_rng(4)
    wrong = sum(analysed(arms(0, 0.05, 4, rng)).best is not None for _ in range(300))
    assert wrong / 300 < 0.05


def test_the_interval_of_the_best_of_many_cuts_holds() -> None:
    """The highest of many gains overestimates the true one, so an interval that ignores the choice is too narrow."""
    rng, holds, holds_alone = np.random.default_rng(6), [], []
    names = [NO_FILTER, *(f"cut {n}" for n in range(8))]
    sizes = dict.fromkeys(names, 10) | {NO_FILTER: 20}
    for _ in range(300):
        values = {name: rng.normal(0, 0.1, 3) for name in names}
        outcome = analysed(values, sizes)
        best = max(outcome.over_all.comparisons, key=lambda c: c.difference)
        holds.append(best.low < 0 < best.high)
        [alone] = compare(values, [(best.first, NO_FILTER)], outcome.noise).comparisons
        holds_alone.append(alone.low < 0 < alone.high)
    assert np.mean(holds) > 0.94
    assert np.mean(holds_alone) < 0.9


def test_the_best_cut_is_among_the_indistinguishable_ones() -> None:
    rng, among = np.random.default_rng(7), []
    sizes = {NO_FILTER: 40, "cut 0": 10, "cut 1": 20, "cut 2": 30}
    means = {NO_FILTER: 0.0, "cut 0": 1.0, "cut 1": 1.02, "cut 2": 0.9}
    for _ in range(200):
        outcome = analysed({name: mean + rng.normal(0, 0.05, 3) for name, mean in means.items()}, sizes)
        assert outcome.best is not None
        among.append(1 in {outcome.best, *outcome.ties})
    assert np.mean(among) > 0.95


def test_a_cut_that_helps_is_recommended() -> None:
    rng = np.random.default_rng(5)
    assert [analysed(arms(0.3, 0.03, 4, rng)).best for _ in range(20)] == [0] * 20


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_and_equal_results_raise_nothing(seeds: int) -> None:
    outcome = analysed({name: np.full(seeds, 0.5) for name in SIZES})
    assert outcome.best is None
    assert outcome.over_all.seeds_for(0.1) is None


@pytest.mark.parametrize(
    ("gain", "messages"),
    [
        (0.3, ["cut at score ≥ 0: ", "It is better than every other cut."]),
        (0.0, ["no difference found.", "The largest gain over no filter is ", "can show a difference of "]),
        (-0.3, ["no cut is better than no filter.", "Worse than no filter: score ≥ 0."]),
    ],
)
def test_the_verdict_states_what_was_found(gain: float, messages: list[str]) -> None:
    plan = Plan("run", "out", [Cut((Condition("score", "min", float(n)),)) for n in range(2)])
    text = "\n".join(verdict(analysed(arms(gain, 0.03, 4, np.random.default_rng(8))), plan))
    for message in messages:
        assert message in text
    assert "with 80% power" in text
