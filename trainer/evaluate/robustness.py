"""Effective robustness: accuracy under distribution shift beyond what accuracy in distribution predicts.

As in Taori et al. 2020 (and Radford et al. 2021, section 3.3): a line is fitted to the logits of the accuracies of
baseline models, in distribution and shifted. It predicts the shifted accuracy of a model from its accuracy in
distribution. The difference between the shifted accuracy and this prediction is the effective robustness; its
difference from the shifted accuracy of a reference model is the relative robustness.

DATA and each --shift are a dataset to evaluate zero-shot, in a layout of `zeroshot`, or the JSON of an earlier
evaluation. If a shift has only some of the classes (ImageNet-A, ImageNet-R), restrict DATA to the same classes.
BASELINES has a row per model: `model`, then the accuracies, from 0 to 1, in columns named after the datasets:

    model,imagenet,imagenetv2
    resnet50,0.761,0.633
    vit_b_16,0.811,0.695

    python -m trainer.evaluate robustness --model runs/x/model --data imagenet=data/imagenet \\
        --shift imagenetv2=data/imagenetv2 --shift sketch=sketch.json --baselines baselines.csv
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trainer.command import open_encoder
from trainer.config import ConfigError
from trainer.evaluate.classes import open_labelled, read_classnames
from trainer.evaluate.zeroshot import accuracy, add_class_arguments, classify
from trainer.samples import EvaluationError, read_csv, read_text

if TYPE_CHECKING:
    from trainer.features import Encoder

TASK = "effective_robustness"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_class_arguments(parser)
    parser.add_argument(
        "--shift", action="append", required=True, metavar="[NAME=]PATH", help="a shifted dataset; can be repeated"
    )
    parser.add_argument("--baselines", type=Path, required=True, help="accuracies of other models, CSV or JSON")
    parser.add_argument("--reference", help="the baseline that relative robustness is measured from")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`acc1` on DATA and, for each shift, its `acc1`, the expected accuracy, the difference, and the line."""
    baselines = read_baselines(args.baselines)
    if args.reference is not None and args.reference not in baselines:
        raise EvaluationError(f"{args.baselines}: no model {args.reference!r}; there are {', '.join(baselines)}")
    sources = [args.data, *args.shift]
    encoder = None
    if not all(_path(source).suffix == ".json" for source in sources):
        if args.model is None:
            raise ConfigError("--model", ["missing, but not every dataset is the JSON of an earlier evaluation"])
        encoder = open_encoder(args)
    found = [_accuracy(source, encoder, args) for source in sources]
    if len(models := {result.model for result in found}) > 1:
        raise EvaluationError(f"--data, --shift: results of different models: {', '.join(sorted(models))}")
    (base, acc, args.model), *shifted = found
    args.data = base  # the dataset named in the result
    shifts = {}
    for name, acc_shifted, _ in shifted:
        pairs = {model: (row[base], row[name]) for model, row in baselines.items() if base in row and name in row}
        try:
            shifts[name] = effective_robustness(acc, acc_shifted, list(pairs.values()))
        except ValueError as error:
            raise EvaluationError(f"{args.baselines}: columns {base!r} and {name!r}: {error}") from error
        if args.reference in pairs:
            shifts[name]["relative_robustness"] = acc_shifted - pairs[args.reference][1]
    mean = sum(shift["effective_robustness"] for shift in shifts.values()) / len(shifts)
    return {"acc1": acc, "mean_effective_robustness": mean, "shifts": shifts}


def effective_robustness(acc: float, shifted: float, baselines: list[tuple[float, float]]) -> dict[str, float]:
    """`shifted` minus the accuracy that a line through the logits of the baselines predicts, and the line.

    `acc`, and the first of each pair of baselines, are accuracies in distribution; `shifted`, and the second of each
    pair, are accuracies under the shift. Raises ValueError if there is no such line.
    """
    from scipy.special import expit, logit

    if not 0 <= acc <= 1 or not 0 <= shifted <= 1:
        raise ValueError(f"accuracies {acc} and {shifted}, expected numbers from 0 to 1")
    if len({pair[0] for pair in baselines}) < 2:
        raise ValueError(f"{len(baselines)} models have both, expected two or more of different accuracy")
    if any(not 0 < value < 1 for pair in baselines for value in pair):
        raise ValueError("expected accuracies between 0 and 1 (divide percentages by 100)")
    x, y = logit(np.array(baselines, np.float64)).T
    slope, intercept = np.polyfit(x, y, 1)
    # The logits of 0 and 1 are infinite. A line with a slope maps them to 0 or 1; on a level line, slope * logit would
    # be NaN.
    expected = float(expit(slope * logit(acc) + intercept if slope else intercept))
    explained = (
        1.0 if np.ptp(y) == 0 else 1 - np.square(y - slope * x - intercept).sum() / np.square(y - y.mean()).sum()
    )
    return {
        "acc1": shifted,
        "expected_acc1": expected,
        "effective_robustness": shifted - expected,
        "slope": float(slope),
        "intercept": float(intercept),
        "r2": float(explained),
        "baselines": len(baselines),
    }


def read_baselines(path: Path) -> dict[str, dict[str, float]]:
    """Reads accuracies by model and dataset; cells may be empty. Raises EvaluationError."""
    rows = _read_json(path) if path.suffix == ".json" else read_csv(path)
    found: dict[str, dict[str, float]] = {}
    for row in rows if isinstance(rows, list) and rows else [None]:
        if not isinstance(row, Mapping) or "model" not in row:
            columns = f"; it has the columns {', '.join(row)}" if isinstance(row, Mapping) else ""
            raise EvaluationError(
                f"{path}: expected rows with `model` and an accuracy per dataset, as a CSV separated by commas or as a"
                f" JSON list of objects{columns}"
            )
        model = str(row["model"])
        if model in found:
            raise EvaluationError(f"{path}: two rows for the model {model!r}")
        accuracies = {str(name): value for name, value in row.items() if name != "model" and value not in ("", None)}
        try:
            found[model] = {name: float(value) for name, value in accuracies.items()}
        except (ValueError, TypeError) as error:
            raise EvaluationError(f"{path}: {model}: {error}; expected accuracies such as 0.633") from error
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"{path}: not JSON: {error}") from error


def _path(source: str) -> Path:
    return Path(source.partition("=")[2] or source)


class _Result(NamedTuple):
    dataset: str
    acc1: float
    model: str


def _accuracy(source: str, encoder: Encoder | None, args: argparse.Namespace) -> _Result:
    path = _path(source)
    name = source.partition("=")[0] if "=" in source else ""
    if path.suffix == ".json":
        result = _read_json(path)
        try:
            acc1 = float(result["metrics"]["acc1"])
            if not 0 <= acc1 <= 1:
                raise ValueError(f"acc1 is {acc1}, not from 0 to 1")
            return _Result(name or str(result["dataset"]), acc1, str(result["model"]))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path}: expected the JSON of `evaluate zeroshot` ({type(error).__name__}: {error})"
            ) from error
    assert encoder is not None
    data = open_labelled(path, read_classnames(args.classnames))
    best, labels, _ = classify(encoder, data, args.templates)
    found = accuracy(best, labels, len(data.names))
    return _Result(name or path.name, found["acc1"], args.model)
