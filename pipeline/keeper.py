"""A small process that outlives the command and ends what the command left: the Ray that it started, and all below.

The command holds the other end of this process's standard input. However the command ends, the system closes that end;
a SIGKILL leaves no time for anything else. What belongs to the command is told by a variable in its environment, which
every process inherits from the one that started it: parents may be gone by now, groups and sessions differ.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "WINNOW_COMMAND"
PATIENCE = 10.0
"""Seconds in which processes that appear while others are being killed are looked for."""


class Keeper:
    """The command's side. From now on, processes that this one starts are marked as its own."""

    def __init__(self) -> None:
        token = secrets.token_hex(16)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment.pop(VARIABLE, None)  # of a command that this one was started by: its keeper must not end ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.keeper", token],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment, cwd="/", start_new_session=True,  # no signal to the command's group may end it
        )  # fmt: skip
        os.environ[VARIABLE] = token

    def end(self) -> None:
        """Ends whatever is left, and waits for it."""
        os.environ.pop(VARIABLE, None)
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)


def _marked(mark: bytes) -> list[int]:
    """The processes whose environment holds the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # another user's, or gone
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark = f"{VARIABLE}={sys.argv[1]}".encode()
    while sys.stdin.buffer.read(1):
        pass
    end = time.monotonic() + PATIENCE
    clean = 0
    while clean < 2 and time.monotonic() < end:  # one look may miss what was being started
        left = _marked(mark) if os.path.isdir("/proc/self") else []  # elsewhere Ray's own reaper must do
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        clean = 0 if left else clean + 1
        time.sleep(0.1)


if __name__ == "__main__":
    _main()
