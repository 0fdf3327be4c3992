"""Runs a study: gathers candidates, applies the cuts, counts what they keep, and trains the arms."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.reader import open_run
from pipeline.report.fitness import measure
from pipeline.studio.cuts import default_step
from pipeline.study.arms import Arm, Trainer, index_pictures, random_places, write_subset
from pipeline.study.candidates import open_candidates
from pipeline.study.contents import contents, duplicates_by, find_concepts
from pipeline.study.kept import Cuts, cut_rows, jaccard, overlaps
from pipeline.study.study_plan import Plan, StudyError, Training
from pipeline.study.table import NO_FILTER, Results, analyse
from trainer.config import TrainConfig, load_config
from trainer.terminal import Console


def run(plan: Plan, console: Console) -> Results:
    """Runs a whole study.

    Raises StudyError and other InputErrors, mostly before anything starts; RunError and DamagedError from reading the
    run; ArmError if a training fails.
    """
    out = Path(plan.out)
    opened = open_run(plan.run)
    if out.resolve().is_relative_to(Path(plan.run).resolve()):
        raise StudyError(f"out: {plan.out} lies in the run {plan.run}; expected a folder of its own")
    concepts = find_concepts(opened, plan.concepts)
    config = training_config(plan) if plan.train else None
    after = plan.after or default_step(opened)
    columns = list(dict.fromkeys(condition.column for cut in plan.cuts for condition in cut.conditions))
    candidates = open_candidates(opened, after, columns, out / "candidates")
    console.say(f"{len(candidates):,} candidates after {after}, {len(plan.cuts):,} cuts")
    cuts = Cuts(candidates, plan.cuts)
    both = overlaps(cuts)
    results = Results(
        plan, opened.name, after, len(candidates), both.diagonal().tolist(), jaccard(both),
        contents(cuts, concepts), isinstance(concepts, tuple), duplicates_by(candidates),
        [(f"{found.score} {found.fits[0]}.", found.fits[0].low >= 0.7) for found in measure(opened)],
    )  # fmt: skip
    if plan.train and config:
        train(results, cuts, plan.train, config, out, console)
    return results


def training_config(plan: Plan) -> TrainConfig:
    """Reads the training configuration of a study, and checks its tasks and budgets."""
    from trainer.evaluation import parse

    assert plan.train is not None
    # Required keys, which are replaced for each arm.
    config = load_config(plan.train.config, ["shards=study", "output=study"])
    parse(plan.train.evaluate)
    for budget in plan.budgets:
        if budget < config.batch_size:
            raise StudyError(
                f"budgets: found {budget:,}, expected at least one batch ({plan.train.config}: batch_size "
                f"{config.batch_size:,})"
            )
    return config


def train(results: Results, cuts: Cuts, training: Training, config: TrainConfig, out: Path, console: Console) -> None:
    """Trains the arms of one budget after the other, and adds the outcomes to the results."""
    plan = results.plan
    pictures = cuts.candidates.folder / "pictures"
    numbers = index_pictures(cuts.candidates, pictures)
    subsets = _Subsets(cuts, numbers, out / "subsets", config.batch_size)
    trainer = Trainer(training, config, pictures, out)
    remaining = list(range(len(plan.cuts)))

    def arms_of(numbers: Sequence[int], budget: int) -> dict[tuple[str, int], Arm]:
        """The arms of these cuts, their random subsets and no filter, by name and seed."""
        names = [NO_FILTER, *(f"cut {n}" for n in numbers)]
        if training.random:
            sizes = dict.fromkeys(subsets.sizes[f"cut {n}"] for n in numbers)
            names += [f"random {size}" for size in sizes if size < subsets.whole]
        keys = [(name, seed) for seed in training.seeds for name in names]
        return {key: trainer.arm(*subsets.of(*key), budget, key[1]) for key in keys}

    done = planned = 0
    stopped: list[str] = []
    for budget in plan.budgets:
        arms = arms_of(remaining, budget)
        due = list(dict.fromkeys(arms.values()))
        labels = {arm.key: name for (name, _), arm in arms.items()}
        progress = _Progress(console, plan, training.metric, labels, sum(trainer.result(arm) is None for arm in due))
        trainer.train(due, progress.say)
        records = {arm.key: trainer.result(arm) or {} for arm in due}
        results.records += records.values()
        values = {
            name: np.array(
                [records[arms[name, seed].key]["metrics"][training.metric] for seed in training.seeds], np.float64
            )
            for name, _ in arms
        }
        distinct = {arm.key: name for (name, seed), arm in arms.items() if seed == training.seeds[0]}
        results.outcomes.append(analyse(budget, values, subsets.sizes, list(distinct.values())))
        done += len(due) * budget
        planned += len({*arms_of(range(len(plan.cuts)), budget).values()}) * budget
        if training.halving and budget < plan.budgets[-1] and len(remaining) > 1:
            ranked = sorted(remaining, key=lambda n: -float(values[f"cut {n}"].mean()))
            half = math.ceil(len(ranked) / 2)
            remaining = sorted(ranked[:half])
            dropped = "; ".join(str(plan.cuts[n]) for n in sorted(ranked[half:]))
            stopped.append(f"after {budget:,} samples it stopped {dropped}")
    if stopped:
        results.saved = (
            f"Successive halving saw {done:,} samples instead of {planned:,}, {1 - done / planned:.0%} less: "
            f"{', '.join(stopped)}."
        )


class _Subsets:
    """The subsets of a study, as files of sample numbers. Random ones are drawn and written when first needed."""

    def __init__(self, cuts: Cuts, numbers: np.ndarray, folder: Path, batch_size: int) -> None:
        self.cuts, self.numbers, self.folder = cuts, numbers, folder
        self.known: dict[tuple[str, int], tuple[str, int]] = {}
        self.known[NO_FILTER, 0] = write_subset(np.arange(len(numbers)), numbers, folder)
        self.whole = self.known[NO_FILTER, 0][1]
        self.sizes = {NO_FILTER: self.whole}
        """Samples of each subset."""
        small = []
        for n, cut in enumerate(cuts.cuts):
            self.known[f"cut {n}", 0] = subset = write_subset(cut_rows(cuts, n), numbers, folder)
            size = subset[1]
            self.sizes[f"cut {n}"] = self.sizes[f"random {size}"] = size
            if size < batch_size:
                small.append(f"cuts: {cut} keeps {size:,} samples, fewer than a batch of {batch_size:,}")
        if small:
            raise StudyError(
                "\n".join([*small, "  Lower batch_size in the training configuration, or leave them out."])
            )

    def of(self, name: str, seed: int) -> tuple[str, int]:
        """The file of a subset, and its samples. Only random subsets depend on the seed."""
        key = (name, seed if name.startswith("random") else 0)
        if key not in self.known:
            places = random_places(self.cuts.candidates, self.numbers, int(name.split()[1]), seed)
            self.known[key] = write_subset(places, self.numbers, self.folder)
        return self.known[key]


class _Progress:
    """Prints a line after each training of a budget."""

    def __init__(self, console: Console, plan: Plan, metric: str, labels: Mapping[str, str], due: int) -> None:
        self.console, self.plan, self.metric, self.labels, self.due = console, plan, metric, labels, due
        self.done, self.started = 0, time.monotonic()

    def say(self, arm: Arm, record: dict[str, Any]) -> None:
        self.done += 1
        name = self.labels[arm.key]
        if name.startswith("cut "):
            name = str(self.plan.cuts[int(name.split()[1])])
        left = (time.monotonic() - self.started) / self.done * (self.due - self.done)
        self.console.say(
            f"{self.done}/{self.due} at {arm.budget:,} samples: {name}, seed {arm.seed}: "
            f"{self.metric} {record['metrics'][self.metric]:.4f} "
            f"({record['seconds']:.0f} s); {left / 60:.0f} min left for this budget"
        )
