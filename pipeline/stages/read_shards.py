"""Reads images from existing shards of img2dataset or DataComp, instead of downloading them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.fetch import quality
from pipeline.fetch.concurrent_rows import Begin, ConcurrentRows, Work, as_drop, table_of, with_columns
from pipeline.fetch.decoder import EncodeFormat, Picture, Rules, decode, sniff
from pipeline.fetch.img2dataset_engine import failure
from pipeline.fetch.reasons import FetchError, one_line
from pipeline.fetch.sandbox import Sandbox
from pipeline.schema import PICTURE
from pipeline.step import FILE, Estimate, Stage
from pipeline.storage import Store
from trainer.tar import TarError, samples

REASONS = {
    "no_image": "the shards have no image with this row's key; the detail says if the tar is damaged",
    "shard_truncated": "the tar is truncated within this row's image",
}
GROUP_ROWS = 256
CONCURRENCY = 32
"""Images read and decoded concurrently."""
DECODE_SECONDS = 20
DECODE_BYTES = 1 << 29
_INDEX_VERSION = 3
_INDEX = pa.schema(
    [
        ("key", pa.int64()),
        ("offset", pa.int64()),  # null: not in the tar
        ("size", pa.int64()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
    ]
)
_TABLE_COLUMNS = _INDEX.names[3:]
_KEY = re.compile(r"[0-9]{1,18}")
_TAR = re.compile(r"([0-9]{1,18})\.tar")
_SPEED = {"speed": True}


@dataclass(kw_only=True)
class ReadShards(Stage):
    """Reads each row's image from existing shards, `NNNNN.tar`, by its `key`. Needs no network.

    Use it in place of `download`, with the tables next to the tars as the pool:
    `pool: {path: FOLDER/*.parquet, columns: [key]}`, plus `uid: uid` for a DataComp folder. Reads folders written by
    img2dataset (in its format `webdataset`), DataComp's tools and Winnow.

    Adds the columns of `download` except `usage`. Keeps the image's bytes if they are a JPEG, PNG or WebP of upright,
    8-bit RGB or grey pixels; re-encodes others. `sha256`, `original_bytes` and `original_format` describe the bytes in
    the shard. `original_width`, `original_height` and `exif` come from the shard's table if it has them, because the
    image has been resized. Rows that img2dataset failed to download are dropped for the reason that its message maps
    to. Other drops are `no_image`, `shard_truncated`, or image errors as in `download`.
    """

    needs: ClassVar[tuple[str, ...]] = ("key",)
    adds: ClassVar[dict[str, pa.DataType]] = PICTURE
    version: ClassVar[int] = 3
    expensive: ClassVar[bool] = True

    path: str = field(metadata=FILE)
    """The folder of the tars, local or `s3://`, `gs://`, …"""
    max_bytes: int = 20_000_000
    """Maximum size of an image, in bytes."""
    max_image_area: float = 36_000_000
    """Maximum number of pixels of an image."""
    image_quality: bool = False
    """Add `dark_score`, `light_score`, `blurry_score` and `low_information_score`, for the filter `image_quality`."""
    index: str = field(default="~/.cache/winnow/shards", metadata=_SPEED)
    """A local or remote folder that caches the offsets of images in each tar. A tar is indexed once, in one pass, for
    all workers that share the folder and for later runs."""

    def __post_init__(self) -> None:
        if self.image_quality:
            self.adds = PICTURE | quality.SCORES  # type: ignore[misc]
        # Resolve paths now: workers run in other working directories.
        self._folder = Folder(Store(os.path.expanduser(self.path)).root, Store(os.path.expanduser(self.index)).root)

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 300, "rate assumed", stored=26_000)

    def check(self) -> Iterator[tuple[str, str]]:
        for key in ("max_bytes", "max_image_area"):
            if getattr(self, key) < 1:
                yield key, f"{getattr(self, key)} must be 1 or more"
        try:
            if not self._folder.tars:
                yield "path", f"{self.path} contains no NNNNN.tar"
        except FileNotFoundError:
            yield "path", f"{self.path} does not exist"

    def fingerprint(self) -> object:
        stamps = [[tar.name, tar.stamp] for _, tar in sorted(self._folder.tars.items())]
        return hashlib.sha256(repr(stamps).encode()).hexdigest()

    def setup(self) -> None:
        _ = self._folder.row_digits  # fails early on a folder of another kind

    def process(self, batch: pa.Table) -> pa.Table:
        done = [*self.stream([batch]), with_columns(batch.slice(0, 0), [], self.adds)]
        return pa.concat_tables(done).sort_by([("unit", "ascending"), ("row", "ascending")])

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yields finished rows, roughly in the order of the shards, at most 256 per table, with dropped rows marked."""
        for finished in self._rows_at_work(_by_key(batch) for batch in batches):
            yield table_of(finished, self.adds)

    @cached_property
    def _rows_at_work(self) -> ConcurrentRows[dict[str, Any]]:
        return ConcurrentRows(
            copy(self)._open,  # a copy: a reference to self would keep the thread alive forever
            columns=("key",),
            concurrency=CONCURRENCY,
            admitted=2 * CONCURRENCY,
            group=GROUP_ROWS,
        )

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Work[dict[str, Any]]]:
        target = partial(check_image, max_image_area=self.max_image_area, image_quality=self.image_quality)
        readers = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="shards")
        try:
            async with Sandbox(target, processes=1, seconds=DECODE_SECONDS, memory=DECODE_BYTES) as sandbox:
                yield partial(self._one, readers, sandbox)
        finally:
            readers.shutdown(cancel_futures=True)

    async def _one(
        self, readers: Executor, sandbox: Sandbox[Picture], row: tuple[Any, ...], begin: Begin
    ) -> dict[str, Any]:
        """Returns the columns of `adds` for a row, or `drop_reason` and `drop_detail`."""
        (key,) = row
        await begin()
        found = await asyncio.get_running_loop().run_in_executor(readers, self._folder.find, key, self.max_bytes)
        if isinstance(found, tuple):
            return dict(zip(("drop_reason", "drop_detail"), found))
        try:
            picture = await sandbox(found.pop("body"))
        except FetchError as error:
            return as_drop(error)
        return vars(picture) | {name: value for name, value in found.items() if value is not None}


def check_image(body: bytes, *, max_image_area: float, image_quality: bool = False) -> Picture:
    """Decodes the image and keeps its bytes if they need no change. Raises FetchError like `decode`."""
    formats: dict[str | None, EncodeFormat] = {"PNG": "png", "WEBP": "webp"}
    encode_format = formats.get(sniff(body), "jpg")
    rules = Rules(
        resize_mode="no",
        skip_reencode=True,
        encode_format=encode_format,
        encode_quality=6 if encode_format == "png" else 95,
        max_image_area=max_image_area,
        image_quality=image_quality,
    )
    return decode(body, rules)


def _by_key(batch: pa.Table) -> pa.Table:
    """Sorts rows in the order of the shards, for sequential reads."""
    key = batch["key"].cast(pa.string())
    return batch.set_column(batch.column_names.index("key"), "key", key).sort_by("key")


class Tar(NamedTuple):
    name: str
    stamp: str
    """Identifies the version of the file: size and modification time, or the store's ETag."""


class Folder:
    """A folder of shards `NNNNN.tar`, optionally with tables `NNNNN.parquet`. Looks up images by key.

    img2dataset's keys are shard · 10^d + row, so a key identifies its shard. Indexing reads each tar's headers once
    (`trainer.tar`) and extracts nothing. Samples with non-numeric keys are ignored.
    """

    def __init__(self, path: str, index: str) -> None:
        self.path, self._index = path, Store(index)
        self._fs, self._root = fsspec.core.url_to_fs(path)
        self._locks: dict[int, threading.Lock] = {}
        self._entries = lru_cache(maxsize=16)(self._load)

    def __reduce__(self) -> tuple[type[Folder], tuple[str, str]]:
        return Folder, (self.path, self._index.root)

    @cached_property
    def tars(self) -> dict[int, Tar]:
        """The tars by shard number. Raises FileNotFoundError if the folder does not exist."""
        found = {}
        for entry in self._fs.ls(self._root, detail=True):
            name = entry["name"].rsplit("/", 1)[-1]
            if (match := _TAR.fullmatch(name)) and entry["type"] == "file":
                when = entry.get("ETag") or entry.get("mtime") or entry.get("updated") or ""
                found[int(match[1])] = Tar(name, f"{entry['size']} {when}")
        return found

    @cached_property
    def row_digits(self) -> int:
        """The d in key = shard · 10^d + row, from the last shard with an image. Raises ValueError if no d fits."""
        for shard in sorted(self.tars, reverse=True):
            key = None
            with suppress(TarError):
                key = next((key for key, _, _ in self._members(shard)), None)
            if key is None:
                continue
            if not shard:
                return 18  # shard 0 contains all keys
            for digits in range(18):
                if key // 10**digits == shard:
                    return digits
            raise ValueError(
                f"read_shards: path: {self.path}/{self.tars[shard].name} has the key {key}, which does not begin with "
                "the shard number; expected a folder written by img2dataset"
            )
        return 18

    def find(self, key: str | None, max_bytes: int) -> dict[str, Any] | tuple[str, str | None]:
        """Returns `body` and the table's columns for a key, or the drop's (reason, detail) if there is no image."""
        if key is None or not _KEY.fullmatch(key):
            return "no_image", f"the key is {key!r:.50}"
        number = int(key)
        shard = number // 10**self.row_digits
        tar = self.tars.get(shard)
        if tar is None:
            return "no_image", f"shard {shard} does not exist"
        with self._locks.setdefault(shard, threading.Lock()):  # the first row of a shard indexes it; the others wait
            entries = self._entries(shard)
        at = int(np.searchsorted(entries["key"].to_numpy(), number))
        damage = (entries.schema.metadata or {}).get(b"damage", b"").decode()
        absent = "no_image", f"not in {tar.name}" + (f", which is damaged: {damage}" if damage else "")
        if at == len(entries) or entries["key"][at].as_py() != number:
            return absent
        entry = entries.slice(at, 1).to_pylist()[0]
        if entry["status"] not in (None, "success"):
            error = failure(entry["status"], entry["error_message"])
            return error.reason, error.detail
        if entry["offset"] is None:
            return absent
        offset, size = entry["offset"], entry["size"]
        if size > max_bytes:
            return "body_too_large", f"{size} bytes"
        body = bytes(self._fs.cat_file(f"{self._root}/{tar.name}", offset, offset + size)) if size else b""
        if len(body) < size:
            return "shard_truncated", f"{tar.name} ends {size - len(body)} bytes early"
        return {"body": body, **{name: entry[name] for name in ("original_width", "original_height", "exif")}}

    def _load(self, shard: int) -> pa.Table:
        """The index of a shard, sorted by key, memory-mapped if local."""
        tar = self.tars[shard]
        identity = f"{_INDEX_VERSION} {self.path}/{tar.name} {tar.stamp}"
        name = f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.arrow"
        if not self._index.exists(name):
            entries = self._make(shard)
            with self._index.output(name) as file, pa.ipc.new_file(file, entries.schema) as writer:
                writer.write_table(entries)
        with self._index.input(name) as file:
            return pa.ipc.open_file(file).read_all().combine_chunks()

    def _make(self, shard: int) -> pa.Table:
        places: dict[int, dict[str, int]] = {}
        damage = ""
        try:
            for key, offset, size in self._members(shard):
                # Of samples with the same key, take the first, like other readers.
                places.setdefault(key, {"offset": offset, "size": size})
        except TarError as error:
            damage = one_line(str(error))
        table = self._table(self.tars[shard].name.replace(".tar", ".parquet"))
        rows = [{"key": key, **places.get(key, {}), **table.get(key, {})} for key in sorted({*places, *table})]
        return pa.Table.from_pylist(rows, _INDEX.with_metadata({"damage": damage}))

    def _members(self, shard: int) -> Iterator[tuple[int, int, int]]:
        """Yields key, offset and size of each image in a tar. Raises TarError at the first damage."""
        path = f"{self._root}/{self.tars[shard].name}"
        with self._fs.open(path, "rb") as file:

            def read(at: int, size: int) -> bytes:
                file.seek(at)
                return bytes(file.read(size))

            for sample in samples(read, self._fs.size(path)):
                image = sample.image()
                key = sample.key.removeprefix("./")
                if image.size >= 0 and _KEY.fullmatch(key):
                    yield int(key), image.at, image.size

    def _table(self, name: str) -> dict[int, dict[str, Any]]:
        """The rows of the parquet file next to a tar, by key."""
        path = f"{self._root}/{name}"
        if not self._fs.exists(path):
            return {}
        with self._fs.open(path, "rb") as file:
            parquet = pq.ParquetFile(file)
            columns = [c for c in ("key", *_TABLE_COLUMNS) if c in parquet.schema_arrow.names]
            if "key" not in columns:
                return {}
            rows = parquet.read(columns).to_pylist()
        keys = [str(row.pop("key")) for row in rows]
        return {int(key): row for key, row in zip(keys, rows) if _KEY.fullmatch(key)}
