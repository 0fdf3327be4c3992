"""Estimates the compute, memory and time of a training run on torch's meta device, without allocating the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer import loss
from trainer.config import TrainConfig
from trainer.data import ShardsError, open_shards
from trainer.device import choose_precision, find_device, parse_device
from trainer.model import (
    DTYPES,
    Clip,
    ModelError,
    checkpoint_activations,
    create,
    encode_trimmed,
    find_weights,
    lock,
    model_config,
    untrimmed,
)

H100_BF16_FLOPS, UTILISATION = 989e12, 0.4
"""Dense peak of the SXM card (NVIDIA's data sheet), and the fraction that a good training loop reaches."""
GPU_BYTES = 80e9
UNKNOWN_EPOCH = 100_000_000
"""Assumed samples per epoch if neither the shards nor `samples` give a number."""


def estimate(config: TrainConfig) -> str:
    """A report of parameters, steps, FLOPs, memory and GPU-hours. Raises ModelError.

    Reports missing shards and weights, and estimates the rest.
    """
    with torch.device("meta"):
        model, preprocess, _ = create(config.model, "meta", siglip=config.loss == "siglip")
    lock(model, config.lock_image, config.lock_text)
    if config.grad_checkpointing:
        checkpoint_activations(model)
    parameters = list(model.parameters())
    total, learning = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    image = sum(p.numel() for p in model.visual.parameters())
    lines = [
        f"model        {config.model}: {total / 1e6:,.1f} M parameters, {image / 1e6:,.1f} M of them in the image tower"
        + (f", {learning / 1e6:,.1f} M of them trained" if learning < total else "")
        + f"; {preprocess.size} px, {model.context_length} tokens"
    ]
    if config.pretrained:
        try:
            find_weights(config.model, config.pretrained)
        except ModelError as error:
            lines.append(f"weights      missing: {error}")
        else:
            lines.append(f"weights      {config.pretrained}")

    per_epoch = None
    try:
        shards = open_shards(config.shards, config.subset)
    except ShardsError as error:
        lines.append(f"data         missing: {error}")
    else:
        per_epoch = len(shards) // config.batch_size
        lines.append(f"data         {len(shards):,} samples in {shards.folder}")
    steps = None if per_epoch is None and config.samples is None else config.steps(per_epoch or 0)
    if per_epoch == 0:
        lines.append("steps        none: batch_size is larger than the data, and training would refuse to start")
    elif steps is not None:
        epochs = f" ({steps / per_epoch:.4g} epochs of {per_epoch:,})" if per_epoch else ""
        lines.append(f"steps        {steps:,} of {config.batch_size:,} samples{epochs}, warm-up {config.warmup:,}")

    ranks = config.ranks or 1
    own = config.batch_size // ranks
    passes = -(-own // (config.micro_batch_size or own))
    rows = -(-own // passes)
    precision = _precision(config)
    forward, backward, activations = _measure(model, preprocess.size, rows, DTYPES[precision])
    flops = forward + backward + (forward if passes > 1 else 0)
    recomputed = " with what it recomputes" if config.grad_checkpointing else ""
    cached = f", {forward / 1e9:,.2f} for the features to cache" if passes > 1 else ""
    lines.append(
        f"compute      {flops / 1e9:,.2f} GFLOPs per sample: {forward / 1e9:,.2f} forward, {backward / 1e9:,.2f} "
        f"backward{recomputed}{cached}"
    )

    # fp32 weights; for trained ones a gradient and AdamW's two moments; autocast's copies of all weights.
    state = 4 * total + 12 * learning + (0 if precision == "fp32" else 2 * total)
    pixels = own * 3 * preprocess.size**2
    contrast = loss.memory(own, config.batch_size, model_config(config.model)["embed_dim"])
    fixed, each = state + pixels + contrast, activations / rows
    everywhere = f" on each of {ranks} ranks" if ranks > 1 else ""
    lines.append(
        f"memory       about {(fixed + activations) / 1e9:,.1f} GB{everywhere}: weights, gradients and AdamW "
        f"{state / 1e9:,.1f}, activations {activations / 1e9:,.1f} ({rows:,} samples of {each / 1e6:,.1f} MB), "
        f"pixels {pixels / 1e9:,.1f}, loss {contrast / 1e9:,.1f}"
    )
    if fixed + activations > GPU_BYTES:
        fit = int((GPU_BYTES - fixed) / each)
        cure = f"set micro_batch_size to at most {fit:,}, or train" if fit > 0 else "train"
        lines.append(f"             more than a GPU of {GPU_BYTES / 1e9:.0f} GB has: {cure} on more ranks")

    samples = UNKNOWN_EPOCH * config.epochs if steps is None else steps * config.batch_size
    hours = samples * flops / (H100_BF16_FLOPS * UTILISATION) / 3600
    lines.append(
        f"for scale    {hours:,.1f} GPU-hours on an H100 at {UTILISATION:.0%} of its bf16 peak"
        + (f", if an epoch has {UNKNOWN_EPOCH:,} samples" if steps is None else "")
    )
    return "\n".join(lines)


def _precision(config: TrainConfig) -> str:
    if config.precision == "auto" and config.device.startswith("cuda") and not torch.cuda.is_available():
        return "bf16"  # the plan is for another machine
    device = find_device("auto") if config.device == "auto" else parse_device(config.device)
    return choose_precision(config.precision, device, training=True).name


def _measure(model: Clip, size: int, rows: int, dtype: torch.dtype) -> tuple[float, float, int]:
    """FLOPs per sample of the forward and of the backward pass, and peak bytes of the activations of `rows` samples."""
    model.to(dtype)  # close to what autocast gives
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
    with Meter() as meter, _flash_attention():
        pixels = torch.empty(rows, 3, size, size, device="meta", dtype=dtype)
        captions = untrimmed(torch.zeros(rows, model.context_length, device="meta", dtype=torch.long))
        features = model.encode_image(pixels, normalize=True), encode_trimmed(model, captions, normalize=True)
        forward = meter.flops
        learning = [part.sum() for part in features if part.requires_grad]
        torch.autograd.backward(learning)
    return forward / rows, (meter.flops - forward) / rows, meter.bytes


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # counted with the weights


class Meter(TorchDispatchMode):
    """Counts the `flops` computed under it, and the peak `bytes` of the tensors allocated under it.

    Takes FLOPs from PyTorch's table, which has products and convolutions. PyTorch's own FlopCounterMode keeps gradients
    alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.flops = self.now = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self.alive:
            self.alive[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.bytes = max(self.bytes, self.now)
            weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.now -= self.alive.pop(address)


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Counts attention as a GPU computes it; the meta device's own version holds (B, heads, L, L) in memory."""

    def flash(q: Tensor, k: Tensor, v: Tensor, mask: None = None, dropout: float = 0, is_causal: bool = False) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, is_causal)[0]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", flash, "AutogradMeta")
        yield
