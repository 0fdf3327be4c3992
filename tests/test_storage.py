from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.storage import DamagedError, Store, sealed


def test_exactly_one_of_many_concurrent_creators_wins(tmp_path: Path) -> None:
    store, barrier, won = Store(str(tmp_path)), threading.Barrier(16), []

    def contend(i: int) -> None:
        barrier.wait()
        if store.create("commits/0.json", str(i).encode()):
            won.append(i)

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1
    assert store.read("commits/0.json") == str(won[0]).encode()
    assert store.names("commits") == ["0.json"], "the losers leave no file"


def test_create_never_replaces(store: Store) -> None:
    assert store.create("a/record", b"first")
    assert not store.create("a/record", b"second")
    assert store.read("a/record") == b"first"


def test_a_failed_output_leaves_no_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def write_half() -> None:
        with store.output("x/data") as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert not store.exists("x/data")
    assert store.names("x") == []


def test_write_replaces_and_reads_back(store: Store) -> None:
    store.write("x", b"one")
    store.write("x", b"two")
    assert store.read("x") == b"two"
    assert store.size("x") == 3
    with store.input("x") as file:
        assert file.read() == b"two"
    assert store.read_if_there("y") is None
    store.remove("x")
    store.remove("x")
    assert not store.exists("x")


def test_random_access_reads_everything_and_leaves_no_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    data = bytes(range(256)) * 1000
    entry = store.write("x", data)
    with store.mapped(entry) as file:
        file.seek(255_000)
        assert file.read(2000) == data[255_000:]
        assert file.read_at(3, 7) == data[7:10]
    with store.input("x", random_access=True) as file:
        file.seek(1000)
        assert file.read(10) == data[1000:1010]
    assert not list((tmp_path / "tmp").iterdir())
    table = pa.table({"a": range(5), "b": range(5)})
    store.write_table("t", table)
    assert store.read_table("t") == table
    assert store.read_table("t", ["b"]).column_names == ["b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.replace(b"3", b"4"), "does not match its own sha256"),
        (lambda data: data[:-1], "does not match its own sha256"),
        (lambda data: data + b" ", "does not match its own sha256"),
        (lambda data: b"", "does not match its own sha256"),
        (lambda data: b"{}", "does not match its own sha256"),
        (lambda data: b"\xff" + data, "does not match its own sha256"),
    ],
)
def test_a_changed_record_is_refused(store: Store, change: Callable[[bytes], bytes], message: str) -> None:
    record = {"unit": 3, "names": ["a", 'b", "sha256": "c'], "none": None}
    store.create("r.json", sealed(record))
    assert store.read_record("r.json") == record
    assert store.read_record("s.json") is None
    store.write("r.json", change(sealed(record)))
    with pytest.raises(DamagedError, match=message) as error:
        store.read_record("r.json")
    assert str(error.value).startswith(store.path("r.json"))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"abd", "its sha256 does not match its record"), (b"ab", "2 bytes, expected 3"), (None, "missing")],
)
def test_a_file_that_differs_from_its_entry_is_refused(store: Store, data: bytes | None, message: str) -> None:
    entry = store.write("f", b"abc")
    assert entry == {"name": "f", "bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()} == store.entry("f")
    store.check(entry)
    assert store.read_entry(entry) == b"abc"
    store.remove("f")
    if data is not None:
        store.write("f", data)
    for read in (store.check, store.read_entry, store.mapped, store.read_table):
        with pytest.raises(DamagedError, match=message) as error:
            read(entry)
        assert str(error.value).startswith(store.path("f"))


def test_every_writer_returns_the_entry_of_its_file(store: Store) -> None:
    with store.output("x.npy") as array, store.output("x.arrow") as ipc:
        np.save(array, np.arange(1000))
        with pa.ipc.new_file(ipc, pa.schema([("a", pa.binary())])) as writer:
            writer.write_table(pa.table({"a": [b"x" * 5000] * 10}))
    table = store.write_table("x.parquet", pa.table({"a": range(1000)}))
    for entry in (array.entry, ipc.entry, table):
        assert entry == store.entry(entry["name"])


def test_a_file_and_its_folders_are_synced_before_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced, then renamed, then its folder is synced, and the same follows for the record."""
    calls: list[str] = []

    def watch(name: str, show: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            calls.append(f"{name} {show(*args)}")
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    def plain(path: str) -> str:
        return os.path.relpath(re.sub(r"\.(\w+)\.[0-9a-f]{12}\.part", r"\1.part", path), tmp_path)

    watch("fsync", lambda fd: plain(os.readlink(f"/proc/self/fd/{fd}")))
    watch("replace", lambda part, final: plain(final))
    watch("link", lambda part, final: plain(final))
    store = Store(str(tmp_path / "run"))
    store.write("units/a", b"data")
    store.create("commits/a", b"record")
    assert calls == [
        "fsync .", "fsync run", "fsync run/units/a.part", "replace run/units/a", "fsync run/units",
        "fsync run", "fsync run/commits/a.part", "link run/commits/a", "fsync run/commits",
    ]  # fmt: skip


def test_only_partial_files_of_killed_processes_are_parts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.output("x/data"):
        (part,) = store.parts()
        assert part.startswith("x/.data.")
        store.write("x/.hidden.part", b"another file")
        assert store.parts() == [part]
    assert store.parts() == []
