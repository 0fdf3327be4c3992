"""Atomic file writes, and a lock that limits a folder to one writer.

A file is complete or absent, even if its writer is killed or several processes write it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterator
from typing import BinaryIO

_PART = re.compile(r"\..+\.[0-9a-f]{12}\.part")


def part_of(path: str | os.PathLike[str]) -> str:
    """A unique hidden name in the same folder, for the file while it is being written."""
    folder, base = os.path.split(os.fspath(path))
    return os.path.join(folder, f".{base}.{secrets.token_hex(6)}.part")


def is_part(name: str) -> bool:
    """Whether `part_of` made this file name."""
    return _PART.fullmatch(name) is not None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], parents: bool = False) -> Iterator[BinaryIO]:
    """Opens a new file, which replaces `path` when the block ends. With `parents`, creates missing folders.

    If the block raises, the new file is removed and `path` is unchanged. File and folder are flushed to disk. A pipe or
    a device, such as /dev/null, is written directly. Raises OSError.
    """
    if os.path.isdir(path):  # fail before the caller's work, whose result would be lost
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if _is_device(path):
        with open(path, "wb") as file:
            yield file
        return
    folder = os.path.dirname(path) or "."
    if parents:
        os.makedirs(folder, exist_ok=True)
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds an exclusive lock on a file, created if missing, until the block or the process ends.

    Raises BlockingIOError, which names the owner, if another process holds the lock. On a file system without locks,
    this has no effect.
    """
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by children
        except (BlockingIOError, PermissionError):  # POSIX allows either
            file.seek(0)
            raise BlockingIOError(errno.EAGAIN, f"in use by {file.read(100)}") from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _is_device(path: str | os.PathLike[str]) -> bool:
    # /dev/stdout is a regular file if the shell redirected it to one.
    in_dev = os.path.abspath(path).startswith("/dev/") and not os.path.abspath(path).startswith("/dev/shm/")
    return os.path.exists(path) and (in_dev or not (os.path.isfile(path) or os.path.isdir(path)))


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flushes a folder, so that new entries in it survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
