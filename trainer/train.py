"""Trains a CLIP on shards.

    python -m trainer.train CONF.yaml [key=value ...]         trains, or goes on where the last run stopped
    python -m trainer.train CONF.yaml --plan                  prints what it would do and need, and does nothing

The output folder gets `checkpoints/step-*.pt`, `metrics.jsonl` (a line every `log_every` steps) and, at the end,
`model/`, which `open_clip.create_model_and_transforms("local-dir:OUTPUT/model")` loads.
The same configuration on the same shards gives the same weights, whatever `workers` is and however often the run
was killed and resumed: bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer import checkpoint
from trainer.config import FREE_ON_RESUME, ConfigError, TrainConfig, describe, load_config
from trainer.data import Batch, Batches, Shards, ShardsError
from trainer.export import export
from trainer.loss import MAX_LOG_SCALE, clip_loss
from trainer.model import Clip, ModelError, Preprocess, Tokenizer, create, encode_text, model_config
from trainer.plan import plan


class DivergedError(RuntimeError):
    """A loss or gradient that is not finite; the message names the samples."""


class Run:
    """One training run: the model, its optimiser, and how far they have come."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.device = find_device(config.device)
        self.shards = Shards(config.shards)
        torch.manual_seed(config.seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.model: Clip
        self.preprocess: Preprocess
        self.tokenizer: Tokenizer
        self.model, self.preprocess, self.tokenizer = create(config.model, self.device)
        if config.grad_checkpointing:
            self.model.set_grad_checkpointing()
        self.batches = Batches(self.shards, config.batch_size, self.preprocess.size, self.tokenizer, config.seed)
        self.optimizer = make_optimizer(self.model, config)
        self.total_steps = self.batches.per_epoch * config.epochs
        self.step = 0
        """Steps done."""
        self.corrupt = 0
        """Samples met so far that could not be read."""

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, plus what an export needs."""
        return {
            "step": self.step,
            "corrupt": self.corrupt,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "config": dataclasses.asdict(self.config),
            "data": self.shards.fingerprint,
            "model_config": model_config(self.config.model),
            "preprocess_config": self.preprocess.config,
        }

    def restore(self, path: Path) -> None:
        """Takes over a checkpoint. Raises CheckpointError if it belongs to another configuration or other shards."""
        state = checkpoint.load(path)
        here, there = dataclasses.asdict(self.config), state["config"]
        changed = [key for key in here if key not in FREE_ON_RESUME and here[key] != there.get(key)]
        lines = [f"  {key}: {there.get(key)} in the checkpoint, {here[key]} now" for key in changed]
        if state["data"] != self.shards.fingerprint:
            lines.append(f"  shards: {self.config.shards} is not the data that the checkpoint was trained on")
        if lines:
            cure = "  Put them back, or name another output to start anew."
            raise checkpoint.CheckpointError(
                "\n".join([f"{path}: cannot be resumed with these changes:", *lines, cure])
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        self.step, self.corrupt = state["step"], state["corrupt"]

    def save(self) -> None:
        checkpoint.save(self.output / "checkpoints", self.step, self.state(), self.config.keep_checkpoints)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One update. Raises DivergedError, before the weights change, if the loss or its gradient is not finite."""
        rate = learning_rate(self.step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        pixels = self.preprocess.normalize(batch.pixels)
        tokens = batch.tokens.to(self.device, non_blocking=True)
        with self._precision():
            image = self.model.encode_image(pixels, normalize=True)
            text = encode_text(self.model, tokens, normalize=True)
        loss = clip_loss(image, text, self.model.logit_scale)
        self.optimizer.zero_grad()
        with self._precision():
            loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            self._diverged(batch, image, text, loss.item(), norm.item())
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOG_SCALE)
        self.step += 1
        self.corrupt += len(batch.corrupt)
        temperature = math.exp(-self.model.logit_scale.item())
        return {"loss": loss.item(), "lr": rate, "temperature": temperature, "grad_norm": norm.item()}

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        if self.config.precision != "bf16":
            yield
        # The backward of the CPU's flash attention takes 40% of a bf16 step; plain matrix products do not.
        elif self.device.type == "cpu":
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            with torch.autocast(self.device.type, torch.bfloat16):
                yield

    def _diverged(self, batch: Batch, image: Tensor, text: Tensor, loss: float, norm: float) -> None:
        bad = ~(image.isfinite().all(dim=1) & text.isfinite().all(dim=1))
        numbers = [number for number, is_bad in zip(batch.numbers, bad.tolist()) if is_bad] or batch.numbers
        keys = " ".join(self.shards.key(number) for number in numbers[:20])
        more = f" and {len(numbers) - 20} more" if len(numbers) > 20 else ""
        raise DivergedError(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the weights are left as they were before it.\n"
            f"  samples: {keys}{more}\n"
            f"  Look at these samples; if nothing is wrong with them, lower lr or lengthen warmup."
        )


def train(config: TrainConfig) -> None:
    """Trains to the end of the last epoch, and exports. Resumes as `config.resume` says."""
    run = Run(config)
    found = checkpoint.latest(run.output)
    if config.resume == "latest":
        if found:
            run.restore(found)
    elif config.resume != "none":
        run.restore(Path(config.resume))
    elif found:
        raise checkpoint.CheckpointError(f"resume: none, but {found} exists; use resume=latest or another output")
    run.output.mkdir(parents=True, exist_ok=True)
    with Log(run) as log:
        batches = run.batches.from_step(run.step, run.total_steps, config.workers, run.device.type == "cuda")
        while run.step < run.total_steps:
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            for line in batch.corrupt:
                log.say(f"corrupt sample {line}")
            log.step(run.train_step(batch), len(batch.numbers), waited)
            if run.step % config.checkpoint_every == 0 or run.step == run.total_steps:
                run.save()
        if config.export:
            export(run.state(), run.output / "model", tokenizer=run.tokenizer)
        log.finish()


def make_optimizer(model: Clip, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as CLIP uses it: no decay on gains, biases and the temperature, all of which have fewer than two axes."""
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
    """For the update after `step` updates: up to `lr` in a line over `warmup` steps, then down a half cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup)))


def find_device(name: str) -> torch.device:
    """Raises ConfigError if there is no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", [f"{name!r} cannot be used here: {str(error).splitlines()[0]}"]) from error


class Log:
    """`metrics.jsonl`, and a progress bar on a terminal or plain lines elsewhere."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path = run.output / "metrics.jsonl"
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.samples, self.waited, self.since = 0, 0.0, time.perf_counter()
        self.started, self.first_step = self.since, run.step

    def __enter__(self) -> Log:
        self._forget_undone_steps()
        self.file = self.path.open("a", encoding="utf-8")
        self.bar.start()
        self.task = self.bar.add_task("training", total=self.run.total_steps, completed=self.run.step, numbers="")
        config, place = self.run.config, self.run.device
        resumed = f", resumed after step {self.run.step}" if self.run.step else ""
        self.say(
            f"{config.model} on {len(self.run.shards):,} samples of {self.run.shards.folder}: "
            f"{self.run.total_steps:,} steps of {config.batch_size:,} on {place} in {config.precision}{resumed}"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, numbers: dict[str, float], samples: int, waited: float) -> None:
        run = self.run
        self.samples += samples
        self.waited += waited
        self.bar.update(self.task, completed=run.step)
        if run.step % run.config.log_every and run.step != run.total_steps:
            return
        now = time.perf_counter()
        rate, wait = self.samples / (now - self.since), self.waited / (now - self.since)
        self.samples, self.waited, self.since = 0, 0.0, now
        record = {
            "step": run.step,
            "epoch": round(run.step / run.batches.per_epoch, 4),
            "samples": run.step * run.config.batch_size - run.corrupt,
            **numbers,
            "samples_per_second": round(rate, 2),
            "data_wait": round(wait, 4),
            "corrupt": run.corrupt,
        }
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        text = f"loss {numbers['loss']:.4f}  temperature {numbers['temperature']:.4f}  "
        text += f"{rate:.0f} samples/s  data wait {wait:.0%}"
        self.bar.update(self.task, numbers=text)
        if self.bar.disable:
            self.say(f"step {run.step}/{run.total_steps}  {text}")

    def finish(self) -> None:
        seconds = time.perf_counter() - self.started
        corrupt = f", {self.run.corrupt} corrupt samples left out" if self.run.corrupt else ""
        model = f"; model in {self.run.output / 'model'}" if self.run.config.export else ""
        self.say(f"{self.run.step - self.first_step} steps in {seconds:.0f} s{corrupt}{model}")

    def _forget_undone_steps(self) -> None:
        # A killed run may have logged steps after its last checkpoint; they are about to be done again.
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that the kill cut short
                if json.loads(line)["step"] <= self.run.step:
                    kept.append(line + "\n")
        self.path.write_text("".join(kept), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.train",
        description=__doc__,
        epilog="keys of the configuration:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("conf", help="a YAML file such as conf/train_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file")
    parser.add_argument("--plan", action="store_true", help="print parameters, steps and memory, and stop")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.conf, args.overrides)
        if args.plan:
            print(plan(config))
        else:
            train(config)
    except (ConfigError, ModelError, ShardsError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (DivergedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
