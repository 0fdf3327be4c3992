"""Zero-shot classification: assigns each image to the class with the nearest prompts.

A class is the mean of its prompts' unit vectors, normalised again (Radford et al. 2021, section 3.1.4). DATA is
either CLASS/*.jpg (png, webp) with the folders' names as class names (`_` is a space), or CLIP_benchmark's WebDataset
layout (*.tar or test/*.tar with KEY.jpg and KEY.cls, classnames.txt, zeroshot_classification_templates.txt).

    python -m trainer.evaluate zeroshot --model runs/demo/model --data FOLDER
    python -m trainer.evaluate zeroshot --model ViT-B-32 --pretrained openai --data imagenet/val \\
                                        --classnames imagenet --templates imagenet
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.command import open_encoder, say
from trainer.evaluate.classes import LabelledImages, open_labelled, read_classnames, read_templates
from trainer.samples import EvaluationError, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.features import Encoder

TASK = "zeroshot_classification"
DEFAULT_TEMPLATES = ["a photo of a {c}."]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_class_arguments(parser)


def add_class_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every task that classifies by prompts."""
    parser.add_argument("--classnames", help="file of class names, one per line, or `imagenet` for its 1000")
    parser.add_argument(
        "--templates",
        help="file of prompts, one per line, with {c} for the class, or `imagenet` for CLIP's 80;"
        f" by default the data's own, else {DEFAULT_TEMPLATES[0]!r}",
    )


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`acc1`, `acc5` (null with fewer than 5 classes) and `mean_per_class_recall`, all from 0 to 1."""
    data = open_labelled(Path(args.data), read_classnames(args.classnames))
    best, labels, _ = classify(open_encoder(args), data, args.templates)
    return accuracy(best, labels, len(data.names))


def classify(encoder: Encoder, data: LabelledImages, templates: str | None) -> tuple[Tensor, Tensor, list[Sample]]:
    """Classifies all pictures. Returns their nearest classes, their labels, and the samples without their bytes.

    The nearest classes are int64 (N, 5), nearest first, with fewer columns if there are fewer classes. Labels are int64
    (N,). `templates` is the value of `--templates`. Raises EvaluationError if there are no pictures.
    """
    import torch

    prompts = read_templates(templates) if templates else data.templates or DEFAULT_TEMPLATES
    for name, count in Counter(data.names).items():
        if count > 1:
            say(f"warning: {count} classes are called {name!r}; prompts cannot tell them apart")
    classes = encoder.classes(data.names, prompts)
    best: list[Tensor] = []
    samples: list[Sample] = []
    for batch, vectors in encoder.images(data, data.count()):
        best.append((vectors @ classes.T).topk(min(5, len(classes))).indices.cpu())
        samples.extend(sample._replace(encoded=b"") for sample in batch)
    if not samples:
        raise EvaluationError(f"{data.folder}: no images")
    return torch.cat(best), torch.tensor([sample.label for sample in samples]), samples


def accuracy(best: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    """CLIP_benchmark's metrics of the nearest classes (N, up to 5). Classes without pictures do not count for recall.

    With fewer than 5 classes, `acc5` would be meaningless and is None.
    """
    hits = best == labels[:, None]
    recalls = [hits[labels == label, 0].double().mean().item() for label in labels.unique()]
    return {
        "acc1": hits[:, 0].double().mean().item(),
        "acc5": hits.any(dim=1).double().mean().item() if classes >= 5 else None,
        "mean_per_class_recall": sum(recalls) / len(recalls),
    }
