"""img2dataset as the engine: its pictures and failures always become rows of ours."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.fetch import img2dataset_engine
from pipeline.fetch.decoder import Picture
from pipeline.fetch.img2dataset_engine import download, failure
from pipeline.fetch.reasons import REASONS, FetchError, find
from tests.fetch.process_tree import family
from tests.fetch.server import JPEG, Server, answer, jpeg, redirect, reset, serving, silence

OPTIONS: dict[str, Any] = {
    "image_size": 64,
    "resize_mode": "keep_ratio_largest",
    "resize_only_if_bigger": True,
    "encode_format": "jpg",
    "encode_quality": 95,
    "skip_reencode": False,
    "min_image_size": 20,
    "max_image_area": 1e6,
    "max_aspect_ratio": 3.0,
    "extract_exif": True,
    "timeout": 1,
    "retries": 1,
    "user_agent_token": "winnow",
    "disallowed_header_directives": ["noai"],
    "concurrency": 8,
    "bbox_col": None,
    "compute_phash": True,
    "compute_hash": None,
    "verify_hash": None,
    "hash_mismatch": "reject",
    "deny_hashes": None,
}
EXPECTED = {
    "ok": None,
    "large": None,
    "moved": None,
    "missing": "http_404",
    "down": "http_503",
    "noai": "opted_out",
    "reset": "reset",
    "silent": "deadline",
    "loop": "redirect_loop",
    "cut": "body_truncated",
    "half": "decode_error",
    "html": "decode_error",
    "tiny": "too_small",
    "long": "aspect_ratio",
    "vast": "too_large",
}
ANSWERS = {
    "ok": answer(body=JPEG),
    "large": answer(body=jpeg(200, 100)),
    "moved": redirect("/ok"),
    "down": answer("503 Service Unavailable", b"later"),
    "noai": answer(body=JPEG, X_Robots_Tag="noai"),
    "reset": reset,
    "silent": silence,
    "loop": redirect("/loop"),
    "cut": answer(body=JPEG[:500], length=str(len(JPEG)), close=True),
    "half": answer(body=JPEG[:20]),
    "html": answer(body=b"<!doctype html>"),
    "tiny": answer(body=jpeg(19, 19)),
    "long": answer(body=jpeg(400, 50)),
    "vast": answer(body=jpeg(1100, 1000)),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(ANSWERS) as server:
        yield server


def results(urls: list[Any], further: dict[str, list[Any]] | None = None, **options: Any) -> list[Picture | FetchError]:
    table = pa.table({"url": pa.array(urls, pa.string()), **(further or {})})
    groups = list(download(table, {**OPTIONS, **options}))
    rows = [row for group in groups for row in group]
    assert sorted(position for position, _ in rows) == list(range(len(urls)))
    return [result for _, result in sorted(rows, key=lambda row: row[0])]


def test_every_row_is_a_picture_or_one_of_our_reasons(server: Server) -> None:
    refused = {None: "bad_url", "/x.jpg": "bad_url", "file:///etc/hostname": "bad_scheme", "ftp://h/x": "bad_scheme",
               "http://127.0.0.1:1/": "connect", "http://[::1/": "unexpected", "http://h:port/": "bad_url"}  # fmt: skip
    found = results([*(f"{server.url}/{name}" for name in EXPECTED), *refused])
    reasons = [r.reason if isinstance(r, FetchError) else None for r in found]
    assert dict(zip([*EXPECTED, *refused], reasons)) == EXPECTED | refused
    small, large, moved = found[:3]
    assert isinstance(small, Picture)
    assert isinstance(large, Picture)
    assert isinstance(moved, Picture)
    assert (large.width, large.height, large.original_width, large.original_height) == (64, 32, 200, 100)
    assert Image.open(io.BytesIO(large.image)).size == (64, 32)
    assert (small.original_bytes, small.original_format, small.exif) == (len(JPEG), "jpeg", "{}")
    assert small.phash == moved.phash


def test_hashes_and_boxes_work_as_with_our_own_engine(server: Server, tmp_path: Path) -> None:
    denied = tmp_path / "denied.txt"
    denied.write_text(hashlib.md5(jpeg(200, 100)).hexdigest())
    right, wrong = hashlib.sha1(JPEG).hexdigest(), "0" * 40
    further = {"sha1": [right.upper(), wrong, None, None], "boxes": [[], None, [[0.0, 0.0, 0.5, 1.0]], None]}
    plain, other, blurred, listed = results(
        [f"{server.url}/{name}" for name in ("ok", "ok", "ok", "large")], further, deny_hashes=str(denied),
        verify_hash=["sha1", "sha1"], hash_mismatch="flag", compute_hash="sha512", bbox_col="boxes",
    )  # fmt: skip
    assert isinstance(plain, Picture)
    assert isinstance(other, Picture)
    assert isinstance(blurred, Picture)
    assert isinstance(listed, FetchError)
    assert listed.reason == "denied_hash"
    assert (plain.hash_matches, other.hash_matches, blurred.hash_matches) == (True, False, None)
    assert plain.hash == hashlib.sha512(JPEG).hexdigest()
    sharp, soft = (np.asarray(Image.open(io.BytesIO(p.image)).convert("L")).astype(int) for p in (plain, blurred))
    change = abs(sharp - soft).mean(axis=0)
    assert change[:20].mean() > 5 * change[-10:].mean()


def test_a_body_that_differs_from_its_claimed_hash_is_rejected() -> None:
    job = {"columns": {}, "compute_hash": None, "verify_hash": ["sha1", "sha1"], "hash_mismatch": "reject"}
    resizer = img2dataset_engine._Resizer(None, None)
    writer = img2dataset_engine._Writer(None, resizer, job)  # type: ignore[arg-type]
    resizer.body = JPEG
    assert "reason" not in writer._hashes(hashlib.sha1(JPEG).hexdigest())
    assert writer._hashes("0" * 40)["reason"] == "hash_mismatch"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for img2dataset that reports 404 for every url, or misbehaves as the url's name says."""
    package = tmp_path / "img2dataset"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "blurrer.py").write_text("BoundingBoxBlurrer = object\n")
    (package / "resizer.py").write_text("def Resizer(**options): pass\n")
    (package / "downloader.py").write_text("""
import os, signal, time
import pyarrow as pa

class Downloader:
    def __init__(self, sample_writer_class, **options):
        self.writer = sample_writer_class()

    def download_shard(self, row):
        for n, url in enumerate(pa.ipc.open_file(row[1]).read_all()["url"].to_pylist()):
            if "deadly" in url:
                os.kill(os.getpid(), signal.SIGSEGV)
            if "starved" in url:
                os.kill(os.getpid(), signal.SIGKILL)
            if "silent" in url:
                time.sleep(1000)
            if "lost" not in url:
                outcome = {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
                self.writer.write(None, str(n), None, outcome)
""")
    monkeypatch.syspath_prepend(str(tmp_path))


def reasons(names: list[str], **options: Any) -> list[str | None]:
    found = results([f"http://host/{name}" for name in names], **options)
    return [result.reason if isinstance(result, FetchError) else None for result in found]


@pytest.mark.usefixtures("stand_in")
def test_only_the_row_that_crashes_img2dataset_fails() -> None:
    names = ["a", "deadly", "b", "starved", "deadly", "lost"]
    expected = ["http_404", "decoder_crash", "http_404", "decoder_killed", "decoder_crash", "unexpected"]
    assert reasons(names) == expected


@pytest.mark.usefixtures("stand_in")
def test_an_endlessly_slow_server_does_not_block_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(img2dataset_engine, "PATIENCE", -96)
    assert reasons(["silent", "a"], timeout=100, retries=0) == ["deadline", "deadline"]


@pytest.mark.usefixtures("stand_in")
def test_closing_the_iterator_ends_the_process() -> None:
    others = set(family())
    rows = download(pa.table({"url": ["http://host/a"] * 300 + ["http://host/silent"]}), OPTIONS)
    assert len(next(rows)) == 256
    assert set(family()) - others
    rows.close()  # type: ignore[attr-defined]
    assert not set(family()) - others


@pytest.mark.usefixtures("stand_in")
def test_a_broken_installation_is_reported_and_drops_nothing(tmp_path: Path) -> None:
    (tmp_path / "img2dataset" / "__init__.py").write_text("raise ImportError('no such thing')")
    with pytest.raises(RuntimeError, match="img2dataset failed to run: ImportError: no such thing"):
        reasons(["a"])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 429: Too Many Requests", "http_429"),
        ("HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.\nThe last 30x "
         "error message was:\nFound", "redirect_loop"),
        ("<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns_unavailable"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "tls"),
        ("<urlopen error timed out>", "deadline"),
        ("The read operation timed out", "deadline"),
        ("<urlopen error [Errno 113] No route to host>", "connect"),
        ("IncompleteRead(500 bytes read, 1000 more expected)", "body_truncated"),
        ("'ascii' codec can't encode character '\\xfc'", "bad_url"),
        ("something never seen \x1b[31m", "unexpected"),
        (None, "unexpected"),
    ],
)  # fmt: skip
def test_messages_map_to_reasons(message: str | None, reason: str) -> None:
    found = failure("failed_to_download", message)
    assert found.reason == reason
    assert found.detail.isprintable()


def test_every_mapped_reason_is_known() -> None:
    for _, reason in img2dataset_engine._MESSAGES:
        assert reason == "http_" or find(reason) is REASONS[reason]
    assert failure("failed_to_resize", "OpenCV(4.12) error").reason == "decode_error"
