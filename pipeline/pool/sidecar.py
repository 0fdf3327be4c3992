"""Vectors in NumPy files beside the tables of a pool: one file for each table, one vector for each of its rows.

A pattern names the file relative to the folder of its table. `{stem}` stands for the table's name without its
extension, and `{number}` for the digits at the end of that name. A `#` precedes the name of an array in an `.npz`:

- `{stem}.npz#l14_img`: CommonPool's metadata, as DataComp publishes it
- `../img_emb/img_emb_{number}.npy`: a folder of clip-retrieval, whose tables are `metadata/metadata_{number}.parquet`
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa

TYPES = {np.dtype("<f2"): pa.float16(), np.dtype("<f4"): pa.float32()}
_WINDOW = 1 << 22
_NUMBER = re.compile(r"[0-9]+$")


class SidecarError(ValueError):
    """A vector file cannot be used. The message names the file, what was found and what was expected."""


class Array(NamedTuple):
    """The vectors beside a table."""

    rows: int
    width: int
    type: pa.DataType
    """The type of a component: float16 or float32."""

    @property
    def column(self) -> pa.DataType:
        return pa.list_(self.type, self.width)

    @property
    def row_bytes(self) -> int:
        return self.width * int(self.type.bit_width) // 8


def locate(pattern: str, table: str) -> tuple[str, str]:
    """The path of the vector file of a table, and the name of the array in it. Raises SidecarError if the pattern has
    `{number}` but the table's name does not end in digits."""
    folder, _, name = table.rpartition("/")
    stem = name.partition(".")[0]
    number = _NUMBER.search(stem)
    if "{number}" in pattern and number is None:
        raise SidecarError(f"{table} has no number at the end of its name, which {pattern!r} asks for")
    file, _, array = pattern.replace("{stem}", stem).replace("{number}", number[0] if number else "").partition("#")
    path = f"{folder}/{file}" if folder else file
    if "://" in path:
        scheme, _, rest = path.partition("://")
        return f"{scheme}://{os.path.normpath(rest)}", array
    return os.path.normpath(path), array


def head(path: str, array: str) -> Array:
    """Reads the shape and type of an array. Raises SidecarError."""
    with _opened(path, array) as (_, found):
        return found


@contextlib.contextmanager
def reader(path: str, array: str, first: int) -> Iterator[Callable[[int], pa.FixedSizeListArray]]:
    """Yields a function that returns the next n vectors, beginning at row `first`. Raises SidecarError."""
    with _opened(path, array) as (file, found):
        _skip(file, first * found.row_bytes)

        def take(rows: int) -> pa.FixedSizeListArray:
            data = file.read(rows * found.row_bytes)
            if len(data) < rows * found.row_bytes:
                raise SidecarError(f"{path} ends within its vectors; it may be truncated")
            values = pa.Array.from_buffers(found.type, rows * found.width, [None, pa.py_buffer(data)])
            return pa.FixedSizeListArray.from_arrays(values, found.width)

        yield take


@contextlib.contextmanager
def _opened(path: str, array: str) -> Iterator[tuple[IO[bytes], Array]]:
    """Opens a file at the first value of an array. Converts any error of a reader to a SidecarError."""
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(fsspec.open(path, "rb"))
            if path.endswith(".npz"):
                members = stack.enter_context(zipfile.ZipFile(file))
                names = [name.removesuffix(".npy") for name in members.namelist()]
                if array not in names:
                    there = ", ".join(names) or "nothing"
                    raise SidecarError(f"{path} holds {there}; expected `#` and one of them, found {array or 'none'!r}")
                size = members.getinfo(f"{array}.npy").file_size
                file = stack.enter_context(members.open(f"{array}.npy"))
            else:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
            found = _header(file, f"{path}#{array}" if array else path)
            if size < (end := file.tell() + found.rows * found.row_bytes):
                raise SidecarError(f"{path} is truncated: found {size:,} bytes, expected {end:,}")
            yield file, found
    except SidecarError:
        raise
    except FileNotFoundError:
        raise SidecarError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SidecarError(f"{path} cannot be read: {error}") from None


def _header(file: IO[bytes], what: str) -> Array:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read_header(file)
    if len(shape) != 2 or not shape[1] or dtype not in TYPES or (columns_first and math.prod(shape) > shape[0]):
        found = f"{dtype} of shape {shape}{' by columns' if columns_first else ''}"
        raise SidecarError(f"{what}: found {found}, expected float16 or float32 of shape (n, d)")
    return Array(shape[0], shape[1], TYPES[dtype])


def _skip(file: IO[bytes], size: int) -> None:
    if file.seekable() and not isinstance(file, zipfile.ZipExtFile):
        file.seek(size, os.SEEK_CUR)
        return
    while size and (block := file.read(min(size, _WINDOW))):  # a member of an archive may be compressed
        size -= len(block)
