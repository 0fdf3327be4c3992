"""The meter counts what the kernel counts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.scheduler.meter import Meter, Spent

BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


def test_working_and_waiting_are_distinguished() -> None:
    meter = Meter()
    time.sleep(0.05)
    meter.add("waiting")
    started = time.thread_time()
    while time.thread_time() < started + 0.2:
        pass
    meter.add("working")
    spent = meter.take()
    assert spent["waiting"] >= 0.05
    assert spent["working"] >= 0.2
    assert spent["cpu"] >= 0.2  # of all threads, so it may exceed the time by the clock
    assert meter.take() == {}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count it")
def test_child_processes_count_while_they_live() -> None:
    meter = Meter()
    argv = [sys.executable, "-c", BUSY]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        meter.add("working")
        child.communicate("\n")
    meter.add("working")
    spent = meter.take()
    assert spent["child_cpu"] >= 0.29
    assert spent["cpu"] < 0.29


def test_spent_adds_up() -> None:
    spent = Spent(working=1.0)
    spent += {"working": 2.0, "cpu": 1.0}
    assert spent == {"working": 3.0, "cpu": 1.0}
    assert spent["queued"] == 0.0
