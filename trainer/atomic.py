"""Atomic writes: a file is complete or absent, also after a kill or with several writers. And a folder's one writer."""

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
    """A new hidden name, in the same folder, for a file that is being written."""
    folder, base = os.path.split(os.fspath(path))
    return os.path.join(folder, f".{base}.{secrets.token_hex(6)}.part")


def is_part(name: str) -> bool:
    """Whether a file name is one of `part_of`."""
    return _PART.fullmatch(name) is not None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file that takes its name, and replaces what had it, when the block ends.

    If the block raises, nothing is left of it. File and folder are flushed to disk. A pipe or a device, such as
    /dev/null, is written to and not replaced. Raises OSError.
    """
    if os.path.isdir(path):  # before the work whose result would be lost
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if _is_device(path):
        with open(path, "wb") as file:
            yield file
        return
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(os.path.dirname(path) or ".")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a file, made if it is not there, until the block or this process ends, however it ends.

    Raises BlockingIOError, which says who holds it, if another process does. On a file system without locks, nobody is
    kept out.
    """
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held on by a child that outlives us
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
    # /dev/stdout is a plain file where a shell redirected it to one.
    in_dev = os.path.abspath(path).startswith("/dev/") and not os.path.abspath(path).startswith("/dev/shm/")
    return os.path.exists(path) and (in_dev or not (os.path.isfile(path) or os.path.isdir(path)))


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flushes a folder, so that new entries in it survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
