"""Runs in an S3 object store, as on a cluster without a shared disk.

The fixture installs moto and s3fs from the package index, because only these tests need them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import RunError, open_run, verify
from pipeline.scheduler import claim
from pipeline.storage import Store
from tests.conftest import HUNG, ROOT, Command, free_port
from tests.test_reader import like
from tests.test_run import furnish, shards

pytestmark = pytest.mark.slow

PACKAGES = ["moto[server]>=5.1,<6", "s3fs>=2025.2"]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Serves S3 with a bucket named `bucket`; yields the environment variables that clients need."""
    folder = str(tmp_path_factory.mktemp("s3"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-t", folder, *PACKAGES], check=True)
    port = free_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": folder}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:  # fmt: skip
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(sys, "path", [*sys.path, folder])  # what is installed here comes first
        try:
            fs = Store("s3://bucket").fs
            deadline = time.monotonic() + HUNG
            while True:
                try:
                    fs.mkdir("bucket")
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            yield {**env, "PYTHONPATH": folder}
        finally:
            server.kill()


def test_exactly_one_of_many_concurrent_creators_wins(s3: dict[str, str]) -> None:
    store = Store("s3://bucket/store")
    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(lambda i: store.create("commits/0.json", str(i).encode()), range(16)))
    assert won.count(True) == 1
    assert store.read("commits/0.json") == str(won.index(True)).encode()


def test_a_run_directory_in_the_store_has_one_writer(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WATCH", 1.0)
    store = Store("s3://bucket/claimed")
    dead = {"host": "node7", "boot": "b", "pids": "p", "pid": 4711, "started": "1", "since": 0, "token": "t", "beat": 0}
    store.write("claim/0000003.json", json.dumps(dead).encode())

    def enter(stack: ExitStack) -> bool:
        try:
            stack.enter_context(claim.hold(store))
        except claim.InUseError:
            return False
        return True

    with ExitStack() as stack, ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(enter, [stack] * 8)) == 1
        assert store.names("claim") == ["0000004.json"]
    assert store.names("claim") == []


def test_a_run_has_the_bytes_of_a_local_one(s3: dict[str, str], run: Command, tmp_path: Path) -> None:
    furnish(tmp_path)
    assert run("r.yaml").returncode == 0
    Store("s3://bucket").write("pool.csv", (tmp_path / "pool.csv").read_bytes())
    remote = ["r.yaml", "pool.path=s3://bucket/*.csv", "run=s3://bucket/run"]
    env = {**s3, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), s3["PYTHONPATH"]])}
    done = run(*remote, ray=False, **env)
    assert done.returncode == 0, done.stderr
    store = Store("s3://bucket/run")
    assert not list(verify.problems(store, Console(quiet=True)))
    tables = (".tar", ".parquet", ".npy")
    local = {name: digest for name, digest in shards(tmp_path / "out").items() if name.endswith(tables)}
    assert local == {n: store.sha256(f"shards/{n}") for n in store.names("shards") if n.endswith(tables)}
    like(open_run("s3://bucket/run/"), open_run(tmp_path / "out"))
    with pytest.raises(RunError, match=r"is not the folder of a run: there is no s3://bucket/other/run\.json"):
        open_run("s3://bucket/other")
    painted = (tmp_path / "steps_of_mine" / "painted.log").read_text()
    again = run(*remote, "steps.threshold.top_fraction=0.25", ray=False, **env)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "steps_of_mine" / "painted.log").read_text() == painted, "committed work is not repeated"
    assert not list(verify.problems(store, Console(quiet=True)))
    store.remove("shards/00000.tar")
    store.write("shards/manifest.json", b"{}")
    named = {line.split(":")[1] for line in verify.problems(store, Console(quiet=True))}
    assert named == {"//bucket/run/shards/manifest.json"}
    healed = run(*remote, "steps.threshold.top_fraction=0.25", ray=False, **env)
    assert healed.returncode == 0, healed.stderr
    assert not list(verify.problems(store, Console(quiet=True)))
