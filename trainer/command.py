"""Shared by the trainer's commands: the options that name a model, messages and exit statuses.

Does not import torch, so that `--help` is fast. Commands import the code that runs a model where they call it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trainer.config import PRECISIONS, ConfigError
from trainer.terminal import Console

if TYPE_CHECKING:
    from trainer.features import Encoder


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
    from trainer.features import Encoder
    from trainer.model import load

    if (encoder := getattr(args, "encoder", None)) is not None:
        assert isinstance(encoder, Encoder)
        return encoder
    if args.batch_size < 1:
        raise ConfigError("--batch-size", [f"found {args.batch_size}, expected at least 1"])
    return Encoder(*load(args.model, args.pretrained, find_device(args.device), args.precision), args.batch_size)


def say(line: str) -> None:
    """Prints a line to standard error, like progress; standard output is for results."""
    Console(stderr=True).say(line)
