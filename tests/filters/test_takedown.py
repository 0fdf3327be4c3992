from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.filters.takedown import Takedown
from pipeline.text.takedown_list import TakedownList
from tests.tables import check_filter, make_batch, run_step

LIST = """
# asked for in May
uid 0123456789ABCDEF0123456789abcdef
url https://Example.org:443/a/../b.jpg#top
domain bad.example
domain Bücher.example
"""
CASES: list[tuple[dict[str, Any], str | None]] = [
    ({"uid": "0123456789abcdef0123456789abcdef"}, "uid"),
    ({"url": "https://example.org/b.jpg"}, "url"),
    ({"url": "https://example.org/b.jpg?x=1"}, None),
    ({"url": "http://example.org/b.jpg"}, None),
    ({"url": "http://BAD.example./x.jpg"}, "domain"),
    ({"url": "http://cdn.bad.example:8080/x.jpg"}, "domain"),
    ({"url": "http://notbad.example/x.jpg"}, None),
    ({"url": "http://xn--bcher-kva.example/x.jpg"}, "domain"),
    ({"url": "not a url"}, None),
    ({"url": None}, None),
    ({"uid": "0123456789abcdef0123456789abcdef", "url": "http://bad.example/"}, "uid"),
]


def listed(folder: Path, text: str) -> str:
    path = folder / "takedown.txt"
    path.write_text(text)
    return str(path)


def test_entries_known_before_the_download_are_dropped(tmp_path: Path) -> None:
    step = Takedown(file=listed(tmp_path, LIST))
    assert set(step.needs) == {"uid", "url"}
    check_filter(step, [row for row, _ in CASES], [reason for _, reason in CASES])


def test_the_detail_is_the_entry(tmp_path: Path) -> None:
    _, drops = run_step(Takedown(file=listed(tmp_path, LIST)), make_batch([row for row, _ in CASES]))
    assert drops["detail"].to_pylist()[:3] == [
        "0123456789abcdef0123456789abcdef", "https://example.org/b.jpg", "bad.example"
    ]  # fmt: skip


def flipped(value: int, bits: int, seed: int) -> int:
    for place in np.random.default_rng(seed).choice(64, bits, replace=False).tolist():
        value ^= 1 << place
    return value


def test_pictures_by_digest_and_by_hash(tmp_path: Path) -> None:
    digest, near, far = hashlib.sha256(b"a picture").hexdigest(), 0x8F00FF3312345678, 0x0123456789ABCDEF
    step = Takedown(file=listed(tmp_path, f"sha256 {digest.upper()}\nphash {near:016x}\nphash {far:016x} 0\n"))
    assert set(step.needs) == {"sha256", "phash"}
    rows = [
        ({"sha256": digest, "phash": None}, "sha256"),
        ({"sha256": None, "phash": near}, "phash"),
        ({"sha256": None, "phash": far}, "phash"),
        *(({"sha256": "0" * 64, "phash": flipped(near, 4, seed)}, "phash") for seed in range(20)),
        *(({"sha256": "0" * 64, "phash": flipped(near, 5, seed)}, None) for seed in range(20)),
        *(({"sha256": "0" * 64, "phash": flipped(far, 1, seed)}, None) for seed in range(5)),
        ({"sha256": None, "phash": None}, None),
    ]
    check_filter(step, [row for row, _ in rows], [reason for _, reason in rows])


@pytest.mark.parametrize("distance", [0, 1, 4, 10])
def test_hashes_are_found_as_by_brute_force(tmp_path: Path, distance: int) -> None:
    rng = np.random.default_rng(distance)
    entries = rng.integers(0, 1 << 64, 300, np.uint64)
    entries[:50] = entries[50] ^ rng.integers(0, 1 << 12, 50, np.uint64)  # crowded, as blank pictures are
    hashes = np.array([flipped(int(entries[i % 300]), i % 13, i) for i in range(1500)], np.uint64)
    found = TakedownList(listed(tmp_path, "".join(f"phash {h:016x} {distance}\n" for h in entries.tolist())))
    kinds, _ = found.find(pa.table({"phash": hashes}), ["phash"])
    expected = (np.bitwise_count(hashes[:, None] ^ entries[None]) <= distance).any(axis=1)
    assert kinds.is_valid().to_pylist() == expected.tolist()


def test_a_uid_names_the_sample_that_has_its_caption(tmp_path: Path) -> None:
    step = Takedown(file=listed(tmp_path, f"uid {'a' * 32}\nuid {'c' * 32}\n"))
    assert step.wants == ("captions",)
    several = [
        [{"caption": "x", "uid": uid * 32, "language": None} for uid in uids] for uids in ("ba", "bd", "c", "ca")
    ]
    rows = [{"uid": "e" * 32}, *({"uid": captions[0]["uid"], "captions": captions} for captions in several)]
    check_filter(step, rows, [None, "uid", None, "uid", "uid"])


def test_by_limits_the_kinds_of_entries(tmp_path: Path) -> None:
    step = Takedown(file=listed(tmp_path, LIST), by=["domain"])
    assert step.needs == ("url",)
    check_filter(step, [row for row, _ in CASES[:5]], [None, None, None, None, "domain"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists nothing"),
        ("# nothing yet\n", "lists nothing"),
        ("uid 12\n", ":1: found uid '12', expected 32 hex digits"),
        ("\nhost example.org\n", ":2: found 'host example.org', expected one of uid, url, domain, sha256, phash"),
        ("url example.org/a.jpg\n", "expected an address that begins with http"),
        ("domain http://example.org\n", "expected a host name"),
        ("domain a b\n", "expected a host name"),
        ("sha256 1f\n", "expected 64 hex digits"),
        ("phash 1f\n", "expected 16 hex digits"),
        ("phash 00000000000000ff 11\n", "expected 0 to 10 bits"),
        ("phash 00000000000000ff x\n", "expected 0 to 10 bits"),
    ],
)
def test_a_list_that_cannot_be_read_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = listed(tmp_path, text)
    ((key, problem),) = Takedown(file=path).check()
    assert key == "file"
    assert path in problem
    assert message in problem


def test_a_missing_list_and_a_list_that_is_not_text_are_reported(tmp_path: Path) -> None:
    assert [key for key, _ in Takedown(file=str(tmp_path / "none.txt")).check()] == ["file"]
    (tmp_path / "latin.txt").write_bytes(b"domain caf\xe9.example\n")
    ((_, problem),) = Takedown(file=str(tmp_path / "latin.txt")).check()
    assert "latin.txt:1: not UTF-8" in problem
