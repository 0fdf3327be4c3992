"""`--help` of every command describes it, gives an example, explains every option, and avoids slow imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import COMMANDS

TASKS = ("bias", "fewshot", "overlap", "probe", "retrieval", "robustness", "zeroshot")
HELP = [
    "pipeline.cli",
    *sorted({command.module for command in COMMANDS.values()}),
    *(f"trainer.evaluate.__main__ {task}" for task in TASKS),
    *(f"trainer.search {command}" for command in ("embed", "index", "query")),
]
CODE = """
import runpy, sys
sys.argv = sys.argv[1:] + ["--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
slow = sorted({"torch", "open_clip", "ray", "dask", "img2dataset", "pandas", "scipy"} & set(sys.modules))
assert not slow, slow
"""


@pytest.mark.parametrize("command", HELP)
def test_help_teaches_and_imports_nothing_slow(command: str) -> None:
    words = [sys.executable, "-c", CODE, *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "usage:" in lines[0]
    assert any(line.lstrip().startswith(("python -m ", "winnow ")) for line in lines[1:]), "no example"
    for number, line in enumerate(lines):
        if line.startswith("  -") and "  " not in line.strip():  # an option without help beside it has it below
            assert lines[number + 1].startswith(" " * 8), f"{line} has no help"
