"""Where a run lives: a folder on a local disk or any store that fsspec knows (`s3://`, `gs://`, …).

Two promises carry everything else. A file is whole or absent: locally it is written beside its place, flushed to disk
and renamed; an object store publishes an upload only when it is complete. And `create` succeeds for exactly one
caller: a hard link locally, a conditional put (`If-None-Match: *`) elsewhere. So a small record, created last, can
commit any number of larger files, and readers trust records and never listings.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq


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

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file in one atomic step, replacing any earlier one."""
        with self.output(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def output(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write to; it appears under its name when the block ends, and not at all if the block fails."""
        if not self.local:
            file = self.fs.open(self.path(name), "wb")
            try:
                yield file
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
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, final)
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

    def mapped(self, name: str) -> pa.NativeFile:
        """A large file to read at random and again and again: memory-mapped, a remote one from a copy on local disk,
        which is gone when this is closed."""
        if self.local:
            return pa.memory_map(self.path(name))
        with tempfile.NamedTemporaryFile() as copy:
            self.fs.get_file(self.path(name), copy.name)
            return pa.memory_map(copy.name)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A parquet file, or some columns of it; a remote one comes as a whole, it is small and each request is not."""
        if not self.local:
            return pq.ParquetFile(pa.BufferReader(self.read(name))).read(columns)
        with self.input(name) as file:
            return pq.ParquetFile(file).read(columns)

    def write_table(self, name: str, table: pa.Table) -> None:
        """A table as parquet, in one atomic step."""
        with self.output(name) as file:
            pq.write_table(table, file, compression="zstd")

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
        if self.local:
            try:
                return sorted(entry.name for entry in os.scandir(self.path(name)) if entry.is_file())
            except FileNotFoundError:
                return []
        try:
            found = self.fs.ls(self.path(name), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if self.local:
                os.unlink(self.path(name))
            else:
                self.fs.rm_file(self.path(name))

    def _part(self, final: str) -> str:
        folder, base = os.path.split(final)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f".{base}.{secrets.token_hex(6)}.part")


def _sync_folder(path: str) -> None:
    """Makes a new directory entry survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
