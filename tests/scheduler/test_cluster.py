"""Starting Ray on a machine that is too busy for it, and stopping it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HUNG, environment

SCRIPT = """
import json, sys, time
from pathlib import Path
from ray._private import services
from pipeline.scheduler import cluster
from tests.fetch.process_tree import family

late, get_node = int(sys.argv[1]), services.get_node

def get_node_late(*words):
    "Ray calls this once GCS and raylet run. Ray itself gives up after 30 s, which is too short on a busy machine."
    global late
    if late:
        late -= 1
        raise Exception("The current node timed out during startup.\\nIt is late.")
    while True:
        try:
            return get_node(*words)
        except RuntimeError:
            time.sleep(0.1)

def running(name):
    lines = [Path(f"/proc/{pid}/cmdline") for pid in family()]
    return sum(name in line.read_text().split("\\0")[0] for line in lines if line.exists())

services.get_node = get_node_late
messages = []
try:
    cluster.start_ray(1, messages.append)
except cluster.StartError as error:
    messages.append(str(error))
counts = [[running("gcs_server"), running("raylet/raylet")]]
cluster.stop_ray(lambda: None)
counts.append([running("gcs_server"), running("raylet/raylet")])
print(json.dumps([messages, counts]))
"""
LATE = "Ray did not start: The current node timed out during startup. "
AGAIN = [f"{LATE}Starting it again, attempt {attempt} of 3." for attempt in (2, 3)]
GIVES_UP = f"{LATE}Run the same command again to resume from what was committed."


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize(("late", "lines", "parts"), [(1, AGAIN[:1], [1, 1]), (3, [*AGAIN, GIVES_UP], [0, 0])])
def test_a_failed_start_is_tried_again_and_leaves_no_process(late: int, lines: list[str], parts: list[int]) -> None:
    words = [sys.executable, "-c", SCRIPT, str(late)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=HUNG, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [lines, [parts, [0, 0]]]


STOPPED = """
import signal, sys
from pipeline.scheduler import cluster
from pipeline.scheduler.lifetime import Watch

cluster.start_ray(1, print)
watch = Watch()
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
try:
    if sys.argv[1] == "meanwhile":  # before Ray is done, after it has removed the handler
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        cluster.stop_ray(watch.take_signals)
        signal.pause()
    cluster.stop_ray(watch.take_signals)
    signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt:
    watch.leave()
"""


@pytest.mark.parametrize("when", ["meanwhile", "afterwards"])
def test_sigterm_ends_the_command_with_a_line_while_ray_shuts_down_and_afterwards(when: str) -> None:
    words = [sys.executable, "-c", STOPPED, when]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=HUNG, check=False)
    assert done.returncode == 143, done.stderr
    assert "interrupted by SIGTERM. Run the same command again" in done.stderr
