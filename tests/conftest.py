"""Fixtures shared across the suite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

# Set before torch is imported: test models are tiny, and thread synchronization would dominate on a busy machine.
# Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers are nice by default (15): beside four busy processes they would hardly run at all.
os.environ.setdefault("RAY_worker_niceness", "0")
# A shell makes what it starts in the background ignore SIGINT. Children that tests interrupt would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
HUNG = 800.0
"""Seconds after which a child process counts as hung; below the timeout of a test, and no measure of speed."""
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
    """A folder that is made once for all processes of the suite."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed to make it
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def finished(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of tests/test_run.py with its finished run `out`: read it, or change a copy."""
    from tests import painted
    from tests.test_run import furnish

    def make(folder: Path) -> None:
        painted.run(furnish(folder), ray_address, "r.yaml")

    return shared("finished", tmp_path_factory, make)


@pytest.fixture(scope="session")
def painted(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, to be read: `out`; `stricter`, of the same pool; `other`, of an overlapping pool.

    A test may add runs of other names.
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
    """Overrides that make a run cheap, without those that `words` set."""
    return [cheap for cheap in ("report=false", "workers=1") if not any(cheap.split("=")[0] in word for word in words)]


@pytest.fixture
def run(ray_address: str, tmp_path: Path) -> Command:
    """`run("recipe.yaml", "key=value", …)`: runs the main command in `tmp_path` on the session Ray.

    One worker a pass and no report, unless asked for: each worker is a process that takes seconds of CPU to start.
    """

    def command(*args: str, ray: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **environment}
        if ray:
            env["RAY_ADDRESS"] = ray_address
        argv = [sys.executable, "-m", "pipeline.run", *args, *quick(args)]
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HUNG, check=False)

    return command
