"""A command that ends early exits with one line and leaves no process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.scheduler import lifetime
from tests.conftest import HUNG, ROOT, environment
from tests.fetch.process_tree import alive, family

WATCHING = """
import sys, time
from pipeline.scheduler import lifetime
lifetime.GRACE, lifetime.PROBE_EVERY = 1.0, 0.1
watch = lifetime.Watch()
watch.watch({"the head node (GCS)": ("127.0.0.1", int(sys.argv[1]))})
"""
WILLING = """
try:
    print("ready", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("in order", flush=True)
    watch.leave()
"""
HANGING = """
first = True
while True:
    try:
        if first:
            first = False
            print("ready", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        continue
"""
KEEPING = """
import subprocess, sys, time
from pipeline.scheduler.keeper import Keeper
keeper = Keeper()
child = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-c", child])
if sys.argv[1] == "orderly":
    keeper.end()
    print("ended", flush=True)
time.sleep(600)
"""


def started(script: str, *words: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", script, *words]
    return subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gone(pid: int) -> bool:
    """Waits for a process to end. Returns False if it is still there after HUNG seconds."""
    end = time.monotonic() + HUNG
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 1)])
@pytest.mark.parametrize(("ending", "stdout"), [(WILLING, "ready\nin order\n"), (HANGING, "ready\n")])
def test_a_signal_or_a_lost_cluster_ends_the_command(
    number: signal.Signals | None, status: int, ending: str, stdout: str
) -> None:
    cluster = socket.create_server(("127.0.0.1", 0), backlog=100)
    with cluster, started(WATCHING + ending, str(cluster.getsockname()[1])) as command:
        assert command.stdout is not None
        first = command.stdout.readline()
        if number is None:
            cluster.close()
            why = "error: the cluster is lost: the head node (GCS) at 127.0.0.1:"
        else:
            command.send_signal(number)
            why = f"interrupted by {number.name}. Run the same command again"
        out, errors = command.communicate(timeout=HUNG)
    assert (command.returncode, first + out) == (status, stdout)
    assert errors.startswith(why)
    assert errors.count("\n") == 1, "one line, no traceback"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the keeper looks processes up in /proc")
@pytest.mark.parametrize("way", ["orderly", "killed"])
def test_no_process_outlives_the_command(way: str) -> None:
    with started(KEEPING, way) as command:
        assert command.stdout is not None
        orphan = int(command.stdout.readline())
        others = [pid for pid in family(command.pid) if pid != command.pid]
        output = command.stdout.readline() if way == "orderly" else ""
        alive = command.poll() is None
        command.kill()
    assert all(gone(pid) for pid in (orphan, *others))
    assert alive, "the keeper does not kill the command itself"
    assert output == ("ended\n" if way == "orderly" else "")


@pytest.mark.parametrize("call", ["", "keeper.started();", "keeper.end();"])
def test_a_command_that_vanishes_while_ray_starts_leaves_a_line(call: str) -> None:
    """For example if the raylet dies: Ray's core then exits the process with status 1 and prints nothing."""
    with started(
        f"import os; from pipeline.scheduler.keeper import Keeper; keeper = Keeper(); {call} os._exit(1)"
    ) as command:
        _, errors = command.communicate(timeout=HUNG)
    line = "error: the command ended while Ray was starting. Run the same command again"
    assert errors.startswith(line) if not call else errors == ""


def test_missing_packages_are_reported_in_one_line_with_the_interpreter(tmp_path: Path) -> None:
    words = [sys.executable, "-S", "-m", "pipeline.run", "recipe.yaml"]  # -S: no site-packages
    done = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the Python at {sys.executable} lacks packages that Winnow needs: aiohttp, ")
    assert done.stderr.count("\n") == 1


def test_a_cluster_that_was_shut_down_in_order_is_not_reported_as_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        parts = {"the head node (GCS)": server.getsockname()}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    watch = lifetime.Watch()
    try:
        watch.watch(parts)
        assert "the head node (GCS) at 127.0.0.1" in (watch.lost() or "")
        watch.close()
        assert watch.lost() is None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
