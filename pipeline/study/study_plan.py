"""Reads the YAML of a study and checks all of it before anything starts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.condition import RULES, Condition
from pipeline.recipe import line_text
from trainer.errors import InputError
from trainer.spelling import did_you_mean
from trainer.yamlfile import Document

MAX_CUTS = 1000
MAX_SEEDS = 1000
LARGEST = 2**63 - 1
"""The largest budget, seed and number of workers."""
SEEDS = 3
"""Default number of seeds: the fewest that give a usable estimate of the noise between seeds. The power statement says
how many are needed."""


class StudyError(InputError):
    """The problems of a study, one per line."""


@dataclass(frozen=True)
class Cut:
    """Conditions applied in order, like consecutive `threshold` lines of a recipe."""

    conditions: tuple[Condition, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.conditions))

    @property
    def recipe_lines(self) -> list[str]:
        """The items of a recipe's `steps` that make this cut."""
        return [f"- {line_text(condition.line())}" for condition in self.conditions]

    @property
    def recipe(self) -> str:
        """The same as a block to paste."""
        return "\n".join(["steps:", *self.recipe_lines])


@dataclass(frozen=True)
class Training:
    """The block `train`."""

    config: str
    """The path of a training configuration; the study replaces its shards, output, samples and seed."""
    evaluate: list[Any]
    """Tasks, as in the key `evaluate` of a training configuration."""
    metric: str
    """The metric that decides, NAME/METRIC of a task such as `zeroshot/colour/acc1`; larger is better."""
    seeds: tuple[int, ...]
    random: bool = True
    """Train a random subset of equal size beside each cut."""
    halving: bool = False
    """Train only the better half of the cuts at each next budget."""
    workers: int = 1
    """Models trained at a time, each in its own process."""


@dataclass(frozen=True)
class Plan:
    """A study, as described by its YAML."""

    run: str
    out: str
    cuts: list[Cut]
    after: str | None = None
    """The step whose survivors are the candidates; None: the step before the first `threshold`."""
    budgets: tuple[int, ...] = ()
    """Samples seen in a training, ascending."""
    concepts: str | None = "entries"
    """What counts as a concept. `entries`: the entries of the run's `balance`, or words without one. `words`: the
    distinct words of captions. The path of a file of entries, as for `balance`. None: nothing."""
    train: Training | None = None


KEYS = ("run", "out", "after", "cuts", "budgets", "concepts", "train")
TRAIN_KEYS = ("config", "evaluate", "metric", "seeds", "random", "halving", "workers")


def load(path: str, overrides: Iterable[str] = ()) -> Plan:
    """Reads a study and applies `key=value` pairs (`train.seeds=5`). Raises StudyError with every problem."""
    document = Document.read(path)
    if document.problems:
        raise StudyError("\n".join(document.problems))
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        raise StudyError(f"{path}: expected lines of `key: value`, found a {type(data).__name__}")
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        value = Document(text)
        if not equals or value.problems:
            problems += value.problems or [f"{override!r}: expected key=value"]
            continue
        *above, last = key.split(".")
        block = data
        for name in above:
            block = block.setdefault(name, {}) if isinstance(block, dict) else {}
        if isinstance(block, dict):
            block[last] = value.data
    reader = _Reader(document, problems)
    plan = reader.plan(data)
    if plan is None or problems:
        raise StudyError("\n".join(problems))
    return plan


class _Reader:
    def __init__(self, document: Document, problems: list[str]) -> None:
        self.document, self.problems = document, problems

    def note(self, key: Sequence[Any], problem: str) -> None:
        self.problems.append(f"{self.document.where(*key)}: {'.'.join(map(str, key))}: {problem}")

    def plan(self, data: dict[str, Any]) -> Plan | None:
        self.known((), data, KEYS)
        run, out = (self.text((key,), data.get(key), required=True) for key in ("run", "out"))
        after = self.text(("after",), data.get("after"))
        budgets = self.numbers(("budgets",), data.get("budgets", []), least=1)
        concepts = self.text(("concepts",), data.get("concepts", "entries"))
        cuts = list(dict.fromkeys(self.cuts(data.get("cuts"))))
        if len(cuts) > MAX_CUTS:
            self.note(("cuts",), f"{len(cuts):,} cuts, expected at most {MAX_CUTS:,}")
        if "://" in out:
            self.note(("out",), f"found {out}, expected a local folder; only the run may be remote")
        train = self.training(data["train"], budgets) if data.get("train") is not None else None
        if self.problems:
            return None
        return Plan(run, out, cuts, after or None, tuple(sorted(set(budgets))), concepts or None, train)

    def cuts(self, lines: Any) -> Iterator[Cut]:
        if not isinstance(lines, list) or not lines:
            self.note(
                ("cuts",), f"found {lines!r}, expected a list such as [{{clip_score: {{top_fraction: [0.2, 0.3]}}}}]"
            )
            return
        for number, line in enumerate(lines):
            at = ("cuts", number)
            if not isinstance(line, dict) or not line:
                self.note(at, f"found {line!r}, expected COLUMN: {{min: …}}, {{max: …}} or {{top_fraction: …}}")
                continue
            grids = [list(self.conditions((*at, column), column, rules)) for column, rules in line.items()]
            yield from map(Cut, itertools.product(*grids))

    def conditions(self, at: tuple[Any, ...], column: str, rules: Any) -> Iterator[Condition]:
        if not isinstance(rules, dict) or len(rules) != 1 or next(iter(rules)) not in RULES:
            expected = "expected {min: …}, {max: …} or {top_fraction: …}, a number or a list of numbers"
            self.note(at, f"found {rules!r}, {expected}")
            return
        [(rule, values)] = rules.items()
        values = values if isinstance(values, list) else [values]
        for value in values:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            number = number and abs(value) <= sys.float_info.max  # also of integers, which may be larger
            if not number or (rule == "top_fraction" and not 0 < value <= 1):
                expected = "a number above 0 and at most 1" if rule == "top_fraction" else "a number"
                self.note((*at, rule), f"found {value!r}, expected {expected}")
            else:
                yield Condition(column, rule, float(value))
        if not values:
            self.note((*at, rule), "found no values")

    def training(self, block: Any, budgets: list[int]) -> Training | None:
        if not isinstance(block, dict):
            self.note(("train",), f"found {block!r}, expected keys {', '.join(TRAIN_KEYS)}")
            return None
        self.known(("train",), block, TRAIN_KEYS)
        config = self.text(("train", "config"), block.get("config"), required=True)
        evaluate = block.get("evaluate")
        if not isinstance(evaluate, list) or not evaluate:
            self.note(
                ("train", "evaluate"), f"found {evaluate!r}, expected a list of tasks: [{{zeroshot: {{data: …}}}}]"
            )
        metric = self.text(("train", "metric"), block.get("metric"), required=True)
        seeds = block.get("seeds", SEEDS)
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            seeds = list(range(min(seeds, MAX_SEEDS + 1)))
        seeds = self.numbers(("train", "seeds"), seeds, least=0)
        if not 1 <= len(seeds) <= MAX_SEEDS:
            self.note(("train", "seeds"), f"expected a number of seeds from 1 to {MAX_SEEDS:,}, or a list of them")
        if not budgets:
            self.note(("budgets",), "missing: the samples that a training sees, such as [5120, 10240]")
        flags = {key: block.get(key, default) for key, default in (("random", True), ("halving", False))}
        for key, value in flags.items():
            if not isinstance(value, bool):
                self.note(("train", key), f"found {value!r}, expected true or false")
        workers = self.numbers(("train", "workers"), [block.get("workers", 1)], least=1)
        if self.problems:
            return None
        return Training(config, list(evaluate or []), metric, tuple(seeds), **flags, workers=workers[0])

    def known(self, at: tuple[Any, ...], block: Mapping[str, Any], keys: Sequence[str]) -> None:
        for key in block:
            if key not in keys:
                self.note((*at, key), f"no such key{did_you_mean(key, keys) or '; the keys are ' + ', '.join(keys)}")

    def text(self, at: tuple[Any, ...], value: Any, required: bool = False) -> str:
        if isinstance(value, str) and value.strip():
            return value
        if required or value is not None:
            self.note(at, "missing" if value is None else f"found {value!r}, expected text")
        return ""

    def numbers(self, at: tuple[Any, ...], values: Any, least: int) -> list[int]:
        values = values if isinstance(values, list) else [values]
        whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and least <= v <= LARGEST]
        if len(whole) < len(values):
            self.note(at, f"found {values!r}, expected whole numbers, at least {least} and below 2^63")
        return list(dict.fromkeys(whole))
