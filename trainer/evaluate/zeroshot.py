"""Zero-shot classification: each image goes to the class whose prompts lie nearest to it.

A class is the mean of its prompts' unit vectors, normalised again (Radford et al. 2021, section 3.1.4). FOLDER is
either CLASS/*.jpg (png, webp) with the folders' names as class names (`_` is a space), or CLIP_benchmark's WebDataset
layout (*.tar or test/*.tar with KEY.jpg and KEY.cls, classnames.txt, zeroshot_classification_templates.txt).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.evaluate.classes import EvaluationError, open_labelled, read_lines
from trainer.model import Clip, Preprocess, Tokenizer, encode_text, open_clip

TASK = "zeroshot_classification"
DEFAULT_TEMPLATES = ["a photo of a {c}."]

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classnames", help="file with a class name a line, or `imagenet` for its 1000")
    parser.add_argument(
        "--templates",
        help="file with a prompt a line, {c} standing for the class, or `imagenet` for CLIP's 80;"
        f" by default the data's own, else {DEFAULT_TEMPLATES[0]!r}",
    )


def evaluate(
    model: Clip, preprocess: Preprocess, tokenizer: Tokenizer, args: argparse.Namespace
) -> dict[str, float | None]:
    """`acc1`, `acc5` (null under 5 classes) and `mean_per_class_recall`, all from 0 to 1."""
    names = None
    if args.classnames:
        names = open_clip.IMAGENET_CLASSNAMES if args.classnames == "imagenet" else read_lines(Path(args.classnames))
    data = open_labelled(args.data, names)
    if args.templates == "imagenet":
        templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    else:
        templates = read_lines(Path(args.templates)) if args.templates else data.templates or DEFAULT_TEMPLATES
    classes = class_vectors(model, tokenizer, data.names, templates, preprocess.device)
    scores: list[Tensor] = []
    labels: list[int] = []
    for batch in batched(data, args.batch_size):
        images, batch_labels = zip(*batch)
        scores.append((model.encode_image(preprocess(images), normalize=True) @ classes.T).float().cpu())
        labels.extend(batch_labels)
    if not labels:
        raise EvaluationError(f"{args.data}: no images")
    return accuracy(torch.cat(scores), torch.tensor(labels))


def class_vectors(
    model: Clip, tokenizer: Tokenizer, names: list[str], templates: list[str], device: torch.device
) -> Tensor:
    """A unit vector per class, shape (classes, embed_dim). Raises EvaluationError on a template without `{c}`."""
    for template in templates:
        if "{c}" not in template:
            raise EvaluationError(f"template {template!r}: expected {{c}} where the class name goes")
    vectors = []
    for name in names:
        tokens = tokenizer([template.replace("{c}", name) for template in templates]).to(device)
        vectors.append(encode_text(model, tokens, normalize=True).mean(dim=0))
    return F.normalize(torch.stack(vectors), dim=-1)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Metrics of scores (images, classes) under CLIP_benchmark's names; a class without images has no recall."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    seen = labels.unique()
    recalls = [hits[labels == label, 0].double().mean().item() for label in seen]
    return {
        "acc1": hits[:, 0].double().mean().item(),
        "acc5": hits.any(dim=1).double().mean().item() if scores.shape[1] >= 5 else None,
        "mean_per_class_recall": sum(recalls) / len(recalls),
    }


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
