"""Fixtures shared across the suite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Set before torch is imported: test models are tiny, and thread synchronization would dominate on a busy machine.
# Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Starts a two-core Ray cluster once per session: joining it takes 1 s, starting one takes 5 s."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def painted(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, to be read: `out`; `stricter`, of the same pool; `other`, of an overlapping pool."""
    from tests import painted

    folder = painted.furnish(tmp_path_factory.mktemp("painted"))
    painted.run(folder, ray_address, "r.yaml")
    painted.run(folder, ray_address, "r.yaml", "run=stricter", "reuse=out", "steps.threshold.min=0.7")
    painted.run(folder, ray_address, "r.yaml", "run=other", "pool.path=other.parquet", "steps.threshold.min=0.3")
    return folder


@pytest.fixture
def run(ray_address: str, tmp_path: Path) -> Command:
    """`run("recipe.yaml", "key=value", …)`: runs the main command in `tmp_path` on the session Ray."""

    def command(*args: str, ray: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **environment}
        if ray:
            env["RAY_ADDRESS"] = ray_address
        quick = [] if any("report" in word for word in args) else ["report=false"]
        argv = [sys.executable, "-m", "pipeline.run", *args, *quick]
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)

    return command
