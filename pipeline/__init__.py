"""Winnow's curation pipeline: from tables of image URLs and captions to WebDataset shards."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.reader import Run, RunError, open_run

__all__ = ["Run", "RunError", "open_run"]

_NEEDED = ("aiohttp", "dask", "fsspec", "numpy", "pandas", "PIL", "pyarrow", "pydantic", "ray", "rich", "torch", "yaml")


def _check_packages() -> None:
    """Fails with the path of the interpreter if it lacks packages: on a cluster it is often not the intended one."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    line = (
        f"the Python at {sys.executable} lacks packages that Winnow needs: {', '.join(missing)}. Install Winnow for it "
        f"({sys.executable} -m pip install …), or use the Python of the environment that has it. On a cluster every "
        "node needs one: see docs/cluster.md"
    )
    if sys.argv[:1] == ["-m"]:  # started as `python -m pipeline.…`: print one line, no traceback
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(1)
    raise ImportError(line)


def __getattr__(name: str) -> Any:
    """Imports the read API on first use: every command imports this package, but few of them read runs."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from pipeline import reader

    return getattr(reader, name)


_check_packages()
