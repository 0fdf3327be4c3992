from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import pool
from pipeline.pool import heads, text_rows
from pipeline.recipe import PoolSpec, RecipeError, load
from tests.conftest import ROOT, Command
from tests.fetch.server import JPEG, answer, first_then, serving, silence

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
    wanted = PoolSpec(**spec)
    types, splits = pool.columns(wanted), pool.splits(wanted)
    rows = [row for split in splits for table in pool.read(wanted, split, types) for row in table.to_pylist()]
    assert len(rows) == sum(pool.count(wanted, split) for split in splits)
    return rows


def recipe_error(keys: str) -> str:
    """The error of a recipe with these keys in `pool`."""
    Path("r.yaml").write_text(f"name: t\npool: {{{keys}}}\nrun: new\nsteps:\n  - caption_length\n")
    with pytest.raises(RecipeError) as caught:
        load("r.yaml", pool_columns=pool.columns)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["p.parquet", "p.csv", "p.tsv", "p.jsonl", "p.csv.gz", "p.tsv.zst", "p.jsonl.gz", "p.jsonl.zst"]
)
def test_every_format_gives_the_same_rows(name: str) -> None:
    write(name)
    rows = read(path=name, quoted=True)  # csv.writer quotes the tab
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


def test_unusable_rows_are_marked() -> None:
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


def test_own_uids() -> None:
    write("u.csv", [("http://a", "c", "A" * 32), ("http://b", "c", "short")], ("url", "caption", "id"))
    rows = read(path="u.csv", uid="id")
    assert [r["drop_reason"] for r in rows] == [None, "bad_uid"]
    assert rows[0]["uid"] == "a" * 32


def test_files_with_different_columns() -> None:
    write("a.parquet", [("http://a", "c", 1)], ("url", "caption", "n"))
    write("b.parquet", [("http://b", "c", 0.5)], ("url", "caption", "score"))
    rows = read(path=["a.parquet", "b.parquet"])
    assert [(r["n"], r["score"]) for r in rows] == [(1, None), (None, 0.5)]


def test_parquet_footers_are_cached_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = heads.open_parquet
    monkeypatch.setattr(heads, "open_parquet", lambda path: opened.append(Path(path).name) or real(path))
    for i in range(20):
        pq.write_table(pa.table({"url": ["u"] * i, "caption": ["c"] * i}), tmp_path / f"{i:02d}.parquet")
    spec = PoolSpec(path=str(tmp_path))
    assert pool.columns(spec) == {}
    assert [pool.count(spec, split) for split in pool.splits(spec)] == list(range(20))
    assert sorted(opened) == [f"{i:02d}.parquet" for i in range(20)]
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"], "more": [1]}), tmp_path / "07.parquet")
    assert pool.columns(spec) == {"more": pa.int64()}
    assert pool.count(spec, pool.splits(spec)[7]) == 1


def test_an_empty_table() -> None:
    write("empty.csv", [])
    assert read(path="empty.csv") == []
    write("empty.parquet", [], ("url", "caption"))
    assert read(path="empty.parquet") == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.parquet", b"not parquet at all", "x.parquet cannot be read as parquet"),
        ("x.csv.gz", b"not gzip", "x.csv.gz cannot be read"),
        ("x.txt", b"url caption", "is not one of parquet, csv, tsv, jsonl, json"),
        ("x.csv", b"a,b\n1,2\n", "has no column 'url'; it has a, b"),
        ("x.csv", b"", "x.csv is empty"),
        ("x.csv", b"url;caption\nu1;a\n", "If its fields are separated by ';', set pool.delimiter"),
        ("x.tsv", b"url,caption\nu1,a\n", "If its fields are separated by ',', set pool.delimiter"),
    ],
)
def test_an_invalid_file_is_reported(name: str, data: bytes, message: str) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(ValueError, match=r"path|url") as caught:
        pool.columns(PoolSpec(path=name))
    assert message in str(caught.value)


TEXTS = [
    # name, contents, options of the pool, (url, caption) or the reason of each row
    ("p.tsv", 'url\tcaption\nu1\t"open quote\nu2\ttwo\nu3\t"so"\n', {}, ['u1|"open quote', "u2|two", 'u3|"so"']),
    ("p.tsv", 'url\tcaption\nu1\t"a\tb"\n', {"quoted": True}, ["u1|a\tb"]),
    ("p.csv", 'url,caption\nu1,"open, quote\nu2,two\n', {}, ["u1|open, quote", "u2|two"]),
    ("p.csv", 'url,caption\nu1,"open quote\nu2,"closed"\nu3,three\n', {}, ["u1|open quote", "u2|closed", "u3|three"]),
    ("p.csv", 'url,caption\nu1,"two\nlines, one ""field"""\nu2,b\n', {}, ['u1|two\nlines, one "field"', "u2|b"]),
    ("p.csv", 'url,caption\nu1,a "5"" disk\nu2,"b"c\n', {}, ['u1|a "5"" disk', "u2|bc"]),
    ("p.csv", 'url,caption\nu1,"a\nu2,b\n', {"quoted": False}, ['u1|"a', "u2|b"]),
    ("p.tsv", "u1\ta\nu2\tb\n", {"names": ["url", "caption"]}, ["u1|a", "u2|b"]),
    ("p.csv", "a,u1\nb,u2\n", {"names": ["caption", "url"]}, ["u1|a", "u2|b"]),
    ("p.csv", 'url;caption\nu1;"a; b, c"\nu2;d, e\n', {"delimiter": ";"}, ["u1|a; b, c", "u2|d, e"]),
    ("p.tsv", 'url|caption\nu1|a\tb\n', {"delimiter": "|"}, ["u1|a\tb"]),
    ("p.csv", b"\xef\xbb\xbfurl,caption\nu1,a\n", {}, ["u1|a"]),
    ("p.csv", "url,caption\nu1,\u00e4\n".encode("utf-16"), {}, ["u1|\u00e4"]),
    ("p.tsv", "url\tcaption\rn1\ta\r", {}, ["n1|a"]),
    ("p.tsv", "url\tcaption\r\nn1\ta\rb\r\n", {}, ["n1|a\rb"]),
    ("p.tsv", "url\tcaption\nn1\ta\tb\nn2\nn3\tc\n\n", {}, ["bad_line", "bad_line", "n3|c"]),
    ("p.csv", "url,caption\nn1,a\0b\n", {}, ["n1|ab"]),
    ("p.json", '[{"url": "u1", "caption": "a"},\n 7, {"url": "u2", "caption": "b"}]', {}, ["u1|a", "bad_line", "u2|b"]),
    ("p.json", '{"url": "u1", "caption": "a"}\n{"url": "u2", "caption": "b"}\n', {}, ["u1|a", "u2|b"]),
    ("p.jsonl", '{"url": "u1", "caption": ["a", "b"]}\n{"url": "u2", "caption": []}\n', {"captions": "each"},
     ["u1|a", "u1|b", "null_caption"]),
    ("p.jsonl", '{"url": "u1", "caption": ["a", "b"]}\n', {"captions": "first"}, ["u1|a"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "options", "expected"), TEXTS)
def test_text_files(name: str, data: str | bytes, options: dict[str, Any], expected: list[str]) -> None:
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
    rows = read(path=name, **options)
    assert [row["drop_reason"] or f"{row['url']}|{row['caption']}" for row in rows] == expected


def test_a_long_json_array_in_one_line_is_read_in_parts() -> None:
    rows = [{"url": f"http://a/{n}", "caption": "x" * 300, "n": n} for n in range(8_000)]
    Path("p.json").write_text(json.dumps(rows))
    assert [row["n"] for row in read(path="p.json")] == list(range(8_000))


def test_a_line_without_an_end_is_a_bad_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MAX_LINE", 1_000)
    for name, line in (("p.tsv", "u\t{}\n"), ("p.csv", "u,{}\n"), ("p.jsonl", '{{"url": "u", "caption": "{}"}}\n')):
        header = "" if name == "p.jsonl" else line.format("caption").replace("u", "url", 1)
        Path(name).write_text(header + line.format("a") + line.format("x" * 5_000) + line.format("b"))
        assert [row["drop_reason"] for row in read(path=name)] == [None, "bad_line", None], name


def twice(**columns: pa.Array) -> pa.Table:
    return pa.table({"url": ["http://a/1", "http://a/2"], "caption": ["one", "two"]} | columns)


@pytest.mark.parametrize(
    ("first", "second", "wider"),
    [
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.int64(), pa.null(), pa.int64()),
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.int8(), pa.uint16(), pa.int32()),
        (pa.uint64(), pa.int64(), pa.decimal128(20, 0)),
        (pa.bool_(), pa.int64(), pa.int64()),
        (pa.decimal128(5, 2), pa.int32(), pa.decimal128(12, 2)),
        (pa.date32(), pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.int64(), pa.string(), pa.string()),
        (pa.null(), pa.null(), pa.string()),
        (pa.dictionary(pa.int8(), pa.int32()), pa.int64(), pa.int64()),
        (pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float64())),
        (pa.list_(pa.null()), pa.list_(pa.null()), pa.list_(pa.null())),
        (pa.list_(pa.null()), pa.list_(pa.int64()), pa.list_(pa.int64())),
        (pa.struct({"a": pa.null()}), pa.struct({"a": pa.null()}), pa.struct({"a": pa.string()})),
        (pa.struct({"a": pa.null()}), pa.struct({"a": pa.int8()}), pa.struct({"a": pa.int8()})),
    ],
)
def test_the_common_type_fits_the_values_of_all_files(first: Any, second: Any, wider: Any) -> None:
    for name, dtype in (("a", first), ("b", second)):
        values = pa.nulls(2, dtype) if not pa.types.is_integer(dtype) else pa.array([1, 2], dtype)
        pq.write_table(twice(x=values), f"{name}.parquet")
    for order in (["a.parquet", "b.parquet"], ["b.parquet", "a.parquet"]):
        assert pool.columns(PoolSpec(path=order)) == {"x": wider}
        assert {row["drop_reason"] for row in read(path=order)} == {None}


def test_numbers_in_text_are_numbers_unless_they_are_codes() -> None:
    Path("n.csv").write_text("url,caption,n,x,code,message\nu1,a,1,0.5,007,7\nu2,b,,1e-3,012,seven\nu3,c,-3,4,000,\n")
    assert pool.columns(PoolSpec(path="n.csv")) == {
        "n": pa.int64(),
        "x": pa.float64(),
        "code": pa.string(),
        "message": pa.string(),
    }
    rows = read(path="n.csv")
    assert [(row["n"], row["x"], row["code"], row["message"]) for row in rows] == [
        (1, 0.5, "007", "7"), (None, 0.001, "012", "seven"), (-3, 4.0, "000", ""),
    ]  # fmt: skip
    Path("n.jsonl").write_text('{"url": "u", "caption": "c", "n": 2.5, "code": 7, "tags": ["a"], "ok": true}\n')
    (row,) = read(path="n.jsonl")
    assert (row["n"], row["code"], row["tags"], row["ok"]) == (2.5, 7, '["a"]', True)
    (*_, row) = read(path=["n.csv", "n.jsonl"])
    assert (row["n"], row["code"]) == (2.5, "7")


def test_a_value_that_does_not_fit_the_inferred_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEAD_ROWS", 1)
    Path("n.csv").write_text("url,caption,n\nu1,a,1\nu2,b,n/a\nu3,c,\n")
    assert [(row["n"], row["drop_reason"]) for row in read(path="n.csv")] == [
        (1, None), (None, "bad_value"), (None, None),
    ]  # fmt: skip
    rows = read(path="n.csv", types={"n": "text"})
    assert [(row["n"], row["drop_reason"]) for row in rows] == [("1", None), ("n/a", None), ("", None)]


def test_clashing_columns_get_a_prefix() -> None:
    names = ["uid", "row", "unit", "place", "drop_reason", "width", "sha256", "status", "mine"]
    pq.write_table(twice(**{name: pa.array([1, 2]) for name in names}), "p.parquet")
    carried = [f"pool_{name}" for name in names[:-1]] + ["mine"]
    assert list(pool.columns(PoolSpec(path="p.parquet"))) == carried
    rows = read(path="p.parquet")
    assert [[row[name] for row in rows] for name in carried] == [[1, 2]] * len(carried)
    assert list(read(path="p.parquet", columns=["width"])[0]) == ["uid", "url", "caption", "pool_width", "drop_reason"]
    pq.write_table(twice(width=pa.array([1, 2]), pool_width=pa.array([3, 4])), "p.parquet")
    with pytest.raises(ValueError, match="'width' is carried as 'pool_width', which also exists"):
        pool.columns(PoolSpec(path="p.parquet"))


def test_hive_partitions() -> None:
    for lang, year in (("en", "2024"), ("de", "2025"), ("a%20b", "__HIVE_DEFAULT_PARTITION__")):
        Path(f"h=1/lang={lang}/year={year}").mkdir(parents=True)
        pq.write_table(twice(), f"h=1/lang={lang}/year={year}/0.parquet")
    for path in ("h=1", "h=1/*/*/*.parquet"):
        assert pool.columns(PoolSpec(path=path)) == {"lang": pa.string(), "year": pa.int64()}
        found = {(row["lang"], row["year"]) for row in read(path=path)}
        assert found == {("en", 2024), ("de", 2025), ("a b", None)}


LISTS = [["a", "b"], None, [], ["c", None]]


def test_a_list_of_captions() -> None:
    pq.write_table(pa.table({"url": list("uvwx"), "caption": LISTS, "n": [1, 2, 3, 4]}), "p.parquet")
    rows = read(path="p.parquet", captions="each")
    assert [(r["url"], r["caption"], r["n"]) for r in rows] == [
        ("u", "a", 1), ("u", "b", 1), ("v", "", 2), ("w", "", 3), ("x", "c", 4), ("x", "", 4),
    ]  # fmt: skip
    assert [r["caption"] for r in read(path="p.parquet", captions="first")] == ["a", "", "", "c"]


@pytest.mark.parametrize("url", [True, False])
def test_pictures_in_the_pool(url: bool) -> None:
    pictures = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "http://a/2.jpg"}, None]
    columns: dict[str, Any] = {"image": pictures, "caption": list("abc")} | ({"url": ["u", None, None]} if url else {})
    pq.write_table(pa.table(columns), "p.parquet")
    rows = read(path="p.parquet", image="image")
    urls = ["u" if url else f"urn:sha256:{hashlib.sha256(b'one').hexdigest()}", "http://a/2.jpg", ""]
    assert [row["url"] for row in rows] == urls
    assert [row["inline_image"] for row in rows] == [b"one", None, None]
    assert [row["drop_reason"] for row in rows] == [None, None, "null_url"]


STRUCT = pa.array([{"bytes": b"x", "path": "p"}] * 2)
REFUSED = [
    (twice(url=pa.array([1, 2])), {}, "url: {}: the column 'url' has type int64, expected text"),
    (twice(url=STRUCT), {}, "has type struct<bytes: binary, path: string>, expected text; to read its pictures"),
    (twice(url=pa.array([["a"]] * 2)), {}, "url: {}: the column 'url' has type list<"),
    (twice(url=pa.nulls(2)), {}, "url: the column 'url' has type null in every file"),
    (twice(caption=pa.array([["a"]] * 2)), {}, "a list of strings (list<"),
    (twice(caption=pa.array([[1]] * 2)), {"captions": "each"}, "{}: the column 'caption' has type list<"),
    (twice(id=pa.array([1, 2])), {"uid": "id"}, "uid: {}: the column 'id' has type int64"),
    (twice(image=pa.array([1, 2])), {"image": "image"}, "image: {}: the column 'image' has type int64"),
    (pa.Table.from_arrays([pa.array(["u"])] * 4, ["url", "caption", "x", "x"]), {}, "more than one column 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "options", "message"), REFUSED)
def test_unsupported_schemas_are_refused(table: pa.Table, options: dict[str, Any], message: str) -> None:
    pq.write_table(table, "p.parquet")
    with pytest.raises(pool.PoolError) as caught:
        pool.columns(PoolSpec(path="p.parquet", **options))
    assert message.format(Path("p.parquet").absolute()) in str(caught.value)


WHOLE = "url,caption\n" + "".join(f"http://a/{n},{n * n} is a square\n" for n in range(20_000))
BROKEN = [
    ("p.csv.gz", gzip.compress(WHOLE.encode(), mtime=0)[:-500]),
    ("p.csv.zst", _zstd(WHOLE.encode())[:-500]),
    ("p.csv.bz2", bz2.compress(WHOLE.encode())[:-500]),
    ("p.json", b'[{"url": "u", "caption": "c"}, {"url": '),
    ("p.json", b'[{"url": "u", "caption": "c"} {"url": "v"}]'),
    ("p.jsonl", b""),
    ("p.jsonl", b"no JSON\n"),
    ("p.csv", gzip.compress(b"url,caption\n", mtime=0)),
    ("p.csv", "url,caption\n".encode("utf-16-le")),
    ("p.tsv", b"PAR1 and so on"),
    ("p.csv", b"url,caption,twin,twin\n"),
    ("p.parquet", b""),
]


@pytest.mark.parametrize(("name", "data"), BROKEN)
def test_the_error_names_a_broken_file(name: str, data: bytes) -> None:
    Path("pool").mkdir()
    write("pool/whole.csv")
    Path("pool", name).write_bytes(data)
    with pytest.raises(pool.PoolError, match=name):
        read(path="pool")


def test_the_error_names_a_parquet_file_with_a_broken_page() -> None:
    pq.write_table(pa.table({"url": [f"http://a/{n}" for n in range(9_000)], "caption": ["c"] * 9_000}), "p.parquet")
    data = bytearray(Path("p.parquet").read_bytes())
    data[4:2_000] = bytes(1_996)
    Path("p.parquet").write_bytes(data)
    with pytest.raises(pool.PoolError, match=r"p\.parquet cannot be read as parquet"):
        read(path="p.parquet")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("names: [url, caption, url]", "names: url: named more than once"),
        ("names: [address, caption]", "names: 'url', the url, is not among address, caption"),
        ("uid: id, captions: each", "captions: each makes several rows of one uid"),
        ('delimiter: ";;"', "delimiter: must be one character, such as ';' or '|', found ';;'"),
        ("columns: [url]", "columns: url already used as"),
        ("types: {n: long}", "pool.types: expected"),
        ("types: {n: int}", "types: no file has n"),
        ("captions: all", "pool.captions: expected one of each, first"),
    ],
)
def test_keys_of_the_pool_in_a_recipe(keys: str, message: str) -> None:
    write("p.csv")
    assert message in recipe_error(f"path: p.csv, {keys}")


COYO: dict[str, Any] = {
    "id": [1, 2], "url": ["http://a/1", "http://a/2"], "text": ["one", "two"], "width": [640, 480],
    "height": [480, 640], "image_phash": ["f0e1d2c3b4a59687", "0123456789abcdef"], "text_length": [3, 3],
    "word_count": [1, 1], "num_tokens_bert": [3, 3], "num_tokens_gpt": [1, 1], "num_faces": [0, 1],
    "clip_similarity_vitb32": [0.31, 0.2], "clip_similarity_vitl14": [0.25, 0.1],
    "nsfw_score_opennsfw2": [0.01, 0.2], "nsfw_score_gantman": [0.02, 0.1], "watermark_score": [0.1, 0.2],
    "aesthetic_score_laion_v2": [5.1, 4.0],
}  # fmt: skip
COMMONPOOL: dict[str, Any] = {
    "uid": ["0" * 31 + "a", "0" * 31 + "b"], "url": ["http://a/1", "http://a/2"], "text": ["one", "two"],
    "original_width": [640, 480], "original_height": [480, 640], "clip_b32_similarity_score": [0.3, 0.2],
    "clip_l14_similarity_score": [0.25, 0.1], "face_bboxes": [[[0.1, 0.1, 0.2, 0.2]], []], "sha256": ["0" * 64] * 2,
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "table"), [("coyo", COYO), ("commonpool", COMMONPOOL)])
def test_published_tables_run_without_listing_columns(recipe: str, table: dict[str, Any]) -> None:
    pq.write_table(pa.table(table), "p.parquet")
    checked = load(str(ROOT / f"conf/{recipe}.yaml"), ["pool.path=p.parquet"], pool.columns)
    types = pool.columns(checked.pool)
    mapped = {"url", "text", "uid"}
    assert len(types) == len(table.keys() - mapped)
    (split,) = pool.splits(checked.pool)
    (rows,) = pool.read(checked.pool, split, types)
    assert rows["drop_reason"].null_count == 2
    assert "pool_width" in types if recipe == "coyo" else {"pool_sha256", "pool_original_width"} <= types.keys()


def drops(run: str, rows: list[tuple[str, str]], finished: bool = True) -> list[str]:
    """Writes a run's ledger with a drop for each step and reason. Returns their uids."""
    Path(run, "drops").mkdir(parents=True)
    Path(run, "run.json").write_text("{}")
    uids = [f"{n:032x}" for n in range(len(rows))]
    table = pa.table(
        {
            "uid": uids,
            "url": [f"http://a/{n}" for n in range(len(rows))],
            "caption": [f"caption {n}" for n in range(len(rows))],
            "step": [step for step, _ in rows],
            "reason": [reason for _, reason in rows],
            "detail": [None] * len(rows),
        }
    )
    half = len(rows) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, f"{run}/drops/{number:05d}.parquet", row_group_size=2)
    if finished:
        books: dict[str, dict[str, int]] = {"pool": {}}
        for step, reason in rows:
            counts = books.setdefault(step, {})
            counts[reason] = counts.get(reason, 0) + 1
        steps = [{"step": step, "dropped": counts} for step, counts in books.items()]
        Path(run, "funnel.json").write_text(json.dumps({"steps": steps}))
    return uids


LEDGER = [
    ("download", "deadline"),
    ("download", "http_404"),
    ("download.2", "http_503"),
    ("download", "not_an_image"),
    ("read_shards", "http_429"),
    ("image_size", "too_small"),
    ("my_check", "deadline"),
    ("download", "no_word_of_ours"),
]


def test_retry_takes_transient_failures_and_keeps_uids() -> None:
    uids = drops("old", LEDGER)
    rows = read(retry="old")
    assert [row["uid"] for row in rows] == [uids[0], uids[2], uids[4]]
    assert rows[0] == {"uid": uids[0], "url": "http://a/0", "caption": "caption 0", "drop_reason": None}


def test_a_run_that_cannot_be_retried_is_reported() -> None:
    drops("unfinished", LEDGER, finished=False)
    drops("steady", [("download", "http_404"), ("my_check", "deadline")])
    drops("texts", [("caption_length", "too_short")])
    for run, message in (
        ("nowhere", "nowhere is not the folder of a run"),
        ("unfinished", "unfinished is not finished: it has no funnel.json"),
        ("steady", "steady dropped no row for a transient reason"),
        ("texts", "texts has no step download; its steps are pool, caption_length"),
    ):
        with pytest.raises(ValueError, match=f"^retry: {message}"):
            pool.columns(PoolSpec(retry=run))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("retry: old, path: p.csv, uid: id", "pool: retry: excludes path, uid"),
        ("url: u", "pool: path: is missing"),
        ("retri: old", "pool.retri: unknown key; did you mean retry?"),
    ],
)
def test_retry_in_a_recipe(keys: str, message: str) -> None:
    assert f"r.yaml:2: {message}" in recipe_error(keys)


RETRY = """
name: flaky
pool: {pool}
run: {run}
steps:
  - download: {{timeout: {timeout}, retries: 0, allow_addrs: ["{addr}"]}}
  - write_shards
"""


def test_a_retry_run_fetches_what_the_first_one_missed(run: Command, tmp_path: Path) -> None:
    ok = answer(body=JPEG)
    answers = {
        "ok": ok,
        "busy": first_then(answer("503 Service Unavailable"), ok),
        "slow": first_then(silence, ok),
        "down": answer("500 Internal Server Error"),
        "gone": answer("404 Not Found"),
    }
    names = [f"{name}?{n}" for name in answers for n in range(2)]
    with serving(answers) as server:
        write("p.csv", [(f"{server.url}/{name}", f"the caption of {name}", name) for name in names])
        for name, source, timeout in (("old", "{path: p.csv}", 2), ("new", "{retry: old}", 8)):
            text = RETRY.format(pool=source, run=name, timeout=timeout, addr=server.addr)
            (tmp_path / f"{name}.yaml").write_text(text)
            done = run(f"{name}.yaml")
            assert done.returncode == 0, done.stderr
        assert server.hits["gone"] == 2

    def uids(rows: list[dict[str, Any]]) -> dict[str, str]:
        return {row["caption"].split()[-1]: row["uid"] for row in rows}

    whole = uids(read(path="p.csv"))
    old, new = (uids(pq.read_table(f"{name}/shards/00000.parquet").to_pylist()) for name in ("old", "new"))
    assert old == {name: whole[name] for name in names if name.startswith("ok")}
    assert new == {name: whole[name] for name in names if name.startswith(("busy", "slow"))}
    left = pq.read_table("new/drops/00000.parquet").to_pylist()
    assert sorted((row["url"].rpartition("/")[2], row["reason"]) for row in left) == [
        ("down?0", "http_500"),
        ("down?1", "http_500"),
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_a_name_twice_in_a_json_object_is_refused(name: str) -> None:
    row = '{"url": "http://h/1", "caption": "c", "x": 1, "x": 2, "nested": {"a": 1, "a": 2}}'
    Path(name).write_text(f"[{row}]" if name == "p.json" else f"{row}\n")
    with pytest.raises(pool.PoolError, match=r"p\.json.* has more than one column 'x'; rename one of them"):
        pool.columns(PoolSpec(path=name))


def test_a_wide_table_is_read_in_time_linear_in_its_columns() -> None:
    """A look-up of a column by its name is a scan in Arrow, which takes minutes for a row of 10,000 columns."""
    width = 3_000
    header = ("url", "caption", *(f"c{n}" for n in range(width)))
    for name in ("p.csv", "p.parquet"):
        write(name, [("u", "a caption", *range(width))], header)
        spec = PoolSpec(path=name)
        types = pool.columns(spec)
        began = time.process_time()
        (table,) = pool.read(spec, pool.splits(spec)[0], types)
        assert time.process_time() - began < 10, name
        assert table.num_columns == width + 4


def test_folders_behind_links_are_read_once() -> None:
    Path("in/below").mkdir(parents=True)
    Path("elsewhere").mkdir()
    write("in/0.csv", [("http://a/0", "zero", 1)])
    write("elsewhere/1.csv", [("http://a/1", "one", 1)])
    Path("in/link").symlink_to("../elsewhere")
    Path("in/below/up").symlink_to("..")
    assert sorted(row["caption"] for row in read(path="in")) == ["one", "zero"]


def test_a_path_that_is_not_a_regular_file_is_refused_without_opening_it() -> None:
    Path("in").mkdir()
    write("in/0.csv")
    Path("in/1.csv").symlink_to("nowhere.csv")
    with pytest.raises(pool.PoolError, match=r"in/1\.csv is a broken link"):
        read(path="in")
    Path("in/1.csv").unlink()
    os.mkfifo("in/1.csv")  # opening it would wait for a writer for ever
    for path in ("in", "in/1.csv"):
        with pytest.raises(pool.PoolError, match=r"in/1\.csv is a device, pipe or socket"):
            read(path=path)


UNUSABLE = [
    ("p.csv", "url,caption,x\na,b\nc,d\n", {}, "p.csv: none of its first 2 lines has the 3 fields of its header line"),
    ("p.tsv", "a\tb\tc\n", {"names": ["url", "caption"]}, "p.tsv: none of its first 1 lines has the 2 fields of pool."),
    ("p.csv", b"url,caption,x\xff\na,b,c\n", {}, "p.csv: the column name 'x\\udcff' is not valid UTF-8"),
    ("p.jsonl", '{"url": "a", "caption": "b", "\\ud800": 1}\n', {}, "the column name '\\ud800' is not valid UTF-8"),
    ("p.jsonl", '{"url": {"path": "a"}, "caption": "b"}\n', {}, "p.jsonl: the column 'url' has type struct<"),
    ("p.jsonl", '{"url": "a", "caption": null}\n', {}, "caption: the column 'caption' has type null in every file"),
    ("p.csv", "url,caption\na,\nb,\n", {}, "caption: the column 'caption' has type null in every file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "options", "message"), UNUSABLE)
def test_a_text_file_whose_rows_would_all_be_dropped_is_refused(
    name: str, data: str | bytes, options: dict[str, Any], message: str
) -> None:
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(pool.PoolError) as caught:
        pool.columns(PoolSpec(path=name, **options))
    assert message in str(caught.value)


def test_a_pool_may_have_a_file_without_captions() -> None:
    Path("a.csv").write_text("url,caption\na,\n")
    write("b.csv")
    assert [row["drop_reason"] for row in read(path=["a.csv", "b.csv"])] == ["null_caption", None, None, None]


@pytest.mark.parametrize("keys", ["uid: url", "image: caption", "caption: url"])
def test_one_column_cannot_serve_as_two(keys: str) -> None:
    write("p.csv")
    assert "one column cannot serve as two of these" in recipe_error(f"path: p.csv, {keys}")


def test_folders_may_name_the_mapped_columns() -> None:
    for name, key in (("u", "url=http%3A%2F%2Fa"), ("c", "caption=a%20red%20car")):
        Path(name, key).mkdir(parents=True)
    pq.write_table(pa.table({"caption": ["one", "two"]}), "u/url=http%3A%2F%2Fa/p.parquet")
    Path("c/caption=a%20red%20car/p.csv").write_text("url\nhttp://b\n")
    Path("c/caption=a%20red%20car/q.jsonl").write_text('{"url": "http://c"}\n')
    assert [(row["url"], row["caption"]) for row in read(path="u")] == [("http://a", "one"), ("http://a", "two")]
    assert {(row["url"], row["caption"]) for row in read(path="c")} == {
        ("http://b", "a red car"), ("http://c", "a red car"),
    }  # fmt: skip


@pytest.mark.parametrize("path", ["nonsense://bucket/p.csv", "https://127.0.0.1:9/p.csv", "memory://nowhere/p.csv"])
def test_an_address_that_cannot_be_read_is_named(path: str) -> None:
    with pytest.raises(pool.PoolError, match=r"^path: .*p\.csv cannot be read: "):
        pool.columns(PoolSpec(path=path))
