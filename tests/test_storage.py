from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.storage import Store


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(
        str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}-{request.node.name}/run"
    )


def test_of_many_who_create_exactly_one_wins(tmp_path: Path) -> None:
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
    assert store.names("commits") == ["0.json"], "the losers left nothing behind"


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


def test_what_is_read_at_random_is_all_there_and_leaves_nothing(
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
    with store.input("x", apart=True) as file:
        file.seek(1000)
        assert file.read(10) == data[1000:1010]
    assert not list((tmp_path / "tmp").iterdir())
    table = pa.table({"a": range(5), "b": range(5)})
    store.write_table("t", table)
    assert store.read_table("t") == table
    assert store.read_table("t", ["b"]).column_names == ["b"]
