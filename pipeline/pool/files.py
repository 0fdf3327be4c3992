"""Finds the files of a pool, or the drop tables of a run for `retry`. Read errors name the file."""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.compressed import COMPRESSIONS
from pipeline.fetch.reasons import find
from pipeline.pool import sidecar
from pipeline.recipe import PoolSpec
from pipeline.storage import Store, special_file
from trainer.errors import InputError

FORMATS = ("parquet", "csv", "tsv", "jsonl", "json", "wat")
_FETCHING = re.compile(r"(download|read_shards)(\.\d+)?")
"""Labels of the steps whose drops may be transient."""


class PoolError(InputError):
    """The pool cannot be read. The message names the file and the cause."""


def file_format(path: str) -> str | None:
    """The format that a file name implies, without its compression extension; None if it is not supported."""
    parts = os.path.basename(path).lower().split(".")[1:]
    if parts and parts[-1] in COMPRESSIONS:
        compression = parts.pop()
        if parts[-1:] in (["parquet"], ["pq"]) or (parts[-1:] == ["wat"] and compression != "gz"):
            return None
    aliases = {"pq": "parquet", "ndjson": "jsonl"}
    kind = aliases.get(parts[-1], parts[-1]) if parts else None
    return kind if kind in FORMATS else None


@contextlib.contextmanager
def reading(path: str, kind: str = "") -> Iterator[None]:
    """Converts any exception of a reader to a PoolError that names the file."""
    try:
        yield
    except PoolError:
        raise
    except sidecar.SidecarError as error:
        raise PoolError(f"embeddings: {error}") from None
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeError, csv.Error) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise PoolError(f"path: {path} cannot be read{kind}: {cause}; it may be truncated or damaged") from None
    except Exception as error:
        if "://" not in path:
            raise
        cause = (str(error).splitlines() or [""])[0]  # an object store or its library may raise anything
        raise PoolError(f"path: {path} cannot be read{kind}: {type(error).__name__}: {cause}") from None


def find_files(spec: PoolSpec) -> list[str]:
    """The files of a pool in a fixed order. Raises PoolError if there are none."""
    files: list[str] = []
    if spec.retry is not None:
        _check_retry(spec.retry)
    for path in spec.paths:
        if "://" in path:
            with reading(path):
                fs, root = fsspec.core.url_to_fs(path)
                found = fs.glob(root) if glob.has_magic(root) else fs.find(root) if fs.isdir(root) else [root]
                names = [fs.unstrip_protocol(name) for name in found]
        else:
            found = glob.glob(path, recursive=True) if glob.has_magic(path) else [path] if os.path.exists(path) else []
            names = [name for one in found for name in (_walk(one) if os.path.isdir(one) else [one])]
        explicit = names == [path]
        usable = [n for n in names if file_format(n) and not os.path.basename(n).startswith((".", "_"))]
        kinds = ", ".join(FORMATS) + f" (also .{' and .'.join(COMPRESSIONS)})"
        if not names and "://" not in path and os.path.isdir(path):
            raise PoolError(f"path: {path} is an empty folder; expected {kinds}")
        if not names:
            raise PoolError(
                f"path: {path} does not exist" if not glob.has_magic(path) else f"path: {path} matches no file"
            )
        if not usable:
            raise PoolError(f"path: {path} is not one of {kinds}" if explicit else f"path: {path} contains no {kinds}")
        for name in usable:
            if "://" not in name and not os.path.isfile(name):
                raise PoolError(f"path: {special_file(name) or f'{name} is a broken link; remove it'}")
        files += sorted(n if "://" in n else os.path.abspath(n) for n in usable)
    return list(dict.fromkeys(files))


def _walk(folder: str) -> list[str]:
    """The files in a folder and its subfolders. Follows links, except to folders already visited."""
    found, seen = [], set()
    for at, below, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(at))
        below[:] = [name for name in sorted(below) if os.path.realpath(os.path.join(at, name)) not in seen]
        found += [os.path.join(at, name) for name in names]
    return found


def _check_retry(run: str) -> None:
    """Raises PoolError unless `run` is a finished run with transient failures."""
    store = Store(run)
    if not store.exists("run.json"):
        raise PoolError(f"retry: {run} is not the folder of a run")
    books = store.read_if_there("funnel.json")
    if books is None:
        raise PoolError(f"retry: {run} is not finished: it has no funnel.json; run its command again first")
    try:
        steps = {line["step"]: line["dropped"] for line in json.loads(books)["steps"]}
    except (ValueError, KeyError, TypeError):
        raise PoolError(f"retry: {run}/funnel.json is not a valid funnel") from None
    fetching = [step for step in steps if _FETCHING.fullmatch(step)]
    if not fetching:
        raise PoolError(f"retry: {run} has no step download; its steps are {', '.join(steps)}")
    if not any(is_transient(step, reason) for step in fetching for reason in steps[step]):
        raise PoolError(f"retry: {run} dropped no row for a transient reason; see {run}/funnel.json")


@functools.lru_cache(maxsize=1000)
def is_transient(step: str, reason: str) -> bool:
    """Whether a row that `step` dropped for `reason` may succeed on a later try."""
    try:
        return bool(_FETCHING.fullmatch(step)) and find(reason).transient
    except KeyError:  # a reason specific to the step
        return False


def stamp(spec: PoolSpec) -> list[list[Any]]:
    """Identifies the version of the pool without reading it: name, size, and time or ETag of each file."""
    paths = find_files(spec)
    vector_files = dict.fromkeys(
        vectors_beside(name, pattern, path)[0]
        for path in paths
        for name, pattern in (spec.embeddings or {}).items()
        if file_format(path) == "parquet"
    )
    stamps: list[list[Any]] = []
    for path in [*paths, *vector_files]:
        if "://" in path:
            with reading(path):
                fs, root = fsspec.core.url_to_fs(path)
                info = fs.info(root)
            stamps.append([os.path.basename(path), info["size"], str(info.get("ETag") or info.get("mtime") or "")])
        else:
            stat = os.stat(path)
            stamps.append([os.path.basename(path), stat.st_size, str(stat.st_mtime_ns)])
    return stamps


def vectors_beside(name: str, pattern: str, table: str) -> tuple[str, str]:
    """The path of the vector file beside a table, and the name of its array. Raises PoolError if there is none."""
    try:
        path, array = sidecar.locate(pattern, table)
    except sidecar.SidecarError as error:
        raise PoolError(f"embeddings.{name}: {error}") from None
    if "://" not in path and not os.path.exists(path):
        raise PoolError(f"embeddings.{name}: {path} does not exist; expected the vectors of {table}")
    return path, array


def open_parquet(path: str) -> pq.ParquetFile:
    with reading(path, " as parquet"):
        if "://" in path:
            return pq.ParquetFile(fsspec.open(path, "rb").open())
        return pq.ParquetFile(path)
