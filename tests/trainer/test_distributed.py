"""Training with several ranks gives the same model as training with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import HUNG, free_port
from tests.fetch.process_tree import family
from tests.trainer.models import COCA
from tests.trainer.shards import samples, write_shards
from tests.trainer.test_train import assert_equal, metrics, wait_for_step_2, weights, words
from trainer import checkpoint, distributed, train


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = samples(36)
    pairs[19] = (b"not a picture", "nor one")
    return write_shards(tmp_path_factory.mktemp("data") / "shards", pairs)


MODULE = ["-m", "trainer.train"]


def start(line: list[str], ranks: int = 2, program: list[str] = MODULE) -> list[subprocess.Popen[str]]:
    """Starts processes that find each other by environment variables, as `torchrun` does."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        subprocess.Popen(
            [sys.executable, *program, *line],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    output = [process.communicate(timeout=HUNG)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), output
    return output


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
    # All ranks share one log.
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


WITH_COCA = """\
import sys
from trainer.model import open_clip
open_clip.add_model_config(sys.argv[1])
from trainer.train import main
sys.exit(main(sys.argv[2:]))
"""


def test_parameters_that_the_loss_does_not_reach_train_on_two_ranks_as_on_one(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "coca-64.json").write_text(json.dumps(COCA))
    program = ["-c", WITH_COCA, str(tmp_path)]
    options = {"model": "coca-64", "samples": 24, "log_every": 1, "checkpoint_every": 2, "micro_batch_size": 2}
    finish(start(words(shards, tmp_path / "one", **options), 1, program))
    finish(start(words(shards, tmp_path / "two", **options), 2, program))
    for key in ("loss", "grad_norm"):
        one, two = ([record[key] for record in metrics(tmp_path / name)] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-3)
    # Two ranks resume the checkpoint of one.
    resume = f"resume={tmp_path / 'one' / 'checkpoints' / 'step-00000002.pt'}"
    finish(start([*words(shards, tmp_path / "again", **options), resume], 2, program))


def test_two_ranks_evaluate_once_and_train_as_without(shards: Path, tmp_path: Path) -> None:
    task = f"evaluate=[{{retrieval: {{data: {shards}, name: seen, every: 3}}}}]"
    data = write_shards(tmp_path / "shards", samples(36))
    line = words(data, tmp_path / "plain", epochs=1)
    finish(start(line))
    output = finish(start([*line, f"output={tmp_path / 'evaluated'}", task.replace(str(shards), str(data))]))
    found = [record["step"] for record in metrics(tmp_path / "evaluated") if "seen/image_retrieval_recall@1" in record]
    assert found == [0, 3, 4]
    assert [text.count("  seen  ") for text in output] == [3, 0]
    assert_equal(weights(tmp_path / "evaluated"), weights(tmp_path / "plain"))
    # An error in it ends all ranks in the same way.
    processes = start([*line, f"output={tmp_path / 'refused'}", task.replace(str(shards), str(tmp_path / "nowhere"))])
    output = [process.communicate(timeout=HUNG)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("nowhere" in text and "Traceback" not in text for text in output)


def test_sigterm_to_one_rank_stops_all_after_the_same_step(shards: Path, tmp_path: Path) -> None:
    line = words(shards, tmp_path / "out", log_every=1, epochs=100)
    processes = start(line)
    wait_for_step_2(processes[0])
    processes[1].send_signal(signal.SIGTERM)
    output = [process.communicate(timeout=HUNG)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], output
    assert "Traceback" not in "".join(output)
    assert int(weights(tmp_path / "out")["step"]) == metrics(tmp_path / "out")[-1]["step"]


@pytest.mark.slow
def test_sigterm_to_torchrun_writes_a_checkpoint_that_the_same_command_resumes_from(
    shards: Path, tmp_path: Path
) -> None:
    line = words(shards, tmp_path / "out", log_every=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *MODULE, *line]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as torchrun:
        wait_for_step_2(torchrun)
        ranks = [pid for pid in family(torchrun.pid) if pid != torchrun.pid]
        torchrun.send_signal(signal.SIGTERM)
        output = torchrun.communicate(timeout=HUNG)[1]
    assert torchrun.returncode == 1, output  # torchrun's own status; it prints what its ranks ended with
    assert output.count("stopped by SIGTERM; the same command resumes") == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    step = int(weights(tmp_path / "out")["step"])
    assert step == metrics(tmp_path / "out")[-1]["step"] < 12
    finish([subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)])
    finish(start(words(shards, tmp_path / "whole", log_every=1)))
    assert_equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_have_the_same_weights(shards: Path, tmp_path: Path) -> None:
    options = {"checkpoint_every": 1, "micro_batch_size": 2, "precision": "bf16"}
    finish(start(words(shards, tmp_path / "whole", **options)))
    line = words(shards, tmp_path / "killed", **options)
    processes = start(line)
    deadline = time.monotonic() + HUNG
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
def test_ray_starts_the_ranks_wherever_its_workers_run(shards: Path, tmp_path: Path, ray_address: str) -> None:
    line = words(shards, tmp_path / "one", log_every=1, checkpoint_every=2, epochs=1)
    assert train.main(line) == 0
    resume = "resume=one/checkpoints/step-00000002.pt"  # relative to the command, not to Ray's workers
    command = [sys.executable, "-m", "trainer.train", *line, "output=ray", resume, "ranks=2", "device=cpu"]

    def start_on_ray(*changes: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "RAY_ADDRESS": ray_address}
        return subprocess.run([*command, *changes], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HUNG)

    done = start_on_ray()
    assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one")[2:], metrics(tmp_path / "ray")
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-3)
    # An error in a worker ends the command as it does with a single rank.
    refused = start_on_ray("batch_size=64")
    assert refused.returncode == 2
    assert "only 36 samples" in refused.stderr
