"""Prints the results of a study and writes its files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from rich.table import Table

from pipeline.study import study_page
from pipeline.study.table import NO_FILTER, Outcome, Results, arms_table, as_table, verdict
from trainer import atomic
from trainer.terminal import Console


def show(results: Results, out: Path) -> None:
    """Prints the table and the recommendation, and writes all files of the study."""
    table = as_table(results)
    pq.write_table(table, out / "table.parquet")
    pyarrow.csv.write_csv(table, out / "table.csv")
    names = list(map(str, results.plan.cuts))
    pairs = list(itertools.combinations(range(len(names)), 2))
    overlap = {
        "cut": [names[i] for i, _ in pairs],
        "other": [names[j] for _, j in pairs],
        "jaccard": pa.array([results.overlap[i, j] for i, j in pairs], pa.float64(), from_pandas=True),
    }
    pq.write_table(pa.table(overlap), out / "overlap.parquet")
    if results.records:
        pq.write_table(arms_table(results.records), out / "arms.parquet")
    with atomic.replacing(out / "index.html") as file:
        file.write(study_page.write(results))
    console = Console()
    console.print(_counts(results))
    for outcome in results.outcomes:
        console.print(_trained(results, outcome))
        for line in verdict(outcome, results.plan):
            console.say(line)
        if outcome.best is not None:
            console.say(results.plan.cuts[outcome.best].recipe)
    for line in [*(line for line, _ in results.scorers), *results.warnings, results.saved]:
        if line:
            console.say(line)
    console.say(f"tables in {out}/, page in {out}/index.html")


def _counts(results: Results) -> Table:
    table = Table(title=f"What each cut keeps of {results.candidates:,} candidates", title_justify="left")
    for name in ("cut", "rows", "kept", *results.contents, *(f"epochs of {b:,}" for b in results.plan.budgets)):
        table.add_column(name, justify="left" if name == "cut" else "right")
    for number, (cut, rows) in enumerate(zip(results.plan.cuts, results.rows)):
        counts = [f"{values[number]:,}" for values in results.contents.values()]
        epochs = [f"{budget / rows:.1f}" if rows else "" for budget in results.plan.budgets]
        share = f"{rows / results.candidates:.1%}" if results.candidates else ""
        table.add_row(str(cut), f"{rows:,}", share, *counts, *epochs)
    return table


def _trained(results: Results, outcome: Outcome) -> Table:
    metric = results.plan.train.metric if results.plan.train else ""
    title = f"\n{metric} after {outcome.budget:,} samples, {outcome.noise.seeds} seeds"
    table = Table(title=title, title_justify="left")
    for name in ("cut", "rows", metric, "random, equal size", "over no filter", "over random"):
        table.add_column(name, justify="left" if name == "cut" else "right")
    table.add_row(NO_FILTER, f"{results.candidates:,}", _shown(outcome, NO_FILTER), "", "", "")
    for number, cut in enumerate(results.plan.cuts):
        name = f"cut {number}"
        if name not in outcome.arms:
            continue
        gains = outcome.gains(number)
        control = _shown(outcome, gains[1].second) if gains[1] else ""
        cells = [str(gain or "") for gain in gains]
        shown = f"{cut} *" if number == outcome.best else str(cut)
        table.add_row(shown, f"{results.rows[number]:,}", _shown(outcome, name), control, *cells)
    return table


def _shown(outcome: Outcome, arm: str) -> str:
    interval = outcome.paired(arm)
    return f"{interval.mean:.3f}" + ("" if math.isnan(interval.low) else f" ±{interval.high - interval.mean:.3f}")
