"""Writes the page of a study: one HTML file with the recommendation, curves and tables.

The curves are not drawn by `pipeline.page.chart`, because their marks are links and their series can be hidden. Styles
alone do this, since no script may run on a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from pipeline import page
from pipeline.study.statistics import LEVEL, POWER, Interval
from pipeline.study.study_plan import Cut
from pipeline.study.table import MOST_EPOCHS, NO_FILTER, Outcome, Results, verdict

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 14, 44
MOST_HEAT = 40
"""Most cuts for which the page shows the overlap of each pair."""
COLOURS = ("kept", "series-4", "series-5", "series-6")
"""The colours of the curves of cuts, used in turn."""


def write(results: Results) -> bytes:
    """Renders the page as HTML."""
    plan = results.plan
    groups = _groups(plan.cuts)
    choices = [
        {"name": f"series-{i}", "title": title, "colour": COLOURS[i % len(COLOURS)]} for i, title in enumerate(groups)
    ]
    if any(name.startswith("random ") for outcome in results.outcomes for name in outcome.arms):
        choices.append({"name": "random", "title": "random, equal size", "colour": "other"})
    choices.append({"name": "everything", "title": NO_FILTER, "colour": "cut"})
    outcomes = sorted(results.outcomes, key=lambda outcome: -outcome.budget)
    verdicts = [
        {
            "lines": verdict(outcome, plan),
            "recipe": "" if outcome.best is None else plan.cuts[outcome.best].recipe,
        }
        for outcome in outcomes
    ]
    return page.render(
        "study.html",
        name=results.run,
        candidates=results.candidates,
        after=results.after,
        seeds=len(plan.train.seeds) if plan.train else 0,
        metric=plan.train.metric if plan.train else "",
        level=f"{LEVEL:.0%}",
        verdicts=verdicts,
        scorers=results.scorers,
        notes=[*results.warnings, *([results.saved] if results.saved else [])],
        choices=choices if results.outcomes else [],
        curves=[{"svg": _curves(results, outcome, groups), "caption": _caption(outcome)} for outcome in outcomes],
        trained=[_table(results, outcome) for outcome in outcomes],
        columns=["cut", "rows", "kept", *results.contents, *(f"epochs of {b:,}" for b in plan.budgets), "recipe"],
        cuts=[_line(results, number, cut) for number, cut in enumerate(plan.cuts)],
        heat=list(_heat(results)) if len(plan.cuts) <= MOST_HEAT else [],
        method=_method(results),
    )


def _groups(cuts: Sequence[Cut]) -> dict[str, list[int]]:
    """Groups the cuts into curves: those with the same rules on the same columns. Returns cut numbers by title."""
    groups: dict[str, list[int]] = {}
    for number, cut in enumerate(cuts):
        title = ", ".join(f"{condition.column} {condition.rule}" for condition in cut.conditions)
        groups.setdefault(title, []).append(number)
    return groups


def _caption(outcome: Outcome) -> str:
    return f"Trained on {outcome.budget:,} samples, {outcome.noise.seeds} seeds."


# --- Curves -----------------------------------------------------------------------------------------------------------


def _curves(results: Results, outcome: Outcome, groups: dict[str, list[int]]) -> Markup:
    intervals = {name: outcome.paired(name) for name in outcome.arms}
    bounds = [v for i in intervals.values() for v in (i.mean, i.low, i.high) if not math.isnan(v)]
    spread = max(bounds) - min(bounds) or 1.0
    low, high = min(bounds) - 0.05 * spread, max(bounds) + 0.05 * spread

    def x(share: float) -> float:
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [*_axes(low, high, x, y, results.plan.train.metric if results.plan.train else "")]
    whole = intervals[NO_FILTER]
    level = [(0.0, whole, None, ""), (1.0, whole, None, NO_FILTER)]
    parts.append(_series("everything", "cut", level, x, y, dashed=True))
    shares = {number: rows / results.candidates for number, rows in enumerate(results.rows)}
    controls = sorted(
        (share := shares[int(c.first.split()[1])], intervals[c.second], None, f"random, {share:.1%}")
        for c in outcome.over_random.comparisons
    )
    unique = {point[0]: point for point in controls}
    parts.append(_series("random", "other", [*unique.values()], x, y))
    for i, numbers in enumerate(groups.values()):
        shown = sorted((n for n in numbers if f"cut {n}" in intervals), key=lambda n: shares[n])
        points = [(shares[n], intervals[f"cut {n}"], n, str(results.plan.cuts[n])) for n in shown]
        parts.append(_series(f"series-{i}", COLOURS[i % len(COLOURS)], points, x, y, best=outcome.best))
    label = f"The metric against the share kept, after {outcome.budget:,} samples"
    return Markup('<svg class="curve" viewBox="0 0 {} {}" role="group" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def _axes(low: float, high: float, x: Any, y: Any, metric: str) -> Iterator[Markup]:
    line = Markup('<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        yield line.format(x(share), x(share), TOP, HEIGHT - BOTTOM)
        yield text.format(x(share), HEIGHT - BOTTOM + 18, "middle", f"{share:.0%}")
    for value in _ticks(low, high):
        yield line.format(x(0), x(1), y(value), y(value))
        yield text.format(LEFT - 8, y(value) + 4, "end", f"{value:g}")
    yield text.format(x(0.5), HEIGHT - 8, "middle", f"share of the candidates kept ({metric} upwards)")


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, about evenly spaced, from low to high."""
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 8)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _series(
    name: str,
    colour: str,
    points: Sequence[tuple[float, Interval, int | None, str]],
    x: Any,
    y: Any,
    dashed: bool = False,
    best: int | None = None,
) -> Markup:
    """Draws a curve with its band and marks. A point is its share, interval, cut number and title."""
    if not points:
        return Markup("")
    path = "M" + "L".join(f"{x(share):.1f},{y(interval.mean):.1f}" for share, interval, _, _ in points)
    parts = []
    if not any(math.isnan(interval.low) for _, interval, _, _ in points):
        upper = [f"{x(share):.1f},{y(interval.high):.1f}" for share, interval, _, _ in points]
        lower = [f"{x(share):.1f},{y(interval.low):.1f}" for share, interval, _, _ in reversed(points)]
        parts.append(Markup('<path class="band" d="M{}Z"/>').format("L".join(upper + lower)))
    dash = Markup(' stroke-dasharray="6 4"') if dashed else ""
    parts.append(Markup('<path class="line" d="{}"{}/>').format(path, dash))
    for share, interval, number, title in points:
        if not title:
            continue
        at, value = (x(share), y(interval.mean)), f"{title}: {_shown(interval)}"
        mark = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5"/>').format(*at)
        anchor = "start" if share < 0.35 else "end" if share > 0.65 else "middle"
        label = Markup('<text class="value" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
            at[0], max(TOP + 10, at[1] - 12), anchor, value
        )
        target = "#recommendation" if number is None else f"#cut-{number}"
        chosen = "best" if number is not None and number == best else ""
        parts.append(
            Markup('<a href="{}" class="{}" aria-label="{}">{}{}</a>').format(target, chosen, value, mark, label)
        )
    return Markup('<g class="{}" style="--tone: var(--{})">{}</g>').format(name, colour, Markup("").join(parts))


def _shown(interval: Interval) -> str:
    bounds = "" if math.isnan(interval.low) else f" ({interval.low:.3f} to {interval.high:.3f})"
    return f"{interval.mean:.3f}{bounds}"


# --- Tables -----------------------------------------------------------------------------------------------------------


def _table(results: Results, outcome: Outcome) -> page.Table:
    rows: list[list[object]] = [
        [NO_FILTER, results.candidates, _shown(outcome.paired(NO_FILTER)), None, None, None, None]
    ]
    for number, cut in enumerate(results.plan.cuts):
        if (name := f"cut {number}") not in outcome.arms:
            continue
        over_all, control = outcome.gains(number)
        cells: list[object] = [str(cut), results.rows[number], _shown(outcome.paired(name))]
        cells.append(_shown(outcome.paired(control.second)) if control else None)
        cells += [str(gain) if gain else None for gain in (over_all, control)]
        rows.append([*cells, "recommended" if number == outcome.best else None])
    columns = ["cut", "rows", "metric", "random, equal size", "over no filter", "over random", "verdict"]
    return page.Table(columns, rows, _caption(outcome))


def _line(results: Results, number: int, cut: Cut) -> dict[str, Any]:
    rows = results.rows[number]
    cells = [f"{rows:,}", page.share(rows, results.candidates)]
    cells += [f"{counts[number]:,}" for counts in results.contents.values()]
    cells += [f"{budget / rows:.1f}" if rows else "–" for budget in results.plan.budgets]
    return {"title": str(cut), "cells": cells, "recipe": " ".join(cut.recipe_lines)}


def _heat(results: Results) -> Iterator[dict[str, Any]]:
    for cut, row in zip(results.plan.cuts, results.overlap.tolist()):
        cells = [
            {"text": "–", "shade": 0} if math.isnan(v) else {"text": f"{v:.2f}", "shade": round(40 * v)} for v in row
        ]
        yield {"title": str(cut), "cells": cells}


def _method(results: Results) -> list[str]:
    lines = []
    if "concepts" in results.contents:
        words = "the entries that captions match" if results.entries else "the distinct words of captions"
        lines.append(f"Concepts are {words}.")
    if "languages" in results.contents:
        lines.append(
            "A caption's language is its most likely one. The step language also keeps captions whose most likely "
            "language is another one, if the languages it keeps are together likely enough."
        )
    if results.duplicates_by:
        lines.append(
            f"Duplicates are the rows that a cut keeps beyond the first with the same {results.duplicates_by}."
        )
    if results.outcomes:
        lines += [
            "Arms with the same seed start from the same weights. Random subsets are drawn anew for each seed. "
            f"The {LEVEL:.0%} interval of an arm leaves out the effect that a seed has on all arms alike (Loftus and "
            "Masson, 1994); table.parquet has plain t intervals over seeds, and p values. Differences are paired by "
            "seed. Their noise is estimated from all arms of a budget together, and assumed to be equal in all.",
            "A cut is recommended if it is better than no filter and better than a random subset of equal size. The "
            "comparisons with no filter are one family, and those with random subsets another. The intervals of a "
            f"family hold simultaneously at {LEVEL:.0%}, and its p values are adjusted accordingly (Dunnett, 1955; "
            "Hothorn, Bretz and Westfall, 2008). The recommended cut was picked for its mean, so that mean is too high "
            "on average; its intervals are still valid. All arms are evaluated on the same samples, so the results say "
            "nothing about other samples.",
            f"Power is the probability of showing a true difference, by convention {POWER:.0%}.",
        ]
    if results.plan.budgets:
        lines.append(
            f"Epochs are the samples of a training divided by the rows kept. Beyond {MOST_EPOCHS}, repeated data is "
            "worth visibly less than new data (Muennighoff et al., Scaling Data-Constrained Language Models, 2023; "
            "measured on language models)."
        )
    return lines
