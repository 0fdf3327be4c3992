"""Fits a mixture of a run's stored scores, and optionally embeddings, for a `learned_score` step.

    python -m pipeline.learn runs/demo --labels labels.csv
    python -m pipeline.learn runs/demo --positives clean.csv --vectors image_embedding text_embedding
    python -m pipeline.learn runs/demo --losses losses.parquet --keep 0.3

Give one of three targets, each a CSV or Parquet table of rows of the run:

    --labels     uid, label    1 or true for a good row, 0 or false for a bad one
    --positives  uid           good rows; all other rows of the run are unlabelled
    --losses     uid, loss     training losses; rows up to the median loss count as good

Writes the mixture to RUN/report/score_mixture.json. Prints how well each score ranks rows, how the mixture compares
with the best single score, and the recipe lines to paste. All figures are cross-fitted: each row is judged by a model
that was not fitted to it. Needs neither GPU nor Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.learn.fit import Findings, fit
from pipeline.learn.training_rows import (
    FOLDS,
    MIN_PER_CLASS,
    ROWS,
    SEED,
    Sample,
    Target,
    choose_columns,
    draw,
    read_target,
)
from trainer.terminal import Console, entry_point

if TYPE_CHECKING:
    from pipeline.reader import Run

NAME = "score_mixture.json"


def recipe_lines(path: Path, keep: float | None) -> list[str]:
    """The lines to paste into a recipe."""
    cut = "min: 0.5" if keep is None else f"top_fraction: {keep:g}"
    # A JSON string is also a YAML string.
    file = str(path) if re.fullmatch(r"[\w./-]+", str(path)) else json.dumps(str(path))
    return [f"  - learned_score: {{mixture: {file}}}", f"  - threshold: {{column: learned_score, {cut}}}"]


def show(console: Console, findings: Findings, sample: Sample, target: Target, keep: float | None, seed: int) -> None:
    """Prints the figures of a fitted mixture; precision and recall at the share `keep`, or at a probability of 0.5."""
    import numpy as np
    from rich.table import Table

    from pipeline.models import score_mixture as model

    other = "unlabelled" if target.unlabelled else "bad"
    good, bad = int(sample.good.sum()), int((~sample.good).sum())
    gone = f"; {sample.gone:,} rows of {target.path} were dropped before and have no scores" if sample.gone else ""
    console.say(f"{good:,} of {sample.found[1]:,} good and {bad:,} of {sample.found[0]:,} {other} rows{gone}")
    table = Table(title="Each score alone (95% intervals)", title_justify="left")
    for name in ("column", "missing", "weight (logits)", "AUC alone", "AUC lost without it"):
        table.add_column(name, justify="left" if name == "column" else "right", no_wrap=True)
    for part in sorted(findings.parts, key=lambda p: -p.weight):
        alone = f"{part.alone}{' (low is good)' if part.falling else ''}"
        lost = "" if part.lost is None else str(part.lost)
        table.add_row(part.column, f"{part.missing:.1%}", f"{part.weight:.2f}", alone, lost)
    console.print(table)
    console.say(f"mixture: AUC {findings.auc}, cross-fitted")
    if findings.best and findings.over_best:
        console.say(f"above {findings.best}: {findings.over_best}")
    console.say(f"calibration error {findings.calibration:.3f}; penalty {findings.penalty:g}")
    weights = sample.weights
    kept = float(weights[findings.logits >= 0].sum() / weights.sum()) if keep is None else keep
    lines = {"mixture": findings.logits, **({findings.best: findings.singles[findings.best]} if findings.best else {})}
    for name, scores in lines.items():
        ranking = model.Ranking(scores, sample.good)
        recall = model.bootstrap(lambda w, r=ranking: r.kept(w, kept)[1], weights, seed)  # type: ignore[misc]
        text = f"{name} at {kept:.1%} kept: recall of good rows {recall}"
        if not target.unlabelled:
            precision = model.bootstrap(lambda w, r=ranking: r.kept(w, kept)[0], weights, seed)  # type: ignore[misc]
            text += f", precision {precision}"
        console.say(text)
    if np.isclose(kept, 1.0) or np.isclose(kept, 0.0):
        console.say("warning: this cut keeps all rows or none; give --keep")


@contextmanager
def _progress(console: Console, run: Run) -> Iterator[Callable[[int], None]]:
    """Shows the progress of reading; yields the function to call with the number of each unit read."""
    from rich.progress import Progress

    from pipeline.reader import RunError

    try:
        units: int | None = run.units
    except RunError:  # unknown for a run whose passes were removed
        units = None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading units", total=units)
        yield lambda unit: progress.update(task, completed=unit + 1)


def _about(run: Run, target: Target, sample: Sample, findings: Findings, after: str, seed: int) -> dict[str, Any]:
    """The part of the file that is for people: where the mixture comes from."""
    auc = findings.auc
    return {
        "run": run.name,
        "target": target.kind,
        "after": after,
        "rows": {"good": sample.found[1], "unlabelled" if target.unlabelled else "bad": sample.found[0]},
        "fitted_to": len(sample.good),
        "seed": seed,
        "penalty": findings.penalty,
        "auc": [round(value, 4) for value in (auc.value, auc.low, auc.high)],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.learn",
        description=__doc__,
        epilog="exit status: 0 written; 1 the run is damaged or the file cannot be written; 2 unusable input",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the folder of a run, local or remote")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--labels", type=Path, metavar="FILE", help="table of uid, label")
    target.add_argument("--positives", type=Path, metavar="FILE", help="table of uid")
    target.add_argument("--losses", type=Path, metavar="FILE", help="table of uid, loss")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="scores to mix (default: all columns of floats)")
    parser.add_argument("--vectors", nargs="+", default=[], metavar="NAME", help="columns of embeddings to mix too")
    parser.add_argument(
        "--after", metavar="STEP", help="use the rows that survived this step (default: the first that has all columns)"
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS, metavar="N", help="training rows of each class, at most (default %(default)s)"
    )
    parser.add_argument("--folds", type=int, default=FOLDS, help="folds of the cross-fit (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="seed of rows, folds and bootstrap (default %(default)s)"
    )
    parser.add_argument(
        "--keep", type=float, metavar="SHARE", help="cut at this share of the rows (default: at a probability of 0.5)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where to write (default RUN/report/{NAME})")
    return parser


def _usage(args: argparse.Namespace) -> Iterator[str]:
    """Yields what is wrong with the command line."""
    if args.rows < MIN_PER_CLASS:
        yield f"--rows must be at least {MIN_PER_CLASS}, found {args.rows}"
    if not 2 <= args.folds <= 20:
        yield f"--folds must be from 2 to 20, found {args.folds}"
    if args.keep is not None and not 0 < args.keep < 1:
        yield f"--keep must be above 0 and below 1, found {args.keep:g}"
    if args.seed < 0:
        yield f"--seed must not be negative, found {args.seed}"
    if "://" in args.run and args.out is None:
        yield f"{args.run} is remote, and the step reads a local file: give --out FILE"
    if args.out is not None and args.out.is_dir():
        yield f"--out {args.out} is a folder; name a file in it, such as {args.out / NAME}"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 if the mixture was written, 2 for unusable input, else 1."""
    args = _parser().parse_args(argv)
    console, errors = Console(), Console(stderr=True)
    if problems := list(_usage(args)):
        for problem in problems:
            errors.error(problem)
        return 2
    from pipeline.reader import open_run
    from pipeline.storage import Store

    kind = next(name for name in ("labels", "positives", "losses") if getattr(args, name) is not None)
    out: Path = args.out or Path(args.run) / "report" / NAME
    target = read_target(kind, getattr(args, kind))
    run = open_run(args.run)
    columns, after = choose_columns(run, args.columns, args.vectors, args.after)
    with _progress(errors, run) as done:
        sample = draw(run, target, columns, after, args.rows, args.folds, args.seed, done)
    with errors.status("fitting the mixture, and once more without each column"):
        findings = fit(sample, columns, target.unlabelled, args.seed)
    about = _about(run, target, sample, findings, after, args.seed)
    Store(os.fspath(out.parent)).write(out.name, findings.mixture.to_bytes(about))
    show(console, findings, sample, target, args.keep, args.seed)
    console.say(f"\nwrote {out}; in a recipe, below the steps that add these columns:\n")
    for line in recipe_lines(out, args.keep):
        console.say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
