"""The contrastive losses of CLIP (Radford et al. 2021, figure 3) and SigLIP (Zhai et al. 2023, algorithm 1).

For N pairs of unit vectors, N x D each, with the logits `log_scale.exp() * image @ text.T`, they are

    clip = (cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2
    siglip = -logsigmoid(sign * (logits + bias)).sum() / N          # sign is 1 on the diagonal and -1 elsewhere

This module computes them without holding the N x N logits. It goes through blocks of image rows: in a first pass for
the normalisers of CLIP's two softmaxes, in a second for the gradient, which is all that it keeps. Memory grows with
N x D, not with N squared. If the whole batch fits into one block, the logits are computed once.

Each rank has the N / ranks pairs that it encoded, and compares its images with the texts of all ranks. The loss is that
of the whole batch and the same on every rank. Its gradient is multiplied by the number of ranks, because the gradient
of the whole batch is the sum over the ranks, while DistributedDataParallel takes the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trainer import distributed

MAX_LOG_SCALE = math.log(100)
"""Upper limit of the log of the scale: a scale of 100 (CLIP, section 2.5). CLIP starts at a scale of 1 / 0.07."""
SIGLIP_LOG_SCALE, SIGLIP_BIAS = math.log(10), -10.0
"""Initial values of SigLIP's learned scale and bias (Zhai et al. 2023, section 3.2)."""
LOGITS_AT_ONCE = 1 << 24
"""Logits per block, 64 MiB; `memory` gives the total."""


def clip_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy over a batch of matching pairs: the loss in nats, and the loss of each pair of this rank.

    `image` and `text` are unit vectors (n, D), where row i of one matches row i of the other; `log_scale` is the
    logarithm of the inverse temperature. The loss is the mean over the N pairs of all ranks and both directions: ln N
    if nothing is learnt. The second value (n,) has no gradient.
    """
    loss, each = _Contrast.apply(image, text, log_scale, None)
    return loss, each


def siglip_loss(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid loss over all image-text pairs, in nats per image. Arguments and results are those of `clip_loss`."""
    loss, each = _Contrast.apply(image, text, log_scale, bias)
    return loss, each


def chance(pairs: int, loss: str) -> float:
    """The loss, in nats, of a model that has learnt nothing."""
    # SigLIP's best constant answer is a probability of 1/N for each of an image's N pairs.
    others = (pairs - 1) * math.log(pairs / (pairs - 1)) if loss == "siglip" and pairs > 1 else 0.0
    return math.log(pairs) + others


def memory(own: int, pairs: int, width: int) -> int:
    """Peak bytes that the loss takes on a rank that has `own` of all `pairs`, with features of `width`."""
    logits = min(own * pairs, max(LOGITS_AT_ONCE, pairs))
    # Logits: a block, its probabilities, and the previous block. Features: for all pairs, the texts, their gradient
    # and its sum over the ranks; for this rank's pairs, images, scaled images and two gradients.
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
            # Yields the rows of a block, their logits, and a view of the logits of matching pairs.
            start = 0
            for part in parts:
                logits = compute(part) if kept is None else kept
                yield slice(start, start + len(part)), logits, logits.diagonal(first + start)[: len(part)]
                start += len(part)

        each = images.new_empty(len(images))
        if bias is None:
            normaliser = images.new_full((total,), -torch.inf)  # of each text, over the images
            for rows, logits, matching in blocks():
                # The same as logsumexp, by any one row of log_softmax, which is several times faster.
                each[rows] = -logits.log_softmax(1).diagonal(first + rows.start)[: len(matching)] - matching
                normaliser = torch.logaddexp(normaliser, logits[0] - logits.log_softmax(0)[0])
            if distributed.world_size() > 1:
                peak = distributed.max_of(normaliser)
                normaliser = peak + distributed.sum_of((normaliser - peak).exp()).log()
            each.add_(normaliser[first : first + len(each)]).div_(2)

        image_grad, text_grad = torch.empty_like(images), torch.zeros_like(texts)
        bias_grad = torch.zeros_like(scale)
        for rows, logits, matching in blocks():
            # The gradient of both losses with respect to the logits is the predicted probability minus the target.
            if bias is None:
                logit_grad = logits.softmax(1).add_(logits.sub_(normaliser).exp_()).div_(2)
            else:
                each[rows] = torch.nn.functional.softplus(logits).sum(1) - matching
                logit_grad = logits.sigmoid_()
            logit_grad.diagonal(first + rows.start)[: rows.stop - rows.start].sub_(1)
            image_grad[rows] = logit_grad @ texts
            text_grad.addmm_(logit_grad.T, scaled[rows])
            if bias is not None:
                bias_grad += logit_grad.sum()

        text_grad = distributed.sum_of(text_grad)[first : first + len(each)]
        # The derivative of a logit with respect to the log of the scale is the logit minus the bias.
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
