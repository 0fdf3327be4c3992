"""The columns of a pool and their types, checked before a run starts."""

from __future__ import annotations

import glob
import itertools
import os
import urllib.parse

import pyarrow as pa

from pipeline.pool.files import PoolError, file_format
from pipeline.pool.heads import Head, read_heads, type_of_texts
from pipeline.recipe import PoolSpec
from pipeline.schema import INLINE, carried, is_binary, is_list, is_number, is_text

TYPES = {"text": pa.string(), "int": pa.int64(), "float": pa.float64()}
"""The types supported by `pool.types`."""


def columns(spec: PoolSpec) -> dict[str, pa.DataType]:
    """The columns carried besides url and caption, by their names in the run, with types that hold the values of all
    files.

    Every file must have the mapped columns. Other columns may be missing in some files and are null there. Raises
    PoolError if a column is missing or unsupported, or if the pool cannot be read.
    """
    types: dict[str, pa.DataType] = {}
    first: dict[str, str] = {}
    heads = read_heads(spec)
    mapped = _mapped(spec, heads)
    has_values = dict.fromkeys(mapped, False)
    for path, head in heads.items():
        known = {**_partition_types(spec, path), **dict(zip(head.schema.names, head.schema.types))}
        for key, column in mapped.items():
            if column not in known:
                raise PoolError(_no_column(key, column, path, head, list(known)))
            has_values[key] |= _check_mapped(spec, key, column, path, known[column])
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
    for key, found in has_values.items():
        if not found and any(counts) and None not in counts:
            raise PoolError(f"{key}: the column {mapped[key]!r} has type null in every file, so it has no values")
    for option, named in (("columns", spec.columns or []), ("types", spec.types or {})):
        if missing := [c for c in named if c not in types]:
            raise PoolError(
                f"{option}: no file has {', '.join(missing)}; the files have {', '.join(types) or 'no other columns'}"
            )
    wanted = list(types) if spec.columns is None else spec.columns
    asked = {name: TYPES[kind] for name, kind in (spec.types or {}).items()}
    return _carried_types({name: asked.get(name) or types[name] for name in wanted} | _vector_types(spec, heads), spec)


def _vector_types(spec: PoolSpec, heads: dict[str, Head]) -> dict[str, pa.DataType]:
    """The columns of `pool.embeddings`. Raises PoolError if a file cannot have them, or if their types differ."""
    types: dict[str, pa.DataType] = {}
    first = next(iter(heads), "")
    for path, head in heads.items():
        for name in spec.embeddings or ():
            if head.groups is None:
                raise PoolError(f"embeddings.{name}: {path} is not a parquet file; only those can have vectors")
            if name in head.schema.names:
                raise PoolError(f"embeddings.{name}: {path} already has a column of that name; choose another")
            if types.setdefault(name, head.vectors[name]) != head.vectors[name]:
                raise PoolError(
                    f"embeddings.{name}: the vectors beside {first} are {types[name]}, those beside {path} are "
                    f"{head.vectors[name]}; they are from different models"
                )
    return types


def _carried_types(types: dict[str, pa.DataType], spec: PoolSpec) -> dict[str, pa.DataType]:
    """The types by the names of the columns in the run. Raises PoolError if two columns get one name."""
    result: dict[str, pa.DataType] = {}
    for name, dtype in types.items():
        if carried(name) in result or (carried(name) != name and carried(name) in types):
            raise PoolError(f"columns: {name!r} is carried as {carried(name)!r}, which also exists; rename one")
        result[carried(name)] = _without_null(dtype)
    return result | ({INLINE: pa.binary()} if spec.image else {})


def _mapped(spec: PoolSpec, heads: dict[str, Head]) -> dict[str, str]:
    """The column of each key that names one. With `image`, the default `url` column may be missing."""
    keys = {"url": spec.url, "caption": spec.caption, "uid": spec.uid, "image": spec.image}
    if spec.image and spec.url == "url" and not any("url" in head.schema.names for head in heads.values()):
        del keys["url"]
    return {key: column for key, column in keys.items() if column is not None}


def _no_column(key: str, column: str, path: str, head: Head, known: list[str]) -> str:
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
        if not (is_binary(dtype) or _is_picture(dtype)):
            raise PoolError(
                f"image: {path}: the column {column!r} has type {_type_name(dtype)}; expected encoded pictures: "
                "binary, or a struct of bytes and path"
            )
        return True
    if key == "caption" and is_list(dtype) and (is_text(dtype.value_type) or pa.types.is_null(dtype.value_type)):
        if spec.captions is None:
            raise PoolError(
                f"caption: {path}: the column {column!r} is a list of strings ({_type_name(dtype)}); set "
                "pool.captions: `each` makes a row of each caption, `first` takes the first"
            )
        return True
    if not is_text(dtype) and not is_binary(dtype):
        cure = "name a column of text"
        if key == "url" and _is_picture(dtype):
            cure = f"to read its pictures without fetching, set pool.image: {column}"
        raise PoolError(f"{key}: {path}: the column {column!r} has type {_type_name(dtype)}, expected text; {cure}")
    return True


def _type_name(dtype: pa.DataType) -> str:
    text = str(dtype)
    return text if len(text) <= 80 else text[:80] + "…"


def _is_picture(dtype: pa.DataType) -> bool:
    """True for the type of a Hugging Face image column."""
    return pa.types.is_struct(dtype) and "bytes" in dtype.names and is_binary(dtype.field("bytes").type)


def _plain_type(dtype: pa.DataType, in_text: bool) -> pa.DataType:
    """The type of a column in a run. All string encodings become string; nested JSON becomes its text."""
    if isinstance(dtype, pa.BaseExtensionType):
        dtype = dtype.storage_type
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if pa.types.is_binary_view(dtype):
        return pa.large_binary()
    return pa.string() if is_text(dtype) or (in_text and pa.types.is_nested(dtype)) else dtype


def _without_null(dtype: pa.DataType) -> pa.DataType:
    """Replaces the type null by text, also in structs: Arrow cannot cast slices of a struct with a field of nulls.

    A list that is empty in all rows keeps its type: steps accept it as a list of whatever they expect.
    """
    if pa.types.is_null(dtype):
        return pa.string()
    if pa.types.is_struct(dtype):
        return pa.struct([field.with_type(_without_null(field.type)) for field in dtype])
    if pa.types.is_map(dtype):
        return pa.map_(dtype.key_type, _without_null(dtype.item_type))
    if not is_list(dtype) or pa.types.is_null(dtype.value_type):
        return dtype
    if pa.types.is_fixed_size_list(dtype):
        return pa.list_(_without_null(dtype.value_type), dtype.list_size)
    inner = dtype.value_field.with_type(_without_null(dtype.value_type))
    return pa.list_(inner) if pa.types.is_list(dtype) else pa.large_list(inner)


def _wider(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both, numeric if both are numbers; None if there is none."""
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
        odd = any(pa.types.is_nested(t) or is_binary(t) or pa.types.is_fixed_size_binary(t) for t in (a, b))
        return None if odd else pa.string()


def hive_partition(spec: PoolSpec, path: str) -> dict[str, str | None]:
    """The Hive partition columns (`key=value` folders) of a file, below the folder or glob in `path`."""
    for pattern in spec.paths:
        base = pattern if "://" in pattern else os.path.abspath(pattern)
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
    return {key: type_of_texts([value or ""]) for key, value in hive_partition(spec, path).items()}
