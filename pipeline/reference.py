"""Generates the reference pages of the docs from the code: what each step does, and the keys of recipes and
configurations.

`winnow steps [NAME …]` prints the steps, `winnow steps --configuration` the keys. `docs/steps.md` and
`docs/configuration.md` are these two pages; a test compares them.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence

from pipeline.fetch.reasons import REASONS
from pipeline.recipe import PoolSpec, Recipe, built_in_steps, find_step
from pipeline.step import Filter, Sink, Stage, Step
from trainer.config import TrainConfig
from trainer.errors import InputError
from trainer.terminal import entry_point

CONFIGURATION = """\
# Configuration keys

<!-- written by `winnow steps --configuration > docs/configuration.md` -->

The keys of a recipe and of a training configuration. How the values are read: [Write a recipe](recipes.md). The options
of each step: [Steps](steps.md).

## Recipe

{recipe}
## Pool

The keys below `pool` in a recipe.

{pool}
## Training configuration

What to set for which purpose: [Train](training.md).

{training}"""


def describe(step: type[Step]) -> str:
    """A step's reference in Markdown: what the step does, the columns that it reads and adds, and its options."""
    kind = "stage" if issubclass(step, Stage) else "sink" if issubclass(step, Sink) else "filter"
    lines = [f"## `{step.name()}` ({kind})", "", inspect.cleandoc(step.__doc__ or ""), ""]
    for title, names in (("reads", step.needs), ("adds", step.adds)):
        if names:
            lines.append(f"{title} " + ", ".join(f"`{name}`" for name in names) + "  ")
    if options := dataclasses.fields(step):
        lines += ["", _table("option", options, field_docs(step))]
    return "\n".join(lines).rstrip() + "\n"


def steps_page() -> str:
    """`docs/steps.md`: all steps that come with Winnow, stages first."""
    steps = [find_step(name) for name in built_in_steps()]
    parts = [describe(step) for step in sorted(steps, key=lambda step: (issubclass(step, Filter), step.name()))]
    head = "# Steps\n\n<!-- written by `winnow steps > docs/steps.md` -->\n"
    return "\n".join([head, *parts, reasons_section()])


def configuration_page() -> str:
    """`docs/configuration.md`: the keys of a recipe, of its pool and of a training configuration."""
    recipe = [field for field in dataclasses.fields(Recipe) if field.name != "source"]
    training = dataclasses.fields(TrainConfig)
    docs = {field.name: field.metadata["doc"] for field in training}
    return CONFIGURATION.format(
        recipe=_table("key", recipe, field_docs(Recipe)),
        pool=_table("key", dataclasses.fields(PoolSpec), field_docs(PoolSpec)),
        training=_table("key", training, docs),
    )


def reasons_section() -> str:
    """The reasons of `download`, in Markdown."""
    lines = ["## Why `download` drops a row", "", "| reason | meaning | may a later try help? |", "|---|---|---|"]
    lines += [f"| `{name}` | {why.meaning} | {'yes' if why.transient else 'no'} |" for name, why in REASONS.items()]
    lines.append("| `http_NNN` | the server answered with status NNN | for 5xx, 408, 425 and 429 |")
    return "\n".join(lines) + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """The string that follows each field of a dataclass, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            value = below.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[field.target.id] = inspect.cleandoc(value.value)
    return docs


def _table(title: str, fields: Sequence[dataclasses.Field], docs: Mapping[str, str]) -> str:  # type: ignore[type-arg]
    lines = [f"| {title} | type | default | |", "|---|---|---|---|"]
    for field in fields:
        cells = [f"`{field.name}`", f"`{field.type}`", _default(field), " ".join(docs.get(field.name, "").split())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field) -> str:  # type: ignore[type-arg]
    """The default as YAML: empty for null, `required` if there is none."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif (value := field.default) is dataclasses.MISSING:
        return "required"
    if value is None:
        return ""
    if isinstance(value, str):
        return f"`{value}`" if value else "`''`"
    return "`.inf`" if value == math.inf else f"`{json.dumps(value, ensure_ascii=False)}`"


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="winnow steps",
        description="Prints the reference of all steps, or of those named, in Markdown.",
        epilog="examples:\n  winnow steps\n  winnow steps clip_score threshold\n  winnow steps --configuration",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a step, as in `download`, or its import path")
    parser.add_argument(
        "--configuration", action="store_true", help="print the keys of recipes and training configurations instead"
    )
    args = parser.parse_args(argv)
    if args.configuration:
        print(configuration_page(), end="")
        return
    try:
        print("\n".join(describe(find_step(name)) for name in args.names) if args.names else steps_page(), end="")
    except ValueError as error:
        raise InputError(f"{' '.join(args.names)}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
