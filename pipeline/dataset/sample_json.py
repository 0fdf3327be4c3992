"""The `KEY.json` of a sample: img2dataset's names in its order, and one JSON form per Arrow type.

A column has the same JSON type in every sample, so readers may infer types from the first samples. JSON (RFC 8259) has
no NaN, bytes or dates, and many readers store integers as int64.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import POSITION, is_binary, is_heavy, is_list, is_text

ORDER = (
    "caption",
    "url",
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "exif",
    "sha256",
    "uid",
)
"""The last keys: img2dataset's, then DataComp's `uid`. Other columns come before them."""

_ALWAYS: dict[str, tuple[pa.DataType, str | None]] = {
    "status": (pa.string(), "success"),
    "error_message": (pa.string(), None),
}
_types = pa.types


def sample_types(types: dict[str, pa.DataType]) -> dict[str, pa.DataType]:
    """The keys of a sample's JSON, in order, and the types of their values, for rows with the columns of `types`.

    Pixels, bytes and fixed-size vectors are only in the parquet files: as text they would be larger than the pictures.
    """
    light = {
        name: json_type(dtype) for name, dtype in types.items() if name not in POSITION.names and not is_heavy(dtype)
    }
    light |= {name: dtype for name, (dtype, _) in _ALWAYS.items()}
    return {name: light[name] for name in [*(n for n in light if n not in ORDER), *(n for n in ORDER if n in light)]}


def sample_json(table: pa.Table) -> Iterator[bytes]:
    """Yields one JSON object per row, on one line."""
    order = list(sample_types({field.name: field.type for field in table.schema}))
    columns: list[Iterable[Any]] = []
    for name in order:
        if name in _ALWAYS:
            columns.append(itertools.repeat(_ALWAYS[name][1], len(table)))
        else:
            columns.append(json_values(table[name], _hash_digits if name == "phash" else str))
    for values in zip(*columns):
        yield json.dumps(dict(zip(order, values)), ensure_ascii=False, allow_nan=False).encode()


def _hash_digits(value: int) -> str:
    """64 bits in hex, as imagehash prints them."""
    return f"{value:016x}"


def json_values(column: pa.Array | pa.ChunkedArray, text: Callable[[Any], str] = str) -> list[Any]:
    """The values of a column as Python objects that `json.dumps` accepts. Null becomes None.

    - NaN and infinities become None; float16 and float32 become their shortest decimal (0.2813)
    - uint64 becomes a string by `text` (default: decimal digits), because it overflows int64
    - decimals become strings of all digits; bytes become base64 (RFC 4648)
    - dates and times become ISO 8601 strings, instants in UTC with a Z, None outside Arrow's calendar; durations become
      seconds
    - lists and vectors become arrays, structs objects, maps arrays of `{"key": …, "value": …}`
    - invalid UTF-8 becomes U+FFFD
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    dtype = array.type
    if isinstance(array, pa.ExtensionArray):
        return _spelt(array, str) if dtype.extension_name == "arrow.uuid" else json_values(array.storage, text)
    if _types.is_dictionary(dtype):
        return json_values(array.dictionary_decode(), text)
    if _types.is_null(dtype) or _types.is_boolean(dtype):
        return list(array.to_pylist())
    if _types.is_integer(dtype):
        return _spelt(array, text) if _types.is_uint64(dtype) else list(array.to_pylist())
    if _types.is_floating(dtype):
        return _floats(array)
    if _types.is_decimal(dtype):
        return _spelt(array, str)
    if _types.is_duration(dtype):
        ticks = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[dtype.unit]
        return [None if v is None else v / ticks for v in array.cast(pa.int64()).to_pylist()]
    if _types.is_temporal(dtype):
        return _moments(array)
    if is_text(dtype):
        return _texts(array)
    if is_binary(dtype) or _types.is_fixed_size_binary(dtype):
        return _spelt(array, lambda value: base64.b64encode(value).decode())
    if _types.is_struct(dtype):
        # `flatten` applies the struct's own nulls; `field` does not.
        children = [json_values(child, text) for child in array.flatten()]
        rows = zip(array.is_valid().to_pylist(), zip(*children) if children else [()] * len(array))
        return [dict(zip(dtype.names, values)) if valid else None for valid, values in rows]
    if _types.is_map(dtype):
        array = array.cast(pa.list_(pa.struct([("key", dtype.key_type), ("value", dtype.item_type)])))
    if _is_list(array.type):
        sizes = pc.list_value_length(array).to_pylist()
        values = iter(json_values(pc.list_flatten(array), text))
        return [None if size is None else list(itertools.islice(values, size)) for size in sizes]
    return _spelt(array, str)


def json_type(dtype: pa.DataType) -> pa.DataType:
    """The type of the values returned by `json_values`, for readers to declare."""
    if isinstance(dtype, pa.BaseExtensionType):
        return json_type(dtype.storage_type)
    if _types.is_dictionary(dtype):
        return json_type(dtype.value_type)
    if _types.is_struct(dtype):
        return pa.struct([(field.name, json_type(field.type)) for field in dtype])
    if _types.is_map(dtype):
        return pa.list_(pa.struct([("key", json_type(dtype.key_type)), ("value", json_type(dtype.item_type))]))
    if _is_list(dtype):
        return pa.list_(json_type(dtype.value_type))
    if _types.is_duration(dtype):
        return pa.float64()
    if _types.is_float16(dtype):
        return pa.float32()
    known = _types.is_boolean(dtype) or _types.is_null(dtype) or _types.is_float32(dtype) or _types.is_float64(dtype)
    return dtype if known or (_types.is_integer(dtype) and not _types.is_uint64(dtype)) else pa.string()


def _is_list(dtype: pa.DataType) -> bool:
    return bool(is_list(dtype) or _types.is_list_view(dtype) or _types.is_large_list_view(dtype))


def _spelt(array: pa.Array, spell: Callable[[Any], str]) -> list[Any]:
    return [None if value is None else spell(value) for value in array.to_pylist()]


def _floats(array: pa.Array) -> list[Any]:
    values = array.to_pylist()
    narrow = {16: np.float16, 32: np.float32}.get(array.type.bit_width)
    if narrow is None:
        return [value if value is not None and math.isfinite(value) else None for value in values]
    return [float(str(narrow(v))) if v is not None and math.isfinite(v) else None for v in values]


def _moments(array: pa.Array) -> list[Any]:
    aware = _types.is_timestamp(array.type) and array.type.tz is not None
    if aware:
        array = array.cast(pa.timestamp(array.type.unit))  # the same instant in UTC
    # Not via Python's datetime, which lacks nanoseconds and years over 9999.
    spelt = array.cast(pa.string()).to_pylist()
    end = "Z" if aware else ""
    return [None if value is None or value[0] == "<" else value.replace(" ", "T") + end for value in spelt]


def _texts(array: pa.Array) -> list[Any]:
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        raw = array.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in raw]
