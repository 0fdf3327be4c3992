"""Few-shot classification: logistic regression on the frozen features of 1, 2, 4, 8 and 16 pictures per class.

Accuracies are averaged over random draws of the pictures (Radford et al. 2021, figure 6); a larger number of pictures
extends the draw of a smaller one. DATA and the features are those of `probe`. One picture per class leaves none to
choose the L2 strength on, so the strength is an option; the default, 3.16, is the C = 0.316 of openai/CLIP's example.

    python -m trainer.evaluate fewshot --model runs/demo/model --data FOLDER_WITH_TRAIN_AND_TEST --shots 1 4 16
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.command import open_encoder
from trainer.evaluate.probe import add_probe_arguments, featurize, open_splits
from trainer.evaluate.zeroshot import accuracy
from trainer.samples import EvaluationError

if TYPE_CHECKING:
    from torch import Tensor

TASK = "few_shot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_probe_arguments(parser)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="pictures per class")
    parser.add_argument("--draws", type=int, default=3, help="draws of pictures to average over (default 3)")
    parser.add_argument("--l2", type=float, default=3.16, help="L2 strength (default 3.16)")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`fs_acc1@K` and `fs_acc1_std@K`, mean and standard deviation of the accuracy over draws, for each number K."""
    from trainer.evaluate.logistic import fit, predict

    for option, found in (("--shots", min(args.shots)), ("--draws", args.draws)):
        if found < 1:
            raise EvaluationError(f"{option}: found {found}, expected at least 1")
    splits = open_splits(args)
    classes = len(splits["test"].names)
    encoder = open_encoder(args)
    (features, labels), (test, truth) = (featurize(encoder, splits[name], args) for name in ("train", "test"))
    counts = labels.bincount(minlength=classes)
    if int(counts.min()) < max(args.shots):
        name = splits["train"].names[int(counts.argmin())]
        raise EvaluationError(
            f"{splits['train'].folder}: {int(counts.min())} pictures of {name!r}, fewer than --shots {max(args.shots)}"
        )
    metrics: dict[str, Any] = {}
    for shots in sorted(set(args.shots)):
        accuracies = []
        for draw in range(args.draws):
            chosen = draw_shots(labels, shots, args.seed + draw)
            best = predict(test, *fit(features[chosen], labels[chosen], classes, args.l2, args.max_iterations))
            accuracies.append(accuracy(best, truth, classes)["acc1"])
        metrics[f"fs_acc1@{shots}"] = float(np.mean(accuracies))
        metrics[f"fs_acc1_std@{shots}"] = float(np.std(accuracies))
    return {**metrics, "l2": args.l2, "draws": args.draws, "features": args.features}


def draw_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Draws `shots` samples of each class and returns their numbers. With the same seed, more shots extend the draw."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen)
