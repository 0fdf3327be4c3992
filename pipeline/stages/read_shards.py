"""The stage in place of the download: images out of the shards that img2dataset or DataComp's tools made."""

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

from pipeline.fetch.decoder import EncodeFormat, Picture, Rules, decode, sniff
from pipeline.fetch.img2dataset_engine import failure
from pipeline.fetch.concurrent_rows import Begin, ConcurrentRows, Work, as_drop, table_of, with_columns
from pipeline.fetch.reasons import FetchError
from pipeline.fetch.sandbox import Sandbox
from pipeline.schema import PICTURE
from pipeline.step import Estimate, Stage
from pipeline.storage import Store
from trainer.tar import TarError, samples

REASONS = {
    "no_image": "the shards hold no image under this row's key",
    "shard_truncated": "the tar ends before this row's image does",
}
GROUP_ROWS = 256
CONCURRENCY = 32
"""Images in hand at once."""
DECODE_SECONDS = 20
DECODE_BYTES = 1 << 29
_INDEX_VERSION = 2
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
    """Takes each row's image from existing shards, `NNNNN.tar`, by its `key`: a run without the network.

    Stands where `download` would, on a pool of the tables beside the tars:
    `pool: {path: FOLDER/*.parquet, columns: [key]}`, with `uid: uid` in a DataComp folder. Fits folders of img2dataset
    (its format `webdataset`), of DataComp's tools and Winnow's own.

    Adds what `download` adds, but for `usage`. The image's bytes are taken as they are once they decode, or re-encoded
    where they are not plain 8-bit RGB or grey pixels, upright, as JPEG, PNG or WebP. `sha256`, `original_bytes` and
    `original_format` are those of the bytes in the shard; `original_width`, `original_height` and `exif` come from the
    shard's table if it has them, since the image was resized since. Rows that img2dataset had failed with are dropped
    for the reason that its message means; others as `no_image`, `shard_truncated` or for the image's own reasons, as in
    `download`.
    """

    needs: ClassVar[tuple[str, ...]] = ("key",)
    adds: ClassVar[dict[str, pa.DataType]] = PICTURE
    version: ClassVar[int] = 2
    commits: ClassVar[bool] = True

    path: str
    """The folder of the tars, local or `s3://`, `gs://`, …"""
    max_bytes: int = 20_000_000
    """The largest image, in bytes."""
    max_image_area: float = 36_000_000
    """Pixels of an image."""
    index: str = field(default="~/.cache/winnow/shards", metadata=_SPEED)
    """A folder, local or remote, that keeps where each image lies in its tar: found out once (a pass over the tar), for
    all workers that share the folder and for later runs."""

    def __post_init__(self) -> None:
        # Workers have working directories of their own.
        self._folder = Folder(Store(os.path.expanduser(self.path)).root, Store(os.path.expanduser(self.index)).root)

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 300, "rate assumed", stored=26_000)

    def check(self) -> Iterator[tuple[str, str]]:
        for key in ("max_bytes", "max_image_area"):
            if getattr(self, key) < 1:
                yield key, f"{getattr(self, key)} must be 1 or more"
        try:
            if not self._folder.tars:
                yield "path", f"{self.path} holds no NNNNN.tar"
        except FileNotFoundError:
            yield "path", f"{self.path} does not exist"

    def fingerprint(self) -> object:
        stamps = [[tar.name, tar.stamp] for _, tar in sorted(self._folder.tars.items())]
        return hashlib.sha256(repr(stamps).encode()).hexdigest()

    def setup(self) -> None:
        _ = self._folder.row_digits  # a folder of another kind fails here, before any row is taken

    def process(self, batch: pa.Table) -> pa.Table:
        done = [*self.stream([batch]), with_columns(batch.slice(0, 0), [], self.adds)]
        return pa.concat_tables(done).sort_by([("unit", "ascending"), ("row", "ascending")])

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Finished rows in the order of the shards, about, at most 256 a table, dropped ones marked."""
        for finished in self._rows_at_work(_by_key(batch) for batch in batches):
            yield table_of(finished, self.adds)

    @cached_property
    def _rows_at_work(self) -> ConcurrentRows[dict[str, Any]]:
        return ConcurrentRows(
            copy(self)._open,  # of a copy, or the thread would keep its own end from coming
            columns=("key",),
            concurrency=CONCURRENCY,
            admitted=2 * CONCURRENCY,
            group=GROUP_ROWS,
        )

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Work[dict[str, Any]]]:
        target = partial(check_image, max_image_area=self.max_image_area)
        readers = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="shards")
        try:
            async with Sandbox(target, processes=1, seconds=DECODE_SECONDS, memory=DECODE_BYTES) as sandbox:
                yield partial(self._one, readers, sandbox)
        finally:
            readers.shutdown(cancel_futures=True)

    async def _one(
        self, readers: Executor, sandbox: Sandbox[Picture], row: tuple[Any, ...], begin: Begin
    ) -> dict[str, Any]:
        """The columns of `adds` for a row, or `drop_reason` and `drop_detail`."""
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


def check_image(body: bytes, *, max_image_area: float) -> Picture:
    """The image as it is if nothing is wrong with it; FetchError otherwise, as `decode` has it."""
    formats: dict[str | None, EncodeFormat] = {"PNG": "png", "WEBP": "webp"}
    encode_format = formats.get(sniff(body), "jpg")
    rules = Rules(
        resize_mode="no",
        skip_reencode=True,
        encode_format=encode_format,
        encode_quality=6 if encode_format == "png" else 95,
        max_image_area=max_image_area,
    )
    return decode(body, rules)


def _by_key(batch: pa.Table) -> pa.Table:
    """In the order of the shards, so that neighbours in time are neighbours on the disk."""
    key = batch["key"].cast(pa.string())
    return batch.set_column(batch.column_names.index("key"), "key", key).sort_by("key")


class Tar(NamedTuple):
    name: str
    stamp: str
    """Tells one state of the file from another: size and time, or the store's own tag."""


class Folder:
    """Shards `NNNNN.tar`, each with its table `NNNNN.parquet` or without, and the images in them by key.

    img2dataset's keys are shard · 10^d + row, so a key leads to its shard. Of a tar only the headers are read, once, by
    the reader that the trainer has (`trainer.tar`), and nothing is unpacked: samples whose key is not a number have no
    row.
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
        """By the number of the shard; FileNotFoundError if there is no such folder."""
        found = {}
        for entry in self._fs.ls(self._root, detail=True):
            name = entry["name"].rsplit("/", 1)[-1]
            if (match := _TAR.fullmatch(name)) and entry["type"] == "file":
                when = entry.get("ETag") or entry.get("mtime") or entry.get("updated") or ""
                found[int(match[1])] = Tar(name, f"{entry['size']} {when}")
        return found

    @cached_property
    def row_digits(self) -> int:
        """The d of shard · 10^d + row, from the last shard that holds an image. ValueError if its keys are others."""
        for shard in sorted(self.tars, reverse=True):
            key = next((key for key, _, _ in self._members(shard)), None)
            if key is None:
                continue
            if not shard:
                return 18  # one shard holds all keys
            for digits in range(18):
                if key // 10**digits == shard:
                    return digits
            raise ValueError(
                f"read_shards: path: {self.path}/{self.tars[shard].name} holds the key {key}, which does not "
                "begin with the number of the shard: not a folder that img2dataset wrote"
            )
        return 18

    def find(self, key: str | None, max_bytes: int) -> dict[str, Any] | tuple[str, str | None]:
        """`body` and what the shard's table says of a key, or why there is no image, as (reason, detail)."""
        if key is None or not _KEY.fullmatch(key):
            return "no_image", f"the key is {key!r:.50}"
        number = int(key)
        shard = number // 10**self.row_digits
        tar = self.tars.get(shard)
        if tar is None:
            return "no_image", f"there is no shard {shard}"
        with self._locks.setdefault(shard, threading.Lock()):  # the first row of a shard indexes it, the others wait
            entries = self._entries(shard)
        at = int(np.searchsorted(entries["key"].to_numpy(), number))
        if at == len(entries) or entries["key"][at].as_py() != number:
            return "no_image", f"not in {tar.name}"
        entry = entries.slice(at, 1).to_pylist()[0]
        if entry["status"] not in (None, "success"):
            error = failure(entry["status"], entry["error_message"])
            return error.reason, error.detail
        if entry["offset"] is None:
            return "no_image", f"not in {tar.name}"
        offset, size = entry["offset"], entry["size"]
        if size > max_bytes:
            return "body_too_large", f"{size} bytes"
        body = bytes(self._fs.cat_file(f"{self._root}/{tar.name}", offset, offset + size)) if size else b""
        if len(body) < size:
            return "shard_truncated", f"{tar.name} ends {size - len(body)} bytes early"
        return {"body": body, **{name: entry[name] for name in ("original_width", "original_height", "exif")}}

    def _load(self, shard: int) -> pa.Table:
        """The index of a shard, ascending by key, memory-mapped where it is local."""
        tar = self.tars[shard]
        what = f"{_INDEX_VERSION} {self.path}/{tar.name} {tar.stamp}"
        name = f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.arrow"
        if not self._index.exists(name):
            with self._index.output(name) as file, pa.ipc.new_file(file, _INDEX) as writer:
                writer.write_table(self._make(shard))
        with self._index.input(name) as file:
            return pa.ipc.open_file(file).read_all().combine_chunks()

    def _make(self, shard: int) -> pa.Table:
        places: dict[int, tuple[int, int]] = {}
        for key, offset, size in self._members(shard):
            places.setdefault(key, (offset, size))  # as every reader has it, the first of a name counts
        told = self._told(self.tars[shard].name.replace(".tar", ".parquet"))
        rows = [
            {"key": key, **dict(zip(("offset", "size"), places.get(key, (None, None)))), **told.get(key, {})}
            for key in sorted({*places, *told})
        ]
        return pa.Table.from_pylist(rows, _INDEX)

    def _members(self, shard: int) -> Iterator[tuple[int, int, int]]:
        """Key, offset and size of each image of a tar, as far as the tar can be read."""
        path = f"{self._root}/{self.tars[shard].name}"
        with self._fs.open(path, "rb") as file, suppress(TarError):

            def read(at: int, size: int) -> bytes:
                file.seek(at)
                return bytes(file.read(size))

            for sample in samples(read, self._fs.size(path)):
                image = sample.image()
                key = sample.key.removeprefix("./")
                if image.size >= 0 and _KEY.fullmatch(key):
                    yield int(key), image.at, image.size

    def _told(self, name: str) -> dict[int, dict[str, Any]]:
        """What the table beside a tar says, by key."""
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
