"""Evaluates a model and prints the result as CLIP_benchmark's JSON, on standard output or in a file.

    python -m trainer.evaluate zeroshot  --model runs/demo/model --data FOLDER
    python -m trainer.evaluate zeroshot  --model ViT-B-32 --pretrained openai --data imagenet/val \\
                                         --classnames imagenet --templates imagenet
    python -m trainer.evaluate retrieval --model runs/demo/model --data runs/heldout/shards
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.config import ConfigError
from trainer.data import ShardsError
from trainer.evaluate import retrieval, zeroshot
from trainer.evaluate.classes import EvaluationError
from trainer.model import DTYPES, ModelError, load
from trainer.train import find_device

TASKS = {"zeroshot": zeroshot, "retrieval": retrieval}


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__, formatter_class=formatter)
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        doc = task.__doc__ or ""
        sub = tasks.add_parser(name, help=doc.split("\n")[0], description=doc, formatter_class=formatter)
        sub.add_argument("--model", required=True, help="a folder from trainer.export, or an open_clip name")
        sub.add_argument("--pretrained", help="tag or file of the weights, where --model is a name")
        sub.add_argument("--data", required=True, type=Path, help="folder to evaluate on")
        sub.add_argument("--batch-size", type=int, default=64, help="images or captions at once (default 64)")
        sub.add_argument("--device", default="auto", help="cpu, cuda, ...; by default a GPU if there is one")
        sub.add_argument("--precision", choices=DTYPES, default="fp32", help="of the weights (default fp32)")
        sub.add_argument("--output", type=Path, help="file for the JSON, instead of standard output")
        task.add_arguments(sub)
    args = parser.parse_args(argv)
    try:
        if args.batch_size < 1:
            raise ConfigError("--batch-size", [f"found {args.batch_size}, expected at least 1"])
        loaded = load(args.model, args.pretrained, find_device(args.device), args.precision)
        with torch.inference_mode():
            metrics = task_metrics(args, loaded)
    except (ConfigError, EvaluationError, ModelError, ShardsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        "dataset": args.data.name or str(args.data),
        "model": args.model,
        "pretrained": args.pretrained or "",
        "task": TASKS[args.task].TASK,
        "metrics": metrics,
        "language": "en",
    }
    text = json.dumps(result) + "\n"
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def task_metrics(args: argparse.Namespace, loaded: Any) -> dict[str, float | None]:
    metrics: dict[str, float | None] = TASKS[args.task].evaluate(*loaded, args)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
