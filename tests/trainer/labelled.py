"""Makes labelled and captioned pictures in the layouts that evaluations read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.trainer.shards import COLOURS, jpeg, picture


def write_folders(folder: Path, per_class: int, seed: int = 0) -> Path:
    """Writes COLOUR/*.png, `per_class` noisy pictures of each colour, which depend on the seed."""
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for i in range(per_class):
            picture(colour, seed * 1000 + i).save(folder / colour / f"{i}.png")
    return folder


def labelled_members(labels: list[int], start: int = 0) -> list[tuple[str, bytes]]:
    names = list(COLOURS)
    return [
        member
        for i, label in enumerate(labels, start)
        for member in ((f"s{i}.cls", str(label).encode()), (f"s{i}.png", jpeg(picture(names[label], i), "PNG")))
    ]


def texture(seed: int, size: int = 64) -> Image.Image:
    """Smooth noise, like a photograph, that differs clearly from that of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
