"""A small process that outlives the command, and then kills the command's Ray and all its descendants.

The command holds the write end of this process's standard input. The kernel closes it however the command ends, even by
SIGKILL. Parent processes and process groups cannot identify the descendants: by then parents may be gone, and groups
differ. Instead, a process belongs to the command if it inherited a marker variable. A process that renames itself
overwrites its environment, so it also belongs to the command if it has a file in the Ray session folder open for
writing.
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

from pipeline.child import start_child
from pipeline.scheduler.lifetime import GOES_ON

VARIABLE = "WINNOW_COMMAND"
PATIENCE = 10.0
"""Seconds to keep looking for processes that appear while others are being killed."""
LOOK_EVERY = 0.25
"""Seconds between checks for the Ray session while it starts."""
_SESSION = b"--session-dir="
_HAS_PROC = os.path.isdir("/proc/self")


class Keeper:
    """Starts the keeper process and marks all later child processes of this command."""

    def __init__(self) -> None:
        token = secrets.token_hex(16)
        os.environ.pop(VARIABLE, None)  # set by a parent command, whose keeper must not kill ours
        self._process = start_child(
            "pipeline.scheduler.keeper", token,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            cwd="/", start_new_session=True,  # signals to the command's group must not reach it
        )  # fmt: skip
        os.environ[VARIABLE] = token

    def started(self) -> None:
        """Tells the keeper process that the start of Ray has returned, successfully or with an error.

        If the command ends earlier, the keeper prints an error message: when a component of Ray dies during the start,
        Ray's core ends the command without one.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Kills all remaining marked processes, and waits up to PATIENCE seconds for them to end."""
        os.environ.pop(VARIABLE, None)
        assert self._process.stdin is not None
        self.started()
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)


def _processes() -> Iterator[Path]:
    # Without /proc, only Ray's own reaper cleans up.
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit()) if _HAS_PROC else iter(())


def _environment(process: Path) -> list[bytes]:
    """The environment with which a process was started; empty if it is gone or belongs to another user."""
    with contextlib.suppress(OSError):
        return (process / "environ").read_bytes().split(b"\0")
    return []


def _belongs(process: Path, mark: bytes, session: str | None) -> bool:
    environment = _environment(process)
    if mark in environment:
        return True
    # The command and other drivers also write to the session, but their environment is intact.
    renamed = bool(environment) and b"=" not in environment[0]
    return renamed and session is not None and _writes_to(process, session)


def _writes_to(process: Path, folder: str) -> bool:
    """Whether a process has a file in a folder open for writing. Readers such as `tail` do not belong to Ray."""
    with contextlib.suppress(OSError):
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if fd.lstat().st_mode & stat.S_IWUSR and os.readlink(fd).startswith(folder):
                    return True
    return False


def _find_session(mark: bytes) -> str | None:
    """The folder of the Ray session that the command started; None before it exists."""
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
    started = False
    while True:
        if not select.select([0], [], [], LOOK_EVERY if session is None and _HAS_PROC else None)[0]:
            session = _find_session(mark)
        elif os.read(0, 1):
            started = True
            os.dup2(1, 2)  # releases the command's stderr
        else:
            break
    if not started:
        with contextlib.suppress(OSError):
            os.write(2, f"error: the command ended while Ray was starting. {GOES_ON}\n".encode())
        os.dup2(1, 2)
    end = time.monotonic() + PATIENCE
    clean = 0
    while clean < 2 and time.monotonic() < end:  # a single scan may miss a process that is starting
        left = [process for process in _processes() if _belongs(process, mark, session)]
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(int(process.name), signal.SIGKILL)
        clean = 0 if left else clean + 1
        time.sleep(0.1)


if __name__ == "__main__":
    _main()
