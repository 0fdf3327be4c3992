"""Distribution of units to workers, and the loss of workers and nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest
from ray.cluster_utils import Cluster

from pipeline.recipe import Recipe
from pipeline.scheduler import isolation
from pipeline.scheduler.passes import Pass
from pipeline.scheduler.run_pass import UnitReport
from pipeline.scheduler.workers import MAX_FAILED_STARTS, _Worker
from pipeline.step import Stage
from tests.conftest import HUNG, Command, environment
from tests.fetch.process_tree import family
from tests.scheduler.test_passes import ROWS, ingested, recipe

__all__ = ["recipe"]  # the fixture
STORE_BYTES = 200 << 20

STEPS = '''
import os, time
from dataclasses import dataclass
from pathlib import Path
import pyarrow as pa
from pipeline.step import Stage

@dataclass(kw_only=True)
class Stillborn(Stage):
    """A model that does not fit into memory."""
    def setup(self):
        os._exit(9)
    def process(self, batch):
        return batch

@dataclass(kw_only=True)
class Dear(Stage):
    adds = {"dear": pa.int32()}
    expensive = True
    def setup(self):
        self.units = 0
    def process(self, batch):
        note(f"dear {batch['unit'][0]}")
        note(os.getpid(), "workers")
        self.units += 1
        end = time.monotonic() + 600
        while self.units > 1 and not others_are_there() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        return batch.append_column("dear", pa.array(range(len(batch)), pa.int32()))

@dataclass(kw_only=True)
class Slow(Stage):
    """A model that loads until the file `loading` is gone."""
    def setup(self):
        note(os.getpid(), "workers")
        while (Path(__file__).parent / "loading").exists():
            time.sleep(0.05)
    def process(self, batch):
        return batch

@dataclass(kw_only=True)
class Look(Stage):
    needs = ("dear",)
    adds = {"look": pa.int32()}
    expensive = True
    def process(self, batch):
        note(f"look {batch['unit'][0]}")
        return batch.append_column("look", batch["dear"])

def others_are_there():
    """Tells whether as many workers have begun as the file `wanted` says, and, if a file `beside` exists, the next pass
    too."""
    here = Path(__file__).parent
    wanted = int((here / "wanted").read_text()) if (here / "wanted").exists() else 0
    beside = not (here / "beside").exists() or "look" in (here / "notes").read_text()
    return beside and len(set((here / "workers").read_text().split())) >= wanted

def note(line, name="notes"):
    with (Path(__file__).parent / name).open("a") as file:
        file.write(f"{line}\\n")
'''
RECIPE = """
name: t
pool: {path: p.csv}
run: out
unit_rows: 50
steps: [STEPS]
"""


@dataclass(kw_only=True)
class Late(Stage):
    """Emits each batch after the next one arrives, like a slow host."""

    seen: ClassVar[list[int]] = []

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        held = None
        for batch in batches:
            self.seen.append(batch["unit"][0].as_py())
            if held is not None:
                yield held
            held = batch
        if held is not None:
            yield held


@dataclass(kw_only=True)
class Loaded(Stage):
    """Holds something that cannot be pickled once it is set up, like a model or a thread pool."""

    def setup(self) -> None:
        self.lock = threading.Lock()

    def process(self, batch: pa.Table) -> pa.Table:
        with self.lock:
            return batch


def worked(passes: list[Pass], units: list[int]) -> list[UnitReport]:
    worker = _Worker(passes, 1, {})
    for unit in (*units, None):
        worker.submit(unit)
    ready, *reports = worker.run()
    assert ready == UnitReport(), "the first report says that the worker is ready"
    return reports


@pytest.mark.parametrize("recipe", ["local"], indirect=True)
def test_a_unit_is_isolated_from_a_worker_that_is_set_up(recipe: Recipe) -> None:
    passes = ingested(recipe, [Loaded()])
    for _ in range(isolation.ATTEMPTS):
        isolation.attempt(passes[1], 0)
    (record,) = [record for report in worked(passes, [0]) for record in report.records]
    assert record["kept"] == record["rows_in"] > 0


def test_a_worker_begins_the_next_unit_while_the_last_rows_of_this_one_run_out(recipe: Recipe) -> None:
    passes = ingested(recipe, [Late()])
    Late.seen.clear()
    worker = _Worker(passes, 1, {})
    for unit in (0, 1, 2, None):
        worker.submit(unit)
    seen = [(record["unit"], list(Late.seen)) for report in worker.run() for record in report.records]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]


def test_a_committed_unit_counts_and_is_not_repeated(recipe: Recipe) -> None:
    passes = ingested(recipe, [Late()])
    worked(passes, [1])
    Late.seen.clear()
    reports = worked(passes, [1, 0, 2])
    assert 1 not in Late.seen
    assert sorted(record["unit"] for t in reports for record in t.records) == [0, 1, 2]
    assert sum(t.rows for t in reports) == sum(t.kept for t in reports) == ROWS


@pytest.fixture
def project(tmp_path: Path) -> Path:
    rows = "".join(f"http://h/{i},picture number {i}\n" for i in range(400))
    (tmp_path / "p.csv").write_text("url,caption\n" + rows)
    (tmp_path / "mine").mkdir()
    for name in ("__init__", "stillborn", "dear", "slow", "look"):
        (tmp_path / "mine" / f"{name}.py").write_text(STEPS)
    return tmp_path


def test_neighbouring_passes_run_side_by_side(run: Command, project: Path) -> None:
    (project / "r.yaml").write_text(RECIPE.replace("STEPS", "mine.dear, mine.look"))
    (project / "mine/beside").touch()  # how fast workers start does not matter
    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    notes = (project / "mine/notes").read_text().splitlines()
    assert sorted(notes) == sorted(f"{step} {unit}" for step in ("dear", "look") for unit in range(8))
    assert notes.index(next(n for n in notes if n.startswith("look"))) < notes.index(
        [n for n in notes if n.startswith("dear")][-1]
    )


def test_workers_that_die_before_they_are_ready_end_the_run(run: Command, project: Path) -> None:
    (project / "r.yaml").write_text(RECIPE.replace("STEPS", "mine.stillborn"))
    done = run("r.yaml")
    assert done.returncode == 1
    assert "3 workers of stillborn in a row died before they were ready: is there enough memory?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A Ray head node with one core."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES})
    yield cluster
    cluster.shutdown()


@contextmanager
def started(cluster: Cluster, project: Path, ready: Callable[[Path], bool]) -> Iterator[subprocess.Popen[str]]:
    """Starts a run on the cluster. Yields it once `ready(project)`."""
    env = environment(project, RAY_ADDRESS=cluster.address)
    argv = [sys.executable, "-m", "pipeline.run", "r.yaml"]
    with subprocess.Popen(argv, cwd=project, env=env, stdout=subprocess.PIPE, text=True) as driver:
        deadline = time.monotonic() + HUNG
        while not ready(project) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield driver


def committed(project: Path) -> bool:
    """True if the run has committed a unit."""
    return any(project.glob("out/passes/dear-*/commits/*"))


def begun(project: Path) -> int:
    """Number of workers that have begun."""
    notes = project / "mine/workers"
    return len(set(notes.read_text().split())) if notes.exists() else 0


@pytest.mark.slow
def test_losing_a_node_only_costs_time(cluster: Cluster, project: Path) -> None:
    (project / "r.yaml").write_text(RECIPE.replace("STEPS", "mine.dear, mine.look"))
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    with started(cluster, project, committed) as driver:
        cluster.remove_node(node, allow_graceful=False)
        output, _ = driver.communicate(timeout=HUNG)
    assert driver.returncode == 0
    assert "400 rows in = 400 kept + 0 dropped" in output


@pytest.mark.slow
@pytest.mark.parametrize("in_order", [False, True])
def test_workers_lost_with_a_node_are_no_failed_starts(cluster: Cluster, project: Path, in_order: bool) -> None:
    (project / "r.yaml").write_text(RECIPE.replace("STEPS", "mine.slow"))
    (project / "mine/loading").touch()
    lost = MAX_FAILED_STARTS + 1
    node = cluster.add_node(num_cpus=lost, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    with started(cluster, project, lambda it: begun(it) == 1 + lost) as driver:
        cluster.remove_node(node, allow_graceful=in_order)
        time.sleep(5)  # until the run has noticed all of them
        (project / "mine/loading").unlink()
        output, _ = driver.communicate(timeout=HUNG)
    assert driver.returncode == 0
    assert "400 rows in = 400 kept + 0 dropped" in output


@pytest.mark.slow
def test_a_node_that_joins_later_gets_work(cluster: Cluster, project: Path) -> None:
    (project / "r.yaml").write_text(RECIPE.replace("STEPS", "mine.dear").replace("unit_rows: 50", "unit_rows: 4"))
    (project / "mine/wanted").write_text("3")
    with started(cluster, project, committed) as driver:
        cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        output, _ = driver.communicate(timeout=HUNG)
    assert driver.returncode == 0
    assert "400 rows in = 400 kept + 0 dropped" in output
    assert begun(project) == 3


def may_unshare() -> bool:
    """True if this user may create a mount namespace."""
    words = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    with contextlib.suppress(OSError):
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    return False


@contextmanager
def node_without(folder: Path, cluster: Cluster) -> Iterator[None]:
    """Adds a node on which `folder` is empty, started in another working directory."""
    script = f'mount -t tmpfs none "{folder}" && exec ray start --address {cluster.address} --num-cpus 2 --block'
    env = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    nodes = cluster.global_state._live_node_ids
    before, deadline = len(nodes()), time.monotonic() + HUNG
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script], cwd="/", env=env, stdout=subprocess.PIPE) as node:
        try:
            while len(nodes()) == before:
                assert node.poll() is None, "the node did not start"
                assert time.monotonic() < deadline, "the node did not join"
                time.sleep(0.1)
            yield
        finally:
            for pid in family(node.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not may_unshare(), reason="needs the right to mount in a namespace of its own (root on Linux)")
@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("data", "does not see {project}/data/out, which this process writes to"),
        ("lists", "does not see {project}/lists/words.txt, which the recipe names"),
    ],
)
def test_a_node_that_does_not_share_a_folder_is_named_before_the_start(
    cluster: Cluster, project: Path, folder: str, problem: str
) -> None:
    for name in ("data", "lists"):
        (project / name).mkdir()
    (project / "lists/words.txt").write_text("red car\n")
    steps = "{text_safety: {words: lists/words.txt}}, mine.dear"
    (project / "r.yaml").write_text(RECIPE.replace("STEPS", steps).replace("run: out", "run: data/out"))
    env = environment(project, RAY_ADDRESS=cluster.address)
    words = [sys.executable, "-m", "pipeline.run", "r.yaml"]
    with node_without(project / folder, cluster):
        done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 2, done.stderr
    assert "error: the node " in done.stderr
    assert problem.format(project=project) in done.stderr
    assert not list(project.glob("data/out/passes/*"))
    assert not list(project.glob("data/out/nodes/*"))


def test_workers_find_the_files_of_steps(run: Command, project: Path) -> None:
    """Paths in options are relative to the command's folder, but workers run in other folders."""
    (project / "words.txt").write_text("number 7\n")
    steps = "{text_safety: {words: words.txt}}"
    (project / "r.yaml").write_text(RECIPE.replace("STEPS", steps))
    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    assert "400 rows in = 399 kept + 1 dropped" in done.stdout
