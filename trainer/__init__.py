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

# Read once, when torch loads OpenMP. Waiting threads that spin make training on a CPU up to ten times slower when
# anything else runs on the machine. Threads that sleep at once wake too late for the small products of a small model,
# which then runs at a sixth of its speed. So they spin for some tens of microseconds, then sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# Torch and open_clip take seconds to import, so each function imports them when it is called.
def available_models() -> list[str]:
    """Model names that `load` accepts: those of openai/CLIP."""
    from trainer import clip

    return clip.available_models()


def load(
    name: str, device: str | torch.device | None = None, pretrained: str | None = None
) -> tuple[Any, Callable[[Image.Image], torch.Tensor]]:
    """A trained model and the preprocessing of its pictures: see `trainer.clip.load`."""
    from trainer import clip

    return clip.load(name, device, pretrained)


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """Texts to the token ids that CLIP's text towers take: see `trainer.clip.tokenize`."""
    from trainer import clip

    return clip.tokenize(texts, context_length, truncate)
