"""Reads a pool (parquet, csv, tsv, jsonl, json or wat; one file or thousands) into batches of clean rows.

`columns` checks everything in the files' heads (a parquet footer, or the first rows of a text file) and rejects
unsupported columns before a run starts. `read` yields each row exactly once: clean, or with the reason why it is
unusable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import sidecar, wat
from pipeline.compressed import COMPRESSIONS
from pipeline.fetch.reasons import find
from pipeline.pool_file import FORMATS, PoolError, file_format, reading
from pipeline.recipe import PoolSpec
from pipeline.schema import INLINE, carried, is_number
from pipeline.storage import Store, special_file
from pipeline.text_rows import JsonObject, column_names, text_rows

BATCH_ROWS = 50_000
BATCH_BYTES = 64 << 20
FOOTERS_AT_ONCE = 32
WAT_ROWS = 10_000
"""Image links of a WAT file in a batch."""
HEAD_ROWS = 1_000
"""Rows of a text file from which its columns and types are inferred."""
MAX_CAPTION_BYTES = 1 << 20
"""Maximum size of a caption; bounds memory in all steps."""
MAX_URL_BYTES = 1 << 16
REASONS = {
    "null_url": "the row has no url",
    "null_caption": "the row has no caption",
    "not_text": "the url or the caption is not text",
    "invalid_utf8": "the url or the caption is not valid UTF-8 or contains a lone surrogate",
    "caption_oversized": f"the caption is larger than {MAX_CAPTION_BYTES:,} bytes",
    "url_oversized": f"the url is larger than {MAX_URL_BYTES:,} bytes",
    "bad_line": "the line is not a JSON object, or has too many or too few fields",
    "bad_record": "a record of the WAT file is damaged",
    "bad_url": "the image link does not lead to an http or https address",
    "bad_value": "another column has a value that does not fit the column's type (set it in `pool.types`)",
    "bad_uid": "the uid in the pool is not 32 hex digits",
    "duplicate_uid": "an earlier row has the same uid",
}
TYPES = {"text": pa.string(), "int": pa.int64(), "float": pa.float64()}
"""The types supported by `pool.types`."""


_FETCHING = re.compile(r"(download|read_shards)(\.\d+)?")
"""Labels of the steps whose drops may be transient."""
# Integers. Leading zeros mark a code (a zip code, an id), which an integer column would not preserve.
_INT = re.compile(r"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|-?(?:nan|NaN|inf)")


@dataclass(frozen=True)
class Split:
    """A part of the pool read by one task: row groups of a parquet file, or a whole text file."""

    path: str
    row_groups: tuple[int, ...] | None = None
    retry: bool = False
    """True if the file is a ledger of drops, of which only the transient failures are read."""
    rows: int | None = None
    """The number of rows, if known without reading them."""


@dataclass(frozen=True)
class _Head:
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
    """The columns of vectors in the files beside a table (`pool.embeddings`)."""


_known: dict[bytes, dict[str, _Head]] = {}


def _heads(spec: PoolSpec) -> dict[str, _Head]:
    """The heads of a pool's files, in order. Cached until a file or the recipe changes. Read concurrently, since each
    costs a round trip to a remote store."""
    paths = find_files(spec)
    stamps = stamp(spec)
    state = hashlib.sha256(json.dumps([dataclasses.asdict(spec), paths, stamps]).encode()).digest()
    if state not in _known:
        schemas: dict[pa.Schema, pa.Schema] = {}  # most files share one

        def read(path: str, size: int) -> _Head:
            head = _parquet_head(path, spec) if file_format(path) == "parquet" else _text_head(path, spec, size)
            twins = [name for name, n in Counter(head.schema.names).items() if n > 1]
            if twins:
                raise PoolError(f"path: {path} has more than one column {twins[0]!r}; rename one of them")
            return dataclasses.replace(head, schema=schemas.setdefault(head.schema, head.schema))

        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
            heads = dict(zip(paths, threads.map(read, paths, [size for _, size, _ in stamps])))
        _known.clear()
        _known[state] = heads
    return _known[state]


def _parquet_head(path: str, spec: PoolSpec) -> _Head:
    with _open_parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        counts = tuple(group.num_rows for group in groups)
        head = _Head(file.schema_arrow.remove_metadata(), counts, size, sum(counts))
    for name, pattern in (spec.embeddings or {}).items():
        place = _beside(name, pattern, path)
        try:
            array = sidecar.head(*place)
        except sidecar.SidecarError as error:
            raise PoolError(f"embeddings.{name}: {error}") from None
        if array.rows != sum(head.groups or ()):
            raise PoolError(
                f"embeddings.{name}: {place[0]} has {array.rows:,} vectors, expected one for each of the "
                f"{sum(head.groups or ()):,} rows of {path}"
            )
        vectors = head.vectors | {name: array.column}
        head = dataclasses.replace(head, vectors=vectors, bytes=head.bytes + array.rows * array.row_bytes)
    return head


def find_files(spec: PoolSpec) -> list[str]:
    """The files of a pool in a fixed order. Raises PoolError if there are none."""
    files: list[str] = []
    if spec.retry is not None:
        _check_retry(spec.retry)
    for path in [spec.path] if isinstance(spec.path, str) else spec.path:
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
                raise PoolError(f"path: {special_file(name) or f'{name} is a link to nothing; remove it'}")
        files += sorted(n if "://" in n else os.path.abspath(n) for n in usable)
    return list(dict.fromkeys(files))


def _walk(folder: str) -> list[str]:
    """The files in a folder and below it, also behind links. A link to a folder above it is not followed again."""
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
        raise PoolError(f"retry: {run} is not finished: there is no funnel.json; run its command again first")
    try:
        steps = {line["step"]: line["dropped"] for line in json.loads(books)["steps"]}
    except (ValueError, KeyError, TypeError):
        raise PoolError(f"retry: {run}/funnel.json is not a valid funnel") from None
    fetching = [step for step in steps if _FETCHING.fullmatch(step)]
    if not fetching:
        raise PoolError(f"retry: {run} has no step download; its steps are {', '.join(steps)}")
    if not any(_is_transient(step, reason) for step in fetching for reason in steps[step]):
        raise PoolError(f"retry: {run} dropped no row for a transient reason; see {run}/funnel.json")


@functools.lru_cache(maxsize=1000)
def _is_transient(step: str, reason: str) -> bool:
    try:
        return bool(_FETCHING.fullmatch(step)) and find(reason).transient
    except KeyError:  # a reason specific to the step
        return False


# --- Columns and their types ------------------------------------------------------------------------------------------


def columns(spec: PoolSpec) -> dict[str, pa.DataType]:
    """The columns carried besides url and caption, by their names in the run, with types that fit the values of all
    files. Raises PoolError if there are none or the pool cannot be read.

    Every file must have the mapped columns. Other columns may be missing in some files and are null there.
    """
    types: dict[str, pa.DataType] = {}
    first: dict[str, str] = {}
    heads = _heads(spec)
    mapped = _mapped(spec, heads)
    texts = dict.fromkeys(mapped, False)
    for path, head in heads.items():
        known = {**_partition_types(spec, path), **dict(zip(head.schema.names, head.schema.types))}
        for key, column in mapped.items():
            if column not in known:
                raise PoolError(_no_column(key, column, path, head, list(known)))
            texts[key] |= _check_mapped(spec, key, column, path, known[column])
        for name, dtype in known.items():
            if name in mapped.values():
                continue
            dtype = _plain_type(dtype, in_text=head.groups is None)
            held = types.setdefault(name, dtype)
            if (wider := _wider(held, dtype)) is None:
                raise PoolError(
                    f"columns: {name!r} is {_type_name(held)} in {first[name]} and {_type_name(dtype)} in {path}; no "
                    "common type exists. Convert one of them, or leave the column out of pool.columns"
                )
            types[name] = wider
            first.setdefault(name, path)
    counts = [head.rows for head in heads.values()]
    for key, found in texts.items():
        if not found and any(counts) and None not in counts:
            raise PoolError(f"{key}: the column {mapped[key]!r} has type null in every file, so it has no values")
    for option, named in (("columns", spec.columns or []), ("types", spec.types or {})):
        if missing := [c for c in named if c not in types]:
            raise PoolError(
                f"{option}: no file has {', '.join(missing)}; the files have {', '.join(types) or 'no other columns'}"
            )
    wanted = list(types) if spec.columns is None else spec.columns
    asked = {name: TYPES[kind] for name, kind in (spec.types or {}).items()}
    return _in_run({name: asked.get(name) or types[name] for name in wanted} | _vector_types(spec, heads), spec)


def _vector_types(spec: PoolSpec, heads: dict[str, _Head]) -> dict[str, pa.DataType]:
    """The columns of `pool.embeddings`. PoolError if they are of different types in two files, or a table has none."""
    types: dict[str, pa.DataType] = {}
    first = next(iter(heads), "")
    for path, head in heads.items():
        for name in spec.embeddings or ():
            if head.groups is None:
                raise PoolError(f"embeddings.{name}: {path} is not a parquet file, and only those have vectors beside")
            if name in head.schema.names:
                raise PoolError(f"embeddings.{name}: {path} has a column of that name; choose another")
            if types.setdefault(name, head.vectors[name]) != head.vectors[name]:
                raise PoolError(
                    f"embeddings.{name}: the vectors beside {first} are {types[name]}, those beside {path} are "
                    f"{head.vectors[name]}; they are from different models"
                )
    return types


def _in_run(types: dict[str, pa.DataType], spec: PoolSpec) -> dict[str, pa.DataType]:
    result: dict[str, pa.DataType] = {}
    for name, dtype in types.items():
        if carried(name) in result or (carried(name) != name and carried(name) in types):
            raise PoolError(f"columns: {name!r} is carried as {carried(name)!r}, which also exists; rename one")
        result[carried(name)] = _without_null(dtype)
    return result | ({INLINE: pa.binary()} if spec.image else {})


def _mapped(spec: PoolSpec, heads: dict[str, _Head]) -> dict[str, str]:
    """The column of each key that names one. With `image`, the default `url` column may be missing."""
    keys = {"url": spec.url, "caption": spec.caption, "uid": spec.uid, "image": spec.image}
    if spec.image and spec.url == "url" and not any("url" in head.schema.names for head in heads.values()):
        del keys["url"]
    return {key: column for key, column in keys.items() if column is not None}


def _no_column(key: str, column: str, path: str, head: _Head, known: list[str]) -> str:
    text = f"{key}: {path} has no column {column!r}; it has {', '.join(name[:100] for name in known) or 'none'}"
    if head.groups is None and file_format(path) in ("csv", "tsv"):
        if len(known) == 1 and (other := next((mark for mark in ";|\t," if mark in known[0]), None)):
            return f"{text}. If its fields are separated by {other!r}, set pool.delimiter"
        text += ". If the first line is data and not a header, name the columns in pool.names"
    return text


def _check_mapped(spec: PoolSpec, key: str, column: str, path: str, dtype: pa.DataType) -> bool:
    """Raises PoolError if the type of a mapped column is not supported. Returns False if the type is null."""
    dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if pa.types.is_null(dtype):
        return False
    if key == "image":
        if not (_is_binary(dtype) or _is_picture(dtype)):
            raise PoolError(
                f"image: {path}: the column {column!r} has type {_type_name(dtype)}; expected encoded pictures: "
                "binary, or a struct of bytes and path"
            )
        return True
    if key == "caption" and _is_list(dtype) and (_is_text(dtype.value_type) or pa.types.is_null(dtype.value_type)):
        if spec.captions is None:
            raise PoolError(
                f"caption: {path}: the column {column!r} is a list of strings ({_type_name(dtype)}); set "
                "pool.captions: `each` makes a row of each caption, `first` takes the first"
            )
        return True
    if not _is_text(dtype) and not _is_binary(dtype):
        cure = "name a column of text"
        if key == "url" and _is_picture(dtype):
            cure = f"to read its pictures without fetching, set pool.image: {column}"
        raise PoolError(f"{key}: {path}: the column {column!r} has type {_type_name(dtype)}, expected text; {cure}")
    return True


def _type_name(dtype: pa.DataType) -> str:
    text = str(dtype)
    return text if len(text) <= 80 else text[:80] + "…"


def _is_text(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype))


def _is_binary(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_binary_view(dtype))


def _is_list(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype))


def _is_picture(dtype: pa.DataType) -> bool:
    """True for the type of a Hugging Face image column."""
    return pa.types.is_struct(dtype) and "bytes" in dtype.names and _is_binary(dtype.field("bytes").type)


def _plain_type(dtype: pa.DataType, in_text: bool) -> pa.DataType:
    """The type of a column in a run. All string encodings become string; nested JSON becomes its text."""
    if isinstance(dtype, pa.BaseExtensionType):
        dtype = dtype.storage_type
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if pa.types.is_binary_view(dtype):
        return pa.large_binary()
    return pa.string() if _is_text(dtype) or (in_text and pa.types.is_nested(dtype)) else dtype


def _without_null(dtype: pa.DataType) -> pa.DataType:
    """Text in place of the type null, also in structs: Arrow cannot cast slices of a struct with a field of nulls.

    A list that is empty in all rows keeps its type, which fits whatever is expected of its values.
    """
    if pa.types.is_null(dtype):
        return pa.string()
    if pa.types.is_struct(dtype):
        return pa.struct([field.with_type(_without_null(field.type)) for field in dtype])
    if pa.types.is_map(dtype):
        return pa.map_(dtype.key_type, _without_null(dtype.item_type))
    if not _is_list(dtype) or pa.types.is_null(dtype.value_type):
        return dtype
    if pa.types.is_fixed_size_list(dtype):
        return pa.list_(_without_null(dtype.value_type), dtype.list_size)
    inner = dtype.value_field.with_type(_without_null(dtype.value_type))
    return pa.list_(inner) if pa.types.is_list(dtype) else pa.large_list(inner)


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The common type of both, numeric if both are numbers; None if there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    for one, other in ((a, b), (b, a)):
        if pa.types.is_boolean(one) and is_number(other):
            return other
        if pa.types.is_date(one) and pa.types.is_timestamp(other):
            return other
        if pa.types.is_uint64(one) and pa.types.is_signed_integer(other):
            return pa.decimal128(20, 0)
        if pa.types.is_decimal(one) and pa.types.is_integer(other):
            digits = max(one.precision - one.scale, len(str(1 << other.bit_width - 1)))
            return (pa.decimal128 if digits + one.scale <= 38 else pa.decimal256)(digits + one.scale, one.scale)
    try:
        schemas = [pa.schema([("", dtype)]) for dtype in (a, b)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        odd = any(pa.types.is_nested(t) or _is_binary(t) or pa.types.is_fixed_size_binary(t) for t in (a, b))
        return None if odd else pa.string()


def _partition(spec: PoolSpec, path: str) -> dict[str, str | None]:
    """The Hive partition columns (`key=value` folders) of a file, below the folder or glob in `path`."""
    for named in [spec.path] if isinstance(spec.path, str) else spec.path:
        base = named if "://" in named else os.path.abspath(named)
        fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), base.rstrip("/").split("/")))
        root = "/".join(fixed) + "/"
        if path.startswith(root):
            pairs = [folder.split("=", 1) for folder in path[len(root) :].split("/")[:-1] if "=" in folder]
            return {
                key: None if value == "__HIVE_DEFAULT_PARTITION__" else urllib.parse.unquote(value)
                for key, value in pairs
            }
    return {}


def _partition_types(spec: PoolSpec, path: str) -> dict[str, pa.DataType]:
    return {key: _type_of_texts([value or ""]) for key, value in _partition(spec, path).items()}


def _type_of_texts(values: Iterable[str]) -> pa.DataType:
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


# --- Splits -----------------------------------------------------------------------------------------------------------


def splits(spec: PoolSpec, rows: int = 1_000_000) -> list[Split]:
    """The splits to read in parallel, of about `rows` rows if the format allows it. The same on every machine."""
    pieces: list[Split] = []
    retry = spec.retry is not None
    counted = not retry and spec.captions != "each"
    for path, head in _heads(spec).items():
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
    return sum(head.bytes for head in _heads(spec).values())


def count(spec: PoolSpec, split: Split) -> int:
    """The number of rows that `read` yields for a split."""
    if split.rows is not None:
        return split.rows
    if split.row_groups is not None:
        wanted = {"caption": spec.caption} if spec.captions else {}
        return sum(len(batch) for batch in _parquet_batches(spec, split, wanted, {}))
    if file_format(split.path) == "wat":
        return sum(len(batch) for batch in _wat_batches(spec, split, {}, {}))
    each = spec.captions == "each"
    captions = (row.get(spec.caption) if row else None for row in text_rows(split.path, spec))
    return sum(max(1, len(caption)) if each and isinstance(caption, list) else 1 for caption in captions)


def stamp(spec: PoolSpec) -> list[list[Any]]:
    """Identifies the version of the pool without reading it: name, size, and time or ETag of each file."""
    paths = find_files(spec)
    beside = dict.fromkeys(
        _beside(name, pattern, path)[0]
        for path in paths
        for name, pattern in (spec.embeddings or {}).items()
        if file_format(path) == "parquet"
    )
    return _stamps([*paths, *beside])


def _beside(name: str, pattern: str, table: str) -> tuple[str, str]:
    """The file of vectors beside a table, and the array in it. PoolError if there is none."""
    try:
        path, array = sidecar.locate(pattern, table)
    except sidecar.SidecarError as error:
        raise PoolError(f"embeddings.{name}: {error}") from None
    if "://" not in path and not os.path.exists(path):
        raise PoolError(f"embeddings.{name}: {path} does not exist; expected the vectors of {table}")
    return path, array


def _stamps(paths: list[str]) -> list[list[Any]]:
    stamps: list[list[Any]] = []
    for path in paths:
        if "://" in path:
            with reading(path):
                fs, root = fsspec.core.url_to_fs(path)
                info = fs.info(root)
            stamps.append([os.path.basename(path), info["size"], str(info.get("ETag") or info.get("mtime") or "")])
        else:
            stat = os.stat(path)
            stamps.append([os.path.basename(path), stat.st_size, str(stat.st_mtime_ns)])
    return stamps


# --- Rows -------------------------------------------------------------------------------------------------------------


def read(spec: PoolSpec, split: Split, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    """Yields the rows of a split in batches with the columns `uid, url, caption, drop_reason` and those of `types`.

    `drop_reason` is null for a usable row, else one of REASONS; url and caption then hold whatever is readable. Raises
    PoolError that names the file if it cannot be read to its end.
    """
    wanted = {"url": spec.url, "caption": spec.caption}
    wanted |= {key: column for key, column in (("uid", spec.uid), (INLINE, spec.image)) if column}
    is_wat = file_format(split.path) == "wat"
    batches = _wat_batches if is_wat else _text_batches if split.row_groups is None else _parquet_batches
    folders = _partition(spec, split.path)
    partition = {carried(name): value for name, value in folders.items() if carried(name) in types}
    partition |= {ours: folders[theirs] for ours, theirs in wanted.items() if theirs in folders}
    for batch in batches(spec, split, wanted, types):
        for name, value in partition.items():
            if name not in batch.column_names:
                batch = batch.append_column(name, pa.array([value] * len(batch), pa.string()))
        for name in wanted.keys() - {"uid", INLINE, *batch.column_names} - ({"url"} if spec.image else set()):
            batch = batch.append_column(name, pa.nulls(len(batch), pa.string()))
        yield _clean(batch, types)


def _clean(batch: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    """Marks unusable rows with their reason. Gives every row a uid."""
    n = len(batch)
    reason = np.full(n, None, dtype=object)

    def mark(rows: np.ndarray, why: str) -> None:
        reason[rows & (reason == np.array(None))] = why  # the first reason wins

    for flag in ("bad_line", "not_text", "bad_record", "bad_url"):  # detected by the reader of the file
        if flag in batch.column_names:
            mark(batch[flag].to_numpy(), flag)
    if INLINE in types:
        batch = _with_inline(batch)
    texts = {}
    for name, limit in (("url", MAX_URL_BYTES), ("caption", MAX_CAPTION_BYTES)):
        text, bad_type, bad_utf8 = _as_text(batch[name])
        sizes = pc.fill_null(pc.binary_length(text), 0).to_numpy(zero_copy_only=False)
        blank = sizes == 0  # csv has no null, only empty fields
        for mask, why in (
            (bad_type, "not_text"),
            (bad_utf8, "invalid_utf8"),
            (blank, f"null_{name}"),
            (sizes > limit, f"{name}_oversized"),
        ):
            mark(mask, why)
        if (sizes > limit).any():
            # The ledger keeps a prefix, enough to identify the row.
            text = pa.array([t[:1000] if s > limit else t for t, s in zip(text.to_pylist(), sizes)], pa.string())
        texts[name] = pc.fill_null(text, "")
    uid = _uids(texts["url"], texts["caption"])
    if "uid" in batch.column_names:
        own = pc.utf8_lower(pc.fill_null(_as_text(batch["uid"])[0], ""))
        good = pc.match_substring_regex(own, "^[0-9a-f]{32}$")
        mark(~good.to_numpy(zero_copy_only=False), "bad_uid")
        uid = pc.if_else(good, own, uid)
    extras = {}
    columns = dict(zip(batch.column_names, batch.columns))  # a lookup in a wide table is a scan
    for name, dtype in types.items():
        extras[name], bad = _fit(columns[name], dtype) if name in columns else (pa.nulls(n, dtype), None)
        if bad is not None:
            mark(bad, "bad_value")
    return pa.table({"uid": uid, **texts, **extras, "drop_reason": pa.array(reason, pa.string())})


def _with_inline(batch: pa.Table) -> pa.Table:
    """Extracts the pictures from their structs. The sha256 of the picture identifies a row without a url."""
    column = batch[INLINE].combine_chunks()
    paths = [None] * len(batch)
    if pa.types.is_struct(column.type):
        if "path" in column.type.names:
            paths = [path if path and "://" in path else None for path in pc.struct_field(column, "path").to_pylist()]
        column = pc.struct_field(column, "bytes")
    pictures = column.cast(pa.binary())
    urls = batch["url"].to_pylist() if "url" in batch.column_names else [None] * len(batch)
    for i, url in enumerate(urls):
        if not url:
            body = pictures[i]
            urls[i] = paths[i] or (
                f"urn:sha256:{hashlib.sha256(body.as_buffer()).hexdigest()}" if body.is_valid else None
            )
    others = batch.drop_columns([name for name in (INLINE, "url") if name in batch.column_names])
    url_type = batch["url"].type if "url" in batch.column_names else pa.string()
    return others.append_column(INLINE, pictures).append_column("url", pa.array(urls, url_type))


def _uids(urls: pa.Array, captions: pa.Array) -> pa.Array:
    """The first 128 bits of sha256(url NUL caption), in hex."""
    pairs = zip(urls.to_pylist(), captions.to_pylist(), strict=True)
    return pa.array([hashlib.sha256(f"{u}\0{c}".encode()).hexdigest()[:32] for u, c in pairs], pa.string())


def _as_text(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """A column as valid UTF-8, with masks of the values that are not text and of those with invalid UTF-8."""
    n = len(column)
    array = _decoded(column)
    none = np.zeros(n, dtype=bool)
    if pa.types.is_null(array.type):
        return pa.nulls(n, pa.string()), none, none
    if not _is_text(array.type) and not _is_binary(array.type):
        return pa.nulls(n, pa.string()), pc.is_valid(array).to_numpy(zero_copy_only=False), none
    raw = array.cast(pa.large_binary())
    try:
        # Arrow validates UTF-8 only when casting from binary, not from string.
        return raw.cast(pa.string()), none, none
    except pa.ArrowInvalid:
        pass
    values = raw.to_pylist()
    bad = np.zeros(n, dtype=bool)
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            values[i] = value.decode("utf-8")
        except UnicodeDecodeError:
            bad[i] = True
            values[i] = value.decode("utf-8", "replace")
    return pa.array(values, pa.string()), none, bad


def _decoded(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _fit(column: pa.ChunkedArray, dtype: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    """Converts a carried column to its type in the whole pool. Returns it with a mask of the values that do not fit."""
    array = _decoded(column)
    if dtype == pa.string():
        text, not_text, _ = _as_text(array)
        return (pa.array(map(_value_text, array.to_pylist()), pa.string()) if not_text.any() else text), None
    # Integers beyond 2^53 are rounded if another file has floats.
    safe = not (pa.types.is_integer(array.type) and pa.types.is_floating(dtype))
    if _is_text(array.type):
        array = _as_text(array)[0]
        array = pc.if_else(pc.equal(array, ""), pa.scalar(None, pa.string()), array)
    try:
        return array.cast(dtype, safe=safe), None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    values, bad = [], np.zeros(len(array), bool)
    for i, value in enumerate(array):
        try:
            values.append(value.cast(dtype, safe=safe))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            values.append(pa.scalar(None, dtype))
            bad[i] = True
    return pa.array([value.as_py() for value in values], dtype), bad


def _value_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict | bool) else str(value)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _open_parquet(path: str) -> pq.ParquetFile:
    with reading(path, " as parquet"):
        if "://" in path:
            return pq.ParquetFile(fsspec.open(path, "rb").open())
        return pq.ParquetFile(path)


def _parquet_batches(
    spec: PoolSpec, split: Split, wanted: dict[str, str], types: dict[str, pa.DataType]
) -> Iterator[pa.Table]:
    file = _open_parquet(split.path)
    names = dict.fromkeys(file.schema_arrow.names)
    # By the file's own names. A missing mapped column is the url of a pool with inline pictures.
    mapped = {ours: theirs for ours, theirs in wanted.items() if theirs in names}
    here = {name: carried(name) for name in names if carried(name) in types and name not in wanted.values()}
    why = ["step", "reason"] if split.retry else []
    groups = [file.metadata.row_group(i) for i in split.row_groups or ()]
    row_bytes = max([group.total_byte_size // max(1, group.num_rows) for group in groups], default=0)
    patterns = {carried(name): pattern for name, pattern in (spec.embeddings or {}).items() if carried(name) in types}
    row_bytes += sum(types[name].list_size * types[name].value_type.bit_width // 8 for name in patterns)
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))
    first = sum(file.metadata.row_group(i).num_rows for i in range(min(split.row_groups or (0,))))
    with reading(split.path, " as parquet"), file, contextlib.ExitStack() as stack:
        vectors = {
            name: stack.enter_context(sidecar.reader(*sidecar.locate(pattern, split.path), first))
            for name, pattern in patterns.items()
        }
        for batch in file.iter_batches(
            rows, row_groups=list(split.row_groups or ()), columns=list(dict.fromkeys([*mapped.values(), *here, *why]))
        ):
            if split.retry:
                whys = zip(batch["step"].to_pylist(), batch["reason"].to_pylist())
                batch = batch.filter(pa.array([_is_transient(step, reason) for step, reason in whys], pa.bool_()))
            held = dict(zip(batch.schema.names, batch.columns))  # a lookup in a wide batch is a scan
            columns = {**{ours: held[theirs] for ours, theirs in mapped.items()}, **{here[n]: held[n] for n in here}}
            columns |= {name: take(len(batch)) for name, take in vectors.items()}
            table = pa.table(columns or {"step": batch["step"]})
            yield _explode_captions(table, spec) if "caption" in mapped else table


def _explode_captions(table: pa.Table, spec: PoolSpec) -> pa.Table:
    """Makes a row of each caption in a list, or of the first. An empty list gives a row without a caption."""
    column = table["caption"].combine_chunks()
    if not _is_list(column.type):
        return table
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    rows = np.maximum(lengths, 1) if spec.captions == "each" else np.ones(len(lengths), np.int64)
    parent = np.repeat(np.arange(len(lengths)), rows)
    nth = np.arange(len(parent)) - np.repeat(np.cumsum(rows) - rows, rows)
    at = pa.array(starts[parent] + nth, mask=lengths[parent] == 0)
    captions = column.drop_null().flatten().take(at)
    table = table.take(pa.array(parent))
    return table.set_column(table.column_names.index("caption"), "caption", captions)


# --- WAT --------------------------------------------------------------------------------------------------------------


def _wat_batches(
    spec: PoolSpec, split: Split, wanted: dict[str, str], types: dict[str, pa.DataType]
) -> Iterator[pa.Table]:
    with reading(split.path, " as WAT"):
        links = wat.read_links(split.path)
        while some := list(itertools.islice(links, WAT_ROWS)):
            columns: dict[str, Any] = {"url": [], "caption": [], "page_url": []}
            for link in some:
                for name, values in columns.items():
                    values.append(_to_bytes(getattr(link, name)))
            texts = {name: pa.array(values, pa.large_binary()) for name, values in columns.items()}
            mapped = {ours: texts[theirs] for ours, theirs in wanted.items()}
            others = {carried(name): column for name, column in texts.items() if name not in wanted.values()}
            flags = {why: [link.problem == why for link in some] for why in ("bad_record", "bad_url")}
            yield pa.table({**mapped, **others, **flags})


# --- Text -------------------------------------------------------------------------------------------------------------


def _text_head(path: str, spec: PoolSpec, stored: int) -> _Head:
    if file_format(path) == "wat":
        if importlib.util.find_spec("fastwarc") is None:
            raise PoolError(f"path: {path}: fastwarc is not installed; pip install 'winnow-clip[commoncrawl]'")
        return _Head(pa.schema([(name, pa.string()) for name in ("url", "caption", "page_url")]), None, stored)
    rows = list(itertools.islice(text_rows(path, spec, JsonObject), HEAD_ROWS))
    good = [row for row in rows if row is not None]
    if file_format(path) in ("csv", "tsv"):
        names = column_names(path, spec)
        if rows and not good:
            raise PoolError(
                f"path: {path}: none of its first {len(rows):,} lines has the {len(names):,} fields of "
                f"{'its header line' if spec.names is None else 'pool.names'} ({', '.join(names)[:200]})"
            )
        fields = [(name, _type_of_texts(row[name] for row in good)) for name in names]
    else:
        if not good:
            problem = "is empty" if not rows else f"has no JSON object in its first {len(rows):,} lines"
            raise PoolError(f"path: {path} {problem}")
        names = list(dict.fromkeys(name for row in good for name in row))
        twins = next((row.twins for row in good if isinstance(row, JsonObject) and row.twins), [])
        fields = [(name, _type_of_json([row.get(name) for row in good])) for name in [*names, *twins]]
    if (odd := next((name for name, _ in fields if not _is_utf8(name)), None)) is not None:
        raise PoolError(f"path: {path}: the column name {odd!r} is not valid UTF-8; convert the file to UTF-8")
    return _Head(pa.schema(fields), None, stored, len(rows) if len(rows) < HEAD_ROWS else None)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_batches(
    spec: PoolSpec, split: Split, wanted: dict[str, str], types: dict[str, pa.DataType]
) -> Iterator[pa.Table]:
    rows: list[dict[str, Any] | None] = []
    held = 0
    for row in text_rows(split.path, spec):
        for each in _captions(row, spec):
            rows.append(each)
            held += sum(len(v) for v in each.values() if isinstance(v, str)) if each else 0
        if len(rows) >= BATCH_ROWS or held > BATCH_BYTES:
            yield _text_table(rows, wanted, types)
            rows, held = [], 0
    if rows:
        yield _text_table(rows, wanted, types)


def _captions(row: dict[str, Any] | None, spec: PoolSpec) -> Iterator[dict[str, Any] | None]:
    captions = row.get(spec.caption) if row and spec.captions else None
    if not isinstance(captions, list):
        yield row
        return
    assert row is not None
    for caption in (captions if spec.captions == "each" else captions[:1]) or [None]:
        yield row | {spec.caption: caption}


def _text_table(rows: list[dict[str, Any] | None], wanted: dict[str, str], types: dict[str, pa.DataType]) -> pa.Table:
    def values(name: str) -> list[Any]:
        return [row.get(name) if row else None for row in rows]

    # A column of none of these rows is missing, or named by the folder of the file.
    there = {ours: theirs for ours, theirs in wanted.items() if any(row and theirs in row for row in rows)}
    table = {
        ours: pa.array([_to_bytes(v) for v in values(theirs)], pa.large_binary()) for ours, theirs in there.items()
    }
    names = dict.fromkeys(name for row in rows if row for name in row if name not in wanted.values())
    for name in names:
        if carried(name) in types:
            table[carried(name)] = pa.array([_plain(v) for v in values(name)], pa.string())
    # Numbers in place of text: parquet shows them in the column's type, JSON only in each value.
    no_text = [any(v is not None and not isinstance(v, str) for v in row) for row in zip(*map(values, wanted.values()))]
    return pa.table({**table, "not_text": no_text, "bad_line": [row is None for row in rows]})


def _to_bytes(value: Any) -> bytes | None:
    """Encodes text, reversing surrogateescape. Lone surrogates give invalid UTF-8."""
    if value is None:
        return None
    if not isinstance(value, str):
        return json.dumps(value).encode()
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        try:
            return value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return value.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode("utf-8")
