"""Checkpoints: everything a training run needs to resume, one file per step, complete or absent."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from trainer import atomic
from trainer.errors import InputError

_NAME = re.compile(r"step-(\d{8})\.pt")


class CheckpointError(InputError):
    """A checkpoint is absent, unreadable or of another run; the message names the file."""


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-NNNNNNNN.pt` atomically, then removes all but the `keep` newest up to this step.

    Raises OSError if it cannot be written, and leaves the folder unchanged.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises its own errors from the file's
        cause = error if isinstance(error, OSError) else error.__context__ or error
        why = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise OSError(f"{path}: the checkpoint cannot be written: {why}; earlier ones are unchanged") from None
    whole = [found for found in _found(folder) if found <= path]  # later ones are damaged, or will be rewritten
    killed = [stray for stray in folder.iterdir() if atomic.is_part(stray.name)]
    for old in [*whole[:-keep], *killed]:
        old.unlink(missing_ok=True)
    return path


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in the output of a training (or in its `checkpoints/`), or None."""
    found = _found(folder) or _found(folder / "checkpoints")
    return found[-1] if found else None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint (see `latest`), and a message for each newer, damaged one.

    Raises CheckpointError if all are damaged.
    """
    found, damaged = _found(folder) or _found(folder / "checkpoints"), []
    for path in reversed(found):
        try:
            check(path)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    if damaged:
        cure = "  Remove them to start over, or name another output."
        raise CheckpointError("\n".join(["no checkpoint is whole:", *(f"  {line}" for line in damaged), cure]))
    return None, []


def check(path: Path) -> None:
    """Verifies the checksums of a checkpoint. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except Exception as error:  # zipfile raises almost any exception on damage
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this trainer ({error})") from error
    if broken:
        raise CheckpointError(f"{path}: damaged (the checksum of {broken} is wrong)")


def load(path: Path) -> dict[str, Any]:
    """The state that `save` was given, on the CPU. Only tensors and plain values are unpickled."""
    check(path)  # torch.load does not verify checksums
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or not {"model", "model_config", "step"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this trainer")
    return state


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
