"""The names and Arrow types of the columns that every step can count on.

Names follow img2dataset where it has one. A step adds further columns by declaring them in `adds`.
"""

from __future__ import annotations

import pyarrow as pa

# Where a row lives: unit number and position in the unit. Together they name a row for good, even if the pool's
# own uids repeat. Every batch carries both; no step may change them.
POSITION = pa.schema([("unit", pa.int32()), ("row", pa.int32())])

# What ingest gives every row. `uid` is 32 hex digits: the pool's own, or the first 128 bits of
# sha256(url NUL caption), so that the same pair has the same name in every run.
SAMPLE = pa.schema([("uid", pa.string()), ("url", pa.string()), ("caption", pa.string())])

# What a row has once its picture is there, fetched or read; `pipeline.fetch.decoder.Picture` says what each is.
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

INLINE = "inline_image"
"""The column of pictures that came with the pool (`pool.image`): read by `download`, never written to the shards."""

RESERVED = frozenset(
    {*POSITION.names, *SAMPLE.names, *PICTURE, INLINE, "place", "heavy_at", "drop_reason", "drop_detail", "drop_value",
     "status", "error_message"}
)  # fmt: skip
"""Names that mean something of ours in a run: a pool's own columns of these names are carried under a prefix."""


def carried(name: str) -> str:
    """The name that a further column of a pool has in a run: `pool_width` for `width`."""
    return f"pool_{name}" if name in RESERVED else name


# One row per dropped row, as steps hand it to the ledger. `detail` is free text for people; `reason` is from a
# closed list per step and safe to count; `value` is the number that decided, where there is one.
DROP = pa.schema(
    [
        *POSITION,
        ("step", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("value", pa.float64()),
    ]
)


def is_heavy(dtype: pa.DataType) -> bool:
    """True for pixels and vectors: kept apart from the measurements, so that a scan of scores reads no image."""
    return bool(pa.types.is_fixed_size_list(dtype) or _holds_bytes(dtype))


def _holds_bytes(dtype: pa.DataType) -> bool:
    if pa.types.is_nested(dtype):
        return any(_holds_bytes(dtype.field(i).type) for i in range(dtype.num_fields))
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_fixed_size_binary(dtype))
