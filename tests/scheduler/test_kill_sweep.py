"""Kills processes at random moments: the command ends, leaves no process, and resumes when run again.

    pytest -m slow tests/scheduler/test_kill_sweep.py            # WINNOW_KILLS=30 moments, WINNOW_KILL_SEED=0

Each run directory receives kills until its run completes. Its shards are then compared with an undisturbed run,
and the sweep continues in a new directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import verify
from pipeline.demo import web
from tests.conftest import environment
from tests.fetch.process_tree import alive, family

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks processes up in /proc"),
]
MOMENTS = int(os.environ.get("WINNOW_KILLS", "30"))
SEED = int(os.environ.get("WINNOW_KILL_SEED", "0"))
PATIENCE = 120.0
"""Seconds in which a command must end after its cluster or driver was hit, on a busy machine."""
LEFT = 30.0
"""Seconds after which no process of an ended command may still run."""
RUN_SECONDS = 600.0
RECIPE = """
name: sweep
pool: {path: web/pool.parquet}
run: out
unit_rows: 20
workers: 2
steps:
  - caption_length: {min_chars: 6, min_words: 3}
  - caption_frequency: {max_count: 10}
  - exact_dedup: {by: [url]}
  - download: {image_size: 96, timeout: 30, retries: 2, allow_addrs: ["127.0.0.1:PORT"]}
  - image_size: {min_side: 64}
  - exact_dedup: {by: [sha256]}
  - near_dedup: {max_hamming: 4}
  - write_shards: {samples_per_shard: 20}
"""


def words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def named(pattern: str) -> Callable[[int], list[int]]:
    """Finds the descendants of a process whose command line matches a pattern."""
    return lambda driver: [pid for pid in family(driver) if pid != driver and re.search(pattern, words(pid))]


VICTIMS: dict[str, tuple[Callable[[int], list[int]], signal.Signals, set[int]]] = {
    # the processes to choose from, the signal, and the allowed exit statuses
    "driver": (lambda driver: [driver], signal.SIGKILL, {-signal.SIGKILL}),
    "tree": (lambda driver: family(driver), signal.SIGKILL, {-signal.SIGKILL}),
    "worker": (named(r"^ray::(?!\w+Agent)"), signal.SIGKILL, {0}),
    "decoder": (named("pipeline.fetch.sandbox"), signal.SIGKILL, {0}),
    "agent": (named(r"^ray::\w+Agent"), signal.SIGKILL, {1}),  # the raylet ends with it
    "raylet": (named("raylet/raylet"), signal.SIGKILL, {1}),
    "gcs": (named("gcs_server"), signal.SIGKILL, {1}),
    "sigterm": (lambda driver: [driver], signal.SIGTERM, {128 + signal.SIGTERM}),
    "ctrl-c": (lambda driver: [driver], signal.SIGINT, {128 + signal.SIGINT}),
}


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """Serves a small web and writes a recipe for it."""
    with web.open_port(0) as server:
        web.build(tmp_path / "web", 120, SEED, server.server_port)
        (tmp_path / "r.yaml").write_text(RECIPE.replace("PORT", str(server.server_port)))
        with web.serving(server, tmp_path / "web"):
            yield tmp_path


def start(project: Path, run: str) -> subprocess.Popen[bytes]:
    with (project / "output").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.run", "r.yaml", f"run={run}"],
            cwd=project, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def shards(run: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "shards").iterdir())
        if path.suffix in (".tar", ".parquet", ".npy")
    }


def left(pids: list[int]) -> list[int]:
    return [pid for pid in pids if alive(pid)]


def hit(driver: subprocess.Popen[bytes], victim: str, delay: float, chance: random.Random) -> list[int] | None:
    """Kills the victim after `delay` seconds, or as soon as it exists. Returns the command's process tree at that time.

    Returns None if the command ended before."""
    find, number, _ = VICTIMS[victim]
    try:
        driver.wait(delay)
        return None
    except subprocess.TimeoutExpired:
        pass
    while driver.poll() is None:
        known = family(driver.pid)
        found = find(driver.pid)
        for pid in found if victim == "tree" else [chance.choice(found)] if found else []:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if found:
            return known
        time.sleep(0.02)
    return None


def test_the_same_command_resumes_after_any_kill(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert start(project, "calm").wait(RUN_SECONDS) == 0, (project / "output").read_text()
    whole = time.monotonic() - began
    expected = shards(project / "calm")
    assert json.loads((project / "calm/shards/manifest.json").read_text())["samples"] > 40
    chance = random.Random(SEED)
    order: list[str] = []
    while len(order) < MOMENTS:
        order += chance.sample(sorted(VICTIMS), len(VICTIMS))
    hits: Counter[str] = Counter()
    runs = moments = 0
    end = time.monotonic() + 7000
    while moments < MOMENTS and time.monotonic() < end:
        victim = order[moments]
        # From the first import to the last file. A resumed run ends sooner and may not be hit.
        delay = chance.uniform(0.3 if victim in ("worker", "decoder") else 0.05, 1.0) * whole
        fresh, started = not (project / f"run{runs}").exists(), time.monotonic()
        driver = start(project, f"run{runs}")
        known = hit(driver, victim, delay, chance)
        status = driver.wait(PATIENCE if known and 0 not in VICTIMS[victim][2] else RUN_SECONDS)
        output = (project / "output").read_text()
        where = f"{victim} after {delay:.1f} of {whole:.1f} s, moment {moments}, seed {SEED}: status {status}\n{output}"
        assert "Traceback" not in output, where
        if known is not None:
            assert status in VICTIMS[victim][2] | {0}, where  # 0: it finished at this moment
            if status > 0:
                assert "Run the same command again" in output, where
            gone = time.monotonic() + LEFT
            while left(known) and time.monotonic() < gone:
                time.sleep(0.2)
            assert not left(known), where + "\n".join(words(pid) for pid in left(known))
            hits[victim] += 1
            moments += 1
            with capsys.disabled():
                print(
                    f"{moments}: {victim} after {delay:.1f} s: {status}, {time.monotonic() - began:.0f} s", flush=True
                )
        if known is None and fresh:  # it ended before the kill: the machine is faster than before
            whole = time.monotonic() - started
        if status == 0:
            assert shards(project / f"run{runs}") == expected, where
            runs += 1
    driver = start(project, f"run{runs}")
    assert driver.wait(RUN_SECONDS) == 0, (project / "output").read_text()
    assert shards(project / f"run{runs}") == expected
    assert verify.main([str(project / f"run{runs}"), "--deep"]) == 0
    assert moments == MOMENTS, f"only {moments} within the time: {dict(hits)}"
