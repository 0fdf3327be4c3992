"""What the trainer's commands share: the options that name a model, progress and exit statuses.

Imports no torch, so that `--help` answers at once. Commands import the code that runs a model where they call it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.config import PRECISIONS, ConfigError
from trainer.errors import InputError
from trainer.terminal import Console

if TYPE_CHECKING:
    from trainer.evaluate.features import Encoder

PLAIN_EVERY = 10.0
"""Seconds between lines of progress where there is no terminal."""

T = TypeVar("T")


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the options that `open_encoder` reads."""
    parser.add_argument("--model", required=required, help="a folder from trainer.export, or an open_clip architecture")
    parser.add_argument("--pretrained", help="tag or file of the weights, if --model is an architecture")
    parser.add_argument("--batch-size", type=int, default=64, help="images or captions per batch (default 64)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="dtype of the weights (default fp32)")


def open_encoder(args: argparse.Namespace) -> Encoder:
    """Loads the model that the options name; during training, returns the model being trained.

    Raises ConfigError or ModelError.
    """
    from trainer.device import find_device
    from trainer.evaluate.features import Encoder
    from trainer.model import load

    if (encoder := getattr(args, "encoder", None)) is not None:
        assert isinstance(encoder, Encoder)
        return encoder
    if args.batch_size < 1:
        raise ConfigError("--batch-size", [f"found {args.batch_size}, expected at least 1"])
    return Encoder(*load(args.model, args.pretrained, find_device(args.device), args.precision), args.batch_size)


def exit_status(run: Callable[[], object]) -> int:
    """Runs a command; returns 0, or prints an error and returns 2 for wrong input and 1 for an I/O error."""
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def say(line: str) -> None:
    """Prints a line on standard error, where progress goes; standard output is for results."""
    Console(stderr=True).say(line)


def progress(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """Yields the items and counts them on standard error: a bar on a terminal, otherwise a line every ten seconds."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    printed, count = time.monotonic(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            count += 1
            bar.advance(task)
            if bar.disable and time.monotonic() - printed > PLAIN_EVERY:
                printed = time.monotonic()
                console.say(f"{count:,}{f' of {total:,}' if total else ''} {what}")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
