"""Reads the inputs of evaluation: pictures in folders, WebDataset tars and shards, and lists and tables beside them.

Pictures are read as bytes and not decoded here.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.errors import InputError
from trainer.shards import CorruptSampleError, Shards
from trainer.tar import ABSENT, TarError, samples

T = TypeVar("T")

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif")
FOREIGN = (".bmp", ".tif", ".tiff", ".heic", ".heif", ".jp2", ".svg", ".psd", ".jxl")
"""Extensions of pictures in unsupported formats."""
AT_ONCE = 64
"""Samples per concurrent request to an object store."""


class EvaluationError(InputError):
    """The data of an evaluation cannot be used; the message names the file or folder."""


class Sample(NamedTuple):
    """An encoded picture and what is known about it."""

    where: str
    """Path of its file, or `SHARD.tar:KEY`."""
    encoded: bytes
    label: int = -1
    """Number of its class; -1 if it has none."""
    captions: tuple[str, ...] = ()
    problem: str = ""
    """Why the picture could not be read; empty if it was."""


def image_files(folder: Path, pattern: str = "*") -> list[Path]:
    """The pictures in a folder, sorted by name, without hidden files. The pattern `**/*` includes all subfolders.

    Raises EvaluationError on a picture in an unsupported format, because skipping it would change the result.
    """
    found = []
    for path in sorted(folder.glob(pattern)):
        suffix = path.suffix.lower()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or suffix not in EXTENSIONS + FOREIGN or path.is_dir():
            continue
        if suffix in FOREIGN:
            raise EvaluationError(f"{path}: pictures are read as {', '.join(EXTENSIONS)}; convert it, or remove it")
        found.append(path)
    return found


def read_file(path: Path, label: int = -1) -> Sample:
    """Reads a picture from a file; if that fails, `problem` has the reason."""
    try:
        return Sample(str(path), path.read_bytes(), label)
    except OSError as error:
        return Sample(str(path), b"", label, problem=_reason(error))


def read_pictures(path: str) -> tuple[Iterator[Sample], int]:
    """Reads the pictures of shards, of a folder with its subfolders, or of one file; also returns their number.

    Raises EvaluationError or ShardsError if there are none.
    """
    place = Path(path)
    if place.is_file() and place.suffix != ".tar":
        return iter([read_file(place)]), 1
    if not place.is_dir() or any(any(place.glob(pattern)) for pattern in ("*.tar", "manifest.json", "shards")):
        shards = Shards(path)
        return read_shards(shards), len(shards)
    files = image_files(place, "**/*")
    if not files:
        raise EvaluationError(f"{path}: expected shards, a picture or a folder of pictures ({', '.join(EXTENSIONS)})")
    return map(read_file, files), len(files)


def read_shards(shards: Shards, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """Reads samples `start` to `stop` - 1 with their captions."""
    stop = len(shards) if stop is None else stop
    for first in range(start, stop, AT_ONCE):
        numbers = range(first, min(stop, first + AT_ONCE))
        for number, found in zip(numbers, shards.read_many(numbers)):
            if isinstance(found, CorruptSampleError):
                yield Sample(shards.key(number), b"", problem=str(found))
            else:
                yield Sample(shards.key(number), found[0], captions=(found[1],))


def webdataset_shards(folder: Path) -> list[Path]:
    """The tars of a folder, in numerical order. Raises EvaluationError if one that `nshards.txt` counts is missing."""
    counted = folder / "nshards.txt"
    if not counted.is_file():
        return sorted(folder.glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
    try:
        count = int(read_text(counted))
    except ValueError as error:
        raise EvaluationError(f"{counted}: {error}; expected the number of shards") from error
    if count < 0:
        raise EvaluationError(f"{counted}: found {count}, expected the number of shards")
    named = (folder / f"{number}.tar" for number in range(count))  # not a list: the count may be huge
    if missing := next((path for path in named if not path.is_file()), None):
        raise EvaluationError(f"{missing}: missing, but {counted} says {count} shards")
    return [folder / f"{number}.tar" for number in range(count)]


def read_webdataset(shard: Path, companion: str) -> Iterator[tuple[str, bytes, bytes]]:
    """Yields `SHARD.tar:KEY`, the picture, and the contents of `KEY.companion` for each sample of a tar.

    Raises EvaluationError if the tar is damaged or a sample has only one of the two files.
    """
    try:
        with shard.open("rb") as file:

            def read(at: int, size: int) -> bytes:
                return os.pread(file.fileno(), size, at)

            # Reads all headers first, to report a truncated tar before its first picture.
            for sample in list(samples(read, os.fstat(file.fileno()).st_size)):
                where, image, other = f"{shard}:{sample.key}", sample.image(), sample.members.get(companion)
                if other is None and image.size == ABSENT:
                    continue
                if other is None or image.size < 0:
                    has = ", ".join(f".{suffix}" for suffix in sample.members)
                    raise EvaluationError(f"{where} has no image or no .{companion} beside it; it has {has}")
                yield where, read(*image), read(*other)
    except (TarError, OSError) as error:
        raise EvaluationError(f"{shard}: {_reason(error)}") from error


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file, with or without a byte order mark. Raises EvaluationError."""
    try:
        encoded = path.read_bytes()
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise EvaluationError(
            f"{path}:{line}: not UTF-8 (byte 0x{encoded[error.start]:02x}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise EvaluationError(f"{path}: {_reason(error)}") from error


def lines(path: Path) -> list[str] | None:
    """The lines of a text file that are not empty; None if the file does not exist. Raises EvaluationError."""
    return split_lines(read_text(path)) if path.exists() else None


def split_lines(text: str) -> list[str]:
    """The lines of a text that are not empty, without leading and trailing whitespace.

    Lines end with a line feed, a carriage return or both. `str.splitlines` would also split at U+2028 and others, which
    may occur in a caption.
    """
    return [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises EvaluationError if there are none."""
    found = lines(path)
    if found is None:
        raise EvaluationError(f"{path}: no such file")
    if not found:
        raise EvaluationError(f"{path}: empty; expected a line for each name or template")
    return found


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a comma-separated file as dicts keyed by its first line; blank lines are skipped.

    Raises EvaluationError if there are no rows, if column names are missing or repeated, or if a row is longer or
    shorter than the first line. Such a row has lost or gained a comma, so its values are in the wrong columns.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    names: list[str] = []
    rows = []
    try:
        for row in reader:
            if not any(row):
                continue
            if not names:
                names = [name.strip() for name in row]
                if len({*names, ""}) <= len(names):
                    raise EvaluationError(f"{path}:{reader.line_num}: expected distinct column names, found {names}")
                continue
            if len(row) != len(names):
                raise EvaluationError(
                    f"{path}:{reader.line_num}: {len(row)} values for the {len(names)} columns {', '.join(names)}"
                )
            rows.append({name: value.strip() for name, value in zip(names, row)})
    except csv.Error as error:
        raise EvaluationError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    if not rows:
        raise EvaluationError(f"{path}: no rows below the line of column names")
    return rows


def read_vectors(path: Path) -> np.ndarray:
    """The embeddings in a .npy file, floats (rows, dim), memory-mapped. Raises EvaluationError."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise EvaluationError(f"{path}: {_reason(error)}; expected a .npy file of embeddings") from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise EvaluationError(f"{path}: {vectors.dtype} of shape {vectors.shape}, expected floats of shape (rows, dim)")
    return vectors


def read_columns(path: Path, *names: str) -> pa.Table:
    """Reads columns of a parquet file, by default all. Raises EvaluationError."""
    try:
        return pq.read_table(path, columns=list(names) or None)
    except (OSError, pa.ArrowException) as error:
        raise EvaluationError(f"{path}: {_reason(error)}") from error


def count_rows(path: Path) -> int:
    """The number of rows of a parquet file. Raises EvaluationError."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise EvaluationError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of `size` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
