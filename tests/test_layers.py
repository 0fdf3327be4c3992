"""Which module may import which: the rules of docs/architecture.md."""

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
    found: dict[str, set[str]] = {name: set() for name in names}
    for path, name in paths.items():
        here = found.get(name.removesuffix(".__init__"))
        if here is None:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                here.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                modules = {f"{node.module}.{alias.name}" for alias in node.names} & names
                here.update(modules or {str(node.module)})
        here.intersection_update(names)
        here.discard(name.removesuffix(".__init__"))
    return found


def room(module: str) -> str:
    """A folder of the pipeline or the trainer, or a module that lies in none."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("of", [str, room], ids=["modules", "folders"])
def test_imports_have_no_circle(of: Callable[[str], str]) -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in imports().items():
        graph.setdefault(of(module), set()).update({of(name) for name in imported} - {of(module)})
    # `pipeline.open_run` imports the reader, which every module below the package would close a circle with.
    graph.pop("pipeline")
    order = list(TopologicalSorter(graph).static_order())
    assert order.index(of("pipeline.schema")) < order.index(of("pipeline.scheduler.executor"))


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
        if module in steps or room(module) in below:
            assert not imported & steps, f"{module} imports {imported & steps}"
