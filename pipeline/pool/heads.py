"""Reads the heads of a pool's files (parquet footers, first rows of text files), and divides the pool into splits."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.pool import sidecar
from pipeline.pool.files import PoolError, file_format, find_files, open_parquet, stamp, vectors_beside
from pipeline.pool.text_rows import JsonObject, column_names, text_rows
from pipeline.recipe import PoolSpec

HEADS_AT_ONCE = 32
HEAD_ROWS = 1_000
"""Rows of a text file from which its columns and types are inferred."""
# Integers. Leading zeros mark a code (a zip code, an id), which an integer column would not preserve.
_INT = re.compile(r"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|-?(?:nan|NaN|inf)")


@dataclass(frozen=True)
class Split:
    """A part of the pool read by one task: row groups of a parquet file, or a whole text file."""

    path: str
    row_groups: tuple[int, ...] | None = None
    retry: bool = False
    """True if the file is a drop table of another run: only rows dropped for a transient reason are read."""
    rows: int | None = None
    """The number of rows, if known without reading them."""


@dataclass(frozen=True)
class Head:
    """The metadata of a file, known before its rows are read."""

    schema: pa.Schema
    """Its columns, without partition columns. Inferred from the first rows in a text file."""
    groups: tuple[int, ...] | None
    """Rows of each row group of a parquet file; None for a text file."""
    bytes: int
    """Uncompressed size of a parquet file with its vectors; stored size of a text file."""
    rows: int | None = None
    """The number of rows of a parquet file, or of a text file that was read to its end; else None."""
    vectors: dict[str, pa.DataType] = dataclasses.field(default_factory=dict)
    """The vector columns from files beside a table (`pool.embeddings`)."""


_cache: dict[bytes, dict[str, Head]] = {}


def read_heads(spec: PoolSpec) -> dict[str, Head]:
    """The heads of a pool's files, in order. Cached until a file or the recipe changes. Read concurrently, since each
    costs a round trip to a remote store."""
    paths = find_files(spec)
    stamps = stamp(spec)
    state = hashlib.sha256(json.dumps([dataclasses.asdict(spec), paths, stamps]).encode()).digest()
    if state not in _cache:
        schemas: dict[pa.Schema, pa.Schema] = {}  # most files share one

        def read(path: str, size: int) -> Head:
            head = _parquet_head(path, spec) if file_format(path) == "parquet" else _text_head(path, spec, size)
            twins = [name for name, n in Counter(head.schema.names).items() if n > 1]
            if twins:
                raise PoolError(f"path: {path} has more than one column {twins[0]!r}; rename one of them")
            return dataclasses.replace(head, schema=schemas.setdefault(head.schema, head.schema))

        with ThreadPoolExecutor(HEADS_AT_ONCE) as threads:
            heads = dict(zip(paths, threads.map(read, paths, [size for _, size, _ in stamps])))
        _cache.clear()
        _cache[state] = heads
    return _cache[state]


def _parquet_head(path: str, spec: PoolSpec) -> Head:
    with open_parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        counts = tuple(group.num_rows for group in groups)
        rows = sum(counts)
        head = Head(file.schema_arrow.remove_metadata(), counts, size, rows)
    for name, pattern in (spec.embeddings or {}).items():
        place = vectors_beside(name, pattern, path)
        try:
            array = sidecar.head(*place)
        except sidecar.SidecarError as error:
            raise PoolError(f"embeddings.{name}: {error}") from None
        if array.rows != rows:
            raise PoolError(
                f"embeddings.{name}: {place[0]} has {array.rows:,} vectors, expected one for each of the {rows:,} rows "
                f"of {path}"
            )
        vectors = head.vectors | {name: array.column}
        head = dataclasses.replace(head, vectors=vectors, bytes=head.bytes + array.rows * array.row_bytes)
    return head


def _text_head(path: str, spec: PoolSpec, stored: int) -> Head:
    if file_format(path) == "wat":
        if importlib.util.find_spec("fastwarc") is None:
            raise PoolError(f"path: {path}: fastwarc is not installed; pip install 'winnow-clip[commoncrawl]'")
        return Head(pa.schema([(name, pa.string()) for name in ("url", "caption", "page_url")]), None, stored)
    rows = list(itertools.islice(text_rows(path, spec, JsonObject), HEAD_ROWS))
    good = [row for row in rows if row is not None]
    if file_format(path) in ("csv", "tsv"):
        names = column_names(path, spec)
        if rows and not good:
            raise PoolError(
                f"path: {path}: none of its first {len(rows):,} lines has the {len(names):,} fields of "
                f"{'its header line' if spec.names is None else 'pool.names'} ({', '.join(names)[:200]})"
            )
        fields = [(name, type_of_texts(row[name] for row in good)) for name in names]
    else:
        if not good:
            problem = "is empty" if not rows else f"has no JSON object in its first {len(rows):,} lines"
            raise PoolError(f"path: {path} {problem}")
        names = list(dict.fromkeys(name for row in good for name in row))
        twins = next((row.twins for row in good if isinstance(row, JsonObject) and row.twins), [])
        fields = [(name, _type_of_json([row.get(name) for row in good])) for name in [*names, *twins]]
    if odd := [name for name, _ in fields if name.encode("utf-8", "replace").decode() != name]:
        raise PoolError(f"path: {path}: the column name {odd[0]!r} is not valid UTF-8; convert the file to UTF-8")
    return Head(pa.schema(fields), None, stored, len(rows) if len(rows) < HEAD_ROWS else None)


def type_of_texts(values: Iterable[str]) -> pa.DataType:
    """Infers the type of a csv column from its values. Ignores empty fields."""
    kind = pa.null()
    for value in filter(None, values):
        if _INT.fullmatch(value) and abs(int(value)) < 1 << 63:
            kind = pa.int64() if pa.types.is_null(kind) else kind
        elif _FLOAT.fullmatch(value) and not _INT.fullmatch(value):
            kind = pa.float64()
        else:
            return pa.string()
    return kind


def _type_of_json(values: list[Any]) -> pa.DataType:
    kinds = {dict if isinstance(value, dict) else type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64() if all(abs(v) < 1 << 63 for v in values if v is not None) else pa.string()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    if kinds == {list}:
        return pa.list_(_type_of_json([item for value in values for item in value or ()]))
    if kinds == {dict}:
        return pa.struct([(name, pa.string()) for name in dict.fromkeys(k for v in values for k in v or ())])
    return pa.string() if kinds else pa.null()


def splits(spec: PoolSpec, rows: int = 1_000_000) -> list[Split]:
    """The splits to read in parallel, of about `rows` rows if the format allows it. The same on every machine."""
    pieces: list[Split] = []
    retry = spec.retry is not None
    counted = not retry and spec.captions != "each"
    for path, head in read_heads(spec).items():
        if head.groups is None:
            pieces.append(Split(path))
            continue
        groups: list[int] = []
        held = 0
        for i, size in enumerate(head.groups):
            groups.append(i)
            held += size
            if held >= rows or i == len(head.groups) - 1:
                pieces.append(Split(path, tuple(groups), retry, held if counted else None))
                groups, held = [], 0
        if not head.groups:
            pieces.append(Split(path, (), retry, 0 if counted else None))
    return pieces


def size(spec: PoolSpec) -> int:
    """Approximate size of the pool in bytes: uncompressed for parquet, as stored for text files."""
    return sum(head.bytes for head in read_heads(spec).values())
