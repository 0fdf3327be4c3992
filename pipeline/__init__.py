"""Winnow's curation pipeline: from tables of image URLs and captions to WebDataset shards."""

import importlib.util
import sys

_NEEDED = ("aiohttp", "dask", "fsspec", "numpy", "pandas", "PIL", "pyarrow", "pydantic", "ray", "rich", "torch", "yaml")


def _check_packages() -> None:
    """Names the interpreter where packages are missing: on a cluster it is rarely the one that was meant."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    line = (
        f"the Python at {sys.executable} lacks packages that Winnow needs: {', '.join(missing)}. Install Winnow for it "
        f"({sys.executable} -m pip install …), or use the Python of the environment that has it. On a cluster every "
        "node needs one: see docs/cluster.md"
    )
    if sys.argv[:1] == ["-m"]:  # `python -m pipeline.…` is being looked up: a command, which owes a line, no traceback
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(1)
    raise ImportError(line)


_check_packages()
