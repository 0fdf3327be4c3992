"""Evaluation during training: runs the tasks of `trainer.evaluate` on the current weights.

    evaluate:
      - zeroshot: {data: heldout/classes, templates: prompts.txt, every: 500}
      - retrieval: {data: runs/heldout}

A task takes the options of `python -m trainer.evaluate TASK`, except those that name a model. It runs every `every`
steps (default: at the end of each epoch), and also before the first step and after the last. Its metrics equal those
that the command computes for the exported model in fp32. `name` distinguishes entries; the default is TASK/DATA.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from trainer import distributed
from trainer.config import ConfigError
from trainer.hooks import Hook, Log, Record
from trainer.spelling import did_you_mean
from trainer.training import Run

if TYPE_CHECKING:
    from trainer.data import Batch

OWN = ("name", "every", "batch_size")
"""Keys of an entry that are not options of its task."""


@dataclass(frozen=True)
class Task:
    """An entry of `evaluate`."""

    name: str
    kind: str
    """A key of `trainer.evaluate.__main__.TASKS`."""
    every: int | None
    """Interval in steps; None means once per epoch."""
    options: argparse.Namespace

    def due(self, run: Run) -> bool:
        every = self.every or run.batches.per_epoch
        return run.step % every == 0 or run.step == run.total_steps


class Evaluation(Hook):
    """Runs tasks on rank 0 while the other ranks wait. A failing task ends the run on every rank."""

    def __init__(self, run: Run, log: Log) -> None:
        super().__init__(run)
        self.log = log
        self.tasks = parse(run.config.evaluate)
        self.patience = distributed.patient_group()

    def __enter__(self) -> Evaluation:
        # Evaluates before the first step, to report problems with the data immediately. On resume, skips the tasks
        # whose metrics for this step were logged before the run stopped.
        logged = {name for record in self.log.records for name in record}
        self._evaluate([task for task in self.tasks if not any(name.startswith(f"{task.name}/") for name in logged)])
        return self

    def after_step(self, batch: Batch, numbers: dict[str, float]) -> None:
        if not self.run.stopped:
            self._evaluate(self.tasks)

    def _evaluate(self, tasks: Sequence[Task]) -> None:
        if not any(task.due(self.run) for task in self.tasks):  # the same on every rank
            return
        distributed.on_first(lambda: self._run([task for task in tasks if task.due(self.run)]), self.patience)

    def _run(self, tasks: Sequence[Task]) -> None:
        from trainer.evaluate.__main__ import TASKS
        from trainer.features import Encoder

        run = self.run
        for task in tasks:
            encoder = Encoder(run.model, run.preprocess, run.tokenizer, task.options.batch_size)
            options = argparse.Namespace(**vars(task.options), encoder=encoder, model=str(run.output), pretrained=None)
            with self.log.paused(), run.interruptible(), _as_evaluated(run.model, run.device):
                metrics = dict(_flat(TASKS[task.kind].evaluate(options), task.name))
            self.log.write(metrics)
            figures = (
                f"{name.removeprefix(task.name + '/')} {v:.4f}" for name, v in metrics.items() if type(v) is float
            )
            self.log.say(f"step {run.step}/{run.total_steps}  {task.name}  {'  '.join(figures)}")


def parse(entries: Sequence[Any] | None) -> list[Task]:
    """Parses the entries of `evaluate`. Raises ConfigError with all problems."""
    if not entries:
        return []
    from trainer.evaluate.__main__ import TASKS

    tasks, problems = [], []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())), dict):
            problems.append(f"entry {number}: found {entry!r}, expected TASK: {{data: …}}")
            continue
        [(kind, values)] = entry.items()
        if kind not in TASKS:
            hint = did_you_mean(kind, TASKS) or f"; there are {', '.join(TASKS)}"
            problems.append(f"entry {number}: no task {kind!r}{hint}")
            continue
        try:
            tasks.append(_task(kind, values))
        except ValueError as error:
            problems.append(f"{kind}: {error}")
    names = [task.name for task in tasks]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{name}: two entries have this name; give each a `name` of its own")
    if problems:
        raise ConfigError("evaluate", problems)
    return tasks


def _task(kind: str, values: dict[str, Any]) -> Task:
    from trainer.evaluate.__main__ import TASKS

    parser = _Parser(prog=kind, add_help=False, allow_abbrev=False)
    parser.add_argument("--data", required=True)
    TASKS[kind].add_arguments(parser)
    known = {option.removeprefix("--").replace("-", "_") for option in parser._option_string_actions}
    own = {"every": None, "batch_size": 64, "name": f"{kind}/{Path(str(values.get('data'))).name}"} | values
    for key in values:
        if key not in known and key not in OWN:
            raise ValueError(f"{key}: no such option{did_you_mean(key, [*known, *OWN])}")
    for key in ("every", "batch_size"):
        value = own[key]
        positive = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not positive and (key == "batch_size" or value is not None):
            raise ValueError(f"{key}: found {value!r}, expected a whole number above 0")
    if not isinstance(own["name"], str) or not own["name"]:
        raise ValueError(f"name: found {own['name']!r}, expected text")
    words = []
    for key, value in values.items():
        if key not in OWN:
            option = f"--{key.replace('_', '-')}"
            words += _words(option, value, parser._option_string_actions[option].nargs is not None)
    options = parser.parse_args(words)
    options.batch_size = own["batch_size"]
    return Task(own["name"], kind, own["every"], options)


def _words(option: str, value: Any, together: bool) -> list[str]:
    """The command-line words of an option. A list follows the option if `together`, else the option is repeated."""
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if isinstance(value, list) and together:
        return [option, *map(str, value)]
    return [f"{option}={part}" for part in (value if isinstance(value, list) else [value])]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _flat(metrics: Record, name: str) -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}/{key}")
        else:
            yield f"{name}/{key}", value


@contextlib.contextmanager
def _as_evaluated(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts the model in evaluation mode; on exit, restores its training modes and the random number generators."""
    training = [module for module in model.modules() if module.training]  # a locked tower stays in evaluation mode
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module in training:
            module.training = True
