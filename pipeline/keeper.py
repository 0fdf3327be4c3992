"""A small process that outlives the command and ends what the command left: the Ray that it started, and all below.

The command holds the other end of this process's standard input. However the command ends, the system closes that end;
a SIGKILL leaves no time for anything else. Parents may be gone by then, and groups differ. So a process belongs to the
command if it has inherited a variable from it or, since a process that renames itself overwrites its environment, if
it writes to the folder of Ray's session.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "WINNOW_COMMAND"
PATIENCE = 10.0
"""Seconds in which processes that appear while others are being killed are looked for."""
LOOK_EVERY = 0.25
"""Seconds between two looks for Ray's session while it starts."""
_SESSION = b"--session-dir="
_HAS_PROC = os.path.isdir("/proc/self")


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


def _processes() -> Iterator[Path]:
    # Elsewhere than on Linux, Ray's own reaper must do.
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit()) if _HAS_PROC else iter(())


def _environment(process: Path) -> list[bytes]:
    """The variables it was started with; nothing of another user's process, or of one that is gone."""
    with contextlib.suppress(OSError):
        return (process / "environ").read_bytes().split(b"\0")
    return []


def _belongs(process: Path, mark: bytes, session: str | None) -> bool:
    environment = _environment(process)
    if mark in environment:
        return True
    # The command itself and drivers of others write to the session too; their environment is whole.
    renamed = bool(environment) and b"=" not in environment[0]
    return renamed and session is not None and _writes_to(process, session)


def _writes_to(process: Path, folder: str) -> bool:
    """Whether it has a file in a folder open for writing: who reads along, as `tail` does, is none of Ray's."""
    with contextlib.suppress(OSError):
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if fd.lstat().st_mode & stat.S_IWUSR and os.readlink(fd).startswith(folder):
                    return True
    return False


def _find_session(mark: bytes) -> str | None:
    """The folder of the Ray session that the command has started, once there is one."""
    for process in _processes():
        with contextlib.suppress(OSError):
            for word in (process / "cmdline").read_bytes().split(b"\0"):
                if word.startswith(_SESSION) and mark in _environment(process):
                    return word.removeprefix(_SESSION).decode().rstrip("/") + "/"
    return None


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark = f"{VARIABLE}={sys.argv[1]}".encode()
    session: str | None = None
    while not select.select([sys.stdin], [], [], LOOK_EVERY if session is None and _HAS_PROC else None)[0]:
        session = _find_session(mark)
    end = time.monotonic() + PATIENCE
    clean = 0
    while clean < 2 and time.monotonic() < end:  # one look may miss what was being started
        left = [process for process in _processes() if _belongs(process, mark, session)]
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(int(process.name), signal.SIGKILL)
        clean = 0 if left else clean + 1
        time.sleep(0.1)


if __name__ == "__main__":
    _main()
