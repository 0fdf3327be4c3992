"""WAT files in the format of Common Crawl: intact, damaged, and in unusual containers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import pool, verify
from pipeline.demo import web
from pipeline.pool import heads, wat
from pipeline.recipe import PoolSpec
from pipeline.run import main
from tests.conftest import ROOT, Command

PAGE = "http://page.example/dir/a.html"


def warc(body: bytes, kind: str = "metadata", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {PAGE}\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + body + b"\r\n\r\n"


def page(*links: dict[str, Any], base: str | None = None, url: str = PAGE) -> bytes:
    html: dict[str, Any] = {"Head": {"Base": base} if base else {}, "Links": list(links)}
    envelope = {
        "WARC-Header-Metadata": {"WARC-Target-URI": url, "WARC-Type": "response"},
        "Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": html}},
    }
    return warc(json.dumps({"Envelope": envelope}).encode())


def image(url: Any, alt: Any, path: str = "IMG@/src") -> dict[str, Any]:
    return {"path": path, "url": url, "alt": alt}


def write(path: Path, *records: bytes) -> Path:
    path.write_bytes(b"".join(map(gzip.compress, records)) if path.suffix == ".gz" else b"".join(records))
    return path


def found(path: Path) -> list[tuple[str, str] | str]:
    return [link.problem or (link.url, link.caption) for link in wat.read_links(str(path))]


RESOLVED = [
    ("http://other.example/x.jpg", None, "http://other.example/x.jpg"),
    ("HTTPS://Other.example/ x.jpg ", None, "HTTPS://Other.example/ x.jpg"),
    ("x.jpg", None, "http://page.example/dir/x.jpg"),
    ("../x.jpg?a=1#top", None, "http://page.example/x.jpg?a=1"),
    ("/x y.jpg", None, "http://page.example/x%20y.jpg"),
    ("//cdn.example/x.jpg", None, "http://cdn.example/x.jpg"),
    ("x.jpg", "https://cdn.example/pics/", "https://cdn.example/pics/x.jpg"),
    ("x.jpg", "../up/", "http://page.example/up/x.jpg"),
    ("//c.example/x.jpg", "https://cdn.example/", "https://c.example/x.jpg"),
    ("x.jpg", "mailto:me", "http://page.example/dir/x.jpg"),
    ("data:image/gif;base64,R0lGOD", None, None),
    ("javascript:void(0)", None, None),
    ("http:///nowhere", None, "http:///nowhere"),  # absolute: left to url_filter
    ("//[bad/x.jpg", None, None),
    ("", None, None),
    (7, None, None),
]


@pytest.mark.parametrize(("url", "base", "expected"), RESOLVED)
def test_links_are_resolved_as_browsers_do(tmp_path: Path, url: Any, base: str | None, expected: str | None) -> None:
    path = write(tmp_path / "a.wat.gz", page(image(url, "a caption"), base=base))
    assert found(path) == ["bad_url" if expected is None else (expected, "a caption")]


def test_only_pictures_with_a_text_are_links(tmp_path: Path) -> None:
    links = [
        image("1.jpg", "one"), image("2.jpg", ""), image("3.jpg", "  "), image("4.jpg", None),
        image("5.html", "a page", "A@/href"), {"path": "IMG@/src", "url": "6.jpg"},
        image("7.jpg", " seven ", "IMG@/data-src"),
    ]  # fmt: skip
    records = [warc(b"software: x", "warcinfo"), page(*links), page(), warc(b'{"Envelope": {"Payload-Metadata": {}}}')]
    path = write(tmp_path / "a.wat.gz", *records)
    assert found(path) == [("http://page.example/dir/1.jpg", "one"), ("http://page.example/dir/7.jpg", "seven")]


def numbered(i: int) -> bytes:
    return page(image(f"http://host.example/{i}.jpg", f"caption {i}"))


def flipped(data: bytes) -> bytes:
    spoilt = bytearray(gzip.compress(data))
    for at in range(20, 60, 7):
        spoilt[at] ^= 0xFF
    return bytes(spoilt)


GOOD = [(f"http://host.example/{i}.jpg", f"caption {i}") for i in range(9)]
DAMAGED: dict[str, bytes] = {
    "flipped bits": flipped(numbered(9)),
    "garbage": b"garbage" * 100,
    "not a record": gzip.compress(b"hello\r\n\r\n"),
    "not JSON": gzip.compress(warc(b"{nope")),
    "too short": gzip.compress(warc(b'{"Envelope": {"Payload-Metadata": {}}}', length=5)),
    "too long": gzip.compress(warc(b"{}", length=2000)),
    "absurdly long": gzip.compress(warc(b"{}", length=10**18)),
    "negative": gzip.compress(warc(b"{}", length=-4)),
    "no envelope": gzip.compress(warc(b'{"Container": 1}')),
    "a list": gzip.compress(warc(b"[1]")),
    "links of another kind": gzip.compress(
        warc(b'{"Envelope": {"Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": {"Links": [1]}}}}}')
    ),
    "deeply nested": gzip.compress(warc(b"[" * 100_000)),
    "magic bytes": b"\x1f\x8b\x08\x00" * 3,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_loses_only_itself(tmp_path: Path, damage: str) -> None:
    parts = [gzip.compress(numbered(i)) for i in range(3)]
    path = tmp_path / "a.wat.gz"
    path.write_bytes(parts[0] + DAMAGED[damage] + parts[1] + parts[2])
    lines = found(path)
    assert [line for line in lines if line != "bad_record"] == GOOD[:3]
    assert 1 <= lines.count("bad_record") <= (4 if damage == "magic bytes" else 2)


@pytest.mark.parametrize("cut", [1, 40, 100, 200])
def test_a_truncated_file_keeps_its_complete_records(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.wat.gz", *(numbered(i) for i in range(3)))
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    lines = found(path)
    assert lines[:2] == GOOD[:2]
    assert lines[2:] == ([GOOD[2], "bad_record"] if cut < 10 else ["bad_record"])


@pytest.mark.parametrize("name", ["a.wat", "a.warc.wat.gz", "one.wat.gz"])
def test_containers(tmp_path: Path, name: str) -> None:
    records = [numbered(i) for i in range(9)]
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"".join(records)) if name.startswith("one") else b"")
    if not name.startswith("one"):
        write(path, *records)
    assert found(path) == GOOD


@pytest.mark.parametrize("data", [b"", b"plain text\n" * 9, b"\x1f\x8b", b"\x1f\x8b\x08"])
def test_a_file_of_another_kind_has_no_links(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.wat.gz").write_bytes(data)
    assert set(found(tmp_path / "a.wat.gz")) <= {"bad_record"}


def test_a_wat_file_is_read_as_a_pool(tmp_path: Path) -> None:
    records = [page(image("x.jpg", "relative"), image("data:x", "inline")), warc(b"{nope"), numbered(0)]
    write(tmp_path / "b.wat.gz", *records)
    write(tmp_path / "a.wat.gz", *(numbered(i) for i in range(9)))
    spec = PoolSpec(path=str(tmp_path / "*.wat.gz"))
    types = pool.columns(spec)
    assert list(types) == ["page_url"]
    splits = pool.splits(spec)
    rows = [row for split in splits for table in pool.read(spec, split, types) for row in table.to_pylist()]
    assert [pool.count(spec, split) for split in splits] == [9, 4]
    assert [row["drop_reason"] for row in rows] == [None] * 10 + ["bad_url", "bad_record", None]
    assert rows[9]["url"] == "http://page.example/dir/x.jpg"
    assert rows[9]["page_url"] == PAGE
    assert rows[10]["caption"] == "inline"
    pages = PoolSpec(path=spec.path, url="page_url", columns=[])
    ((table, *_), _) = (list(pool.read(pages, split, pool.columns(pages))) for split in pool.splits(pages))
    assert set(table["url"].to_pylist()) == {PAGE}


def test_memory_does_not_exceed_that_of_a_record(tmp_path: Path) -> None:
    import tracemalloc

    body = gzip.compress(b"".join(numbered(i) for i in range(200)))
    path = tmp_path / "a.wat.gz"
    path.write_bytes(b"".join(gzip.compress(numbered(i)) for i in range(200)) * 20 + body)
    tracemalloc.start()
    count = sum(1 for _ in wat.read_links(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4200
    assert peak < 4 << 20


def test_without_fastwarc_the_error_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.wat.gz", numbered(0))
    monkeypatch.setattr(heads.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pool.PoolError, match=r"winnow-clip\[commoncrawl\]"):
        pool.columns(PoolSpec(path=str(tmp_path / "a.wat.gz")))


def test_the_shipped_recipe_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.wat.gz", *(numbered(i) for i in range(9)))
    conf = str(ROOT / "conf/common_crawl.yaml")
    assert main([conf, "--plan", f"pool.path={tmp_path}/*.wat.gz"]) == 0
    assert "common-crawl: 9 rows (counted)" in capsys.readouterr().out
    assert main([conf, "--plan"]) == 0
    assert "5,000,000,000 rows (pool.rows)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_reads_links_and_accounts_for_damage(run: Command, tmp_path: Path) -> None:
    records = [page(image("x.jpg", f"caption {i}"), image("data:x", "inline")) for i in range(3)]
    write(tmp_path / "a.wat.gz", *records, warc(b"{nope"), *(numbered(i) for i in range(9)))
    (tmp_path / "r.yaml").write_text(
        "name: crawl\npool: {path: '*.wat.gz'}\nrun: out\n"
        "steps:\n  - exact_dedup: {by: [url], captions: merge}\n  - write_subset\n"
    )
    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    steps = {line["step"]: line for line in json.loads((tmp_path / "out/funnel.json").read_text())["steps"]}
    assert steps["pool"]["dropped"] == {"bad_record": 1, "bad_url": 3}
    assert steps["exact_dedup"]["dropped"] == {"merged": 2}
    assert steps["write_subset"]["rows_in"] == 10


@pytest.mark.slow
def test_the_shipped_recipe_runs_on_a_small_crawl(run: Command, tmp_path: Path) -> None:
    """The demo's web in the form of a crawl: each row of its pool is an image on a page, half of them by a relative
    link, and every third page occurs twice with different texts."""
    with web.open_port(0) as server:
        web.build(tmp_path / "web", 200, seed=0, port=server.server_port)
        rows = pq.read_table(tmp_path / "web/pool.parquet").to_pylist()
        site = f"http://127.0.0.1:{server.server_port}"
        pages = []
        for i, row in enumerate(rows):
            link = row["url"].removeprefix(site) if i % 2 else row["url"]
            texts = [row["caption"], *([f"seen again: {row['caption']}"] if i % 3 == 0 else [])]
            pages += [page(image(link, text), url=f"{site}/pages/{i}") for text in texts if text]
        write(tmp_path / "crawl.wat.gz", *pages)
        options = {
            "pool.path": tmp_path / "crawl.wat.gz", "run": tmp_path / "out", "unit_rows": 100,
            "steps.download.allow_addrs": f'["127.0.0.1:{server.server_port}"]', "steps.download.timeout": 4,
            "steps.byte_size.min": 100, "steps.image_size.min_side": 64,
            "steps.clip_score.model": ROOT / "pipeline/demo/scorer", "steps.clip_score.pretrained": "null",
        }  # fmt: skip
        with web.serving(server, tmp_path / "web"):
            done = run(str(ROOT / "conf/common_crawl.yaml"), *(f"{key}={value}" for key, value in options.items()))
    assert done.returncode == 0, done.stderr
    steps = {line["step"]: line for line in json.loads((tmp_path / "out/funnel.json").read_text())["steps"]}
    assert steps["exact_dedup"]["dropped"]["merged"] > 20
    assert steps["write_shards"]["rows_in"] > 20
    assert verify.main([str(tmp_path / "out"), "--deep"]) == 0
