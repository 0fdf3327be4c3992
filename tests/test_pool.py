from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import pool
from pipeline.recipe import PoolSpec

ROWS = [
    ("http://a/1.jpg", "a first caption", "x"),
    ("http://a/2.jpg", 'with "quotes", and\ttab', "y"),
    ("http://ü/3", "öß 三", ""),
]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[tuple[Any, ...]] = ROWS, header: tuple[str, ...] = ("url", "caption", "extra")) -> None:
    kind = name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.table({h: [r[i] for r in rows] for i, h in enumerate(header)}), name)
        return
    if kind == "jsonl":
        text = "".join(json.dumps(dict(zip(header, r))) + "\n" for r in rows)
    else:
        path = Path("plain")
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerow(header)
            writer.writerows(rows)
        text = path.read_bytes().decode()
        path.unlink()
    data = text.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = _zstd(data)
    Path(name).write_bytes(data)


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def read(**spec: Any) -> list[dict[str, Any]]:
    asked = PoolSpec(**spec)
    types = pool.extra_types(asked, pool.columns(asked))
    rows = [
        row for split in pool.splits(asked) for table in pool.read(asked, split, types) for row in table.to_pylist()
    ]
    assert len(rows) == sum(pool.count(split) for split in pool.splits(asked))
    return rows


@pytest.mark.parametrize(
    "name", ["p.parquet", "p.csv", "p.tsv", "p.jsonl", "p.csv.gz", "p.tsv.zst", "p.jsonl.gz", "p.jsonl.zst"]
)
def test_every_format_gives_the_same_rows(name: str) -> None:
    write(name)
    rows = read(path=name)
    assert [(r["url"], r["caption"], r["extra"]) for r in rows] == ROWS
    assert [r["drop_reason"] for r in rows] == [None] * 3
    assert rows[0]["uid"] == hashlib.sha256(b"http://a/1.jpg\0a first caption").hexdigest()[:32]


def test_folders_globs_lists_and_mapped_names() -> None:
    Path("in").mkdir()
    for i in range(3):
        write(f"in/{i}.csv", [(f"http://a/{i}", f"caption {i}", 1)], ("URL", "TEXT", "n"))
    Path("in/notes.md").write_text("not a table")
    names = {"url": "URL", "caption": "TEXT"}
    for path in ("in", "in/*.csv", ["in/0.csv", "in/1.csv", "in/2.csv"]):
        assert [r["caption"] for r in read(path=path, **names)] == ["caption 0", "caption 1", "caption 2"]
    assert "n" not in read(path="in", columns=[], **names)[0]


BAD_JSONL = [
    ('{"url": "http://a/1", "caption": "fine"}', None),
    ('{"url": null, "caption": "no url"}', "null_url"),
    ('{"caption": "no url either"}', "null_url"),
    ('{"url": "http://a/2"}', "null_caption"),
    ('{"url": "http://a/3", "caption": 7}', "not_text"),
    ('{"url": ["http://a/3"], "caption": "a list"}', "not_text"),
    ('{"url": "http://a/4", "caption": "lone \\ud800 surrogate"}', "invalid_utf8"),
    ('{"url": "http://a/5", "caption": "nul \\u0000 inside"}', None),
    ('{"url": "http://a/6", "caption": "' + "x" * (10 << 20) + '"}', "caption_oversized"),
    ('{"url": "http://a/' + "y" * 70_000 + '", "caption": "long url"}', "url_oversized"),
    ("{broken", "bad_line"),
    ("[1, 2]", "bad_line"),
    ("7", "bad_line"),
]


def test_rows_that_cannot_be_used_are_named_not_lost() -> None:
    Path("bad.jsonl").write_text("\n".join(line for line, _ in BAD_JSONL) + "\n")
    rows = read(path="bad.jsonl")
    assert [r["drop_reason"] for r in rows] == [reason for _, reason in BAD_JSONL]
    assert max(len(r["caption"]) for r in rows) <= 1000 + 1


def test_invalid_utf8_in_csv_and_parquet() -> None:
    Path("bad.csv").write_bytes(b"url,caption\nhttp://a/1,caf\xe9\nhttp://a/2,fine\nhttp://a/3,one,too many\n")
    assert [r["drop_reason"] for r in read(path="bad.csv")] == ["invalid_utf8", None, "bad_line"]
    raw = pa.array([b"ok", b"\xff\xfe bad", None], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(pa.table({"url": ["http://a", "http://b", "http://c"], "caption": text}), "bad.parquet")
    assert [r["drop_reason"] for r in read(path="bad.parquet")] == [None, "invalid_utf8", "null_caption"]


def test_a_column_of_another_type() -> None:
    pq.write_table(pa.table({"url": ["http://a", None], "caption": [1, 2]}), "n.parquet")
    assert [r["drop_reason"] for r in read(path="n.parquet")] == ["not_text", "null_url"]


def test_own_uids() -> None:
    write("u.csv", [("http://a", "c", "A" * 32), ("http://b", "c", "short")], ("url", "caption", "id"))
    rows = read(path="u.csv", uid="id")
    assert [r["drop_reason"] for r in rows] == [None, "bad_uid"]
    assert rows[0]["uid"] == "a" * 32


def test_files_with_different_further_columns() -> None:
    write("a.parquet", [("http://a", "c", 1)], ("url", "caption", "n"))
    write("b.parquet", [("http://b", "c", 0.5)], ("url", "caption", "score"))
    rows = read(path=["a.parquet", "b.parquet"])
    assert [(r["n"], r["score"]) for r in rows] == [(1, None), (None, 0.5)]


def test_an_empty_table() -> None:
    write("empty.csv", [])
    assert read(path="empty.csv") == []
    write("empty.parquet", [], ("url", "caption"))
    assert read(path="empty.parquet") == []


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.parquet", b"not parquet at all", "x.parquet cannot be read as parquet"),
        ("x.csv.gz", b"not gzip", "x.csv.gz cannot be read"),
        ("x.txt", b"url caption", "is not one of parquet, csv, tsv, jsonl"),
        ("x.csv", b"a,b\n1,2\n", "has no column 'url'; it has a, b"),
        ("x.csv", b"", "has no column 'url'; it has none"),
    ],
)
def test_a_file_that_is_no_pool_is_a_clear_error(name: str, data: bytes, said: str) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(ValueError, match=r"path|url") as caught:
        pool.columns(PoolSpec(path=name))
    assert said in str(caught.value)
