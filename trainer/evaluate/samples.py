"""Where pictures come from: folders, WebDataset tars, shards. Everything is read as bytes; nothing is decoded here."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from trainer.data import CorruptSampleError, Shards

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
AT_ONCE = 64
"""Samples asked of an object store together."""


class EvaluationError(ValueError):
    """Data that cannot be evaluated on; the message names the file or folder."""


class Sample(NamedTuple):
    """An encoded picture and what is known about it."""

    where: str
    """Its file, or `SHARD.tar:KEY`."""
    encoded: bytes
    label: int = -1
    """Number of its class, where it has one."""
    captions: tuple[str, ...] = ()
    problem: str = ""
    """Why there are no bytes, where there are none."""


def image_files(folder: Path) -> list[Path]:
    """The pictures directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)


def read_pictures(path: str) -> tuple[Iterator[Sample], int]:
    """The pictures of shards, of a folder and all folders in it, or of one file; and how many they are.

    Raises EvaluationError or ShardsError where there are none.
    """
    place = Path(path)
    if place.is_file() and place.suffix.lower() in EXTENSIONS:
        return iter([Sample(path, place.read_bytes())]), 1
    if not place.is_dir() or any(any(place.glob(pattern)) for pattern in ("*.tar", "manifest.json", "shards")):
        shards = Shards(path)
        return read_shards(shards), len(shards)
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in EXTENSIONS)
    if not files:
        raise EvaluationError(f"{path}: expected shards, a picture or a folder of pictures ({', '.join(EXTENSIONS)})")
    return (Sample(str(file), file.read_bytes()) for file in files), len(files)


def read_shards(shards: Shards, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """Samples `start` to `stop` - 1 with their captions."""
    stop = len(shards) if stop is None else stop
    for first in range(start, stop, AT_ONCE):
        numbers = range(first, min(stop, first + AT_ONCE))
        for number, found in zip(numbers, shards.read_many(numbers)):
            if isinstance(found, CorruptSampleError):
                yield Sample(shards.key(number), b"", problem=str(found))
            else:
                yield Sample(shards.key(number), found[0], captions=(found[1],))


def webdataset_shards(folder: Path) -> list[Path]:
    """The tars of a folder in the order of their numbers. Raises EvaluationError if `nshards.txt` promises others."""
    shards = sorted(folder.glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
    counted = folder / "nshards.txt"
    if counted.is_file():
        try:
            count = int(counted.read_text(encoding="utf-8"))
        except ValueError as error:
            raise EvaluationError(f"{counted}: expected the number of shards") from error
        shards = [folder / f"{number}.tar" for number in range(count)]
        if missing := next((path for path in shards if not path.is_file()), None):
            raise EvaluationError(f"{missing}: missing, but {counted} says {count} shards")
    return shards


def read_webdataset(shard: Path, companion: str) -> Iterator[tuple[str, bytes, bytes]]:
    """`SHARD.tar:KEY`, picture and content of `KEY.companion` for each pair in a tar. Raises EvaluationError."""
    wanted = (*EXTENSIONS, companion)
    waiting: dict[str, dict[bool, bytes]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                # A key ends at the first dot of the name, as in webdataset.
                stem, _, extension = path.name.partition(".")
                extension = f".{extension.lower()}"
                file = tar.extractfile(member) if member.isfile() and extension in wanted else None
                if file is None:
                    continue
                key = str(path.with_name(stem))
                pair = waiting.setdefault(key, {})
                pair[extension == companion] = file.read()
                if len(pair) == 2:
                    del waiting[key]
                    yield f"{shard}:{key}", pair[False], pair[True]
    except (tarfile.TarError, ValueError) as error:  # ValueError: a member with no name before the dot
        raise EvaluationError(f"{shard}: {error}") from error
    if waiting:
        raise EvaluationError(f"{shard}: {next(iter(waiting))} has no image or no {companion} beside it")


def lines(path: Path) -> list[str] | None:
    """The lines of a text file that are not empty, or None where there is no such file."""
    if not path.is_file():
        return None
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises EvaluationError where there are none."""
    found = lines(path)
    if not found:
        raise EvaluationError(f"{path}: no such file, or nothing in it")
    return found
