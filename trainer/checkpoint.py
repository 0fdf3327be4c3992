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

KEYS = {
    *("step", "corrupt", "model", "optimizer", "scaler", "config", "data", "model_config", "preprocess_config"),
}
"""What a checkpoint holds: see `Run.state`."""
_NAME = re.compile(r"step-(\d{8,})\.pt")


class CheckpointError(InputError):
    """A checkpoint is missing, unreadable or from another run; the message names the file."""


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-NNNNNNNN.pt` atomically, then removes all but the `keep` newest up to this step.

    Raises OSError if it cannot be written, and leaves the folder unchanged.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch hides the file's OSError behind its own error
        cause = error if isinstance(error, OSError) else error.__context__ or error
        why = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise OSError(f"{path}: the checkpoint cannot be written: {why}; earlier ones are unchanged") from None
    found = _found(folder)
    whole = found[: found.index(path) + 1]  # later ones are damaged, or will be rewritten
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
    """Verifies the checksums, the contents and the name of a checkpoint. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # torch.load does not verify checksums
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path}: a folder; expected a file step-*.pt") from error
    except Exception as error:  # zipfile raises almost any exception on damage
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this trainer ({error})") from error
    if broken:
        raise CheckpointError(f"{path}: damaged (the checksum of {broken} is wrong)")
    step, name = _unpickled(path, mmap=True)["step"], _NAME.fullmatch(path.name)
    if name and int(name[1]) != step:
        raise CheckpointError(f"{path}: damaged (it holds step {step}, and its name says another)")


def load(path: Path) -> dict[str, Any]:
    """The state that `save` was given, on the CPU. Only tensors and plain values are unpickled."""
    check(path)
    return _unpickled(path, mmap=False)


def _unpickled(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this trainer ({why})") from error
    missing = KEYS - state.keys() if isinstance(state, dict) else KEYS
    if missing:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this trainer (no {min(missing)} in it)")
    return state


def _found(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    # By number: a name of nine digits sorts before one of eight.
    named = {path: int(name[1]) for path in folder.iterdir() if (name := _NAME.fullmatch(path.name))}
    return sorted(named, key=lambda path: named[path])
