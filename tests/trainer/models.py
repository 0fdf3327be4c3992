"""A tiny dual encoder with random weights, as a folder that every command loads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from trainer.evaluate.features import Encoder
from trainer.export import export
from trainer.model import create, load, model_config

ARCHITECTURE = "scorer-64"


def write_model(out: Path) -> str:
    torch.manual_seed(0)
    model, preprocess, _ = create(ARCHITECTURE)
    state = {"model": model.state_dict(), "model_config": model_config(ARCHITECTURE)}
    export({**state, "preprocess_config": preprocess.config}, out)
    return str(out)


@cache
def encoder_of(folder: str) -> Encoder:
    return Encoder(*load(folder), batch_size=8)
