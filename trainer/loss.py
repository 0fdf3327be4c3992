"""CLIP's loss (Radford et al. 2021, figure 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(100)
"""The logits are never scaled by more than 100 (section 2.5); the model starts at 1 / 0.07."""


def clip_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over a batch of matching pairs.

    `image` and `text` are unit vectors of shape (B, D), row i of one belonging to row i of the other; `log_scale` is
    the logarithm of the inverse temperature. The mean of both directions, in nats: ln B when nothing is learnt.
    """
    logits = log_scale.exp() * image.float() @ text.float().T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
