"""Retrieval in both directions: R@1, 5 and 10 of images for captions and of captions for images.

DATA is a folder of shards (or the run around it), where each caption belongs to its own image alone, or
CLIP_benchmark's WebDataset layout (test/*.tar with KEY.jpg and KEY.txt, dataset_type.txt saying `retrieval`), where
KEY.txt holds a caption a line, as for COCO and Flickr30k. A caption finds its image if that is among the nearest K; an
image finds its captions if at least one of them is.

    python -m trainer.evaluate retrieval --model runs/demo/model --data runs/heldout
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.command import open_encoder
from trainer.evaluate.samples import EvaluationError, Sample, lines, read_shards, read_webdataset, webdataset_shards
from trainer.shards import Shards

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TASK = "zeroshot_retrieval"
AT = (1, 5, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options."""


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`image_retrieval_recall@K` (from a caption to its image) and `text_retrieval_recall@K`, from 0 to 1."""
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
    return recalls(torch.cat(images), torch.cat(texts), torch.tensor(owners), encoder.device)


def recalls(images: Tensor, texts: Tensor, owners: Tensor, device: torch.device) -> dict[str, float]:
    """Recalls of images (N, D) and texts (M, D), caption i belonging to image `owners[i]`."""
    import torch

    from trainer.evaluate.features import nearest

    found_images = nearest(texts, images, max(AT), device)[1] == owners[:, None]
    found_texts = owners[nearest(images, texts, max(AT), device)[1]] == torch.arange(len(images))[:, None]
    metrics = {}
    for k in AT:
        metrics[f"image_retrieval_recall@{k}"] = found_images[:, :k].any(dim=1).double().mean().item()
        metrics[f"text_retrieval_recall@{k}"] = found_texts[:, :k].any(dim=1).double().mean().item()
    return metrics


def open_captioned(data: str) -> tuple[Iterator[Sample], int | None]:
    """The captioned pictures of shards or of CLIP_benchmark's layout, and their number if it is known."""
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
            captions = tuple(line for line in text.decode("utf-8-sig").splitlines() if line.strip())
        except UnicodeDecodeError as error:
            raise EvaluationError(f"{where}: the captions are not UTF-8") from error
        if not captions:
            raise EvaluationError(f"{where}: no caption")
        yield Sample(where, encoded, captions=captions)
