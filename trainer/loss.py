"""The contrastive losses of CLIP (Radford et al. 2021, figure 3) and SigLIP (Zhai et al. 2023, algorithm 1).

Neither holds the N x N logits of a batch of N pairs. They are computed a few rows of images at a time: once for the
normalisers of CLIP's two softmaxes, and once more, when these are known, for the gradient, which is all that is kept.
Memory grows with N x D, not with N squared. A batch small enough for one block computes its logits once.

On several ranks each has the pairs that it encoded, N / ranks of them: its images against the texts of all. The loss
is that of the whole batch, the same on every rank. Its gradient is scaled by the number of ranks, because
DistributedDataParallel averages the gradients of the ranks, and that of a loss over the whole batch is their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trainer import distributed

MAX_LOG_SCALE = math.log(100)
"""The logits are never scaled by more than 100 (CLIP, section 2.5); CLIP starts at 1 / 0.07."""
SIGLIP_LOG_SCALE, SIGLIP_BIAS = math.log(10), -10.0
"""Where SigLIP's learned scale and bias start (Zhai et al. 2023, section 3.2)."""
LOGITS_AT_ONCE = 1 << 24
"""64 MiB of logits; `memory` says what is held in all."""


def clip_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy over a batch of matching pairs: the loss in nats, and each own pair's share of it.

    `image` and `text` are unit vectors of shape (n, D), row i of one belonging to row i of the other; `log_scale` is
    the logarithm of the inverse temperature. The loss is the mean over the N pairs of all ranks and both directions,
    ln N when nothing is learnt; the second value (n,) has no gradient.
    """
    loss, each = _Contrast.apply(image, text, log_scale, None)
    return loss, each


def siglip_loss(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid loss over all image-text pairs, in nats per image. Arguments and result as `clip_loss`."""
    loss, each = _Contrast.apply(image, text, log_scale, bias)
    return loss, each


def chance(pairs: int, loss: str) -> float:
    """The loss, in nats, of a model that has learnt nothing: the baseline of training."""
    # SigLIP's best constant answer is a probability of 1/N for each of an image's N pairs.
    others = (pairs - 1) * math.log(pairs / (pairs - 1)) if loss == "siglip" and pairs > 1 else 0.0
    return math.log(pairs) + others


def memory(own: int, pairs: int, width: int) -> int:
    """Bytes that a rank's loss holds at its peak, over `own` of all `pairs`, with features of `width`."""
    logits = min(own * pairs, max(LOGITS_AT_ONCE, pairs))
    # Logits: a block, its probabilities, and the previous block. Features: for all pairs, the texts, their gradient
    # and its sum over the ranks; for own pairs, images, scaled images and two gradients.
    return 4 * (3 * logits + (3 * pairs + 4 * own) * width)


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        images, scale = image.float(), log_scale.float().exp()
        texts = distributed.rows_of(text.float())
        total, first = len(texts), len(images) * distributed.rank()
        scaled = images * scale
        parts = scaled.split(max(1, LOGITS_AT_ONCE // total))

        def compute(part: Tensor) -> Tensor:
            return part @ texts.T if bias is None else torch.addmm(bias.float(), part, texts.T)

        kept = compute(scaled) if len(parts) == 1 else None

        def blocks() -> Iterator[tuple[slice, Tensor, Tensor]]:
            # The rows, their logits, and the view of these that belongs to matching pairs.
            start = 0
            for part in parts:
                logits = compute(part) if kept is None else kept
                yield slice(start, start + len(part)), logits, logits.diagonal(first + start)[: len(part)]
                start += len(part)

        each = images.new_empty(len(images))
        if bias is None:
            normaliser = images.new_full((total,), -torch.inf)  # of each text, over the images
            for rows, logits, matching in blocks():
                # log_softmax is several times faster than logsumexp, and any of its rows gives the same.
                each[rows] = -logits.log_softmax(1).diagonal(first + rows.start)[: len(matching)] - matching
                normaliser = torch.logaddexp(normaliser, logits[0] - logits.log_softmax(0)[0])
            if distributed.world_size() > 1:
                peak = distributed.max_of(normaliser)
                normaliser = peak + distributed.sum_of((normaliser - peak).exp()).log()
            each.add_(normaliser[first : first + len(each)]).div_(2)

        image_grad, text_grad = torch.empty_like(images), torch.zeros_like(texts)
        bias_grad = torch.zeros_like(scale)
        for rows, logits, matching in blocks():
            # The gradient of both losses by the logits is the predicted probability less the target.
            if bias is None:
                belief = logits.softmax(1).add_(logits.sub_(normaliser).exp_()).div_(2)
            else:
                each[rows] = torch.nn.functional.softplus(logits).sum(1) - matching
                belief = logits.sigmoid_()
            belief.diagonal(first + rows.start)[: rows.stop - rows.start].sub_(1)
            image_grad[rows] = belief @ texts
            text_grad.addmm_(belief.T, scaled[rows])
            if bias is not None:
                bias_grad += belief.sum()

        text_grad = distributed.sum_of(text_grad)[first : first + len(each)]
        # The derivative of a logit by the logarithm of its scale is the logit, less the bias.
        scale_grad = (image_grad * scaled).sum()
        factor = distributed.world_size() / total
        gradients = (image_grad * scale, text_grad, scale_grad, bias_grad)
        ctx.save_for_backward(*(gradient * factor for gradient in gradients))
        ctx.dtypes = image.dtype, text.dtype, log_scale.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(each)
        return distributed.sum_of(each.sum()) / total, each

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if dtype is None else (gradient * outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return tuple(gradients)
