"""Names and Arrow types of the columns that every step can rely on.

Names follow img2dataset where it has an equivalent. A step declares the columns that it adds in `adds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# The unit number of a row and its position in the unit. Together they identify a row permanently, even if the pool's
# own uids repeat. Every batch carries both; no step may change them.
POSITION = pa.schema([("unit", pa.int32()), ("row", pa.int32())])

# Set by ingest for every row. `uid` is 32 hex digits: the pool's own, or the first 128 bits of
# sha256(url NUL caption), so that the same pair has the same uid in every run.
SAMPLE = pa.schema([("uid", pa.string()), ("url", pa.string()), ("caption", pa.string())])

# Set when the picture of a row was fetched or read. `pipeline.fetch.decoder.Picture` documents each column.
PICTURE: dict[str, pa.DataType] = {
    "image": pa.binary(),
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "original_bytes": pa.int64(),
    "original_format": pa.string(),
    "animated": pa.bool_(),
    "sha256": pa.string(),
    "phash": pa.uint64(),
    "exif": pa.string(),
}

# Set where a step merged rows that show one picture: the captions of all of them, beginning with the row's own.
CAPTIONS = pa.list_(pa.struct([("caption", pa.string()), ("uid", pa.string()), ("language", pa.string())]))
MERGED = "merged"
"""Drop reason of a row whose caption was added to another row; the detail is the uid of that other row."""

INLINE = "inline_image"
"""The column of pictures supplied by the pool (`pool.image`): read by `download`, never written to shards."""

RESERVED = frozenset(
    {*POSITION.names, *SAMPLE.names, *PICTURE, INLINE, "captions", "place", "heavy_at", "drop_reason", "drop_detail",
     "drop_value", "status", "error_message"}
)  # fmt: skip
"""Column names that Winnow uses itself. Pool columns with these names get a prefix; see `carried`."""


def carried(name: str) -> str:
    """The name in a run of an extra pool column: `pool_width` for `width`."""
    return f"pool_{name}" if name in RESERVED else name


# One row per dropped row. `reason` comes from a closed list per step and is safe to count; `detail` is free text for
# people; `value` is the number that decided, or null.
DROP = pa.schema(
    [
        *POSITION,
        ("step", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("value", pa.float64()),
    ]
)


def is_text(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype))


def is_binary(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_binary_view(dtype))


def is_list(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype))


def is_number(dtype: pa.DataType) -> bool:
    """True for integers, floats and decimals; False for null, the type of a column without values."""
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(is_kind(dtype) for is_kind in kinds)


def wrong_type(
    types: Mapping[str, pa.DataType], column: str, fits: Callable[[pa.DataType], bool], expected: str
) -> Iterator[str]:
    """Yields a problem if a column exists and its type does not fit. A column without values has type null and fits."""
    dtype = types.get(column)
    if dtype is not None and not fits(dtype) and not pa.types.is_null(dtype):
        yield f"the column {column!r} holds {dtype}, expected {expected}"


def holds_boxes(dtype: pa.DataType) -> bool:
    """True for lists of boxes: lists of lists of numbers. Lists that are empty in all rows have values of type null."""
    for _ in range(2):
        if pa.types.is_null(dtype):
            return True
        if not is_list(dtype):
            return False
        dtype = dtype.value_type
    return is_number(dtype) or pa.types.is_null(dtype)


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as float64, NaN for null."""
    return pc.fill_null(column.cast(pa.float64(), safe=False), math.nan).to_numpy()


def is_heavy(dtype: pa.DataType) -> bool:
    """True for pixels and vectors. They are stored apart from other columns, so that scans of scores skip them."""
    return bool(pa.types.is_fixed_size_list(dtype) or _holds_bytes(dtype))


def _holds_bytes(dtype: pa.DataType) -> bool:
    if pa.types.is_nested(dtype):
        return any(_holds_bytes(dtype.field(i).type) for i in range(dtype.num_fields))
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_fixed_size_binary(dtype))
