"""Reads samples by number from tars on disk or in an object store, without reading the bytes between them.

The shards of a run are read through their manifest and its byte-offset index. Other WebDataset tars (from img2dataset,
open_clip, DataComp) get such an index when they are first opened. Every file is named in the configuration or checked
against the manifest. Nothing is unpickled, and no shell is run.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import struct
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
from braceexpand import braceexpand
from rich.progress import track

from trainer import atomic
from trainer.errors import InputError, store_cure
from trainer.order import shuffled, unshuffled
from trainer.tar import ABSENT, BLOCK, DOTTED, TarError, index_tar, member_name
from trainer.terminal import Console

FORMAT = "winnow-shards/1"
PICTURES_FORMAT = "winnow-pictures/1"
"""Format of `pictures.json`, an index of pictures in other files. `_elsewhere` reads it."""
INDEX_VERSION = 2
"""Version of the indexes built here. Their first row is `version, tar bytes, tar stamp, digest, digest, 0`."""
MAX_IMAGE_BYTES = 1 << 26
MAX_TEXT_BYTES = 1 << 20
WINDOW = 1 << 24
"""Bytes per request when indexing a remote tar."""
GAP = 1 << 16
"""Image and caption of a sample are fetched in one request if at most this many bytes lie between them."""

UIDS_AT_ONCE = 1024
"""JSON members per batch when reading uids."""
PAUSES = (0.3, 2.0)
"""Seconds to wait before each retry of a request."""
MAX_TARS = 2_000_000
"""Maximum number of names in a pattern with braces; the largest datasets have about a million tars."""
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")

_Row = struct.Struct("<6q")
_T = TypeVar("_T")
_R = TypeVar("_R")


class ShardsError(InputError):
    """Shards are missing, unfinished or damaged; the message names the file."""


class CorruptSampleError(ValueError):
    """A sample cannot be read; the message says why."""


@dataclass(frozen=True)
class Shard:
    """A tar and the place of its index."""

    name: str
    """its name in messages"""
    url: str
    size: int
    """bytes"""
    samples: int
    digest: str
    """hex; changes with the contents"""
    index: str
    """a local .npy file"""
    first_row: int
    """byte offset of the rows in that file"""
    captions: str = ""
    """a local file with the captions, if they are not in the tar"""
    lists_captions: bool = False
    """whether the JSON of a sample may list several captions"""
    table: str = ""
    """the parquet file with the columns of its samples, if the manifest names one"""


class Shards:
    """Samples by number, 0 to `len(shards) - 1`.

    `source` is the folder of a run or its `shards/`, any folder of WebDataset tars, one tar, or a pattern of tars such
    as `data/{00000..00999}.tar` or `data/*.tar`. Each can be local or a URL that fsspec supports (`s3://`, `gs://`,
    `https://`, …). It can also be a local folder with `pictures.json`, a study's index of pictures in other files.
    Raises ShardsError.
    """

    def __init__(self, source: str | Path) -> None:
        self.folder = str(source).removeprefix("file://")
        if self.folder.startswith("pipe:") or "::" in self.folder:
            raise ShardsError(f"shards: {self.folder}: commands and chained URLs are not run; name the tars themselves")
        self.remote = "://" in self.folder
        try:
            self.folder, self.name, self.shards = _open(self.folder)
        except (OSError, ImportError) as error:
            raise ShardsError(f"shards: {self.folder}: {error}{store_cure(self.folder, error)}") from error
        self.remote = self.remote or any("://" in shard.url for shard in self.shards)
        self._ends = list(accumulate(shard.samples for shard in self.shards))
        if not self._ends[-1]:
            raise ShardsError(f"shards: {self.folder}: nothing to read: its {len(self.shards)} tars are empty")

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """Equal for equal contents. A hash of the shards' own hashes, or for tars without hashes of the keys and byte
        ranges of all samples."""
        return hashlib.sha256("\n".join(shard.digest for shard in self.shards).encode()).hexdigest()

    def order(self, positions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The sample numbers, int64, at these positions (0 to `len - 1`) of an epoch; each number occurs once."""
        return shuffled(positions, len(self), seed, epoch)

    def positions(self, numbers: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `order`, where these sample numbers are in an epoch: indices into `numbers`, and the position
        of each, both int64."""
        return np.arange(len(numbers)), unshuffled(numbers, len(self), seed, epoch)

    def uids(self) -> Iterator[list[str | None]]:
        """Yields the uids of all samples, in the order of their numbers, one list per tar; None for a missing uid.

        Reads them from the table beside the tar if the manifest names one, otherwise from the JSON of each sample.
        Raises ShardsError if the table does not fit its tar.
        """
        for shard in self.shards:
            uids = _table_uids(shard) if shard.table else None
            yield list(self._json_uids(shard)) if uids is None else uids

    def _json_uids(self, shard: Shard) -> Iterator[str | None]:
        for start in range(0, shard.samples, UIDS_AT_ONCE):
            rows = [self._index(shard, row) for row in range(start, min(start + UIDS_AT_ONCE, shard.samples))]
            for text in self._bytes(shard, [row[2:4] if 0 < row[3] <= MAX_IMAGE_BYTES else (0, 0) for row in rows]):
                uid = None
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    uid = json.loads(text)["uid"]
                yield uid if isinstance(uid, str) else None

    def key(self, number: int) -> str:
        """`SHARD.tar:KEY`, the name of a sample in messages, read from the tar's header."""
        shard, row = self._locate(number)
        if shard.captions:
            return f"{shard.name}:sample {number}"
        at = max(0, self._index(shard, row)[0] - BLOCK)
        header = b""
        with suppress(ShardsError, OSError):
            (header,) = self._bytes(shard, [(at, BLOCK)])
        name = member_name(header).decode("ascii", "replace")
        folder, slash, base = name.rpartition("/")
        # Names come from the web and may contain terminal control characters.
        key = "".join(c if c.isprintable() else "?" for c in folder + slash + base.partition(".")[0])
        return f"{shard.name}:{key or f'sample {row}'}"

    def read(self, number: int) -> tuple[bytes, str]:
        """Reads the encoded image and the caption. Raises CorruptSampleError."""
        (sample,) = self.read_many([number])
        if isinstance(sample, CorruptSampleError):
            raise sample
        return sample

    def read_many(
        self, numbers: Iterable[int], draws: Iterable[int] | None = None
    ) -> Iterator[tuple[bytes, str] | CorruptSampleError]:
        """As `read`, for several samples: one at a time from disk, with concurrent requests from a remote store.

        `draws` has a whole number for each sample. It chooses among several captions, modulo their number; the default
        is the first caption.
        """
        places = (self._places(number, draw) for number, draw in zip(numbers, repeat(0) if draws is None else draws))
        return iter(_read_remote(list(places))) if self.remote else map(_read_local, places)

    def _bytes(self, shard: Shard, ranges: Sequence[tuple[int, ...]]) -> list[bytes]:
        """Byte ranges (offset, size) of a tar."""
        if self.remote:
            return _fetch([(shard.url, at, size) for at, size in ranges])
        file = _opened(shard.url, shard.digest).descriptor
        return [os.pread(file, size, at) for at, size in ranges]

    def _locate(self, number: int) -> tuple[Shard, int]:
        at = bisect_right(self._ends, number)
        return self.shards[at], number - (self._ends[at - 1] if at else 0)

    def _index(self, shard: Shard, row: int) -> tuple[int, ...]:
        file = _opened(shard.index, shard.digest).descriptor
        data = os.pread(file, _Row.size, shard.first_row + row * _Row.size)
        if len(data) < _Row.size:
            raise ShardsError(f"{shard.index}: shorter than when it was opened; start again")
        return _Row.unpack(data)

    def _places(self, number: int, draw: int = 0) -> _Places | CorruptSampleError:
        shard, row = self._locate(number)
        image_at, image_size, json_at, json_size, text_at, text_size = self._index(shard, row)
        if in_json := text_size == ABSENT or (shard.lists_captions and json_size > 0):
            text_at, text_size = json_at, json_size
        if image_size == ABSENT:
            return CorruptSampleError("it has no jpg, png, webp, gif or avif")
        if image_size == DOTTED:
            return CorruptSampleError("its picture's name has several dots, and a key ends at the first")
        if text_size == ABSENT:
            return CorruptSampleError("it has no caption: neither txt nor json")
        # A tar begins with a header. Captions in a separate file are checked when they are read.
        first, longest = (0, sys.maxsize) if shard.captions else (BLOCK, shard.size)
        most_text = MAX_IMAGE_BYTES if shard.lists_captions else MAX_TEXT_BYTES
        for at, size, end, most in (
            (image_at, image_size, shard.size, MAX_IMAGE_BYTES), (text_at, text_size, longest, most_text)
        ):  # fmt: skip
            if at < first or size < 0 or at + size > end:
                return CorruptSampleError(f"the index points outside {shard.name}")
            if size > most:
                return CorruptSampleError(f"{size:,} bytes, more than {most:,}")
        return _Places(shard, image_at, image_size, text_at, text_size, in_json, draw)


class _Places(NamedTuple):
    """Where the image and the caption of a sample are in their tar."""

    shard: Shard
    image_at: int
    image_size: int
    text_at: int
    text_size: int
    in_json: bool
    """whether the caption is in a JSON object: in one of its `captions`, objects with a `caption` each; without these,
    in its `caption`, a text or a list of texts"""
    draw: int
    """chooses among several captions"""

    def ranges(self) -> list[tuple[str, int, int]]:
        """The byte ranges (url, offset, size) to request: one if the two parts are close together."""
        image = (self.shard.url, self.image_at, self.image_size)
        if self.shard.captions:
            return [image]
        start = min(self.image_at, self.text_at)
        size = max(self.image_at + self.image_size, self.text_at + self.text_size) - start
        if size <= self.image_size + self.text_size + GAP:
            return [(self.shard.url, start, size)]
        return [image, (self.shard.url, self.text_at, self.text_size)]


def _read_local(places: _Places | CorruptSampleError) -> tuple[bytes, str] | CorruptSampleError:
    if isinstance(places, CorruptSampleError):
        return places
    shard, image_at, image_size, text_at, text_size, *_ = places
    image = os.pread(_opened(shard.url, shard.digest).descriptor, image_size, image_at)
    text = os.pread(_opened(shard.captions or shard.url, shard.digest).descriptor, text_size, text_at)
    return _sample(image, text, places)


def _read_remote(found: list[_Places | CorruptSampleError]) -> list[tuple[bytes, str] | CorruptSampleError]:
    # The requests of all samples are concurrent.
    ranges = [[] if isinstance(places, CorruptSampleError) else places.ranges() for places in found]
    blocks = iter(_fetch(list(chain.from_iterable(ranges))))
    samples: list[tuple[bytes, str] | CorruptSampleError] = []
    for places, own in zip(found, ranges):
        if isinstance(places, CorruptSampleError):
            samples.append(places)
            continue
        parts = [(start, next(blocks)) for _, start, _ in own]
        (image_start, image), (text_start, text) = parts[0], parts[-1]  # the same block if there is only one
        image = image[places.image_at - image_start :][: places.image_size]
        if places.shard.captions:
            file = _opened(places.shard.captions, places.shard.digest).descriptor
            text = os.pread(file, places.text_size, places.text_at)
        else:
            text = text[places.text_at - text_start :][: places.text_size]
        samples.append(_sample(image, text, places))
    return samples


def _sample(image: bytes, text: bytes, places: _Places) -> tuple[bytes, str] | CorruptSampleError:
    if len(image) != places.image_size or len(text) != places.text_size:
        return CorruptSampleError("its tar is shorter than when it was indexed")
    try:
        if not places.in_json:
            return image, text.decode("utf-8")
        about = json.loads(text)
        captions = [one["caption"] for one in about.get("captions") or ()] if places.shard.lists_captions else []
        caption = captions or about["caption"]
        if isinstance(caption, list) and caption:
            caption = caption[places.draw % len(caption)]
        caption.encode()  # JSON can contain a lone surrogate, which tokenizers refuse
        return image, str(caption)
    except UnicodeError:
        return CorruptSampleError("the caption is not UTF-8")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return CorruptSampleError("it has no txt, and its json has no text as caption")


def _table_uids(shard: Shard) -> list[str | None] | None:
    """The uids in a shard's table, or None if the table was not copied with the tars, which training can do without."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fsspec.open(shard.table, "rb") as file:
            uids: list[str | None] = pq.read_table(file, columns=["uid"])["uid"].to_pylist()
    except FileNotFoundError:
        return None
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ShardsError(f"{shard.table}: its uids cannot be read: {error}") from error
    if len(uids) != shard.samples:
        raise ShardsError(f"{shard.table}: {len(uids):,} rows, expected the {shard.samples:,} of {shard.name}")
    return uids


class _File:
    """A file descriptor, closed with its last reference. A memory map would kill the process if the file shrinks."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


# Bounded, because a process may open only about 1,000 files and a big dataset has tens of thousands of shards. The
# digest is part of the key so that a changed file is not read through the descriptor of the old one.
@lru_cache(maxsize=256)
def _opened(path: str, digest: str) -> _File:
    return _File(path)


def _fetch(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Fetches byte ranges (url, offset, size) of remote files concurrently; tries each up to three times."""
    blocks: list[bytes] = [b""] * len(ranges)
    left = [i for i, (_, _, size) in enumerate(ranges) if size]
    pauses = iter(PAUSES)
    while left:
        fs = _files(ranges[0][0])
        urls, starts, sizes = zip(*(ranges[i] for i in left))
        paths = [fs._strip_protocol(url) for url in urls]
        ends = [start + size for start, size in zip(starts, sizes)]
        answers = fs.cat_ranges(paths, list(starts), ends, on_error="return")
        failed = []
        for i, answer in zip(left, answers):
            if isinstance(answer, Exception):
                failed.append(i)
            elif len(answer) > ranges[i][2]:
                raise ShardsError(f"{ranges[i][0]}: the server ignores range requests")
            else:
                blocks[i] = bytes(answer)
        left = failed
        if failed:
            if (pause := next(pauses, None)) is None:
                url, start, size = ranges[failed[0]]
                error = next(answer for answer in answers if isinstance(answer, Exception))
                raise ShardsError(f"{url}: bytes {start} to {start + size} cannot be read: {error!r}")
            time.sleep(pause)
    return blocks


def _files(url: str) -> Any:
    # Looked up each time: fsspec caches file systems, and gives a forked process new ones.
    try:
        return fsspec.core.url_to_fs(url)[0]
    except ValueError as error:
        raise ShardsError(f"shards: {url}: {error}") from error


# --- Opening ----------------------------------------------------------------------------------------------------------


def _open(source: str) -> tuple[str, str, list[Shard]]:
    """The folder as named in messages, the dataset's name, and its shards."""
    fs = _files(source)
    if source.endswith(".tar") or "{" in source or "*" in source:
        return source, source, _index_all(_tars(fs, source), source)
    folder = source.rstrip("/") or source
    if "://" not in folder and not os.path.isdir(folder):
        raise ShardsError(f"shards: {folder} is not a folder")
    if "://" not in folder and os.path.isfile(f"{folder}/pictures.json"):
        return folder, *_elsewhere(folder)
    for place in (folder, f"{folder}/shards"):
        if fs.exists(f"{place}/manifest.json"):
            return place, *_finished(fs, place)
    found = {place: _listing(fs, place) for place in (folder, f"{folder}/shards")}
    for place, names in found.items():
        if any(name.endswith(".index.npy") and f"{name[:-10]}.tar" in names for name in names):
            raise ShardsError(
                f"shards: {place} has no manifest.json: the run that writes it is not finished; run it again first"
            )
        if tars := [_Tar.of(name, f"{place}/{name}", info) for name, info in names.items() if name.endswith(".tar")]:
            return place, place, _index_all(tars, place)
    raise ShardsError(f"shards: {folder} has no manifest.json (of a finished run) and no .tar files")


def _listing(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    # The names of a folder's files, sorted, with what the store reports about each.
    with suppress(FileNotFoundError, NotADirectoryError):
        entries = fs.ls(folder, detail=True)
        return {
            name: entry
            for entry in sorted(entries, key=lambda entry: str(entry["name"]))
            if entry["type"] == "file" and (name := str(entry["name"]).rsplit("/", 1)[-1])
        }
    return {}


def _finished(fs: Any, folder: str) -> tuple[str, list[Shard]]:
    """The name and shards of a finished run."""
    manifest = _read_manifest(fs, f"{folder}/manifest.json")
    if not fs.exists(f"{folder}/_SUCCESS"):
        raise ShardsError(
            f"shards: {folder} has no _SUCCESS: the run that writes it is not finished; run it again first"
        )
    entries: list[dict[str, Any]] = manifest["shards"]
    total = sum(entry["samples"] for entry in entries)
    if not total or total != manifest["samples"]:
        raise ShardsError(
            f"{folder}/manifest.json: says {manifest['samples']} samples, its shards add up to {total}"
            + ("" if total else "; there is nothing to read")
        )
    open_one = partial(_finished_shard, folder, bool(manifest.get("captions")))
    if "://" in folder:
        with ThreadPoolExecutor(16) as pool:
            shards = _shown(pool, open_one, entries, "fetching indexes")
    else:
        shards = [open_one(entry) for entry in entries]
    return manifest["name"], shards


def _read_manifest(fs: Any, path: str) -> dict[str, Any]:
    try:
        manifest = json.loads(fs.cat_file(path))
        if manifest["format"] != FORMAT:
            raise ShardsError(f"{path}: format {manifest['format']!r}, expected {FORMAT!r}")
        for shard in manifest["shards"]:
            if any(Path(shard[key]).name != shard[key] for key in ("name", "index", "parquet") if key in shard):
                raise ShardsError(f"{path}: {shard['name']!r} is not a plain file name")
            _ = int(shard["samples"]), int(shard["bytes"]), str(shard["sha256"])
        _ = str(manifest["name"]), int(manifest["samples"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ShardsError):
            raise
        raise ShardsError(f"{path}: not a manifest of shards ({type(error).__name__}: {error})") from error
    return dict(manifest)


def _finished_shard(folder: str, lists_captions: bool, entry: dict[str, Any]) -> Shard:
    tar, index = f"{folder}/{entry['name']}", f"{folder}/{entry['index']}"
    local = index
    if "://" in folder:
        local = _cached(f"{index}\n{entry['sha256']}")
        if not os.path.exists(local):
            try:
                encoded = _files(index).cat_file(index)
            except FileNotFoundError as error:
                raise ShardsError(f"{index}: missing, but the manifest lists it") from error
            with atomic.replacing(local, parents=True) as file:
                file.write(encoded)
    else:
        for path in (tar, index):
            if not os.path.isfile(path):
                raise ShardsError(f"{path}: missing, but the manifest lists it")
        if (found := os.path.getsize(tar)) != entry["bytes"]:
            raise ShardsError(
                f"{tar}: {found} bytes, but the manifest says {entry['bytes']}; the file is cut or was changed"
            )
    first_row = _first_row(local, entry["samples"], index)
    table = f"{folder}/{entry['parquet']}" if "parquet" in entry else ""
    return Shard(
        entry["name"], tar, entry["bytes"], entry["samples"], entry["sha256"], local, first_row,
        lists_captions=lists_captions, table=table,
    )  # fmt: skip


def _first_row(path: str, samples: int, name: str) -> int:
    """The byte offset of the rows in an index. Raises ShardsError, with this name, if it is not one of `samples`."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ShardsError(f"{name}: not an index ({error})") from error
    if rows.shape != (samples, 6) or rows.dtype != np.dtype("<i8") or not rows.flags.c_contiguous:
        raise ShardsError(f"{name}: {rows.dtype} of shape {rows.shape}, expected int64 of shape ({samples}, 6)")
    return int(rows.offset)


def _elsewhere(folder: str) -> tuple[str, list[Shard]]:
    """The name and shards of an index of pictures in other files.

    `pictures.json` has `format, name, files` and the SHA-256 of the `index`. Each of the files has its `url, bytes,
    sha256` and its number of `samples`. `index.npy` has the six numbers of every sample, file after file, as in the
    index of a tar: the picture is a range of its file, and the caption is a range of `captions.txt`.
    """
    path, index, captions = (f"{folder}/{name}" for name in ("pictures.json", "index.npy", "captions.txt"))
    try:
        with open(path, "rb") as file:
            described = json.loads(file.read())
        if described["format"] != PICTURES_FORMAT:
            raise ShardsError(f"{path}: format {described['format']!r}, expected {PICTURES_FORMAT!r}")
        shards, at = [], _first_row(index, sum(entry["samples"] for entry in described["files"]), index)
        for entry in described["files"]:
            url, size, count = str(entry["url"]), int(entry["bytes"]), int(entry["samples"])
            if "://" not in url and (not os.path.isfile(url) or os.path.getsize(url) != size):
                raise ShardsError(f"{url}: missing, or not of {size:,} bytes as {path} says")
            name = url.rsplit("/", 1)[-1]
            digest = hashlib.sha256(f"{entry['sha256']}\n{described['index']}".encode()).hexdigest()
            shards.append(Shard(name, url, size, count, digest, index, at, captions))
            at += count * _Row.size
        return str(described["name"]), shards
    except (ValueError, KeyError, TypeError, EOFError) as error:
        if isinstance(error, ShardsError):
            raise
        raise ShardsError(f"{path}: not an index of pictures ({type(error).__name__}: {error})") from error


# --- Tars without an index --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tar:
    name: str
    url: str
    size: int
    stamp: int
    """Changes with the file: its modification time in ns, or a hash of what the store reports about it."""

    @classmethod
    def of(cls, name: str, url: str, info: dict[str, Any]) -> _Tar:
        if "://" not in url:
            stat = os.stat(url)
            return cls(name, url, stat.st_size, stat.st_mtime_ns)
        if info.get("size") is None:
            raise ShardsError(f"{url}: the server does not report its size, so it cannot be read by ranges")
        reported = [str(info.get(key)) for key in ("ETag", "etag", "LastModified", "mtime", "updated", "created")]
        stamp = int.from_bytes(hashlib.sha256("\n".join(reported).encode()).digest()[:7], "big")
        return cls(name, url, int(info["size"]), stamp)


def _tars(fs: Any, pattern: str) -> list[_Tar]:
    """The tars that a pattern names. Raises ShardsError if one of them does not exist."""
    urls = _expanded(pattern)
    if "*" in pattern:
        folder = pattern.rpartition("/")[0]
        if set(folder) & set("*{"):
            raise ShardsError(f"shards: {pattern}: a * is allowed only in the name of the tars, in one folder")
        found = {str(path).rpartition("/")[2] for url in urls for path in fs.glob(url)}
        urls = [f"{folder or '.'}/{name}" for name in sorted(found) if name.endswith(".tar")]
        if not urls:
            raise ShardsError(f"shards: {pattern}: no such tar")
    names = [url.rsplit("/", 1)[-1] for url in urls]
    if len(set(names)) < len(names):
        names = urls

    def found_tar(name: str, url: str) -> _Tar | None:
        try:
            return _Tar.of(name, url, fs.info(url) if "://" in url else {})
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(16) as pool:
        tars = list(pool.map(found_tar, names, urls))
    missing = [url for url, tar in zip(urls, tars) if tar is None]
    if missing:
        raise ShardsError(
            f"shards: {pattern}: {len(missing)} of {len(urls)} tars do not exist: {_some(missing)}\n"
            f"  Fetch them, narrow the pattern, or name the folder to read what is there."
        )
    return [tar for tar in tars if tar is not None]


def _expanded(pattern: str) -> list[str]:
    # braceexpand holds a whole range in memory before it yields the first name, so check the length of ranges first.
    try:
        longest = max((abs(int(b) - int(a)) for a, b in _RANGE.findall(pattern)), default=0)
        urls = list(islice(braceexpand(pattern), MAX_TARS + 1)) if longest < MAX_TARS else []
    except ValueError as error:
        raise ShardsError(f"shards: {pattern}: {error}") from error
    if not 0 < len(urls) <= MAX_TARS:
        raise ShardsError(f"shards: {pattern}: its braces name more than {MAX_TARS:,} tars")
    return urls


def _index_all(tars: list[_Tar], source: str) -> list[Shard]:
    """Loads the index of each tar. Builds indexes that are missing or do not fit their tar."""
    known = {tar.url: _known(tar) for tar in tars}
    todo = [tar for tar in tars if known[tar.url] is None]
    if todo:
        started = time.perf_counter()
        _opened.cache_clear()
        # In random order, so that ranks that start together share the work: each skips tars that are already indexed.
        random.Random(os.getpid()).shuffle(todo)
        # Local tars take CPU time in Python, so they need processes. Remote tars take only network time.
        pool: Executor
        if "://" in source or len(todo) == 1:
            pool = ThreadPoolExecutor(16)
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            pool = ProcessPoolExecutor(min(cores, len(todo)), multiprocessing.get_context("fork"))
        with pool:
            problems = [problem for problem in _shown(pool, _build, todo, "indexing") if problem]
        if problems:
            raise ShardsError(
                f"shards: {source}: {len(problems)} of {len(tars)} tars cannot be read:\n  "
                + "\n  ".join(sorted(problems)[:20])
                + ("\n  …" if len(problems) > 20 else "")
                + "\n  Fetch them again, or remove them."
            )
        known.update((tar.url, _known(tar)) for tar in todo)
        seconds = time.perf_counter() - started
        where = sorted({os.path.dirname(shard.index) or "." for tar in todo if (shard := known[tar.url])})
        print(f"indexed {len(todo):,} tars in {seconds:.1f} s; the indexes are in {_some(where)}", file=sys.stderr)
    shards = [shard for shard in known.values() if shard is not None]
    if len(shards) < len(known):
        raise ShardsError(f"shards: {source}: tars changed while they were read; wait until they are complete")
    return shards


def _known(tar: _Tar) -> Shard | None:
    for path in _index_paths(tar):
        with suppress(ValueError, OSError, EOFError):
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            sound = rows.dtype == np.dtype("<i8") and rows.ndim == 2 and rows.shape[1] == 6 and rows.flags.c_contiguous
            if sound and len(rows) and rows[0, :3].tolist() == [INDEX_VERSION, tar.size, tar.stamp]:
                digest = rows[0, 3:5].tobytes().hex()
                return Shard(tar.name, tar.url, tar.size, len(rows) - 1, digest, path, rows.offset + _Row.size)
    return None


def _build(tar: _Tar) -> str | None:
    """Indexes a tar; returns an error message if it cannot."""
    if _known(tar):
        return None
    try:
        if "://" in tar.url:
            rows, digest = index_tar(_Window(tar).read, tar.size)
        else:
            opened = _File(tar.url)
            rows, digest = index_tar(lambda at, size: os.pread(opened.descriptor, size, at), tar.size)
    except (TarError, OSError, ShardsError) as error:
        return f"{tar.url}: {error}"
    mark = np.frombuffer(digest[:16], np.int64)
    table = np.vstack([np.array([INDEX_VERSION, tar.size, tar.stamp, *mark, 0], np.int64), rows])
    problem: OSError | None = None
    for path in _index_paths(tar):
        try:
            with atomic.replacing(path, parents=True) as file:
                np.save(file, table)
            return None
        except OSError as error:  # a folder of another user, or a read-only or full disk
            problem = error
    return f"{tar.url}: its index cannot be written: {problem}"


class _Window:
    """Reads a remote file from start to end in large requests."""

    def __init__(self, tar: _Tar) -> None:
        self.tar, self.start, self.data = tar, 0, b""

    def read(self, at: int, size: int) -> bytes:
        if at < self.start or at + size > self.start + len(self.data):
            length = max(0, min(max(size, WINDOW), self.tar.size - at))
            self.start, (self.data,) = at, _fetch([(self.tar.url, at, length)])
        return self.data[at - self.start : at - self.start + size]


def _index_paths(tar: _Tar) -> list[str]:
    # Where the index of a tar may be, preferred place first.
    beside = [] if "://" in tar.url else [f"{tar.url}.index.npy"]
    return [*beside, _cached(tar.url if "://" in tar.url else os.path.abspath(tar.url))]


def _cached(name: str) -> str:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(root, "winnow", "indexes", hashlib.sha256(name.encode()).hexdigest()[:32] + ".npy")


def _shown(pool: Executor, work: Callable[[_T], _R], items: Sequence[_T], label: str) -> list[_R]:
    """The results of `work`, with a progress bar if standard error is a terminal."""
    console = Console(stderr=True)
    quiet = not console.is_terminal
    return list(track(pool.map(work, items), label, len(items), console=console, transient=True, disable=quiet))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
