"""Fixtures shared across the suite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from pipeline.storage import Store

# Set before torch is imported: test models are tiny, and thread synchronization would dominate on a busy machine.
# Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray starts its workers at niceness 15, at which they would hardly run next to four busy processes.
os.environ.setdefault("RAY_worker_niceness", "0")
# A shell starts background commands with SIGINT ignored. Children that tests interrupt would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
HUNG = 800.0
"""Seconds after which a child process counts as hung: less than the timeout of a test. Not a performance bound."""
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Starts a two-core Ray cluster once per session: joining it takes 1 s, starting one takes 5 s."""
    import ray

    from pipeline.scheduler.cluster import start_local

    keeper = start_local(cpus=2, store_bytes=200 << 20, say=print)
    # Ray's handler raises SystemExit, which would fail the current test and let the suite go on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    keeper.end()


def shared(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once for all processes of the suite."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def finished(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of tests/test_run.py with its finished run `out`. Read-only: change a copy."""
    from tests import painted
    from tests.test_run import furnish

    def make(folder: Path) -> None:
        painted.run(furnish(folder), ray_address, "r.yaml")

    return shared("finished", tmp_path_factory, make)


@pytest.fixture(scope="session")
def painted(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs: `out`; `stricter`, of the same pool; `other`, of an overlapping pool.

    Tests must not change these but may add runs under other names.
    """
    from tests import painted

    def make(folder: Path) -> None:
        painted.furnish(folder)
        painted.run(folder, ray_address, "r.yaml")
        painted.run(folder, ray_address, "r.yaml", "run=stricter", "reuse=out", "steps.threshold.min=0.7")
        painted.run(folder, ray_address, "r.yaml", "run=other", "pool.path=other.parquet", "steps.threshold.min=0.3")

    return shared("painted", tmp_path_factory, make)


@pytest.fixture(scope="session")
def small_model() -> Callable[[Path], int]:
    """`small_model(folder)`: writes a small, untrained dual encoder and returns the dimension of its embeddings."""

    def write(folder: Path) -> int:
        import torch
        from safetensors.torch import save_file

        from pipeline.stages.clip_score import CONFIG_FILE, WEIGHTS_FILE
        from trainer.model import create, model_config

        torch.manual_seed(0)
        model, preprocess, _ = create("tiny-64")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": model_config("tiny-64"), "preprocess_cfg": preprocess.config}
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS_FILE)
        return int(config["model_cfg"]["embed_dim"])

    return write


def quick(words: Sequence[str]) -> list[str]:
    """Overrides that make a run cheap, except those that `words` already set."""
    return [cheap for cheap in ("report=false", "workers=1") if not any(cheap.split("=")[0] in word for word in words)]


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """The environment of a command that imports from `folders` and the checkout, and does not join the session Ray
    unless `variables` has its RAY_ADDRESS."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT))), **variables}


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store in a folder, then one in an object store (fsspec's memory)."""
    from pipeline.storage import Store

    local = request.param == "local"
    return Store(str(tmp_path / "run") if local else f"memory://{tmp_path.name}-{request.node.name}/run")


@pytest.fixture
def run(ray_address: str, tmp_path: Path) -> Command:
    """`run("recipe.yaml", "key=value", …)`: runs the main command in `tmp_path` on the session Ray.

    Unless overridden, a pass has one worker and no report is written: a worker costs seconds of CPU to start.
    """

    def command(*args: str, ray: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        env = environment(tmp_path, **({"RAY_ADDRESS": ray_address} if ray else {}), **variables)
        argv = [sys.executable, "-m", "pipeline.run", *args, *quick(args)]
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HUNG, check=False)

    return command
