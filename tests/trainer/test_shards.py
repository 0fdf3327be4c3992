from __future__ import annotations

import http.server
import io
import json
import os
import pickle
import re
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import ANY

import fsspec
import numpy as np
import pytest
import webdataset as wds

from tests.trainer.shards import samples, write_foreign, write_shards, write_tar
from trainer import shards as module
from trainer.data import Batches
from trainer.model import create
from trainer.shards import CorruptSampleError, Shards, ShardsError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "winnow" / "indexes"


def members(*names: str) -> list[tuple[str, bytes]]:
    return [(name, name.encode()) for name in names]


def contents(shards: Shards) -> list[tuple[str, object]]:
    found = shards.read_many(range(len(shards)))
    return [
        (shards.key(i), str(sample) if isinstance(sample, CorruptSampleError) else sample)
        for i, sample in enumerate(found)
    ]


@pytest.mark.parametrize("source", ["", "/{00000..00002}.tar", "/{00000,00001,00002}.tar", "/*.tar"])
def test_foreign_tars_are_read_by_folder_or_pattern(tmp_path: Path, source: str) -> None:
    shards = Shards(f"{write_foreign(tmp_path / 'data', samples(37))}{source}")
    assert [shards.read(i) for i in range(len(shards))] == samples(37)
    assert shards.key(36) == "00002.tar:000000036"


def test_one_tar_and_datacomps_outer_folder(tmp_path: Path) -> None:
    write_foreign(tmp_path / "data" / "shards", samples(20))
    assert len(Shards(tmp_path / "data" / "shards" / "00001.tar")) == 4
    assert len(Shards(tmp_path / "data")) == 20


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_grouped_as_webdataset_groups_them(tmp_path: Path, form: int) -> None:
    deep = "d" * 90 + "/" + "e" * 90
    tar = write_tar(
        tmp_path / "a.tar",
        [
            *members("a.txt", "a.jpg", "a.json"),
            *members("./b/c.JPG", "./b/c.cls", "./b/c.seg.png", "./b/c.txt"),
            *members("noextension", "_/.hidden.jpg", "d.cls"),
            *members("e.webp", "e.txt", "e.webp", "e.txt"),
            *members("f.png", "f.jpg", "f.txt"),
            *members(f"{deep}.jpg", f"{deep}.txt"),
            *members("../../etc/passwd.jpeg", "../../etc/passwd.txt"),
        ],
        form,
    )
    assert contents(Shards(tar)) == [
        ("a.tar:a", (b"a.jpg", "a.txt")),
        ("a.tar:./b/c", (b"./b/c.JPG", "./b/c.txt")),
        ("a.tar:e", (b"e.webp", "e.txt")),
        ("a.tar:e", (b"e.webp", "e.txt")),
        ("a.tar:f", (b"f.jpg", "f.txt")),
        (Shards(tar).key(5), (f"{deep}.jpg".encode(), f"{deep}.txt")),
        ("a.tar:../../etc/passwd", (b"../../etc/passwd.jpeg", "../../etc/passwd.txt")),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.txt", "x/a.jpg", "x/a.txt", "x.y/b.jpg", "x.y/b.txt", ".c.jpg", "A.TXT", "A.jpg"],
        ["v1.0/0.jpg", "v1.0/0.txt", "v1.0/1.JPG", "v1.0/1.TXT"],
        ["a.jpg", "a.seg.png", "a.txt", "a.txt.bak"],
        ["./a.jpg", "./a.txt", "a.jpg", "a.txt"],
        ["a.jpg", "b.jpg", "a.txt", "b.txt"],
        ["__meta__/a.jpg", "__index__", "a.jpg", "a.txt"],
        ["Füße 1.jpg", "Füße 1.txt", "日本.jpg", "日本.txt"],
        ["a b/c d.jpg", "a b/c d.txt", "a/.b/c.jpg", "a/.b/c.txt"],
    ],
)
def test_the_grouping_is_webdatasets_own(tmp_path: Path, names: list[str]) -> None:
    tar = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    theirs = [s for s in wds.WebDataset(str(tar), shardshuffle=False) if {"jpg", "txt"} & set(s)]
    assert [sample for _, sample in contents(Shards(tar))] == [
        (s["jpg"], s["txt"].decode()) if {"jpg", "txt"} <= set(s) else ANY for s in theirs
    ]


def test_names_without_a_picture_in_webdataset_get_a_reason(tmp_path: Path) -> None:
    names = ["a.v2.jpg", "a.v2.txt", "b.1.JPG", "b.txt", "._c.jpg", "c.jpg", "c.txt", "x/._d.jpg", "x/d.jpg", "x/d.txt"]
    assert contents(Shards(write_tar(tmp_path / "a.tar", members(*names)))) == [
        ("a.tar:a", "its picture's name has several dots, and a key ends at the first"),
        ("a.tar:b", "its picture's name has several dots, and a key ends at the first"),
        ("a.tar:c", (b"c.jpg", "c.txt")),
        ("a.tar:x/d", (b"x/d.jpg", "x/d.txt")),
    ]


@pytest.mark.parametrize("how", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_with_the_cure(tmp_path: Path, how: str) -> None:
    with tarfile.open(tmp_path / "a.tar", how) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ShardsError, match=r"compressed tar.*decompress it first"):
        Shards(tmp_path / "a.tar")


def test_samples_with_a_part_missing_are_named(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar",
        [
            ("a.txt", b"no picture"),
            ("b.jpg", b"picture"),
            ("c.jpg", b"picture"), ("c.json", json.dumps({"caption": "from the json"}).encode()),
            ("d.jpg", b"picture"), ("d.json", b'{"caption": 7}'),
            ("e.jpg", b"picture"), ("e.json", b"[" * 100_000),
            ("f.jpg", b"picture"), ("f.json", b'{"caption": "\\ud800"}'),
            ("g.jpg", b"picture"), ("g.txt", b"\xff\xfe"),
            ("h.jpg", b"picture"), ("h.txt", b"x" * (module.MAX_TEXT_BYTES + 1)),
            ("i.jpg", b"picture"), ("i.json", b'{"caption": ["first", "second"]}'),
            ("j.jpg", b"picture"), ("j.json", b'{"caption": []}'),
            ("k.jpg", b"picture"), ("k.json", b'{"caption": null}'),
            ("l.bmp", b"picture"), ("l.txt", b"text"),
        ],
    )  # fmt: skip
    assert contents(Shards(tar)) == [
        ("a.tar:a", "it has no jpg, png, webp, gif or avif"),
        ("a.tar:b", "it has no caption: neither txt nor json"),
        ("a.tar:c", (b"picture", "from the json")),
        ("a.tar:d", "it has no txt, and its json has no text as caption"),
        ("a.tar:e", "it has no txt, and its json has no text as caption"),
        ("a.tar:f", "the caption is not UTF-8"),
        ("a.tar:g", "the caption is not UTF-8"),
        ("a.tar:h", "1,048,577 bytes, more than 1,048,576"),
        ("a.tar:i", (b"picture", "first")),
        ("a.tar:j", "it has no txt, and its json has no text as caption"),
        ("a.tar:k", "it has no txt, and its json has no text as caption"),
        ("a.tar:l", "it has no jpg, png, webp, gif or avif"),
    ]


def test_a_draw_chooses_among_several_captions(tmp_path: Path) -> None:
    several, one = b'{"caption": ["first", "second", "third"]}', b'{"caption": "one"}'
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", b"A"), ("a.json", several), ("b.jpg", b"B"), ("b.json", one)])
    read = Shards(tar).read_many([0, 0, 0, 1], [7, 9, 2**64 - 1, 5])
    assert list(read) == [(b"A", "second"), (b"A", "first"), (b"A", "first"), (b"B", "one")]


def test_a_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", members("\x1b[2Jgone.jpg", "\x1b[2Jgone.txt"), tarfile.USTAR_FORMAT)
    assert Shards(tar).key(0) == "a.tar:?[2Jgone"


def test_links_and_folders_are_not_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.txt", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("d.jpg", "d.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"data"))
    assert contents(Shards(tmp_path / "a.tar")) == [("a.tar:d", (b"data", "data"))]


def test_the_index_is_built_once_and_anew_when_the_tar_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_foreign(tmp_path / "data", samples(20))
    first = Shards(folder)
    output = capsys.readouterr().err
    assert re.search(rf"indexed 2 tars in .* s; the indexes are in {folder}", output)
    assert Shards(folder).fingerprint == first.fingerprint
    assert capsys.readouterr().err == ""
    (folder / "00001.tar").unlink()
    write_tar(folder / "00001.tar", members("new.jpg", "new.txt"))
    changed = Shards(folder)
    assert "indexed 1 tars" in capsys.readouterr().err
    assert contents(changed)[-1] == ("00001.tar:new", (b"new.jpg", "new.txt"))
    assert changed.fingerprint != first.fingerprint


def test_a_damaged_index_is_built_anew(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "data", samples(20))
    expected = contents(Shards(folder))
    (folder / "00000.tar.index.npy").write_bytes(b"\x93NUMPY rubbish")
    np.save(folder / "00001.tar.index.npy", np.array([{"a": 1}]), allow_pickle=True)
    assert contents(Shards(folder)) == expected


def test_the_index_goes_to_the_cache_if_the_folder_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    folder = write_foreign(tmp_path / "data", samples(8))
    (folder / "00000.tar.index.npy").mkdir()  # stands in for a read-only folder, which root could write
    assert len(Shards(folder)) == 8
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-10240], "no end mark|end mark is missing"),
        (lambda data: data[:5000], "cut at byte 5,000"),
        (lambda data: b"", "cut at byte 0"),
        (lambda data: data + data, "bytes follow the end mark"),
        (lambda data: data[:3072] + bytes(2 << 20), "bytes follow the end mark at byte 3,"),
        (lambda data: b"<html>" * 1000, "no tar header at byte 0"),
        (lambda data: data[:124] + b"77777777777\0" + data[136:], "checksum"),
        (lambda data: data[:1024] + b"x" + data[1025:], "checksum is wrong|no tar header"),
    ],
)
def test_a_damaged_tar_is_refused_by_name(tmp_path: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = write_foreign(tmp_path / "data", samples(40))
    for name in ("00000.tar", "00002.tar"):
        data = (folder / name).read_bytes().rstrip(b"\0")
        whole = data + bytes(10240)
        (folder / name).write_bytes(spoil(whole))
    with pytest.raises(ShardsError, match=message) as caught:
        Shards(folder)
    assert "2 of 3 tars cannot be read" in str(caught.value)
    assert "00000.tar: " in str(caught.value)
    assert "00002.tar: " in str(caught.value)


def test_hostile_bytes_end_in_an_error_or_an_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = np.frombuffer(write_tar(tmp_path / "a.tar", members("a.jpg", "a.txt", "b.jpg", "b.txt")).read_bytes(), "u1")
    for i in range(100):
        data = whole.copy()
        block = rng.integers(0, 8) * 512
        data[block + rng.integers(0, 512, 4)] = rng.integers(0, 256, 4)
        header = data[block : block + 512]
        header[148:156] = 32
        header[148:155] = np.frombuffer(b"%06o\0" % header.sum(), "u1")
        (tmp_path / f"{i}.tar").write_bytes(data.tobytes())
        try:
            shards = Shards(tmp_path / f"{i}.tar")
        except ShardsError:
            continue
        contents(shards)


def test_an_unfinished_run_is_not_taken_for_foreign_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "run" / "shards", samples(20))
    (folder / "manifest.json").unlink()
    for place in (folder, folder.parent):
        with pytest.raises(ShardsError, match=r"no manifest.json.*not finished"):
            Shards(place)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:cat a.tar", "commands"),
        ("pipe:curl -s http://example.org/{0..9}.tar", "commands"),
        ("a.tar::b.tar", "chained"),
        ("nosuch://bucket/folder", "nosuch"),
        ("{folder}/{1..100000000}.tar", "its braces name more than 2,000,000 tars"),
        ("{folder}/{1" + "0" * 30 + "..1}.tar", "its braces name more than 2,000,000 tars"),
        ("{folder}/" + "{a..z}" * 6 + ".tar", "its braces name more than 2,000,000 tars"),
        ("{folder}/{00000..00009}.tar", "9 of 10 tars do not exist: .*00001.tar.* and 6 more"),
        ("{folder}/x*.tar", "no such tar"),
        ("{folder}/*/0.tar", "only in the name"),
        ("{folder}/empty", "no manifest.json.* and no .tar files"),
        ("{folder}/absent", "absent is not a folder"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(tmp_path: Path, source: str, message: str) -> None:
    (write_foreign(tmp_path / "data", samples(4)) / "empty").mkdir()
    with pytest.raises(ShardsError, match=message):
        Shards(source.replace("{folder}", str(tmp_path / "data")))


def test_a_tar_cut_after_it_was_opened_gives_corrupt_samples(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "data", samples(16))
    shards = Shards(folder)
    os.truncate(folder / "00000.tar", 6000)
    assert contents(shards)[-1][1] == "its tar is shorter than when it was indexed"


# --- Remote -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def upload(fs: fsspec.AbstractFileSystem, folder: Path) -> str:
    for path in folder.iterdir():
        fs.pipe_file(f"/{folder.name}/{path.name}", path.read_bytes())
    return f"memory://{folder.name}"


def test_foreign_tars_in_an_object_store(tmp_path: Path, memory: fsspec.AbstractFileSystem, cache: Path) -> None:
    url = upload(memory, write_foreign(tmp_path / "data", samples(37)))
    for source in (url, f"{url}/{{00000..00002}}.tar", f"{url}/*.tar"):
        shards = Shards(source)
        assert [shards.read(i) for i in range(37)] == samples(37)
        assert shards.key(36) == "00002.tar:000000036"
    assert len(list(cache.iterdir())) == 3
    assert shards.fingerprint == Shards(tmp_path / "data").fingerprint


def test_indexing_a_remote_tar_reads_it_in_windows(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW", 2000)
    shards = Shards(upload(memory, write_foreign(tmp_path / "data", samples(37))))
    assert list(shards.read_many(range(37))) == samples(37)


def test_a_run_in_an_object_store(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "shards", samples(37))
    shards = Shards(upload(memory, folder))
    monkeypatch.setattr(memory, "cat_file", lambda *_, **__: pytest.fail("the indexes are there already"))
    assert list(pickle.loads(pickle.dumps(shards)).shards) == list(shards.shards)
    monkeypatch.undo()
    assert list(shards.read_many(range(37))) == samples(37)
    assert shards.fingerprint == Shards(folder).fingerprint
    memory.rm("/shards/_SUCCESS")
    with pytest.raises(ShardsError, match="no _SUCCESS"):
        Shards("memory://shards")


def test_a_batch_is_one_call_with_one_range_a_sample(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(upload(memory, write_shards(tmp_path / "shards", samples(37))))
    calls = []
    whole = type(memory).cat_ranges
    monkeypatch.setattr(
        type(memory), "cat_ranges", lambda fs, paths, *a, **k: calls.append(len(paths)) or whole(fs, paths, *a, **k)
    )
    assert list(shards.read_many([3, 30, 17, 3])) == [samples(37)[i] for i in (3, 30, 17, 3)]
    assert calls == [4]


def test_a_caption_far_from_its_image_is_read_too(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    (tmp_path / "data").mkdir()
    parts = [("a.txt", b"far"), ("a.cls", bytes(2 * module.GAP)), ("a.jpg", b"away"), ("b.jpg", b""), ("b.txt", b"b")]
    write_tar(tmp_path / "data" / "a.tar", parts)
    assert list(Shards(upload(memory, tmp_path / "data")).read_many([1, 0])) == [(b"", "b"), (b"away", "far")]


def test_a_request_that_fails_is_made_again_and_then_named(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.0, 0.0))
    shards = Shards(upload(memory, write_shards(tmp_path / "shards", samples(4))))
    whole, failures = type(memory).cat_file, [OSError("reset"), OSError("reset")]

    def flaky(fs, *a, **k):  # type: ignore[no-untyped-def]
        if failures:
            raise failures.pop()
        return whole(fs, *a, **k)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert list(shards.read_many([1, 2])) == samples(4)[1:3]
    failures += [OSError("reset")] * 9
    with pytest.raises(ShardsError, match=r"memory://shards/00000.tar: bytes .* cannot be read.*reset"):
        shards.read_many([1])


class Ranges(http.server.SimpleHTTPRequestHandler):
    honest = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (asked and self.honest and path.is_file()):
            return super().do_GET()
        start, end = map(int, asked.groups())
        data = path.read_bytes()[start : end + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{end}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)
        return None

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # a batch asks for everything at once


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = partial(Ranges, directory=str(tmp_path))
    with Server(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http_are_those_of_the_disk(tmp_path: Path, server: str, workers: int) -> None:
    folder = write_foreign(tmp_path / "data", samples(37))
    _, preprocess, tokenizer = create("scorer-64")
    here, there = (
        Batches(Shards(source), 16, preprocess.size, tokenizer, seed=1).from_step(0, 3, workers, pin=False)
        for source in (folder, f"{server}/data/{{00000..00002}}.tar")
    )
    for ours, theirs in zip(here, there, strict=True):
        assert ours.numbers == theirs.numbers
        assert ours.pixels.equal(theirs.pixels)


def test_a_server_that_ignores_ranges_is_refused(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(f"{server}/{write_shards(tmp_path / 'shards', samples(4)).name}")
    assert shards.read(1) == samples(4)[1]
    monkeypatch.setattr(Ranges, "honest", False)
    with pytest.raises(ShardsError, match="ignores range requests"):
        shards.read(2)
