"""Retrieval in both directions over shards: R@1, 5 and 10 of images for captions and captions for images.

FOLDER is a folder of shards or the run folder around it; each caption belongs to its own image alone.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from trainer.data import CorruptSampleError, Shards, ShardsError, decode
from trainer.evaluate.zeroshot import batched
from trainer.model import Clip, Preprocess, Tokenizer, encode_text

TASK = "zeroshot_retrieval"
AT = (1, 5, 10)
TILE = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def evaluate(
    model: Clip, preprocess: Preprocess, tokenizer: Tokenizer, args: argparse.Namespace
) -> dict[str, float | None]:
    """`image_retrieval_recall@K` (from a caption to its image) and `text_retrieval_recall@K`, from 0 to 1."""
    shards = Shards(args.data)
    images, texts = [], []
    for numbers in batched(range(len(shards)), args.batch_size):
        pictures, captions = [], []
        for number in numbers:
            try:
                encoded, caption = shards.read(number)
                pictures.append(decode(encoded))
            except CorruptSampleError as error:
                raise ShardsError(f"{shards.folder}: {shards.key(number)}: {error}") from error
            captions.append(caption)
        images.append(model.encode_image(preprocess(pictures), normalize=True).float())
        texts.append(encode_text(model, tokenizer(captions).to(preprocess.device), normalize=True).float())
    image, text = torch.cat(images), torch.cat(texts)
    to_image, to_text = ranks(text, image), ranks(image, text)
    metrics: dict[str, float | None] = {}
    for k in AT:
        metrics[f"image_retrieval_recall@{k}"] = (to_image < k).double().mean().item()
        metrics[f"text_retrieval_recall@{k}"] = (to_text < k).double().mean().item()
    return metrics


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """How many candidates come before the right one, number i for query i; in tiles, never the full N x N matrix.

    Among equal scores the earlier candidate comes first, so that a collapsed model does not look perfect.
    """
    found = []
    order = torch.arange(len(candidates), device=queries.device)
    for start in range(0, len(queries), TILE):
        scores = queries[start : start + TILE] @ candidates.T
        mine = order[start : start + TILE, None]
        right = scores.gather(1, mine)
        found.append(((scores > right) | ((scores == right) & (order < mine))).sum(dim=1))
    return torch.cat(found)
