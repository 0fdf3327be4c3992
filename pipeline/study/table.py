"""The results of a study: the outcome of each budget, its verdict in words, and the table of all cuts and budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.study.statistics import LEVEL, POWER, Comparison, Family, Interval, Noise, compare, interval, noise_of
from pipeline.study.study_plan import Plan

MOST_EPOCHS = 4
"""Beyond 4 epochs repeated data is worth visibly less than new data (Muennighoff et al., "Scaling Data-Constrained
Language Models", 2023; measured on language models)."""
NO_FILTER = "no filter"


@dataclass(frozen=True)
class Outcome:
    """What the trainings of a budget show."""

    budget: int
    arms: dict[str, np.ndarray]
    """The metric by seed, float64 (seeds,), of each cut (`cut NUMBER`), random subset (`random SIZE`) and no filter."""
    noise: Noise
    over_all: Family
    """Each cut against no filter."""
    over_random: Family
    """Each cut against a random subset of its size."""
    best: int | None
    """The number of the recommended cut; None if no cut is better than both."""
    ties: list[int]
    """The cuts that the trial cannot distinguish from the recommended one."""

    def interval(self, arm: str) -> Interval:
        """The mean over seeds and its t interval."""
        return interval(self.arms[arm])

    def paired(self, arm: str) -> Interval:
        """The mean with an interval that leaves out the effect that a seed has on all arms alike, so that the intervals
        of two arms can be compared by eye (Loftus and Masson, 1994)."""
        mean, half = float(self.arms[arm].mean()), self.noise.half
        return Interval(mean, mean - half, mean + half)

    def gains(self, number: int) -> tuple[Comparison | None, Comparison | None]:
        """The comparisons of a cut with no filter and with its random subset; None if not made."""
        over_all, over_random = (
            next((c for c in family.comparisons if c.first == f"cut {number}"), None)
            for family in (self.over_all, self.over_random)
        )
        return over_all, over_random


@dataclass
class Results:
    """All results of a study."""

    plan: Plan
    run: str
    """The run's name."""
    after: str
    candidates: int
    rows: list[int]
    """Rows that each cut keeps."""
    overlap: np.ndarray
    """Jaccard index of each pair of cuts."""
    contents: dict[str, list[int]]
    entries: bool
    """Whether the concepts are entries rather than words."""
    duplicates_by: str | None
    """The column by which rows count as duplicates."""
    scorers: list[tuple[str, bool]]
    """For each scorer with stored embeddings, how well it separates matching captions from others, and whether that is
    enough to cut by its score."""
    outcomes: list[Outcome] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    """The records of all trainings."""
    saved: str = ""
    """What successive halving saved."""

    @property
    def warnings(self) -> list[str]:
        """A line for each budget that repeats the rows of a cut too often."""
        lines = []
        for budget in self.plan.budgets:
            over = [
                f"{cut} ({budget / kept:.1f})"
                for cut, kept in zip(self.plan.cuts, self.rows)
                if kept and budget / kept > MOST_EPOCHS
            ]
            if over:
                lines.append(
                    f"{budget:,} samples are more than {MOST_EPOCHS} epochs of {', '.join(over)}. Beyond that, "
                    "repeated data is worth less than new data (Muennighoff et al. 2023)."
                )
        return lines


def analyse(budget: int, arms: Mapping[str, np.ndarray], sizes: Mapping[str, int], distinct: Sequence[str]) -> Outcome:
    """Judges one budget from `arms`, the metric by seed, and `sizes`, the samples of each.

    Arms with the same subset share their trainings. `distinct` names one arm of each subset.
    """
    arms, whole = dict(arms), sizes[NO_FILTER]
    noise = noise_of(np.stack([arms[name] for name in distinct]))
    numbers = [int(name.split()[1]) for name in arms if name.startswith("cut ") and sizes[name] < whole]
    over_all = compare(arms, [(f"cut {n}", NO_FILTER) for n in numbers], noise)
    controls = [(f"cut {n}", name) for n in numbers if (name := f"random {sizes[f'cut {n}']}") in arms]
    over_random = compare(arms, controls, noise)
    beaten = [c.first for c in (*over_all.comparisons, *over_random.comparisons) if not c.better]
    helpful = [n for n in numbers if f"cut {n}" not in beaten]
    best = max(helpful, key=lambda n: float(arms[f"cut {n}"].mean()), default=None)
    ties: list[int] = []
    if best is not None:
        # Compared with the highest cut, those that are not worse are, with it, a set that contains the best cut with
        # confidence LEVEL (Hsu, 1984).
        others = [n for n in numbers if n != best]
        family = compare(arms, [(f"cut {best}", f"cut {n}") for n in others], noise)
        ties = [n for n, comparison in zip(others, family.comparisons) if not comparison.better]
    return Outcome(budget, arms, noise, over_all, over_random, best, ties)


def verdict(outcome: Outcome, plan: Plan) -> list[str]:
    """The recommendation of a budget, or why there is none, as sentences."""
    noise, families = outcome.noise, [f for f in (outcome.over_all, outcome.over_random) if f.comparisons]
    metric = plan.train.metric if plan.train else ""
    head = f"At {outcome.budget:,} samples: "
    if not families:
        return [f"{head}no cut leaves anything out, so there is nothing to compare."]
    if noise.seeds < 2:
        return [f"{head}one seed says nothing about noise, so no cut is recommended. Give at least 2 seeds, better 3."]
    worse = [c for c in outcome.over_all.comparisons if c.worse]
    lines = []
    if outcome.best is not None:
        over_all, over_random = outcome.gains(outcome.best)
        assert over_all is not None
        text = f"{head}cut at {plan.cuts[outcome.best]}: {metric} {outcome.interval(over_all.first).mean:.3f}, "
        text += f"{over_all.difference:+.3f} over no filter ({_range(over_all)})"
        if over_random:
            text += f" and {over_random.difference:+.3f} over a random subset of equal size ({_range(over_random)})"
        lines.append(f"{text}.")
        if outcome.ties:
            lines.append(
                f"With {LEVEL:.0%} confidence the best of all cuts is this one or one that the trial cannot "
                "distinguish from it: "
                f"{'; '.join(str(plan.cuts[n]) for n in outcome.ties)}."
            )
        elif len(outcome.over_all.comparisons) > 1:
            lines.append("It is better than every other cut.")
    else:
        controls = list(zip(families, ("no filter", "a random subset of its size"), ("no filter", "random")))
        better = [(text, [c for c in family.comparisons if c.better]) for family, text, _ in controls]
        found = "no difference found"
        if any(cuts for _, cuts in better):
            found = "no cut is better than both no filter and a random subset of its size"
        elif worse:
            found = "no cut is better than no filter"
        lines.append(f"{head}{found}.")
        lines += [f"Better than {text}: {_names(cuts, plan)}." for text, cuts in better if cuts]
        for family, _, text in controls:
            gain = max(family.comparisons, key=lambda c: c.difference)
            if not gain.better:
                need = family.seeds_for(gain.difference) if gain.difference > 0 else None
                size = f"{gain.difference:+.3f} ({_range(gain)})"
                line = f"The largest gain over {text} is {size}, at {_names([gain], plan)}"
                lines.append(line + (f"; {need:,} seeds would show a gain of that size." if need else "."))
    cuts = len(outcome.over_all.comparisons)
    lines.append(
        f"With {noise.seeds} seeds and {cuts} cuts this trial can show a difference of "
        f"{max(family.detectable for family in families):.3f} with {POWER:.0%} power; the noise of one training is "
        f"{noise.sd:.3f}."
    )
    if noise.p_arms > 1 - LEVEL:
        lines.append(
            f"This trial has no power to rank its arms: taken together they do not differ (F test, p = "
            f"{noise.p_arms:.2f}). Train longer, on more samples, or with more seeds."
        )
    if worse:
        lines.append(f"Worse than no filter: {_names(worse, plan)}.")
    return lines


def _names(comparisons: Sequence[Comparison], plan: Plan) -> str:
    """The first cut of each comparison."""
    return "; ".join(str(plan.cuts[int(c.first.split()[1])]) for c in comparisons)


def _range(comparison: Comparison) -> str:
    return f"{LEVEL:.0%} interval {comparison.low:+.3f} to {comparison.high:+.3f}"


def as_table(results: Results) -> pa.Table:
    """A row for each cut and budget; without budgets, one for each cut."""
    lines: list[dict[str, Any]] = []
    outcomes = {outcome.budget: outcome for outcome in results.outcomes}
    for budget in results.plan.budgets or (None,):
        for number, (cut, kept) in enumerate(zip(results.plan.cuts, results.rows)):
            line: dict[str, Any] = {
                "cut": str(cut),
                "recipe": "\n".join(cut.recipe_lines),
                "rows": kept,
                "kept": kept / results.candidates if results.candidates else None,
                **{name: counts[number] for name, counts in results.contents.items()},
                "budget": budget,
                "epochs": budget / kept if budget and kept else None,
            }
            if results.plan.train is not None:
                line |= _trained(outcomes.get(budget or 0), number)
            lines.append(line)
    return pa.Table.from_pylist(lines, schema=_schema(results))


TRAINED = (
    "metric", "metric_low", "metric_high", "random", "random_low", "random_high",
    "gain_over_no_filter", "gain_no_filter_low", "gain_no_filter_high", "gain_no_filter_p",
    "gain_over_random", "gain_random_low", "gain_random_high", "gain_random_p",
)  # fmt: skip


def _trained(outcome: Outcome | None, number: int) -> dict[str, Any]:
    line: dict[str, Any] = dict.fromkeys(("seeds", *TRAINED, "recommended"))
    if outcome is None or (name := f"cut {number}") not in outcome.arms:
        return line
    line["seeds"] = outcome.noise.seeds
    line["recommended"] = number == outcome.best
    line |= _bounds("metric", outcome.interval(name))
    over_all, over_random = outcome.gains(number)
    for control, gain in (("no_filter", over_all), ("random", over_random)):
        if gain:
            line[f"gain_over_{control}"] = gain.difference
            line |= {f"gain_{control}_{key}": getattr(gain, key) for key in ("low", "high", "p")}
    if over_random:
        line |= _bounds("random", outcome.interval(over_random.second))
    return {key: None if value != value else value for key, value in line.items()}  # NaN with one seed


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _schema(results: Results) -> pa.Schema:
    fields = [("cut", pa.string()), ("recipe", pa.string()), ("rows", pa.int64()), ("kept", pa.float64())]
    fields += [(name, pa.int64()) for name in results.contents]
    fields += [("budget", pa.int64()), ("epochs", pa.float64())]
    if results.plan.train is not None:
        fields += [("seeds", pa.int64()), *((name, pa.float64()) for name in TRAINED), ("recommended", pa.bool_())]
    return pa.schema(fields)


def arms_table(records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A row for each training: `subset, samples, budget, seed, seconds` and all its metrics."""
    lines = [{**{k: v for k, v in record.items() if k != "metrics"}, **record["metrics"]} for record in records]
    return pa.Table.from_pylist(lines)
