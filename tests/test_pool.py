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
from pipeline.recipe import PoolSpec, RecipeError, load
from tests.conftest import Command
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
    asked = PoolSpec(**spec)
    types = pool.columns(asked)
    rows = [
        row for split in pool.splits(asked) for table in pool.read(asked, split, types) for row in table.to_pylist()
    ]
    assert len(rows) == sum(pool.count(asked, split) for split in pool.splits(asked))
    return rows


@pytest.mark.parametrize(
    "name", ["p.parquet", "p.csv", "p.tsv", "p.jsonl", "p.csv.gz", "p.tsv.zst", "p.jsonl.gz", "p.jsonl.zst"]
)
def test_every_format_gives_the_same_rows(name: str) -> None:
    write(name)
    rows = read(path=name, quoted=True)  # csv.writer encloses a tab, which a tsv file as it comes could not hold
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


def test_the_end_of_a_parquet_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = pool._open_parquet
    monkeypatch.setattr(pool, "_open_parquet", lambda path: opened.append(Path(path).name) or real(path))
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
    ("name", "data", "said"),
    [
        ("x.parquet", b"not parquet at all", "x.parquet cannot be read as parquet"),
        ("x.csv.gz", b"not gzip", "x.csv.gz cannot be read"),
        ("x.txt", b"url caption", "is not one of parquet, csv, tsv, jsonl, json"),
        ("x.csv", b"a,b\n1,2\n", "has no column 'url'; it has a, b"),
        ("x.csv", b"", "x.csv is empty"),
    ],
)
def test_a_file_that_is_no_pool_is_a_clear_error(name: str, data: bytes, said: str) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(ValueError, match=r"path|url") as caught:
        pool.columns(PoolSpec(path=name))
    assert said in str(caught.value)


def drops(run: str, rows: list[tuple[str, str]], finished: bool = True) -> list[str]:
    """A run's ledger: a drop for each step and reason; their uids."""
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


def test_retry_takes_what_may_pass_and_keeps_its_uid() -> None:
    uids = drops("old", LEDGER)
    rows = read(retry="old")
    assert [row["uid"] for row in rows] == [uids[0], uids[2], uids[4]]
    assert rows[0] == {"uid": uids[0], "url": "http://a/0", "caption": "caption 0", "drop_reason": None}


def test_a_run_that_cannot_be_retried_is_a_clear_error() -> None:
    drops("unfinished", LEDGER, finished=False)
    drops("steady", [("download", "http_404"), ("my_check", "deadline")])
    drops("texts", [("caption_length", "too_short")])
    for run, said in (
        ("nowhere", "nowhere is not the folder of a run"),
        ("unfinished", "unfinished is not finished: there is no funnel.json"),
        ("steady", "steady dropped no row for a reason that may pass"),
        ("texts", "texts has no step download; its steps are pool, caption_length"),
    ):
        with pytest.raises(ValueError, match=f"^retry: {said}"):
            pool.columns(PoolSpec(retry=run))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("retry: old, path: p.csv, uid: id", "pool: retry: leaves no room for path, uid"),
        ("url: u", "pool: path: is missing"),
        ("retri: old", "pool.retri: unknown key; did you mean retry?"),
    ],
)
def test_retry_in_a_recipe(keys: str, said: str) -> None:
    Path("r.yaml").write_text(f"name: again\npool: {{{keys}}}\nrun: new\nsteps:\n  - caption_length\n")
    with pytest.raises(RecipeError) as caught:
        load("r.yaml", pool_columns=pool.columns)
    assert f"r.yaml:2: {said}" in str(caught.value)


RETRY = """
name: flaky
pool: {pool}
run: {run}
steps:
  - download: {{timeout: {timeout}, retries: 0, allow_addrs: ["{addr}"]}}
  - write_shards
"""


def test_a_retry_run_gets_what_the_first_one_missed(run: Command, tmp_path: Path) -> None:
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
