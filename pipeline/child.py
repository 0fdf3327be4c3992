"""Starts Python child processes that find the same modules as their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_PR_SET_PDEATHSIG = 1


def start_child(module: str, *words: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:
    """Runs `python -m module words…`, with `env` added to the environment. `options` go to subprocess.Popen.

    The child searches the same folders for modules, whatever its working directory.
    """
    path = os.pathsep.join(folder for folder in sys.path if folder)
    environment = {**os.environ, **(env or {}), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-m", module, *words], env=environment, **options)


def die_with_parent() -> None:
    """Makes the kernel kill this process when the thread that started it ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
