"""Storage for a run: a folder on a local disk or in any store that fsspec supports (`s3://`, `gs://`, …).

Two guarantees hold. First, a file is complete or absent. Locally, it is written under a temporary name, synced to disk
and renamed, and its folder is synced too; an object store publishes an upload only when it is complete. Second,
`create` succeeds for exactly one caller: with a hard link locally, with a conditional put (`If-None-Match: *`)
elsewhere. A small record, created last, therefore commits any number of larger files. Readers trust records, never
listings.

A record lists each of its files with size and SHA-256 (an *entry*), and ends with its own SHA-256. Hashing takes one
core about 1 s/GB (with the CPU's SHA instructions) and needs only the standard library.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from trainer import atomic
from trainer.errors import FailedError, store_cure

Entry = dict[str, Any]
"""A file as listed in a record: its `name` in the store, its size in `bytes`, and its `sha256`."""

_SEAL = b', "sha256": "'


class DamagedError(FailedError):
    """A stored file is missing or does not match its record. The message begins with the file's path."""


class Output(io.RawIOBase):
    """A file being written. Counts and hashes the bytes written to it."""

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
        """Does nothing: the file is synced once, when it is complete."""

    @property
    def entry(self) -> Entry:
        """The entry for the bytes written so far."""
        return {"name": self.name, "bytes": self._size, "sha256": self._digest.hexdigest()}


def sealed(record: dict[str, Any]) -> bytes:
    """Serializes a record to JSON whose last key is the SHA-256 of everything before it."""
    body = json.dumps(record).encode()
    return body[:-1] + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}'


def unsealed(data: bytes, name: str) -> dict[str, Any]:
    """Parses a record written by `sealed`. Raises DamagedError, quoting the file `name`, if the checksum is wrong."""
    body = data.rpartition(_SEAL)[0] + b"}"
    if data != body[:-1] + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}':
        raise DamagedError(f"{name}: damaged: the record does not match its own sha256")
    record: dict[str, Any] = json.loads(body)
    return record


class Store:
    """A folder whose files are addressed by relative names. Cheap to create and to pickle."""

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
            # Other processes write here too, so cached listings would be stale.
            self._fs = fsspec.core.url_to_fs(self.root, use_listings_cache=False)[0]
        return self._fs

    def missing_package(self) -> str | None:
        """The problem if this machine lacks a package to open the address, with the cure; else None.

        Raises ValueError if no package supports the protocol.
        """
        try:
            if not self.local:
                fsspec.get_filesystem_class(self.root.partition("://")[0])
        except ImportError as error:
            return f"{self.root} cannot be used here: {error}{store_cure(self.root, error)}"
        return None

    def path(self, name: str = "") -> str:
        """The full path or URL of a name."""
        return f"{self.root}/{name}" if name else self.root

    def folder(self, name: str) -> Store:
        return Store(self.path(name))

    def read(self, name: str) -> bytes:
        """Returns the contents of a file. Raises FileNotFoundError if it does not exist."""
        if self.local:
            with open(self.path(name), "rb") as file:
                return file.read()
        return bytes(self.fs.cat_file(self.path(name)))

    def read_if_there(self, name: str) -> bytes | None:
        """Returns the contents of a file, or None if it does not exist."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def read_entry(self, entry: Entry) -> bytes:
        """Returns the contents of a file listed in a record. Raises DamagedError if they do not match the entry."""
        with self._expecting(entry["name"]):
            data = self.read(entry["name"])
        self._compare(entry, len(data), hashlib.sha256(data).hexdigest)
        return data

    def check(self, entry: Entry, digest: bool = True) -> None:
        """Raises DamagedError unless a file has the size and, with `digest`, the SHA-256 of its entry."""
        name = entry["name"]
        with self._expecting(name):
            size = self.size(name)
            self._compare(entry, size, (lambda: self.sha256(name)) if digest and size else None)

    @contextlib.contextmanager
    def _expecting(self, name: str) -> Iterator[None]:
        """Converts FileNotFoundError to DamagedError, for a file that a record lists."""
        try:
            yield
        except FileNotFoundError:
            raise DamagedError(f"{self.path(name)}: missing") from None

    def _compare(self, entry: Entry, size: int, digest: Callable[[], str] | None) -> None:
        path = self.path(entry["name"])
        if size != entry["bytes"]:
            raise DamagedError(f"{path}: damaged: {size:,} bytes, expected {entry['bytes']:,}")
        if digest is not None and digest() != entry["sha256"]:
            raise DamagedError(f"{path}: damaged: its sha256 does not match its record")

    def read_record(self, name: str) -> dict[str, Any] | None:
        """Reads a record written by `sealed`; None if there is none. Raises DamagedError if the checksum is wrong."""
        data = self.read_if_there(name)
        return None if data is None else unsealed(data, self.path(name))

    def entry(self, name: str) -> Entry:
        """Computes the entry of an existing file."""
        return {"name": name, "bytes": self.size(name), "sha256": self.sha256(name)}

    def write(self, name: str, data: bytes) -> Entry:
        """Writes a file atomically, replacing an existing one."""
        with self.output(name) as file:
            file.write(data)
        return file.entry

    @contextlib.contextmanager
    def output(self, name: str) -> Iterator[Output]:
        """Opens a file for writing. It appears under its name when the block ends, and not at all if the block raises.

        Its `entry` is complete after the block.
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
        _make_folder(os.path.dirname(final))
        with atomic.replacing(final) as file:
            yield Output(name, file)

    def create(self, name: str, data: bytes) -> bool:
        """Atomically creates a file with its contents. Returns False, changing nothing, if it already exists."""
        if not self.local:
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            return True
        final = self.path(name)
        _make_folder(os.path.dirname(final))
        part = atomic.part_of(final)
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(part, final)
            atomic.sync_folder(os.path.dirname(final))
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        return True

    def input(self, name: str, random_access: bool = False) -> pa.NativeFile:
        """Opens a file for reading; memory-maps a local one.

        Remote files are read ahead for sequential reading. `random_access` turns that off for a few distant reads.
        """
        if self.local:
            return pa.memory_map(self.path(name))
        cache = "none" if random_access else "readahead"  # 5 MB with every read
        return pa.PythonFile(self.fs.open(self.path(name), "rb", cache_type=cache), mode="r")

    def mapped(self, entry: Entry) -> pa.NativeFile:
        """Memory-maps a large file for repeated random access. Raises DamagedError if it does not match its entry.

        A remote file is mapped from a copy on local disk, which is deleted on close. A local file is hashed once per
        process.
        """
        name = entry["name"]
        if self.local:
            _check_once(self.path(name), entry["bytes"], entry["sha256"])
            with self._expecting(name):  # it may have been removed since it was checked
                return pa.memory_map(self.path(name))
        with tempfile.TemporaryDirectory() as folder:
            with self._expecting(name):
                self.fs.get_file(self.path(name), f"{folder}/copy")
            copy = Store(folder)
            self._compare(entry, copy.size("copy"), lambda: copy.sha256("copy"))
            return pa.memory_map(f"{folder}/copy")

    def read_table(self, file: str | Entry, columns: list[str] | None = None) -> pa.Table:
        """Reads a parquet file, or some of its columns.

        A file given by its entry is read whole, to check it against the entry. Remote files are read whole too: they
        are small, and every request is slow.
        """
        # Arrow's threads may release Python's bytes while the interpreter ends, which aborts the process (pyarrow 26;
        # 4 of 40 short scripts). Callers read several files concurrently anyway.
        if isinstance(file, str) and self.local:
            with self.input(file) as source:
                return pq.ParquetFile(source).read(columns, use_threads=False)
        data = self.read(file) if isinstance(file, str) else self.read_entry(file)
        return pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False)

    def batches(self, name: str, columns: list[str] | None = None, rows: int = 65_536) -> Iterator[pa.Table]:
        """Yields a parquet file, or some of its columns, in tables of up to `rows` rows."""
        with self.input(name) as source:
            for batch in pq.ParquetFile(source).iter_batches(rows, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])

    def write_table(self, name: str, table: pa.Table, encodings: Mapping[str, str] | None = None) -> Entry:
        """Writes a table as parquet, atomically. Columns are dictionary-encoded, except those in `encodings`."""
        others = [column for column in table.column_names if column not in (encodings or {})]
        with self.output(name) as file:
            pq.write_table(table, file, compression="zstd", use_dictionary=others, column_encoding=encodings)
        return file.entry

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name)) if self.local else bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        return os.path.getsize(self.path(name)) if self.local else int(self.fs.size(self.path(name)))

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file in hex, read in blocks of 4 MiB."""
        digest = hashlib.sha256()
        with self.input(name) as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def names(self, name: str = "") -> list[str]:
        """The sorted names of the files directly in a folder. For cleanup only: a listing proves no commit."""
        return list(self.sizes(name))

    def sizes(self, name: str = "") -> dict[str, int]:
        """Sizes in bytes of the files directly in a folder, sorted by name; empty if the folder does not exist."""
        try:
            if self.local:
                found = {}
                for entry in os.scandir(self.path(name)):
                    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
            else:
                listed = self.fs.ls(self.path(name), detail=True, refresh=True)
                found = {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in listed if e["type"] == "file"}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return dict(sorted(found.items()))

    def folders(self, name: str = "") -> list[str]:
        """The sorted names of the folders directly in a folder."""
        try:
            if self.local:
                return sorted(entry.name for entry in os.scandir(self.path(name)) if entry.is_dir())
            listed = self.fs.ls(self.path(name), detail=True, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in listed if e["type"] == "directory")

    def parts(self) -> list[str]:
        """The partial files that killed processes left in the folder and its subfolders.

        Always empty in an object store, where a lifecycle rule of the bucket deletes incomplete uploads.
        """
        if not self.local:
            return []
        walk = os.walk(self.root)
        return sorted(
            os.path.relpath(f"{at}/{n}", self.root) for at, _, names in walk for n in names if atomic.is_part(n)
        )

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            if self.local:
                os.unlink(self.path(name))
            else:
                self.fs.rm_file(self.path(name))


@lru_cache(maxsize=4096)
def _check_once(path: str, size: int, sha256: str) -> None:
    folder, name = os.path.split(path)
    Store(folder).check({"name": name, "bytes": size, "sha256": sha256})


def special_file(path: str) -> str | None:
    """The problem with a local path to a device, pipe or socket, where a read may never end; None for other paths."""
    local = path.removeprefix("file://")
    if "://" in local or not os.path.exists(local) or os.path.isfile(local) or os.path.isdir(local):
        return None
    return f"{path} is a device, pipe or socket; expected a file or a folder"


def _make_folder(path: str) -> None:
    """Makes a folder and its parents, syncing each so that it survives a power failure."""
    if not os.path.isdir(path):
        above = os.path.dirname(path)
        _make_folder(above)
        os.makedirs(path, exist_ok=True)
        atomic.sync_folder(above)
