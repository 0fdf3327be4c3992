"""Checkpoints: everything a training run needs to go on, one file per step, complete or absent."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{8})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that is absent, unreadable, or of another run; the message names the file."""


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-NNNNNNNN.pt` atomically, then removes all but the `keep` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    for old in _found(folder)[:-keep]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step of a training's output (or of its `checkpoints/`), if there is one."""
    found = _found(folder) or _found(folder / "checkpoints")
    return found[-1] if found else None


def load(path: Path) -> dict[str, Any]:
    """The state that `save` was given, on the CPU. Only tensors and plain values are unpickled."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or not {"model", "model_config", "step"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this trainer")
    return state


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
