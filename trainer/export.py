"""Writes a checkpoint as a folder that open_clip loads.

    python -m trainer.export CHECKPOINT OUT [--precision fp32|fp16|bf16]

CHECKPOINT is a file `step-*.pt`, or the output folder of a training, which stands for its latest checkpoint. Then

    open_clip.create_model_and_transforms("local-dir:OUT")
    open_clip.get_tokenizer("local-dir:OUT")

give the same weights (rounded to the precision), preprocessing and tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import PRECISIONS
from trainer.errors import InputError
from trainer.terminal import entry_point

if TYPE_CHECKING:
    from trainer.model import Tokenizer


def check_replaceable(out: Path) -> None:
    """Raises InputError if `out` holds anything but an earlier export, because `export` would delete it."""
    from trainer.model import CONFIG_FILE

    if out.exists() and not (out / CONFIG_FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an earlier export; name another folder")


def export(state: dict[str, Any], out: Path, precision: str = "fp32", tokenizer: Tokenizer | None = None) -> None:
    """Writes a checkpoint's state as `open_clip_config.json` and `open_clip_model.safetensors`; replaces `out`.

    A Hugging Face `tokenizer` is saved beside them, where open_clip looks for it. Raises OSError if `out` cannot be
    written, without leaving partial output, and InputError if `out` exists and is not an earlier export.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from trainer.model import CONFIG_FILE, DTYPES, WEIGHTS_FILE, plain_names

    out = Path(os.path.abspath(out))  # `.` has no name
    check_replaceable(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
    try:
        partial.mkdir(parents=True)
        dtype = DTYPES[precision]
        weights = {
            name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
            for name, value in plain_names(state["model"]).items()
        }
        save_file(weights, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / WEIGHTS_FILE).chmod(0o644)  # safetensors makes it readable only by its owner
        config = {"model_cfg": state["model_config"], "preprocess_cfg": state["preprocess_config"]}
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (save_tokenizer := getattr(tokenizer, "save_pretrained", None)) is not None:
            save_tokenizer(partial)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{out}: the model cannot be written: {why}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="step-*.pt, or the output folder of a training")
    parser.add_argument("out", type=Path, help="folder to write; an earlier export there is replaced")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="dtype of the stored weights (default fp32)"
    )
    args = parser.parse_args(argv)

    import torch

    from trainer import checkpoint
    from trainer.model import find_tokenizer

    check_replaceable(args.out)
    path: Path | None = args.checkpoint
    damaged: list[str] = []
    if args.checkpoint.is_dir():
        path, damaged = checkpoint.newest_whole(args.checkpoint)
    if path is None:
        raise checkpoint.CheckpointError(f"{args.checkpoint} has no checkpoints/step-*.pt")
    state = checkpoint.load(path)
    for line in damaged:
        print(f"warning: {line}; exporting {path.name} instead", file=sys.stderr)
    export(state, args.out, args.precision, find_tokenizer(state["config"]["model"]))
    parameters = sum(value.numel() for value in state["model"].values() if torch.is_tensor(value))
    print(f"{args.out}: step {state['step']}, {parameters:,} values in {args.precision}")


if __name__ == "__main__":
    sys.exit(main())
