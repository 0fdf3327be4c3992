"""Where a run lives: a folder on a local disk or any store that fsspec knows (`s3://`, `gs://`, …).

Two promises carry everything else. A file is whole or absent: locally it is written beside its place, flushed to disk
and renamed, and its folder is flushed too; an object store publishes an upload only when it is complete. And `create`
succeeds for exactly one caller: a hard link locally, a conditional put (`If-None-Match: *`) elsewhere. So a small
record, created last, can commit any number of larger files, and readers trust records and never listings.

A record names each of its files with size and SHA-256 (an *entry*), and carries a SHA-256 of itself. Hashing costs a
second of one core for each GB (with the CPU's SHA instructions), and needs nothing that Python does not bring.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

Entry = dict[str, Any]
"""What a record says of a file: its `name` in the store, its size in `bytes`, and its `sha256`."""

_PART = re.compile(r"\..+\.[0-9a-f]{12}\.part")
_SEAL = b', "sha256": "'


class DamagedError(Exception):
    """A stored file is missing or is not what its record says; the message begins with the file's path."""


class Output(io.RawIOBase):
    """A file under way: passes on what is written to it, and counts and hashes it."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.name, self._file, self._size, self._digest = name, file, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._digest.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing: what counts is flushed to disk at the end."""

    @property
    def entry(self) -> Entry:
        """Of what was written so far."""
        return {"name": self.name, "bytes": self._size, "sha256": self._digest.hexdigest()}


def sealed(record: dict[str, Any]) -> bytes:
    """A record as JSON whose last key is the SHA-256 of all before it."""
    body = json.dumps(record).encode()
    return body[:-1] + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}'


def unsealed(data: bytes, name: str) -> dict[str, Any]:
    """The record in these bytes; DamagedError, with the `name` of its file, if they are not as `sealed` made them."""
    body = data.rpartition(_SEAL)[0] + b"}"
    if data != body[:-1] + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}':
        raise DamagedError(f"{name}: damaged: the record does not have the sha256 that it states")
    record: dict[str, Any] = json.loads(body)
    return record


class Store:
    """A folder, addressed by names relative to it. Cheap to create and to pickle."""

    def __init__(self, root: str) -> None:
        self.local = "://" not in root or root.startswith("file://")
        self.root = os.path.abspath(root.removeprefix("file://")) if self.local else root.rstrip("/")
        self._fs: Any = None

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None}

    @property
    def fs(self) -> Any:
        """The fsspec file system behind a remote root."""
        if self._fs is None:
            # Others write here too: what a listing said once is not to be believed again.
            self._fs = fsspec.core.url_to_fs(self.root, use_listings_cache=False)[0]
        return self._fs

    def path(self, name: str = "") -> str:
        """The full path or URL of a name."""
        return f"{self.root}/{name}" if name else self.root

    def folder(self, name: str) -> Store:
        return Store(self.path(name))

    def read(self, name: str) -> bytes:
        """The contents of a file; FileNotFoundError if there is none."""
        if self.local:
            with open(self.path(name), "rb") as file:
                return file.read()
        return bytes(self.fs.cat_file(self.path(name)))

    def read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def read_entry(self, entry: Entry) -> bytes:
        """The contents of a file that a record names; DamagedError unless they are what the record says."""
        try:
            data = self.read(entry["name"])
        except FileNotFoundError:
            raise DamagedError(f"{self.path(entry['name'])}: missing") from None
        self._compare(entry, len(data), hashlib.sha256(data).hexdigest)
        return data

    def check(self, entry: Entry, digest: bool = True) -> None:
        """DamagedError unless a file has the size of its entry and, with `digest`, the contents too."""
        name = entry["name"]
        try:
            size = self.size(name)
            self._compare(entry, size, (lambda: self.sha256(name)) if digest and size else None)
        except FileNotFoundError:
            raise DamagedError(f"{self.path(name)}: missing") from None

    def _compare(self, entry: Entry, size: int, digest: Callable[[], str] | None) -> None:
        path = self.path(entry["name"])
        if size != entry["bytes"]:
            raise DamagedError(f"{path}: damaged: {size:,} bytes, expected {entry['bytes']:,}")
        if digest is not None and digest() != entry["sha256"]:
            raise DamagedError(f"{path}: damaged: its sha256 is not the one on record")

    def read_record(self, name: str) -> dict[str, Any] | None:
        """A record as `sealed` made it, None if there is none; DamagedError if it was changed."""
        data = self.read_if_there(name)
        return None if data is None else unsealed(data, self.path(name))

    def entry(self, name: str) -> Entry:
        """What a record should say of a file that is there."""
        return {"name": name, "bytes": self.size(name), "sha256": self.sha256(name)}

    def write(self, name: str, data: bytes) -> Entry:
        """Writes a whole file in one atomic step, replacing any earlier one."""
        with self.output(name) as file:
            file.write(data)
        return file.entry

    @contextlib.contextmanager
    def output(self, name: str) -> Iterator[Output]:
        """A file to write to; it appears under its name when the block ends, and not at all if the block fails.

        Its `entry` is complete when the block has ended.
        """
        if not self.local:
            file = self.fs.open(self.path(name), "wb")
            try:
                yield Output(name, file)
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()
                raise
            file.close()
            return
        final = self.path(name)
        part = self._part(final)
        try:
            with open(part, "wb") as file:
                yield Output(name, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, final)
            _sync_folder(os.path.dirname(final))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise

    def create(self, name: str, data: bytes) -> bool:
        """Creates a file that must not exist yet, contents and all in one step. False: somebody else was first."""
        if not self.local:
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            return True
        final = self.path(name)
        part = self._part(final)
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(part, final)
            _sync_folder(os.path.dirname(final))
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        return True

    def input(self, name: str, apart: bool = False) -> pa.NativeFile:
        """A file to read from its beginning to its end; `apart`: in a few places far from each other.

        Memory-mapped where it is local.
        """
        if self.local:
            return pa.memory_map(self.path(name))
        cache = "none" if apart else "readahead"  # the next 5 MB with every read
        return pa.PythonFile(self.fs.open(self.path(name), "rb", cache_type=cache), mode="r")

    def mapped(self, entry: Entry) -> pa.NativeFile:
        """A large file to read at random and again and again: memory-mapped, a remote one from a copy on local disk,
        which is gone when this is closed. DamagedError unless it is what its record says; a local one is hashed once
        in the life of a process."""
        name = entry["name"]
        if self.local:
            _check_once(self.path(name), entry["bytes"], entry["sha256"])
            return pa.memory_map(self.path(name))
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.fs.get_file(self.path(name), f"{folder}/copy")
            except FileNotFoundError:
                raise DamagedError(f"{self.path(name)}: missing") from None
            copy = Store(folder)
            self._compare(entry, copy.size("copy"), lambda: copy.sha256("copy"))
            return pa.memory_map(f"{folder}/copy")

    def read_table(self, of: str | Entry, columns: list[str] | None = None) -> pa.Table:
        """A parquet file, or some columns of it. One that is named by its entry is checked, and so read as a whole, as
        are remote ones: they are small and each request is not."""
        if isinstance(of, str) and self.local:
            with self.input(of) as file:
                return pq.ParquetFile(file).read(columns)
        data = self.read(of) if isinstance(of, str) else self.read_entry(of)
        return pq.ParquetFile(pa.BufferReader(data)).read(columns)

    def batches(self, name: str, columns: list[str] | None = None, rows: int = 65_536) -> Iterator[pa.Table]:
        """A parquet file, or some columns of it, so many rows at a time."""
        with self.input(name) as source:
            for batch in pq.ParquetFile(source).iter_batches(rows, columns=columns):
                yield pa.Table.from_batches([batch])

    def write_table(self, name: str, table: pa.Table) -> Entry:
        """A table as parquet, in one atomic step."""
        with self.output(name) as file:
            pq.write_table(table, file, compression="zstd")
        return file.entry

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name)) if self.local else bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        return os.path.getsize(self.path(name)) if self.local else int(self.fs.size(self.path(name)))

    def sha256(self, name: str) -> str:
        """The digest of a file, read in pieces."""
        digest = hashlib.sha256()
        with self.input(name) as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def names(self, name: str = "") -> list[str]:
        """The names of the files directly in a folder, sorted: for cleaning up, never to learn what is committed."""
        return list(self.sizes(name))

    def sizes(self, name: str = "") -> dict[str, int]:
        """The files directly in a folder, sorted by name, and their sizes in bytes; nothing if there is no folder."""
        try:
            if self.local:
                found = {}
                for entry in os.scandir(self.path(name)):
                    with contextlib.suppress(FileNotFoundError):  # gone since
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
            else:
                listed = self.fs.ls(self.path(name), detail=True, refresh=True)
                found = {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in listed if e["type"] == "file"}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return dict(sorted(found.items()))

    def folders(self, name: str = "") -> list[str]:
        """The names of the folders directly in a folder, sorted."""
        try:
            if self.local:
                return sorted(entry.name for entry in os.scandir(self.path(name)) if entry.is_dir())
            listed = self.fs.ls(self.path(name), detail=True, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in listed if e["type"] == "directory")

    def parts(self) -> list[str]:
        """What killed processes have left of files under way, in the folder and all below it. An object store has no
        such names: it forgets uploads that were not completed, by a rule of the bucket."""
        if not self.local:
            return []
        walk = os.walk(self.root)
        return sorted(os.path.relpath(f"{at}/{n}", self.root) for at, _, names in walk for n in names if is_part(n))

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self.local:
                os.unlink(self.path(name))
            else:
                self.fs.rm_file(self.path(name))

    def _part(self, final: str) -> str:
        folder, base = os.path.split(final)
        _make_folder(folder)
        return os.path.join(folder, f".{base}.{secrets.token_hex(6)}.part")


def is_part(name: str) -> bool:
    """Whether a file name is that of a file under way."""
    return _PART.fullmatch(name) is not None


@lru_cache(maxsize=4096)
def _check_once(path: str, size: int, sha256: str) -> None:
    folder, name = os.path.split(path)
    Store(folder).check({"name": name, "bytes": size, "sha256": sha256})


def _make_folder(path: str) -> None:
    """Makes a folder and those above it, so that they survive a power cut."""
    if not os.path.isdir(path):
        above = os.path.dirname(path)
        _make_folder(above)
        os.makedirs(path, exist_ok=True)
        _sync_folder(above)


def _sync_folder(path: str) -> None:
    """Makes a new directory entry survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
