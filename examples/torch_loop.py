"""Feeds the shards of a run to a plain PyTorch loop: `python examples/torch_loop.py runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import webdataset as wds
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize


def pixels(picture) -> torch.Tensor:
    """uint8 (3, 64, 64): the shorter side is scaled to 64, the rest cut off."""
    return center_crop(resize(pil_to_tensor(picture), 64, antialias=True), [64, 64])


def main(run: str) -> int:
    """Reads every sample once; returns how many there were."""
    tars = sorted(map(str, Path(run, "shards").glob("*.tar")))
    samples = (
        wds.WebDataset(tars, shardshuffle=False)
        .decode("pilrgb", handler=wds.warn_and_continue)
        .to_tuple("jpg;png;webp", "txt")
        .map_tuple(pixels, str)
    )
    loader = torch.utils.data.DataLoader(samples.batched(32), batch_size=None)
    seen = 0
    for images, captions in loader:
        seen += len(captions)
        print(f"{seen:6} samples, pictures {tuple(images.shape)}, first caption {captions[0]!r}")
    return seen


if __name__ == "__main__":
    main(sys.argv[1])
