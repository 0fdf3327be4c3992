"""The training loop: one run on one rank, from its first step or a checkpoint to the exported model."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer import atomic, checkpoint, distributed
from trainer.config import ConfigError, TrainConfig
from trainer.evaluation import Evaluation
from trainer.export import check_replaceable
from trainer.hooks import Checkpoints, Hook, Log
from trainer.training import Run, StoppedError


def train(config: TrainConfig, hooks: Sequence[Callable[[Run], Hook]] = ()) -> None:
    """Trains to the last step and exports the model; resumes according to `config.resume`.

    `hooks` run after the built-in log, checkpoints and evaluation. Raises StoppedError after SIGTERM.
    """
    try:
        run = Run(config)
        with _stopped_by_sigterm(run):
            _resume(run)
            with _held(run.output):
                log = Log(run)
                _train(run, [log, Checkpoints(run), Evaluation(run, log), *(make(run) for make in hooks)])
    except RuntimeError as error:
        # PyTorch's signal handler raises this, wherever the main thread is, when a loader process dies.
        if "DataLoader worker" not in str(error):
            raise
        cause = "Something outside ended it, usually because memory ran out: set fewer `workers`."
        raise OSError(f"{str(error).splitlines()[0]}\n  {cause}") from None
    finally:
        distributed.leave()


def _train(run: Run, hooks: Sequence[Hook]) -> None:
    config = run.config
    with contextlib.ExitStack() as entered:
        batches = run.batches.from_step(
            run.step, run.total_steps, config.workers, run.device.type == "cuda", run.rank, run.ranks
        )
        # The workers ignore SIGTERM. If an error left them alive, Python would wait for them at exit.
        entered.enter_context(contextlib.closing(batches))
        for hook in hooks:
            entered.enter_context(hook)
        while run.step < run.total_steps:
            requested = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - requested
            numbers = run.train_step(batch) | {"waited": waited}
            for hook in hooks:
                hook.after_step(batch, numbers)
            if run.stopped and run.step < run.total_steps:
                raise StoppedError
        for hook in reversed(hooks):
            hook.finish()


def _resume(run: Run) -> None:
    config = run.config
    if config.resume == "latest":
        found, damaged = distributed.on_first(lambda: checkpoint.newest_whole(run.output))
        if found:
            for line in damaged if run.rank == 0 else ():
                print(f"warning: {line}; resuming from {found.name}", file=sys.stderr)
            run.restore(found)
    elif config.resume != "none":
        run.restore(Path(config.resume))
    elif found := distributed.on_first(lambda: checkpoint.latest(run.output)):
        raise checkpoint.CheckpointError(f"resume: none, but {found} exists; use resume=latest or another output")
    try:
        run.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("output", [f"the folder {run.output} cannot be created: {error.strerror}"]) from error
    if config.export:
        check_replaceable(run.output / "model")


@contextlib.contextmanager
def _held(output: Path) -> Iterator[None]:
    """Locks the output against other trainings. Raises ConfigError on every rank if another training has it."""
    with contextlib.ExitStack() as held:

        def hold() -> None:
            try:
                held.enter_context(atomic.locked(output / ".lock"))
            except BlockingIOError as error:
                problem = f"{output} is {error.strerror}; wait for that training, or name another output"
                raise ConfigError("output", [problem]) from None

        distributed.on_first(hold)
        yield


@contextlib.contextmanager
def _stopped_by_sigterm(run: Run) -> Iterator[None]:
    # Only the main thread can receive signals; Ray workers train in another thread.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, run.stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
