"""`write_shards`: the finished dataset as WebDataset shards, byte for byte the same whoever writes them.

The layout is img2dataset's: per sample adjacent members `KEY.jpg, KEY.json, KEY.txt`, keys of digits, JSON keys in its
order. Tars are USTAR with fixed mode, owner and time. Beside each tar stand a parquet with all columns
and an index of byte offsets; the manifest names them all with their digests.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipeline.schema import INLINE, POSITION, is_heavy
from pipeline.step import Stage
from pipeline.storage import Store

FORMAT = "winnow-shards/1"
INDEX_COLUMNS = ("image_offset", "image_size", "json_offset", "json_size", "txt_offset", "txt_size")
JSON_ORDER = (
    "caption",
    "url",
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
)
JSON_TAIL = ("exif", "sha256")
_MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


@dataclass(kw_only=True)
class WriteShards(Stage):
    """Writes the rows that are left, in the run's order, as shards of exactly `samples_per_shard` samples each."""

    needs = ("image", "caption")

    samples_per_shard: int = 10_000
    """Samples in a shard (img2dataset: `number_sample_per_shard`)."""
    drop_last: bool = False
    """Leave a last, shorter shard out; its rows are dropped as `last_shard_short`."""

    def check(self) -> Iterator[tuple[str, str]]:
        if not 1 <= self.samples_per_shard <= 1_000_000:
            yield "samples_per_shard", f"expected 1 to 1,000,000, found {self.samples_per_shard}"

    def write(
        self, store: Store, shard: int, tables: Iterator[pa.Table], types: dict[str, pa.DataType]
    ) -> dict[str, Any]:
        """Writes one shard from tables with the columns of `types`, `image` among them; returns its manifest entry.

        Each file appears whole or not at all. Two workers on one shard write the same bytes, so neither needs to win.
        """
        name = f"{shard:05d}"
        digits = max(9, len(str(shard)) + math.ceil(math.log10(max(self.samples_per_shard, 2))))
        first_key = shard * 10 ** math.ceil(math.log10(max(self.samples_per_shard, 2)))
        # The pool may come with keys of its own, from other shards; here they would name nothing.
        columns = [c for c in types if c not in ("image", INLINE, "key")]
        rest: list[pa.Table] = []
        index: list[list[int]] = []
        extensions: set[str] = set()
        with store.output(f"{name}.tar") as file:
            tar = _Tar(file)
            for table in tables:
                keys = [f"{first_key + len(index) + i:0{digits}d}" for i in range(len(table))]
                labelled = table.select(columns).add_column(0, "key", pa.array(keys, pa.string()))
                rest.append(labelled)
                for key, image, caption, sample in zip(
                    keys, table["image"].to_pylist(), table["caption"].to_pylist(), _json_rows(labelled), strict=True
                ):
                    extension = next((e for magic, e in _MAGIC if image.startswith(magic)), "bin")
                    extensions.add(extension)
                    index.append(
                        [
                            *tar.add(f"{key}.{extension}", image),
                            *tar.add(f"{key}.json", sample),
                            *tar.add(f"{key}.txt", caption.encode()),
                        ]
                    )
            tar.close()
        empty = pa.schema([("key", pa.string()), *((c, types[c]) for c in columns)]).empty_table()
        store.write_table(f"{name}.parquet", pa.concat_tables(rest) if rest else empty)
        with store.output(f"{name}.index.npy") as file:
            np.save(file, np.array(index, np.int64).reshape(-1, len(INDEX_COLUMNS)))
        return {
            "name": f"{name}.tar",
            "samples": len(index),
            "bytes": tar.offset,
            "sha256": tar.digest.hexdigest(),
            "parquet": f"{name}.parquet",
            "index": f"{name}.index.npy",
            "extensions": sorted(extensions),
        }

    def finish(self, store: Store, name: str, shards: list[dict[str, Any]]) -> None:
        """Writes what describes all shards together, and removes the files of an earlier, larger set.

        `subset.npy` is DataComp's subset format: the sorted uids as pairs of uint64, 16 bytes a sample in memory.
        """
        extensions = sorted({e for shard in shards for e in shard.pop("extensions")})
        manifest = {
            "format": FORMAT,
            "name": name,
            "samples": sum(shard["samples"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
            "samples_per_shard": self.samples_per_shard,
            "extension": "|".join(extensions),
            "index_columns": list(INDEX_COLUMNS),
            "shards": shards,
        }
        sizes = {shard["name"]: shard["samples"] for shard in shards}
        wids = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": name,
            "shardlist": [{"url": s["name"], "nsamples": s["samples"], "filesize": s["bytes"]} for s in shards],
        }
        subset = io.BytesIO()
        np.save(subset, _subset(store, [shard["parquet"] for shard in shards]))
        documents = {
            "subset.npy": subset.getvalue(),
            "sizes.json": _dump(sizes),
            "wids.json": _dump(wids),
            "croissant.json": _dump(_croissant(name, manifest)),
            "README.md": _card(name, manifest).encode(),
            "manifest.json": _dump(manifest),
        }
        for file_name, data in documents.items():
            store.write(file_name, data)
        keep = {*documents, "OWNER", "_SUCCESS", *(s[k] for s in shards for k in ("name", "parquet", "index"))}
        for file_name in store.names():
            if file_name not in keep:
                store.remove(file_name)


class _Tar:
    """Appends members to a USTAR stream and knows where their data lie."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.offset = 0
        self.digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Where `data` lie. `name` has at most 100 bytes, and `data` less than 8 GB: ValueError."""
        self._put(_tar_header(name.encode(), b"%011o" % len(data)))
        start = self.offset
        self._put(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return start, len(data)

    def close(self) -> None:
        end = self.offset + 2 * tarfile.BLOCKSIZE
        self._put(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.offset += len(data)


_SOME_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # mode 0644, owner 0, time 0


def _tar_header(name: bytes, size: bytes) -> bytes:
    """As tarfile makes it, in a fifth of the time, which was a quarter of what writing a sample takes.

    The fields that vary are the name (0 to 100), the size (124 to 135), and the sum of all bytes (148 to 156), which
    counts itself as blanks.
    """
    blank = _SOME_HEADER
    parts = [name.ljust(100, b"\0"), blank[100:124], size, blank[135:148], b" " * 8, blank[156:]]
    parts[4] = b"%06o\0 " % sum(b"".join(parts))
    header = b"".join(parts)
    if len(header) != len(blank):
        raise ValueError(f"no room in a tar header for the name {name!r} or the size {size!r}")
    return header


def _json_rows(table: pa.Table) -> Iterator[bytes]:
    """A JSON object per sample: further columns first, then img2dataset's own in its order, as img2dataset has it."""
    light = [name for name in table.column_names if name not in POSITION.names and not is_heavy(table[name].type)]
    known = {*JSON_ORDER, *JSON_TAIL, "uid"}
    data: dict[str, list[Any]] = {name: _plain_values(table[name]) for name in light}
    data |= {"status": ["success"] * len(table), "error_message": [None] * len(table)}
    order = [*(n for n in light if n not in known), *(n for n in (*JSON_ORDER, *JSON_TAIL, "uid") if n in data)]
    for values in zip(*(data[name] for name in order)):
        yield json.dumps(dict(zip(order, values)), ensure_ascii=False, default=str).encode()


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    """As JSON wants them: a float32 as the shortest decimal that means it, 0.2813 and not 0.281300008296967."""
    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        return [None if v is None else float(str(np.float32(v))) for v in column.to_pylist()]
    return list(column.to_pylist())


def _subset(store: Store, names: list[str]) -> np.ndarray:
    pairs = []
    for name in names:
        uids = store.read_table(name, ["uid"])["uid"].to_pylist()
        pairs.append(np.array([(int(u[:16], 16), int(u[16:32], 16)) for u in uids], np.dtype("u8,u8")))
    return np.sort(np.concatenate(pairs)) if pairs else np.empty(0, np.dtype("u8,u8"))


def _dump(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def _croissant(name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Metadata in MLCommons' Croissant 1.0: the parquet files as one record set."""
    fields = ("key", "uid", "url", "caption")
    return {
        "@context": {
            "@vocab": "https://schema.org/",
            "sc": "https://schema.org/",
            "cr": "http://mlcommons.org/croissant/",
            "dct": "http://purl.org/dc/terms/",
            "conformsTo": "dct:conformsTo",
            "recordSet": "cr:recordSet",
            "field": "cr:field",
            "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
            "source": "cr:source",
            "fileSet": "cr:fileSet",
            "extract": "cr:extract",
            "column": "cr:column",
            "includes": "cr:includes",
        },
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": f"{manifest['samples']:,} image–text pairs in {len(manifest['shards'])} WebDataset shards.",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": shard["name"],
                "name": shard["name"],
                "contentUrl": shard["name"],
                "contentSize": f"{shard['bytes']} B",
                "encodingFormat": "application/x-tar",
                "sha256": shard["sha256"],
            }
            for shard in manifest["shards"]
        ]
        + [
            {
                "@type": "cr:FileSet",
                "@id": "samples",
                "name": "samples",
                "encodingFormat": "application/x-parquet",
                "includes": "*.parquet",
            }
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "rows",
                "name": "rows",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"rows/{field}",
                        "name": field,
                        "dataType": "sc:Text",
                        "source": {"fileSet": {"@id": "samples"}, "extract": {"column": field}},
                    }
                    for field in fields
                ],
            }
        ],
    }


def _card(name: str, manifest: dict[str, Any]) -> str:
    size = f"{manifest['bytes'] / 1e9:.3f} GB"
    return f"""# {name}

{manifest["samples"]:,} image–text pairs in {len(manifest["shards"])} WebDataset shards, {size}.

- `NNNNN.tar`: per sample `KEY.{manifest["extension"] or "jpg"}`, `KEY.json`, `KEY.txt`
- `NNNNN.parquet`: the same samples with every column that was measured; `key` names the sample in the tar
- `NNNNN.index.npy`: int64, a row per sample: {", ".join(INDEX_COLUMNS)} (of the data in the tar)
- `manifest.json`: samples, bytes and sha256 of each shard; `sizes.json`, `wids.json` and
  `subset.npy` (DataComp) as their tools expect them; `croissant.json`: Croissant metadata

Why each row of the pool is in or out: `../drops/*.parquet` and `../funnel.json`. The images and captions belong to
their owners; their urls are in the tables.
"""
