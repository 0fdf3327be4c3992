"""Linear probe: logistic regression on frozen image features.

As in Radford et al. 2021, appendix A.3: L-BFGS with at most 1,000 iterations on the image tower's features before
their projection. The L2 strength is chosen on a validation split, by a search over 96 steps from 1e-6 to 1e6 that
starts with seven values and halves the interval around the best. The final fit uses training and validation data.

DATA is a folder with train/, test/ and optionally val/, each in a layout of `zeroshot`; --train and --val name folders
elsewhere. Without a validation split, a tenth of each training class is held out.

    python -m trainer.evaluate probe --model runs/demo/model --data FOLDER_WITH_TRAIN_AND_TEST
    python -m trainer.evaluate probe --model ViT-B-32 --pretrained openai --train imagenet/train --data imagenet/val
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.command import open_encoder, say
from trainer.evaluate.classes import LabelledImages, open_labelled, read_classnames
from trainer.evaluate.zeroshot import accuracy
from trainer.samples import EvaluationError

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.features import Encoder

TASK = "linear_probe"
STEPS = 96
"""Steps of the search for the L2 strength: eight per decade over twelve decades."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_probe_arguments(parser)
    parser.add_argument("--val", type=Path, help="folder to choose the L2 strength on; by default DATA/val, if any")
    parser.add_argument("--l2", type=float, help="L2 strength, instead of the search")


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every task that fits a classifier to features."""
    parser.add_argument("--train", type=Path, help="folder to fit on; by default DATA/train")
    parser.add_argument("--classnames", help="file of class names, one per line, if the data has none")
    parser.add_argument(
        "--features",
        choices=("penultimate", "embedding"),
        default="penultimate",
        help="those before the projection, as in the paper, or unit vectors of the common space, as in CLIP_benchmark",
    )
    parser.add_argument("--max-iterations", type=int, default=1000, help="iterations of L-BFGS (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of samples (default 0)")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`lp_acc1`, `lp_acc5` and `lp_mean_per_class_recall` on the test split, from 0 to 1, and the chosen `l2`."""
    import torch

    from trainer.evaluate.logistic import fit, hold_out, predict

    splits = open_splits(args)
    classes = len(splits["test"].names)
    encoder = open_encoder(args)
    data = {name: featurize(encoder, split, args) for name, split in splits.items()}
    features, labels = data["train"]
    if "val" in data:
        (fit_x, fit_y), (val_x, val_y) = data["train"], data["val"]
        features, labels = torch.cat([features, val_x]), torch.cat([labels, val_y])
    else:
        held = hold_out(labels, args.seed)
        if args.l2 is None and not bool(held.any()):
            raise EvaluationError(
                f"{splits['train'].folder}: one picture of each class leaves none to choose the L2 strength on;"
                " give --l2 or --val"
            )
        fit_x, fit_y, val_x, val_y = features[~held], labels[~held], features[held], labels[held]

    def validate(l2: float) -> float:
        found = float(accuracy(predict(val_x, *fit(fit_x, fit_y, classes, l2, args.max_iterations)), val_y, 2)["acc1"])
        say(f"l2 {l2:.3g}: {found:.4f} of the validation split")
        return found

    l2 = args.l2 if args.l2 is not None else search(validate)
    best = predict(data["test"][0], *fit(features, labels, classes, l2, args.max_iterations))
    metrics = {f"lp_{key}": value for key, value in accuracy(best, data["test"][1].to(best.device), classes).items()}
    return {**metrics, "l2": l2, "train_images": len(labels), "features": args.features}


def open_splits(args: argparse.Namespace) -> dict[str, LabelledImages]:
    """The splits `train`, `test` and, if there is one, `val`. Raises EvaluationError, also if their classes differ."""
    if args.max_iterations < 1:
        raise EvaluationError(f"--max-iterations: found {args.max_iterations}, expected at least 1")
    if args.l2 is not None and not 0 <= args.l2 < math.inf:
        raise EvaluationError(f"--l2: found {args.l2}, expected a number from 0")
    if not 0 <= args.seed < 1 << 63:
        raise EvaluationError(f"--seed: found {args.seed}, expected a number from 0")
    names, data = read_classnames(args.classnames), Path(args.data)
    splits = {"test": open_labelled(data, names), "train": open_labelled(args.train or data, names, "train")}
    val = getattr(args, "val", None) or (data if (data / "val").is_dir() else None)
    if val:
        splits["val"] = open_labelled(val, names, "val")
    test = splits["test"]
    for name, split in splits.items():
        if name != "test" and split.folder == test.folder:
            raise EvaluationError(f"{test.folder}: both for fitting and for testing; give --train FOLDER")
        if split.names != test.names:
            raise EvaluationError(f"{split.folder}: its classes are not those of {test.folder}")
    return splits


def featurize(encoder: Encoder, split: LabelledImages, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The features and labels of a split, on the model's device."""
    features, labels = encoder.matrix(split, split.count(), penultimate=args.features == "penultimate")
    return features.to(encoder.device), labels.to(encoder.device)


def search(validate: Callable[[float], float]) -> float:
    """The L2 strength, of 97 from 1e-6 to 1e6, with the highest `validate`; of equally good ones, the greatest."""
    found: dict[int, float] = {}
    gap = STEPS // 6
    steps = list(range(0, STEPS + 1, gap))
    while True:
        for step in steps:
            if 0 <= step <= STEPS and step not in found:
                found[step] = validate(strength(step))
        peak = max(found, key=lambda step: (found[step], step))
        if gap == 1:
            return strength(peak)
        gap //= 2
        steps = [peak - gap, peak + gap]


def strength(step: int) -> float:
    return float(10 ** (step / 8 - 6))
