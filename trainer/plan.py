"""What a training run would do and need, without allocating the model: everything is counted on torch's meta device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import TrainConfig
from trainer.data import ShardsError, open_shards
from trainer.model import create

H100_BF16_FLOPS, UTILISATION = 989e12, 0.4


def plan(config: TrainConfig) -> str:
    """A page of text: parameters, steps, FLOPs, memory and, for scale, GPU-hours. Raises ModelError."""
    with torch.device("meta"):
        model, preprocess, _ = create(config.model, "meta")
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    parameters = sum(p.numel() for p in model.parameters())
    image_parameters = sum(p.numel() for p in model.visual.parameters())

    # Two samples rather than one: some kernels treat a batch of one as a special case.
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            saved.setdefault(storage, tensor)
        return tensor

    pixels = torch.empty(2, 3, preprocess.size, preprocess.size, device="meta")
    tokens = torch.zeros(2, model.context_length, dtype=torch.long, device="meta")
    hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        model.encode_image(pixels)
        model.encode_text(tokens)
    forward = counter.get_total_flops() / 2
    training = forward * (4 if config.grad_checkpointing else 3)  # the backward pass costs two forward passes
    activations = sum(t.untyped_storage().nbytes() for t in saved.values()) / 2
    if config.precision == "bf16":
        activations /= 2

    lines = [
        f"model        {config.model}: {parameters / 1e6:,.1f} M parameters, {image_parameters / 1e6:,.1f} M of them "
        f"in the image tower; {preprocess.size} px, {model.context_length} tokens",
    ]
    try:
        shards = open_shards(config.shards)
    except ShardsError as error:
        lines.append(f"data         unknown: {error}")
        samples = None
    else:
        per_epoch = len(shards) // config.batch_size
        samples = per_epoch * config.batch_size * config.epochs
        lines.append(f"data         {len(shards):,} samples in {shards.folder}")
        lines.append(
            f"steps        {per_epoch * config.epochs:,} of {config.batch_size:,} samples ({config.epochs} epochs of "
            f"{per_epoch:,}), warm-up {config.warmup:,}"
            + ("" if per_epoch else "; batch_size is larger than the data: nothing would be trained")
        )
    state, logits = 16 * parameters, 12 * config.batch_size**2
    memory = state + activations * config.batch_size + logits
    lines += [
        f"compute      {training / 1e9:,.1f} GFLOPs per sample, forward and backward",
        f"memory       about {memory / 1e9:,.1f} GB: weights, gradients and AdamW {state / 1e9:,.1f}, activations "
        f"{activations * config.batch_size / 1e9:,.1f} ({activations / 1e6:,.1f} MB per sample), "
        f"logits {logits / 1e9:,.1f}",
    ]
    if samples:
        hours = samples * training / (H100_BF16_FLOPS * UTILISATION) / 3600
        lines.append(f"for scale    {hours:,.1f} GPU-hours on an H100 at {UTILISATION:.0%} of its bf16 peak")
    return "\n".join(lines)
