"""A finished dataset with every type of column that a pool or step may have, written without Ray."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.dataset.card import About
from pipeline.ledger import Funnel, Line
from pipeline.schema import PICTURE, SAMPLE
from pipeline.stages.write_shards import WriteShards
from pipeline.storage import Store
from tests.images import encoded

SAMPLES = 25
PER_SHARD = 10
NAN, INF = float("nan"), float("inf")

# name: (type, values that the rows take in turn)
AWKWARD: dict[str, tuple[pa.DataType, list[Any]]] = {
    "unsafe": (pa.float64(), [NAN, INF, -INF, 0.5, None]),
    "boxes": (pa.list_(pa.list_(pa.float64())), [[[NAN, 1.0]], [], None]),
    "late": (pa.string(), [None] * 12 + ["said"] * 13),  # later than the rows from which readers infer types
    "taken": (pa.timestamp("us", "UTC"), [datetime.datetime(2024, 2, 29, 12)]),
    "day": (pa.date32(), [datetime.date(2024, 2, 29), None]),
    "price": (pa.decimal128(8, 2), [decimal.Decimal("1.50")]),
    "long price": (pa.decimal256(50, 2), [decimal.Decimal("9" * 40), None]),
    "serial": (pa.uint64(), [2**64 - 1]),
    "big": (pa.int64(), [2**63 - 1, -(2**63)]),
    "tags": (pa.map_(pa.string(), pa.float32()), [[("cat", 0.1)], []]),
    "info": (pa.struct([("a", pa.float64()), ("b", pa.binary())]), [{"a": NAN, "b": b"\xff"}, None]),
    "face bboxes": (pa.list_(pa.float32()), [[0.1, 0.2]]),
    "flag": (pa.bool_(), [True, None]),
    "length": (pa.duration("ms"), [datetime.timedelta(seconds=1.5)]),
    "at": (pa.time64("us"), [datetime.time(1, 2, 3)]),
    "raw": (pa.binary(), [b"\x00\xff"]),
    "vector": (pa.list_(pa.float16(), 4), [[0.1, 0.2, 0.3, 0.4]]),
    "clip_score": (pa.float32(), [0.2813]),
}
TYPES = {
    **{field.name: field.type for field in SAMPLE},
    **{name: dtype for name, (dtype, _) in AWKWARD.items()},
    **PICTURE,
}
FUNNEL = Funnel(
    {
        "pool": Line(100, {"null_url": 3}),
        "download": Line(97, {"http_404": 60, "opted_out": 12}),
        "write_shards": Line(SAMPLES),
    }
)
HONOURED = ["robots.txt (RFC 9309)"]


def rows(kinds: tuple[str, ...] = ("JPEG",)) -> pa.Table:
    """Samples with the columns of TYPES. Their pictures cycle through these Pillow formats."""
    columns: dict[str, list[Any]] = {
        name: [values[i % len(values)] for i in range(SAMPLES)] for name, (_, values) in AWKWARD.items()
    }
    columns |= {
        "uid": [f"{(i * 7919) << 64 | i:032x}" for i in range(SAMPLES)],
        "url": [f"https://host.example/{i}.jpg" for i in range(SAMPLES)],
        "caption": [f"ein “Bild”\u2028 number {i}" for i in range(SAMPLES)],
        "image": [_picture(i, kinds[i % len(kinds)]) for i in range(SAMPLES)],
        "width": [32 + i for i in range(SAMPLES)],
        "phash": [None if i % 5 == 4 else 2**63 + i for i in range(SAMPLES)],
        "exif": ["{}"] * SAMPLES,
    }
    return pa.table({name: pa.array(columns.get(name, [None] * SAMPLES), dtype) for name, dtype in TYPES.items()})


def write(folder: Path, kinds: tuple[str, ...] = ("JPEG",), name: str = "a set: *of* pictures") -> Path:
    """Writes the dataset. Returns its folder."""
    store, writer, table = Store(str(folder)), WriteShards(samples_per_shard=PER_SHARD), rows(kinds)
    shards = [
        writer.write(store, shard, iter([table.slice(start, 3), table.slice(start + 3, PER_SHARD - 3)]), TYPES)
        for shard, start in enumerate(range(0, SAMPLES, PER_SHARD))
    ]
    writer.finish(store, About(name, TYPES, FUNNEL, HONOURED), shards)
    store.write("_SUCCESS", b"")
    return folder


def _picture(number: int, kind: str) -> bytes:
    return encoded(Image.new("RGB", (32 + number, 24), (number * 9 % 256, 80, 200)), kind)
