"""Feeds the shards of a run to a plain PyTorch loop: `python examples/torch_loop.py runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageOps


def pixels(picture: Image.Image) -> torch.Tensor:
    """uint8 (3, 64, 64): the largest centred square, resized."""
    square = ImageOps.fit(picture.convert("RGB"), (64, 64))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def main(run: str) -> int:
    """Reads every sample once; returns the number of samples."""
    tars = sorted(map(str, Path(run, "shards").glob("*.tar")))
    samples = wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg;png;webp", "txt")
    loader = torch.utils.data.DataLoader(samples.map_tuple(pixels, str).batched(32), batch_size=None)
    seen = 0
    for images, captions in loader:
        seen += len(captions)
        print(f"{seen:6} samples, pictures {tuple(images.shape)}, first caption {captions[0]!r}")
    return seen


if __name__ == "__main__":
    main(sys.argv[1])
