"""Hooks of the training loop: the log, the checkpoints, and the base class for your own hooks."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer import atomic, checkpoint, distributed
from trainer.config import ConfigError
from trainer.export import export
from trainer.terminal import Console
from trainer.training import Run, StoppedError

if TYPE_CHECKING:
    from trainer.data import Batch

Record = dict[str, Any]
"""A line of `metrics.jsonl`: `step`, `epoch`, `samples` and the metrics; metrics that are not finite become null."""


class Hook:
    """Called by the training loop on every rank: entered before the first step, exited after the last or on an error.

    `trainer.loop.train(config, hooks=[MyHook])` adds one; each item is a callable that makes a hook from the run.
    Methods may read anything in `run`, and may call collectives if every rank does. They must not change weights or
    consume the training's random numbers.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> Hook:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def after_step(self, batch: Batch, numbers: dict[str, float]) -> None:
        """Called after step `run.step` with this rank's part of the batch. `numbers` holds `loss`, `lr`, `temperature`,
        `grad_norm`, and `waited`, the seconds spent waiting for the batch."""

    def finish(self) -> None:
        """Called after the last step, while every hook is still open."""


class Log(Hook):
    """Writes `metrics.jsonl`, TensorBoard and Weights & Biases, and shows a progress bar, or lines without a terminal.

    Only rank 0 writes.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.path = run.output / "metrics.jsonl" if run.rank == 0 else Path(os.devnull)
        self.console = Console(stderr=True, quiet=run.rank != 0)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.trackers: list[Tracker] = []
        self.records: list[Record] = []
        """Records of the current step that were written before a resume."""
        self.corrupt = run.corrupt
        self.waited, self.since, self.logged = 0.0, time.perf_counter(), run.step
        self.started, self.first_step = self.since, run.step

    def __enter__(self) -> Log:
        run, config = self.run, self.run.config
        self._forget_undone_steps()
        self.file = self.path.open("ab", buffering=0)  # unbuffered, so that closing it after an error writes nothing
        if run.rank == 0 and config.tensorboard:
            self.trackers.append(TensorBoard(run))
        if run.rank == 0 and config.wandb:
            self.trackers.append(WeightsAndBiases(run))
        self.bar.start()
        self.task = self.bar.add_task("training", total=run.total_steps, completed=run.step, numbers="")
        ranks = f"{run.ranks} ranks, " if run.ranks > 1 else ""
        resumed = f", resumed after step {run.step}" if run.step else ""
        self.say(
            f"{config.model} on {len(run.shards):,} samples of {run.shards.folder}: {run.total_steps:,} steps of "
            f"{config.batch_size:,} on {ranks}{run.device} in {run.precision}{resumed}"
        )
        if run.precision.warning:
            self.say(f"warning: {run.precision.warning}")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()
        for tracker in self.trackers:
            tracker.close()

    def say(self, line: str) -> None:
        self.console.say(line)

    def write(self, numbers: Record) -> None:
        """Writes a record of the current step to the file and the trackers."""
        run = self.run
        epoch = round(run.step / run.batches.per_epoch, 4)
        record = {"step": run.step, "epoch": epoch, "samples": run.step * run.config.batch_size, **numbers}
        # A gradient that overflows in fp16 has an infinite norm, which JSON cannot express.
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        encoded = json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            if self.file.write(encoded) != len(encoded):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(f"{self.path}: the metrics cannot be written: {error.strerror}") from error
        for tracker in self.trackers:
            tracker.write(record)

    def after_step(self, batch: Batch, numbers: dict[str, float]) -> None:
        run = self.run
        if run.corrupt > self.corrupt:  # the same on every rank
            self.corrupt = run.corrupt
            for line in distributed.lists_of(batch.corrupt):
                self.say(f"corrupt sample {line}")
        self.waited += numbers["waited"]
        self.bar.update(self.task, completed=run.step)
        if run.step % run.config.log_every and run.step != run.total_steps:
            return
        now = time.perf_counter()
        rate = (run.step - self.logged) * run.config.batch_size / (now - self.since)
        wait = self.waited / (now - self.since)
        self.waited, self.since, self.logged = 0.0, now, run.step
        measured = {name: value for name, value in numbers.items() if name != "waited"}
        speed = {"samples_per_second": round(rate, 2), "data_wait": round(wait, 4)}
        self.write({**measured, **speed, "corrupt": run.corrupt})
        text = f"loss {numbers['loss']:.4f}  temperature {numbers['temperature']:.4f}  "
        text += f"{rate:.0f} samples/s  data wait {wait:.0%}"
        self.bar.update(self.task, numbers=text)
        if self.bar.disable:
            self.say(f"step {run.step}/{run.total_steps}  {text}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the progress bar and the clock of samples per second, for work that shows its own progress."""
        before = time.perf_counter()
        if not self.bar.disable:
            self.bar.stop()
        try:
            yield
        finally:
            self.bar.start()
            self.since += time.perf_counter() - before

    def finish(self) -> None:
        seconds = time.perf_counter() - self.started
        corrupt = f", {self.run.corrupt} corrupt samples replaced" if self.run.corrupt else ""
        model = f"; model in {self.run.output / 'model'}" if self.run.config.export else ""
        self.say(f"{self.run.step - self.first_step} steps in {seconds:.0f} s{corrupt}{model}")

    def _forget_undone_steps(self) -> None:
        # A killed run may have logged steps after its last checkpoint; those steps will be repeated.
        if self.run.rank != 0 or not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line, or one that the kill cut short
                record = json.loads(line)
                if record["step"] <= self.run.step:
                    kept.append(line + b"\n")
                if record["step"] == self.run.step:
                    self.records.append(record)
        with atomic.replacing(self.path) as file:
            file.write(b"".join(kept))


class Tracker(Protocol):
    """A destination of records besides `metrics.jsonl`."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes `output/tensorboard`. Raises ConfigError without the package."""

    def __init__(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            cure = "pip install 'winnow-clip[tensorboard]'"
            raise ConfigError("tensorboard", [f"true, but the package is missing: {cure}"]) from error
        self.writer = SummaryWriter(run.output / "tensorboard", purge_step=run.step + 1)

    def write(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Sends records to a project of Weights & Biases, configured by WANDB_MODE and `wandb login`.

    Local files go to `output/wandb`. Each start is a separate run, in a group named after the output. Raises
    ConfigError without the package or a login.
    """

    def __init__(self, run: Run) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("wandb", ["set, but the package is missing: pip install wandb"]) from error
        settings = vars(run.config) | {"precision": run.precision.name}
        group = run.output.resolve().name
        try:
            self.logger = wandb.init(project=run.config.wandb, group=group, dir=str(run.output), config=settings)
        except wandb.Error as error:  # no login, no network
            raise ConfigError("wandb", [" ".join(str(error).split())]) from error

    def write(self, record: Record) -> None:
        self.logger.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self.logger.finish()


def _numbers(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


class Checkpoints(Hook):
    """Saves a checkpoint every `checkpoint_every` steps, at the last step and on SIGTERM; then exports the model."""

    saved: int | None = None
    """Step of the last checkpoint that was written."""

    def after_step(self, batch: Batch, numbers: dict[str, float]) -> None:
        if self.run.step % self.run.config.checkpoint_every == 0 or self.run.step == self.run.total_steps:
            self._save()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is StoppedError:
            self._save()

    def finish(self) -> None:
        if self.run.config.export and self.run.rank == 0:
            export(self.run.state(), self.run.output / "model", tokenizer=self.run.tokenizer)

    def _save(self) -> None:
        if self.run.rank == 0 and self.saved != self.run.step:
            folder, keep = self.run.output / "checkpoints", self.run.config.keep_checkpoints
            checkpoint.save(folder, self.run.step, self.run.state(), keep)
            self.saved = self.run.step
