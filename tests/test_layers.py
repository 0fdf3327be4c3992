"""The rules of docs/architecture.md about which module may import which."""

from __future__ import annotations

import ast
from collections.abc import Callable
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT


def imports() -> dict[str, set[str]]:
    """The modules of both packages that each module imports, also within functions and for types only."""
    paths = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("[pt]*/**/*.py")}
    names = {name.removesuffix(".__init__") for name in paths.values() if name.startswith(("pipeline", "trainer"))}
    imported: dict[str, set[str]] = {name: set() for name in names}
    for path, name in paths.items():
        module = name.removesuffix(".__init__")
        if module not in imported:
            continue
        targets = imported[module]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                modules = {f"{node.module}.{alias.name}" for alias in node.names} & names
                targets.update(modules or {str(node.module)})
        targets.intersection_update(names)
        targets.discard(module)
    return imported


def folder_of(module: str) -> str:
    """A folder of the pipeline or the trainer, or a module outside of these folders."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("group_of", [str, folder_of], ids=["modules", "folders"])
def test_imports_have_no_cycle(group_of: Callable[[str], str]) -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in imports().items():
        graph.setdefault(group_of(module), set()).update({group_of(name) for name in imported} - {group_of(module)})
    # `pipeline.open_run` imports the reader, so the package would be in a cycle with every module in it.
    graph.pop("pipeline")
    order = list(TopologicalSorter(graph).static_order())
    assert order.index(group_of("pipeline.schema")) < order.index(group_of("pipeline.scheduler.executor"))


def test_no_step_is_known_by_name() -> None:
    known = imports()
    steps = {name for name in known if name.startswith(("pipeline.stages.", "pipeline.filters."))}
    below = {
        "pipeline.scheduler",
        "pipeline.pool",
        "pipeline.recipe",
        "pipeline.step",
        "pipeline.run",
        "pipeline.reader",
    }
    assert len(steps) > 30
    for module, imported in known.items():
        if module in steps or folder_of(module) in below:
            assert not imported & steps, f"{module} imports {imported & steps}"
