"""Retrieval in both directions, images by caption and captions by image: R@1, R@5, R@10 and AUC.

DATA is a folder of shards (or its run), with one caption per image, or CLIP_benchmark's WebDataset layout (test/*.tar
with KEY.jpg and KEY.txt, and dataset_type.txt that says `retrieval`), where KEY.txt has one caption per line, as for
COCO and Flickr30k. A caption is a hit at K if its image is among the nearest K; an image is a hit if at least one of
its captions is.

The AUC is the probability that a caption is nearer to its own image than to another one, or that an image is nearer to
its own caption than to another image's; 0.5 is guessing. It uses all ranks instead of the first K, so it distinguishes
weak models with fewer images.

    python -m trainer.evaluate retrieval --model runs/demo/model --data runs/heldout
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.command import open_encoder
from trainer.samples import (
    EvaluationError,
    Sample,
    lines,
    read_shards,
    read_webdataset,
    split_lines,
    webdataset_shards,
)
from trainer.shards import Shards

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TASK = "zeroshot_retrieval"
AT = (1, 5, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options."""


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`image_retrieval_recall@K` and `image_retrieval_auc` (from a caption to its image), `text_retrieval_recall@K` and
    `text_retrieval_auc`, all from 0 to 1. The AUC of a single image is None."""
    import torch

    samples, total = open_captioned(args.data)
    encoder = open_encoder(args)
    images, texts, owners = [], [], []
    seen = 0
    for batch, vectors in encoder.images(samples, total):
        images.append(vectors.cpu())
        texts.append(encoder.texts([caption for sample in batch for caption in sample.captions]).cpu())
        owners += [seen + i for i, sample in enumerate(batch) for _ in sample.captions]
        seen += len(batch)
    if not seen:
        raise EvaluationError(f"{args.data}: no images")
    found = torch.cat(images), torch.cat(texts), torch.tensor(owners)
    return {**recalls(*found, encoder.device), **aucs(*found, encoder.device)}


def recalls(images: Tensor, texts: Tensor, owners: Tensor, device: torch.device) -> dict[str, float]:
    """Recalls of images (N, D) and texts (M, D); caption i belongs to image `owners[i]`."""
    import torch

    from trainer.features import nearest

    found_images = nearest(texts, images, max(AT), device)[1] == owners[:, None]
    found_texts = owners[nearest(images, texts, max(AT), device)[1]] == torch.arange(len(images))[:, None]
    metrics = {}
    for k in AT:
        metrics[f"image_retrieval_recall@{k}"] = found_images[:, :k].any(dim=1).double().mean().item()
        metrics[f"text_retrieval_recall@{k}"] = found_texts[:, :k].any(dim=1).double().mean().item()
    return metrics


def aucs(images: Tensor, texts: Tensor, owners: Tensor, device: torch.device) -> dict[str, float | None]:
    """AUCs of images (N, D) and texts (M, D); caption i belongs to image `owners[i]`. None for a single image."""
    import torch

    numbers = torch.arange(len(images))
    return {
        "image_retrieval_auc": _auc(texts, images, owners, numbers, device),
        "text_retrieval_auc": _auc(images[owners], texts, torch.arange(len(texts)), owners, device),
    }


def _auc(queries: Tensor, candidates: Tensor, right: Tensor, image: Tensor, device: torch.device) -> float | None:
    """The share of pairs (query, candidate of another image) in which the query is nearer to the candidate
    `right[query]` than to the other candidate; a tie counts half. `image` has the image number of each candidate."""
    from trainer.features import TILE

    candidates, right, image = candidates.to(device), right.to(device), image.to(device)
    wins = pairs = 0.0
    # Whole rows: one product scores a right candidate and its copies, so that equal scores compare equal.
    rows = max(1, TILE * TILE // len(candidates))
    for block, own in zip(queries.split(rows), right.split(rows)):
        scores = block.to(device, candidates.dtype) @ candidates.T
        own_scores = scores.gather(1, own[:, None])
        others = image[None, :] != image[own][:, None]
        wins += ((scores < own_scores) & others).sum().item() + ((scores == own_scores) & others).sum().item() / 2
        pairs += others.sum().item()
    return wins / pairs if pairs else None


def open_captioned(data: str) -> tuple[Iterator[Sample], int | None]:
    """The captioned pictures of shards or of CLIP_benchmark's layout, and their number if known."""
    folder = Path(data)
    if folder.is_dir() and not any(folder.iterdir()):
        raise EvaluationError(f"{folder}: an empty folder")
    if (kind := lines(folder / "dataset_type.txt")) is None:
        shards = Shards(data)
        return read_shards(shards), len(shards)
    if [word.lower() for word in kind] != ["retrieval"]:
        raise EvaluationError(f"{folder / 'dataset_type.txt'}: {' '.join(kind)}, expected retrieval")
    place = folder / "test" if (folder / "test").is_dir() else folder
    tars = webdataset_shards(place)
    if not tars:
        raise EvaluationError(f"{place}: no *.tar with KEY.jpg and KEY.txt")
    return (sample for tar in tars for sample in _captioned(tar)), None


def _captioned(tar: Path) -> Iterator[Sample]:
    for where, encoded, text in read_webdataset(tar, "txt"):
        try:
            captions = tuple(split_lines(text.decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            raise EvaluationError(f"{where}: the captions are not UTF-8") from error
        if not captions:
            raise EvaluationError(f"{where}: no caption")
        yield Sample(where, encoded, captions=captions)
