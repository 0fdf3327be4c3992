"""Memory of a fetching worker: bounded for any input, without growth over 100,000 rows.

Worker and server run in separate processes. The worker's memory includes all of its descendants.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple

import pytest

from tests.conftest import HUNG, ROOT
from tests.fetch import process_tree
from tests.fetch.fetching import AREA, CAP
from tests.fetch.hostile_images import encoded, smooth
from tests.fetch.server import JPEG, Answer, Server, answer, flood, jpeg, raw

pytestmark = pytest.mark.skipif(not process_tree.CAN_MEASURE, reason="needs Linux's /proc")

LIMIT = 400_000_000
SIDE = math.isqrt(AREA)
SPAWN = multiprocessing.get_context("spawn")

BIG = JPEG + bytes(CAP - len(JPEG))
HEAD = b"HTTP/1.1 200 OK\r\n"


def answers() -> dict[str, Answer]:
    return {
        "small": answer(body=JPEG),
        "photo": answer(body=jpeg(1000, 700)),
        "big": answer(body=BIG),
        "big_unannounced": raw(HEAD + b"\r\n" + BIG),
        "too_big": flood(HEAD + b"\r\n", JPEG + bytes(60_000)),
        "broken": answer(body=encoded("PNG").replace(b"IDAT", b"IDAT\xff", 1) + bytes(CAP // 2)),
    }


def wide() -> dict[str, Callable[[], bytes]]:
    """Pictures of the largest allowed area, within the largest allowed body."""
    return {
        "jpeg": lambda: smooth(SIDE, SIDE, "RGB", "JPEG", quality=85),
        "progressive": lambda: smooth(SIDE, SIDE, "RGB", "JPEG", quality=85, progressive=True),
        "progressive_444": lambda: smooth(SIDE, SIDE, "RGB", "JPEG", quality=85, progressive=True, subsampling=0),
        "progressive_cmyk": lambda: smooth(SIDE, SIDE, "CMYK", "JPEG", quality=85, progressive=True),
        "png": lambda: smooth(SIDE, SIDE, "RGB", "PNG"),
        "png_alpha": lambda: smooth(SIDE, SIDE, "LA", "PNG"),
        "png_16_bit": lambda: smooth(SIDE, SIDE, "I;16", "PNG"),
        "webp": lambda: smooth(SIDE, SIDE, "RGB", "WEBP", quality=50, method=0),
        "webp_alpha": lambda: smooth(SIDE, SIDE, "RGBA", "WEBP", quality=50, method=0),
        "gif": lambda: smooth(SIDE, SIDE, "P", "GIF"),
    }


def serve(pipe: Connection, kinds: Sequence[str]) -> None:
    server = Server(answers() | {kind: answer(body=make()) for kind, make in wide().items() if kind in kinds})
    pipe.send(server.port)
    pipe.recv()
    server.close()


class Progress(NamedTuple):
    rows: int
    reasons: Counter[tuple[str, str | None]]
    """Number of rows by path and reason."""


@contextmanager
def server(kinds: Sequence[str] = ()) -> Iterator[int]:
    """Starts a server in its own process. Yields its port."""
    ours, theirs = multiprocessing.Pipe()
    process = SPAWN.Process(target=serve, args=(theirs, kinds), daemon=True)
    process.start()
    try:
        assert ours.poll(HUNG), "the server did not start"
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def fetch(port: int, paths: Sequence[str], rows: int) -> tuple[Progress, int, list[tuple[int, int]]]:
    """The outcome, the peak memory in bytes, and (rows done, private memory in bytes) over time."""
    command = [sys.executable, "-m", "tests.fetch.fetching", str(port), str(rows), *paths]
    progress, course, measured = Progress(0, Counter()), [], 0.0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as worker:
        try:
            with process_tree.peak_memory(worker.pid) as peak:
                while progress.rows < rows:
                    assert worker.stdout
                    done, ends = json.loads(worker.stdout.readline())
                    progress = Progress(done, Counter({(path, reason): count for path, reason, count in ends}))
                    if time.monotonic() - measured > 0.2:
                        course.append((progress.rows, process_tree.memory(worker.pid, kinds=process_tree.OWN)))
                        measured = time.monotonic()
            worker.communicate(timeout=HUNG)
        finally:
            worker.kill()
    return progress, peak[0], course


def test_large_bodies_do_not_fill_the_worker() -> None:
    """Hundreds of megabytes are in flight, with or without Content-Length, and many bodies are too large or broken."""
    paths = ["small"] * 44 + ["big", "big_unannounced", "too_big", "broken", "small", "photo"]
    rows = 600
    with server() as port:
        end, peak, _ = fetch(port, paths, rows)
    assert dict(end.reasons.keys()) == {
        "small": None, "photo": None, "big": None, "big_unannounced": None,
        "too_big": "body_too_large", "broken": "decode_error",
    }  # fmt: skip
    assert end.reasons.total() == rows
    assert peak < LIMIT


@pytest.mark.parametrize("kind", ["jpeg", "progressive"])
def test_large_areas_do_not_fill_the_worker(kind: str) -> None:
    with server([kind]) as port:
        end, peak, _ = fetch(port, ["small", "small", kind], 24)
    assert end.reasons == {("small", None): 16, (kind, None): 8}
    assert peak < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("kind", wide())
def test_no_kind_of_picture_fills_the_worker(kind: str) -> None:
    """Each kind at the largest area is kept or dropped for its memory. Other rows succeed and memory is bounded."""
    with server([kind]) as port:
        end, peak, _ = fetch(port, [*["small"] * 9, kind], 100)
    assert end.reasons["small", None] == 90
    assert end.reasons[kind, None] + end.reasons[kind, "decoder_memory"] == 10
    assert end.reasons.total() == 100
    assert peak < LIMIT


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_rows() -> None:
    rows = 100_000
    with server() as port:
        end, peak, course = fetch(port, ["small"] * 199 + ["photo"], rows)
    assert end.reasons == {("small", None): rows - rows // 200, ("photo", None): rows // 200}
    early = [held for at, held in course if 0.2 * rows < at <= 0.4 * rows]
    late = [held for at, held in course if 0.8 * rows < at]
    assert max(late) < max(early) + 20_000_000
    assert peak < LIMIT
