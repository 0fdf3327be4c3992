"""Prints the reference of the steps in Markdown: what each does, what it reads and adds, and its options.

python -m pipeline.steps                          all steps, as in docs/steps.md
python -m pipeline.steps clip_score threshold     those named
python -m pipeline.steps my_package.no_shouting   one of your own, named as in a recipe
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Sequence

from pipeline.fetch.reasons import REASONS
from pipeline.recipe import built_in_steps, find_step
from pipeline.step import Filter, Stage, Step
from trainer.terminal import guarded


def describe(step: type[Step]) -> str:
    """A step's reference in Markdown: what it does, what it reads and adds, and a table of its options."""
    kind = "stage" if issubclass(step, Stage) else "filter"
    docs = _option_docs(step)
    lines = [f"## `{step.name()}` ({kind})", "", inspect.cleandoc(step.__doc__ or ""), ""]
    for title, names in (("reads", step.needs), ("adds", step.adds)):
        if names:
            lines.append(f"{title} " + ", ".join(f"`{name}`" for name in names) + "  ")
    options = dataclasses.fields(step)
    if options:
        lines += ["", "| option | type | default | |", "|---|---|---|---|"]
    for option in options:
        cells = [f"`{option.name}`", f"`{option.type}`", _default(option), " ".join(docs.get(option.name, "").split())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).rstrip() + "\n"


def reference() -> str:
    """`docs/steps.md`: all steps that come with Winnow, stages first."""
    steps = [find_step(name) for name in built_in_steps()]
    parts = [describe(step) for step in sorted(steps, key=lambda step: (issubclass(step, Filter), step.name()))]
    head = "# The steps\n\n<!-- written by `python -m pipeline.steps > docs/steps.md` -->\n"
    return "\n".join([head, *parts, _reasons()])


def _reasons() -> str:
    lines = ["## Why `download` drops a row", "", "| reason | meaning | may a later try help? |", "|---|---|---|"]
    lines += [f"| `{name}` | {why.meaning} | {'yes' if why.transient else 'no'} |" for name, why in REASONS.items()]
    lines.append("| `http_NNN` | the server answered with status NNN | for 5xx, 408, 425 and 429 |")
    return "\n".join(lines) + "\n"


def _default(option: dataclasses.Field) -> str:  # type: ignore[type-arg]
    if option.default is not dataclasses.MISSING:
        return f"`{option.default!r}`" if option.default is not None else ""
    if option.default_factory is not dataclasses.MISSING:
        return f"`{option.default_factory()!r}`"
    return "required"


def _option_docs(step: type[Step]) -> dict[str, str]:
    """The string below each field of a class body, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(step))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            value = below.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[field.target.id] = inspect.cleandoc(value.value)
    return docs


@guarded()
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the reference of all steps, or of those named; 2 for a name that is no step."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a step, named as in a recipe (default: all)")
    names = parser.parse_args(argv).names
    try:
        print("\n".join(describe(find_step(name)) for name in names) if names else reference(), end="")
    except ValueError as error:
        print(f"error: {' '.join(names)}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
