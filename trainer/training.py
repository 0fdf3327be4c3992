"""The state of a training run on one rank, and its update by one batch. `trainer.loop` runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer import checkpoint, distributed
from trainer.config import FREE_ON_RESUME, ConfigError, TrainConfig
from trainer.data import Batch, Batches, open_shards
from trainer.device import Precision, choose_precision, find_device
from trainer.errors import FailedError
from trainer.loss import MAX_LOG_SCALE, chance, clip_loss, siglip_loss
from trainer.model import (
    DTYPES,
    Clip,
    Trimmed,
    checkpoint_activations,
    create,
    encode_trimmed,
    freeze_unreached,
    lock,
    model_config,
    trim,
    without_statistics,
)
from trainer.order import mix

PATIENCE = 100
"""The run stops after this many consecutive steps, after the warm-up, with a loss no better than chance."""


class StoppedError(Exception):
    """The training was stopped by SIGTERM and can be resumed."""


class DivergedError(FailedError):
    """The loss or its gradient is not finite, or the loss stayed at chance level; the message names samples."""


class Result(NamedTuple):
    """The loss of a batch, the loss of each pair of this rank (n,), and their features (n, D)."""

    loss: Tensor
    each: Tensor
    image: Tensor
    text: Tensor


class Towers(nn.Module):
    """Both encoders in one forward pass, so that DistributedDataParallel and torch.compile can wrap them."""

    def __init__(self, model: Clip) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, captions: Trimmed) -> tuple[Tensor, ...]:
        """Unit features of images and texts, (B, D) each, the log of the scale and, for SigLIP, the bias."""
        image = self.model.encode_image(pixels, normalize=True)
        text = encode_trimmed(self.model, captions, normalize=True)
        bias = getattr(self.model, "logit_bias", None)
        return (image, text, self.model.logit_scale.clone(), *([] if bias is None else [bias.clone()]))


class Run:
    """A training run on one rank: the model, the optimiser and the progress. Raises InputError."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.device = distributed.join(find_device(config.device))
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        if config.batch_size % self.ranks:
            raise ConfigError("batch_size", [f"{config.batch_size} cannot be divided among {self.ranks} ranks"])
        self.shards = open_shards(config.shards, config.subset)
        torch.manual_seed(config.seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        siglip = config.loss == "siglip"
        self.model, self.preprocess, self.tokenizer = create(config.model, self.device, config.pretrained, siglip)
        self.model_config = model_config(config.model, config.pretrained, siglip)
        if getattr(self.model, "logit_bias", None) is not None and not siglip:
            raise ConfigError(
                "loss", [f"{config.model} has SigLIP's bias, which clip leaves untrained; set loss=siglip"]
            )
        lock(self.model, config.lock_image, config.lock_text)
        freeze_unreached(self.model, self.preprocess, self.tokenizer)
        if config.grad_checkpointing:
            checkpoint_activations(self.model)
        self.towers: nn.Module = Towers(self.model)
        if config.compile:
            self.towers.compile()
        if self.ranks > 1:
            self.towers = DistributedDataParallel(self.towers, gradient_as_bucket_view=True)
        self.batches = Batches(self.shards, config.batch_size, self.preprocess.size, self.tokenizer, config.seed)
        self.optimizer = make_optimizer(self.model, config)
        # Decided on one rank: all ranks must agree, even if their devices differ.
        self.compute_in(distributed.on_first(lambda: choose_precision(config.precision, self.device, training=True)))
        self.total_steps = config.steps(self.batches.per_epoch)
        self.step = 0
        """Steps done."""
        self.corrupt = 0
        """Unreadable samples so far, over all ranks."""
        self.lost_steps = 0
        """The number of latest steps in a row with a loss no better than chance."""
        self.lost: list[str] = []
        """The worst samples of the first of these steps."""
        self.stopping = self.stopped = False
        """Whether this process got SIGTERM, and whether any rank had got it by the end of the last step."""
        self._interruptible = False

    def compute_in(self, precision: Precision) -> None:
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.name == "fp16")

    def state(self) -> dict[str, Any]:
        """Everything needed to resume the run or export its model."""
        return {
            "step": self.step,
            "corrupt": self.corrupt,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": dataclasses.asdict(self.config) | {"precision": self.precision.name},
            "data": self.shards.fingerprint,
            "model_config": self.model_config,
            "preprocess_config": self.preprocess.config,
        }

    def restore(self, path: Path) -> None:
        """Loads a checkpoint. Raises CheckpointError if its configuration or shards differ."""
        state = checkpoint.load(path)
        now = dataclasses.asdict(self.config)
        saved = {field.name: field.default for field in dataclasses.fields(TrainConfig)} | state["config"]
        if self.config.precision == "auto":  # keep what was chosen when the run began
            now["precision"] = saved["precision"]
            chosen = choose_precision(saved["precision"], self.device, training=True)
            self.compute_in(chosen._replace(reason="as in the checkpoint"))
        changed = [key for key in now if key not in FREE_ON_RESUME and now[key] != saved[key]]
        lines = [f"  {key}: {saved[key]} in the checkpoint, {now[key]} now" for key in changed]
        if state["data"] != self.shards.fingerprint:
            lines.append(f"  shards: {self.config.shards} is not the data that the checkpoint was trained on")
        if lines:
            cure = "  Undo these changes, or name another output to start over."
            raise checkpoint.CheckpointError(
                "\n".join([f"{path}: cannot be resumed with these changes:", *lines, cure])
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise checkpoint.CheckpointError(
                f"{path}: its weights do not fit {self.config.model}: {str(error).splitlines()[0]}"
            ) from error
        self.step, self.corrupt = state["step"], state["corrupt"]

    def stop(self, *_: Any) -> None:
        """Signal handler: stops the run after its current step, or immediately inside `interruptible`."""
        self.stopping = True
        if self._interruptible:
            raise StoppedError

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets `stop` interrupt the block at any point. The block must not change weights."""
        self._interruptible = True
        try:
            if self.stopping:
                raise StoppedError
            yield
        finally:
            self._interruptible = False

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Makes one update; returns `loss`, `lr`, `temperature` and `grad_norm`.

        Raises DivergedError, before the weights change, if the loss or its gradient is not finite.
        """
        rate = learning_rate(self.step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pixels = batch.pixels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        result = self.backward(pixels, batch.tokens)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        log_scale = self.model.logit_scale.detach()
        own = [torch.full((), float(value), device=self.device) for value in (len(batch.corrupt), self.stopping)]
        corrupt, stopping = distributed.sum_of(torch.stack(own))
        # Synchronises with the device only once.
        numbers = torch.stack([result.loss, norm, log_scale, corrupt, stopping]).tolist()
        loss, norm, log_scale, corrupt, stopping = numbers
        # fp16 finds its loss scale by overflowing: the scaler skips a step that overflows.
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            self._stop(f"loss {loss}, gradient norm {norm}", self._suspects(batch, result))
        self._watch(loss, batch, result)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOG_SCALE)
        self.step += 1
        self.corrupt += int(corrupt)
        self.stopped = stopping > 0
        return {"loss": loss, "lr": rate, "temperature": math.exp(-log_scale), "grad_norm": norm}

    def backward(self, pixels: Tensor, tokens: Tensor) -> Result:
        """Accumulates the gradient of the batch in the parameters. `tokens` are on the CPU.

        If this rank's part is larger than `micro_batch_size`, uses gradient caching (Gao et al. 2021): computes the
        features of all micro-batches without activations, then the gradient of the loss with respect to the features,
        and then runs each micro-batch again, with activations, to backpropagate that gradient to the parameters.
        """
        size = self.config.micro_batch_size or self.config.batch_size
        count = -(-self.config.batch_size // self.ranks // size)
        # Rounded lengths keep the number of distinct shapes on a GPU small.
        multiple = 1 if self.device.type == "cpu" else 8
        captions = [trim(self.model, part, multiple).to(self.device) for part in tokens.tensor_split(count)]
        parts = list(zip(pixels.tensor_split(count), captions))
        if count == 1:
            result = self._loss(self._encode(0, *parts[0]))
            self.scaler.scale(result.loss).backward()
            return result
        with torch.no_grad(), without_statistics(self.model):
            cached = [self._encode(i, *part) for i, part in enumerate(parts)]
        image, text, *_ = zip(*cached)
        outputs = [v.requires_grad_() for v in (torch.cat(image), torch.cat(text), *cached[0][2:])]
        result = self._loss(outputs)
        image_grad, text_grad, *others = torch.autograd.grad(self.scaler.scale(result.loss), outputs)
        gradients = zip(image_grad.tensor_split(count), text_grad.tensor_split(count))
        for i, (part, gradient) in enumerate(zip(parts, gradients)):
            last = i == count - 1
            # The ranks exchange gradients only after the last micro-batch.
            defer = not last and isinstance(self.towers, DistributedDataParallel)
            with cast(DistributedDataParallel, self.towers).no_sync() if defer else contextlib.nullcontext():
                replayed = zip(self._encode(i, *part), (*gradient, *others) if last else gradient)
                learning = [(output, grad) for output, grad in replayed if output.requires_grad]
                torch.autograd.backward([output for output, _ in learning], [grad for _, grad in learning])
        return result

    def _encode(self, part: int, pixels: Tensor, captions: Trimmed) -> tuple[Tensor, ...]:
        # Seeds all randomness in the model, so a replay is exact and checkpoints need no generator state.
        torch.manual_seed(int(mix(self.config.seed, self.step, self.rank, part)[0]))
        dtype = DTYPES[self.precision.name]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            outputs: tuple[Tensor, ...] = self.towers(self.preprocess.normalize(pixels), captions)
        return outputs

    def _loss(self, outputs: Sequence[Tensor]) -> Result:
        image, text, log_scale, *bias = outputs
        loss, each = siglip_loss(image, text, log_scale, bias[0]) if bias else clip_loss(image, text, log_scale)
        return Result(loss, each, image.detach(), text.detach())

    def _watch(self, loss: float, batch: Batch, result: Result) -> None:
        # The loss of a collapsed model stays at or above chance, up to rounding. A single bad batch does not last.
        if self.step < self.config.warmup or loss < chance(self.config.batch_size, self.config.loss) * (1 - 1e-4):
            self.lost_steps = 0
            return
        if self.lost_steps == 0:
            self.lost = self._suspects(batch, result)
        self.lost_steps += 1
        if self.lost_steps == PATIENCE:
            problem = f"{PATIENCE} steps in a row have a loss no better than chance, {loss:.2f} now"
            self._stop(problem, [*self.lost, "(the worst of the first of these steps)"])

    def _suspects(self, batch: Batch, result: Result) -> list[str]:
        # All samples of all ranks with features that are not finite; if there are none, the five with the highest loss.
        broken = ~(result.image.isfinite().all(dim=1) & result.text.isfinite().all(dim=1))
        losses = result.each.float().nan_to_num(0).masked_fill(broken, math.inf)
        worst = losses.topk(min(len(losses), max(5, int(broken.sum()))))
        mine = [(loss, self.shards.key(batch.numbers[i])) for loss, i in zip(*(v.tolist() for v in worst))]
        ranked = sorted(distributed.lists_of(mine), reverse=True)
        chosen = [key for loss, key in ranked if loss == math.inf] or [f"{key} (loss {v:.2f})" for v, key in ranked[:5]]
        return chosen[:20] + [f"and {len(chosen) - 20} more"] * (len(chosen) > 20)

    def _stop(self, problem: str, samples: list[str]) -> NoReturn:
        raise DivergedError(
            f"step {self.step + 1}: {problem}; the weights are unchanged by this step.\n"
            f"  samples: {', '.join(samples)}\n"
            f"  Look at these samples; if nothing is wrong with them, lower lr or lengthen warmup."
        )


def make_optimizer(model: Clip, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as in CLIP: gains, biases and the temperature, all with fewer than two axes, do not decay."""
    convolutional = isinstance(model_config(config.model)["vision_cfg"].get("layers"), list)
    beta2 = config.beta2 if config.beta2 is not None else 0.999 if convolutional else 0.98
    eps = config.eps if config.eps is not None else 1e-8 if convolutional else 1e-6
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, beta2), eps=eps, fused=True)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate after `step` updates: linear warm-up to `lr`, then a half cosine down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup)))
