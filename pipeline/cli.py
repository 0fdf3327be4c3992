"""The `winnow` command: every command of the pipeline and the trainer under one name.

`winnow run …` is `python -m pipeline.run …`, and so on. Each command parses its own arguments, and is imported only
when it is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from trainer.terminal import guarded


class Command(NamedTuple):
    """A command: the module whose `main` it calls, the arguments to put first, and one line of help."""

    module: str
    arguments: tuple[str, ...]
    summary: str


COMMANDS = {
    "init": Command("pipeline.init", (), "copy a shipped recipe or training configuration to the current folder"),
    "demo": Command(
        "pipeline.demo.run", (), "curate a small built-in web, train on the result and measure both; needs no data"
    ),
    "web": Command("pipeline.demo.web", (), "build and serve the demo's web, for `winnow run demo.yaml`"),
    "run": Command("pipeline.run", (), "curate a pool of image URLs and captions into shards, following a recipe"),
    "plan": Command("pipeline.run", ("--plan",), "print what a recipe would run and cost; run nothing"),
    "study": Command(
        "pipeline.study.__main__", (), "compare cuts of a finished run by what they keep and by models trained on it"
    ),
    "report": Command("pipeline.report.__main__", (), "write the report of a finished run: one HTML page"),
    "learn": Command(
        "pipeline.learn.__main__", (), "fit a mixture of a run's scores to labels, for the step learned_score"
    ),
    "verify": Command("pipeline.verify", (), "check a finished run against its records"),
    "takedown": Command("pipeline.takedown", (), "remove listed samples from the shards of a finished run"),
    "status": Command("pipeline.status", (), "show the progress of a run"),
    "studio": Command("pipeline.studio.__main__", (), "open a local page to move cuts and see what they would keep"),
    "diff": Command("pipeline.diff", (), "compare two runs: rows gained and lost, and the step that dropped them"),
    "entries": Command("pipeline.entries", (), "build the list of concepts (words and phrases) for `balance`"),
    "confusion": Command("pipeline.confusion", (), "measure the language model on captions of known language"),
    "steps": Command("pipeline.reference", (), "print the reference of all steps, or of those named"),
    "train": Command("trainer.train", (), "pretrain a dual encoder on shards"),
    "evaluate": Command("trainer.evaluate.__main__", (), "evaluate a model: zero-shot, retrieval, probe and others"),
    "search": Command("trainer.search", (), "search pictures by text or by picture"),
    "moderate": Command("trainer.moderate", (), "flag pictures by a policy of prompts"),
    "seen": Command("trainer.seen", (), "list the training steps that used given samples"),
    "export": Command("trainer.export", (), "write a checkpoint as a folder that open_clip loads"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: winnow COMMAND [ARGUMENT …]",
            "",
            "Turns tables of image URLs and captions into a training set, and the training set into a CLIP.",
            "",
            *lines,
            "",
            "To begin:",
            "  winnow demo                    run the whole pipeline on a small built-in web",
            "  winnow init 400m               get a recipe to edit; without a name, list all",
            "  winnow COMMAND --help          see what a command does, an example and its options",
        ]
    )


@guarded()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status of the command that it calls, 2 for an unknown one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"winnow {version('winnow-clip')}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        from trainer.spelling import did_you_mean

        print(f"error: unknown command {words[0]!r}{did_you_mean(words[0], COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    status = importlib.import_module(command.module).main([*command.arguments, *words[1:]])
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
