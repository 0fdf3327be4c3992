"""Several ranks train what one trains."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.trainer.shards import samples, write_shards
from tests.trainer.test_train import assert_equal, metrics, weights, words
from trainer import checkpoint, distributed, train


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = samples(36)
    pairs[19] = (b"not a picture", "nor one")
    return write_shards(tmp_path_factory.mktemp("data") / "shards", pairs)


def start(line: list[str], ranks: int = 2) -> list[subprocess.Popen[str]]:
    """What `torchrun` does: processes that find each other by their environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.train", *line],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def test_two_ranks_go_on_from_the_checkpoint_of_one_with_the_same_samples_and_losses(
    shards: Path, tmp_path: Path
) -> None:
    line = words(shards, tmp_path / "one", checkpoint_every=6, log_every=1)
    assert train.main(line) == 0
    resume = f"resume={tmp_path / 'one' / 'checkpoints' / 'step-00000006.pt'}"
    first, second = finish(start([*line, f"output={tmp_path / 'two'}", resume, "micro_batch_size=3"]))
    one, two = metrics(tmp_path / "one")[6:], metrics(tmp_path / "two")
    assert [record["step"] for record in two] == list(range(7, 13))
    for key in ("loss", "grad_norm", "temperature", "corrupt", "samples"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-3), key
    trained, alone = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, value in trained.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-2, atol=1e-3, msg=name)
    # One log, of all ranks.
    assert two[-1]["corrupt"] > 0
    assert "corrupt sample 00001.tar:000000019" in first
    assert "corrupt sample" not in second
    assert "step" not in second


def test_a_batch_that_the_ranks_cannot_share_is_refused(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert train.main(words(shards, tmp_path / "out")) == 2
    assert "batch_size: 8 cannot be divided among 3 ranks" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_have_the_same_weights(shards: Path, tmp_path: Path) -> None:
    options = {"checkpoint_every": 1, "micro_batch_size": 2, "precision": "bf16"}
    finish(start(words(shards, tmp_path / "whole", **options)))
    line = words(shards, tmp_path / "killed", **options)
    processes = start(line)
    deadline = time.monotonic() + 120
    while checkpoint.latest(tmp_path / "killed") is None and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    killed = checkpoint.latest(tmp_path / "killed")
    assert killed is not None
    assert checkpoint.load(killed)["step"] < 12
    finish(start(line))
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_starts_the_ranks_wherever_its_workers_run(shards: Path, tmp_path: Path, ray_address: str) -> None:
    line = words(shards, tmp_path / "one", log_every=1, checkpoint_every=2, epochs=1)
    assert train.main(line) == 0
    resume = "resume=one/checkpoints/step-00000002.pt"  # relative to the command, not to Ray's workers
    command = [sys.executable, "-m", "trainer.train", *line, "output=ray", resume, "ranks=2", "device=cpu"]

    def start_on_ray(*changes: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "RAY_ADDRESS": ray_address}
        return subprocess.run([*command, *changes], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)

    done = start_on_ray()
    assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one")[2:], metrics(tmp_path / "ray")
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-3)
    # What is wrong in a worker ends the command as it would alone.
    refused = start_on_ray("batch_size=64")
    assert refused.returncode == 2
    assert "only 36 samples" in refused.stderr
