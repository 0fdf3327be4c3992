"""Winnow's trainer: pretrains a CLIP on shards, evaluates and exports it. It reads shards and needs no pipeline.

To use a trained model, as with openai/CLIP:

    import trainer

    model, preprocess = trainer.load("runs/demo/model")            # or "ViT-B/32": OpenAI's weights
    image = preprocess(Image.open("photo.jpg")).unsqueeze(0)
    text = trainer.tokenize(["a circle", "a square"], context_length=model.context_length)
    probs = model(image, text)[0].softmax(dim=-1)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

# OpenMP reads these once, when torch loads it. If idle threads only spin, training on a CPU is up to ten times slower
# whenever anything else runs on the machine. If they sleep immediately, they wake too late for the small matrix
# products of a small model, which then trains at a sixth of its speed. So they spin for tens of microseconds first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# Torch and open_clip take seconds to import, so each function imports them when it is called.
def available_models() -> list[str]:
    """The names of OpenAI's published models, which `load` accepts: see `trainer.clip.available_models`."""
    from trainer import clip

    return clip.available_models()


def load(
    name: str, device: str | torch.device | None = None, pretrained: str | None = None
) -> tuple[Any, Callable[[Image.Image], torch.Tensor]]:
    """Loads a trained model and its image preprocessing: see `trainer.clip.load`."""
    from trainer import clip

    return clip.load(name, device, pretrained)


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """Converts texts to CLIP's token ids: see `trainer.clip.tokenize`."""
    from trainer import clip

    return clip.tokenize(texts, context_length, truncate)
