"""The files of a pool: their formats, and the errors of reading them."""

from __future__ import annotations

import contextlib
import csv
import os
import zlib
from collections.abc import Iterator

import pyarrow as pa

from pipeline import sidecar
from pipeline.compressed import COMPRESSIONS

FORMATS = ("parquet", "csv", "tsv", "jsonl", "json", "wat")


class PoolError(ValueError):
    """The pool cannot be read. The message names the file and the cause."""


def file_format(path: str) -> str | None:
    """The format by the file name, ignoring the compression extension."""
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
