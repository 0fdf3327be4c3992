"""Opens files that may be compressed (`.gz`, `.zst` or `.bz2` by name), local or in an object store."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa

COMPRESSIONS = ("gz", "zst", "bz2")


@contextlib.contextmanager
def open_plain(path: str) -> Iterator[io.BufferedReader]:
    """Opens the decompressed bytes of a file. Reading raises OSError, EOFError or zlib.error if the file is damaged."""
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(fsspec.open(path, "rb"))
        if path.lower().endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        elif path.lower().endswith(".bz2"):
            file = stack.enter_context(bz2.open(file))
        elif path.lower().endswith(".zst"):
            file = pa.CompressedInputStream(pa.PythonFile(file), "zstd")
        yield io.BufferedReader(_Raw(file), 1 << 20)


def plain_name(path: str) -> str:
    """The path in lower case, without its compression extension."""
    name = path.lower()
    return name.rpartition(".")[0] if name.endswith(tuple(f".{ending}" for ending in COMPRESSIONS)) else name


class _Raw(io.RawIOBase):
    """Adapts an object with read() for BufferedReader."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
