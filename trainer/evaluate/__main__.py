"""Evaluates a model and writes the result, CLIP_benchmark's JSON, to standard output or to a file.

python -m trainer.evaluate zeroshot   --model runs/demo/model --data FOLDER
python -m trainer.evaluate retrieval  --model runs/demo/model --data runs/heldout
python -m trainer.evaluate probe      --model runs/demo/model --data FOLDER_WITH_TRAIN_AND_TEST
python -m trainer.evaluate TASK --help                         what a task measures, on which data, with an example
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import atomic
from trainer.command import add_model_arguments
from trainer.evaluate import bias, fewshot, overlap, probe, retrieval, robustness, zeroshot
from trainer.samples import EvaluationError
from trainer.terminal import entry_point

TASKS = {
    "zeroshot": zeroshot,
    "retrieval": retrieval,
    "probe": probe,
    "fewshot": fewshot,
    "robustness": robustness,
    "overlap": overlap,
    "bias": bias,
}


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__, formatter_class=formatter)
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        doc = task.__doc__ or ""
        sub = tasks.add_parser(name, help=doc.split("\n")[0], description=doc, formatter_class=formatter)
        add_model_arguments(sub, required=task is not robustness)
        sub.add_argument("--data", required=True, help="the data to evaluate on, in the layout described above")
        sub.add_argument("--output", type=Path, help="file for the JSON, instead of standard output")
        task.add_arguments(sub)
    args = parser.parse_args(argv)
    report(args)


def report(args: argparse.Namespace) -> None:
    metrics = TASKS[args.task].evaluate(args)
    result = {
        "dataset": Path(args.data).name or args.data,
        "model": args.model,
        "pretrained": args.pretrained or "",
        "task": TASKS[args.task].TASK,
        "metrics": metrics,
        "language": "en",
    }
    try:
        text = json.dumps(result, allow_nan=False) + "\n"
    except ValueError as error:
        raise EvaluationError(f"{args.data}: a metric is not a number: {metrics}") from error
    if args.output:
        with atomic.replacing(args.output, parents=True) as file:
            file.write(text.encode())
    else:
        print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
