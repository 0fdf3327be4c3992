"""The stage as driven by the executor: each row comes out once, hosts do not block each other, nothing leaks."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hashlib
import io
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from pipeline.fetch import client as client_module
from pipeline.fetch import concurrent_rows as rows_module
from pipeline.fetch.client import Client, Limits
from pipeline.fetch.decoder import Decoder, Picture, Rules
from pipeline.fetch.hosts import Politeness
from pipeline.stages import download as download_module
from pipeline.stages.download import Download
from pipeline.step import apply
from tests.fetch.server import JPEG, Server, answer, jpeg, redirect, reset, serving, silence

PATIENCE = 60.0
"""Timeout in seconds for requests that an idle machine answers immediately."""


async def quick(server: Server, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
    await asyncio.sleep(0.02)
    await answer(body=JPEG)(server, writer, headers)


ANSWERS = {
    "ok": answer(body=JPEG),
    "large": answer(body=jpeg(900, 700)),
    "quick": quick,
    "moved": redirect("/ok"),
    "private": redirect("http://127.0.0.1:{server.canary}/"),
    "html": answer(body=b"<!doctype html><title>gone</title>"),
    "half": answer(body=JPEG[: len(JPEG) // 2]),
    "noai": answer(body=JPEG, X_Robots_Tag="noai"),
    "reset": reset,
    "silent": silence,
    **{name: answer(body=f"{name} {'x' * 100}".encode()) for name in ("kill", "hang", "eat")},
}
EXPECTED = {"ok": None, "large": None, "moved": None, "private": "addr_denied", "html": "not_an_image",
            "half": "decode_error", "noai": "opted_out", "reset": "reset", "missing": "http_404"}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(ANSWERS) as server:
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF", 0.02)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for _ in range(1000):
        left = [t.name for t in set(threading.enumerate()) - before if t.name.startswith(("rows", "decode", "dns"))]
        if not left:
            return
        time.sleep(0.02)
    raise AssertionError(left)


def step(server: Server, **options: Any) -> Download:
    options = {"allow_addrs": [server.addr], "timeout": PATIENCE, "per_host": 32, **options}
    step = Download(**options)
    assert list(step.check()) == []
    step.setup()
    return step


def unit(urls: list[str | None], number: int = 0, **columns: list[Any]) -> pa.Table:
    rows = range(len(urls))
    return pa.table(
        {
            "unit": pa.array([number] * len(urls), pa.int32()),
            "row": pa.array(rows, pa.int32()),
            "uid": pa.array([f"{number * 10**6 + row:032x}" for row in rows]),
            "url": pa.array(urls, pa.string()),
            "caption": pa.array(["a caption"] * len(urls)),
            **columns,
        }
    )


def positions(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table["unit"].to_pylist(), table["row"].to_pylist()))


def test_publisher_statements_are_kept_with_the_picture() -> None:
    answers = {
        "silent": answer(body=JPEG),
        "stated": answer(body=JPEG, Content_Usage="train-ai=y, search=n", tdm_reservation="0"),
        "no": answer(body=JPEG, Content_Usage="train-ai=n"),
    }
    stated = "Content-Usage: train-ai=y, search=n\ntdm-reservation: 0"
    with serving(answers) as server:
        urls: list[str | None] = [f"{server.url}/{name}" for name in answers]
        obeyed = step(server, timeout=PATIENCE).process(unit(urls))
        ignored = step(server, timeout=60, content_usage=[]).process(unit(urls))
    assert obeyed["drop_reason"].to_pylist() == [None, None, "opted_out"]
    assert obeyed["usage"].to_pylist() == [None, stated, None]
    assert ignored["usage"].to_pylist() == [None, stated, "Content-Usage: train-ai=n"]


def test_every_row_has_an_image_or_a_reason(server: Server) -> None:
    names = list(EXPECTED) * 30
    units = [
        unit([f"{server.url}/{n}" for n in names[i : i + 90]], i // 90, extra=list(range(90)))
        for i in range(0, 270, 90)
    ]
    # Breaker off: how many rows fail consecutively depends on timing.
    tables = list(step(server, host_failures=0).stream(iter(units)))
    out = pa.concat_tables(tables)
    assert all(len(table) <= 256 for table in tables)
    assert sorted(positions(out)) == [(u, row) for u in range(3) for row in range(90)]
    for u, row, extra, reason, url in zip(
        *(out[c].to_pylist() for c in ("unit", "row", "extra", "drop_reason", "url"))
    ):
        assert (extra, reason) == (row, EXPECTED[names[90 * u + row]]), url
    assert server.canary_hits == 0
    assert out.schema.names == [*units[0].column_names, *Download.adds, "drop_reason", "drop_detail"]
    assert [out.schema.field(n).type for n in Download.adds] == list(Download.adds.values())


def test_process_keeps_the_order_and_marks_the_dropped(server: Server) -> None:
    batch = unit([f"{server.url}/large", None, "ftp://h/a", f"{server.url}/missing", f"{server.url}/ok"])
    kept, drops = apply(step(server, image_size=64), batch)
    assert kept["row"].to_pylist() == [0, 4]
    assert kept["width"].to_pylist() == [64, 64]
    assert kept["original_width"].to_pylist() == [900, 120]
    assert Image.open(io.BytesIO(kept["image"][0].as_py())).size == (64, 50)
    assert drops["row"].to_pylist() == [1, 2, 3]
    assert drops["reason"].to_pylist() == ["bad_url", "bad_scheme", "http_404"]
    assert set(drops["step"].to_pylist()) == {"download"}


def test_empty_tables_and_no_tables(server: Server) -> None:
    assert list(step(server).stream([])) == []
    assert list(step(server).stream([unit([]), unit([])])) == []
    assert step(server).process(unit([])).schema.names[-2:] == ["drop_reason", "drop_detail"]


def test_equal_bytes_give_equal_rows(server: Server) -> None:
    batch = unit([f"{server.url}/{name}" for name in EXPECTED] * 5)
    assert step(server).process(batch).equals(step(server, decode_processes=2, concurrency=3).process(batch))


def test_measured_columns_replace_columns_of_the_pool(server: Server) -> None:
    out = step(server).process(unit([f"{server.url}/ok"], width=[7], sha256=["claimed"]))
    assert out["width"].to_pylist() == [120]
    assert out["sha256"].to_pylist() != ["claimed"]


def test_urls_that_are_not_utf8_are_handled(server: Server) -> None:
    raw = pa.array([b"http://h/\xff\xfe", f"{server.url}/ok".encode()], pa.binary())
    url = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    batch = unit([None, None]).set_column(3, "url", url)
    assert step(server).process(batch)["drop_reason"].to_pylist() == ["bad_url", None]


def test_slow_hosts_overlap_with_the_next_units() -> None:
    """The silent rows of five units wait for their deadline at the same time, and fast rows do not wait."""
    with serving({"silent": silence, "quick": quick}) as server:
        urls = [f"{server.url}/silent"] * 3 + [f"{server.url}/quick"] * 40
        out = pa.concat_tables(step(server, timeout=5).stream(unit(urls, n) for n in range(5)))
        assert server.most_open["silent"] == 15
    reasons = out["drop_reason"].to_pylist()
    assert out["unit"].to_pylist().index(4) < reasons.index("deadline")
    assert Counter(reasons) == {"deadline": 15, None: 200}


def test_a_busy_host_does_not_hold_up_the_others() -> None:
    """A row of one host is served immediately, although hundreds of rows wait for a silent host, two at a time."""
    with serving({"silent": silence}) as silent:
        # Connections to the other host are not allowed, so its row is refused immediately.
        urls = [f"{silent.url}/silent"] * 300 + ["http://127.0.0.2/ok"]
        stream = step(silent, per_host=2, concurrency=8, timeout=PATIENCE).stream([unit(urls)])
        assert next(stream)["row"].to_pylist() == [300]
        stream.close()  # type: ignore[attr-defined]
        assert silent.most_open["silent"] <= 2


def test_input_is_pulled_only_when_there_is_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "ADMITTED_ROWS", 40)
    pulled = []

    def units() -> Iterator[pa.Table]:
        for number in range(50):
            pulled.append(number)
            yield unit([f"{server.url}/ok"] * 20, number)

    monkeypatch.setattr(rows_module, "HOLD_SECONDS", 0.05)
    stream = step(server, concurrency=4).stream(units())
    assert len(next(stream)) > 0
    time.sleep(0.5)
    # Rows taken, rows admitted, and one table in transit.
    assert len(pulled) <= 16 + 2 + 2
    rest = sum(len(table) for table in stream)
    assert len(pulled) == 50
    assert 0 < rest < 1000


def test_a_consumer_that_stops_leaks_nothing(server: Server) -> None:
    urls = [f"{server.url}/{n}" for n in ("ok", "silent") * 50]
    stream = step(server, timeout=PATIENCE).stream([unit(urls)])
    next(stream)
    started = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < PATIENCE / 2


def test_an_error_of_the_input_reaches_the_consumer(server: Server) -> None:
    def units() -> Iterator[pa.Table]:
        yield unit([f"{server.url}/silent"])
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(step(server, timeout=PATIENCE).stream(units()))


def test_an_internal_error_drops_only_its_row(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Client.fetch

    def faulty(self: Client, url: str | None, begin: Any) -> Any:
        if url and url.endswith("/ok"):
            raise RuntimeError("a bug")
        return real(self, url, begin)

    monkeypatch.setattr(Client, "fetch", faulty)
    out = step(server).process(unit([f"{server.url}/{n}" for n in ("ok", "large")]))
    assert out["drop_reason"].to_pylist() == ["unexpected", None]
    assert out["drop_detail"].to_pylist() == ["RuntimeError: a bug", None]


def test_a_lost_decoder_drops_only_its_row(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that dies, hangs or exhausts memory on some bodies, among many good ones."""
    monkeypatch.setattr(download_module, "Decoder", Treacherous)
    names = ["ok", "kill", "ok", "hang", "ok", "eat", "ok"] + ["large"] * 60
    out = step(server, decode_timeout=3.0).process(unit([f"{server.url}/{n}" for n in names]))
    reasons = out["drop_reason"].to_pylist()
    assert reasons[:7] == [None, "decoder_crash", None, "decoder_timeout", None, "decoder_memory", None]
    assert set(reasons[7:]) == {None}


class Treacherous(Decoder):
    def __call__(self, body: bytes, *extra: Any) -> Picture:
        match body[:4]:
            case b"kill":
                os.kill(os.getpid(), signal.SIGSEGV)
            case b"hang":
                while True:
                    pass
            case b"eat ":
                held = []
                while True:
                    held.append(bytearray(50_000_000))
        return super().__call__(body, *extra)


def test_hashes_are_computed_verified_and_denied(server: Server, tmp_path: Path) -> None:
    md5 = hashlib.md5(JPEG).hexdigest()
    claims = [md5.upper(), "0" * 32, None]
    batch = unit([f"{server.url}/ok"] * 3, md5=claims)
    options = {"compute_hash": "sha512", "verify_hash": ["md5", "md5"]}
    out = step(server, **options).process(batch)
    assert out["drop_reason"].to_pylist() == [None, "hash_mismatch", None]
    assert out["sha512"].to_pylist() == [hashlib.sha512(JPEG).hexdigest(), None, hashlib.sha512(JPEG).hexdigest()]
    out = step(server, **options, hash_mismatch="flag").process(batch)
    assert out["hash_matches"].to_pylist() == [True, False, None]
    assert out["drop_reason"].null_count == 3
    deny = tmp_path / "deny.txt"
    deny.write_text(md5)
    strict = step(server, deny_hashes=str(deny))
    assert strict.process(batch)["drop_reason"].to_pylist() == ["denied_hash"] * 3
    before = strict.fingerprint()
    deny.write_text("0" * 32)
    assert strict.fingerprint() != before


@pytest.mark.parametrize("engine", ["winnow", "img2dataset"])
def test_the_perceptual_hash_can_be_turned_off(server: Server, engine: str) -> None:
    options = {"engine": engine, "retries": 0}
    without = step(server, **options, compute_phash=False)
    assert "phash" not in without.adds
    (hashed,), bare = (s.process(unit([f"{server.url}/ok"])).to_pylist() for s in (step(server, **options), without))
    assert bare == [{name: value for name, value in hashed.items() if name != "phash"}]
    assert hashed["phash"] is not None


def test_boxes_of_a_column_are_blurred(server: Server) -> None:
    boxes = [[[0.0, 0.0, 1.0, 1.0]], [], None]
    out = step(server, bbox_col="faces").process(unit([f"{server.url}/large"] * 3, faces=boxes))
    blurred, plain, none = out["image"].to_pylist()
    assert plain == none
    assert len(blurred) < len(plain)


def test_the_img2dataset_engine(server: Server) -> None:
    names = ["ok", "large", "missing", "noai"]
    batch = unit([*(f"{server.url}/{name}" for name in names), "file:///etc/hostname", None], extra=list(range(6)))
    kept, drops = apply(step(server, engine="img2dataset", image_size=64, retries=0), batch)
    assert kept.schema.names == [*batch.column_names, *Download.adds]
    assert (kept["row"].to_pylist(), kept["extra"].to_pylist()) == ([0, 1], [0, 1])
    assert kept["width"].to_pylist() == [64, 64]
    assert kept["original_width"].to_pylist() == [120, 900]
    assert drops["row"].to_pylist() == [2, 3, 4, 5]
    assert drops["reason"].to_pylist() == ["http_404", "opted_out", "bad_scheme", "bad_url"]


def test_the_stage_can_be_pickled(server: Server) -> None:
    fresh = Download(allow_addrs=[server.addr])
    there = pickle.loads(pickle.dumps(copy.deepcopy(fresh)))
    assert there == fresh
    assert there.process(unit([f"{server.url}/ok"]))["drop_reason"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"image_size": 0}, "image_size"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio"),
        ({"encode_quality": 101}, "encode_quality"),
        ({"encode_format": "png"}, "encode_quality"),
        ({"user_agent_token": "my bot\r\n"}, "user_agent_token"),
        ({"content_usage": ["Train-AI"]}, "content_usage"),
        ({"user_agent_contact": "a\nb"}, "user_agent_contact"),
        ({"allow_addrs": ["127.0.0.1"]}, "allow_addrs"),
        ({"allow_addrs": ["localhost:80"]}, "allow_addrs"),
        ({"verify_hash": ["md5"]}, "verify_hash"),
        ({"verify_hash": ["column", "crc32"]}, "verify_hash"),
        ({"deny_hashes": "/nowhere"}, "deny_hashes"),
        ({"decode_timeout": 0}, "decode_timeout"),
    ],
)
def test_invalid_options_are_reported(options: dict[str, Any], key: str) -> None:
    assert [found for found, _ in Download(**options).check()] == [key]


def test_inline_pictures_are_not_fetched(server: Server) -> None:
    asked = sum(server.hits.values())
    batch = pa.table(
        {
            "unit": pa.array([0] * 4, pa.int32()),
            "row": pa.array(range(4), pa.int32()),
            "url": ["urn:sha256:0", "urn:sha256:1", f"{server.url}/ok", "urn:sha256:3"],
            "inline_image": pa.array([jpeg(90, 70), b"no picture", None, b"\xff" * 5000]),
        }
    )
    step = Download(inline=True, image_size=45, max_bytes=4000, allow_addrs=[server.addr])
    kept, drops = apply(step, batch)
    assert kept["row"].to_pylist() == [0, 2]
    assert (kept["original_width"][0].as_py(), kept["width"][0].as_py()) == (90, 45)
    assert kept["sha256"][0].as_py() == hashlib.sha256(jpeg(90, 70)).hexdigest()
    assert drops["reason"].to_pylist() == ["not_an_image", "body_too_large"]
    assert sum(server.hits.values()) <= asked + 2, "the one row without a picture, and robots.txt"


@pytest.mark.parametrize("parts", [Limits, Politeness, Rules])
def test_the_step_hands_on_its_own_defaults(parts: type[Any]) -> None:
    step, own = Download(), parts()
    shared = [field.name for field in dataclasses.fields(parts) if hasattr(step, field.name)]
    assert len(shared) > 5
    for name in shared:
        value = getattr(step, name)
        assert getattr(own, name) == (tuple(value) if isinstance(value, list) else value), name
