from __future__ import annotations

import json
import multiprocessing
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import HUNG
from tests.trainer.shards import COLOURS, picture, samples, write_shards
from trainer import checkpoint, export, loop, train
from trainer.config import load_config
from trainer.evaluate.__main__ import main as evaluate
from trainer.hooks import Hook
from trainer.model import create, encode_trimmed, load, open_clip, trim
from trainer.training import Run, Towers, learning_rate, make_optimizer

BASE = {"model": "scorer-64", "batch_size": 8, "epochs": 3, "lr": 0.001, "warmup": 4, "workers": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", samples(36))


def words(shards: Path, output: Path, **changes: object) -> list[str]:
    """The arguments of a training: the configuration file next to the output, then the overrides."""
    conf = output.with_suffix(".yaml")
    conf.parent.mkdir(parents=True, exist_ok=True)
    conf.write_text("".join(f"{key}: {value}\n" for key, value in BASE.items()))
    values = {"shards": shards, "output": output, **changes}
    return [str(conf), *(f"{key}={value}" for key, value in values.items())]


def weights(output: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(output)
    assert path is not None
    state = checkpoint.load(path)
    return {**state["model"], "step": torch.tensor(state["step"])}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "out"
    assert train.main(words(shards, output)) == 0
    return output


def wait_for_step_2(process: subprocess.Popen[str]) -> None:
    """Reads the errors of a training up to the line of its second step, or to the end."""
    assert process.stderr is not None
    for output in process.stderr:
        if output.startswith("step 2/"):
            break


def scalars(output: Path, tag: str) -> dict[int, float]:
    """The values of a TensorBoard scalar, by step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def metrics(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl. ValueError for NaN and Infinity, which are no JSON."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def test_same_configuration_same_weights_whatever_the_workers(shards: Path, reference: Path, tmp_path: Path) -> None:
    assert train.main(words(shards, tmp_path / "again", workers=2)) == 0
    assert_equal(weights(tmp_path / "again"), weights(reference))


def test_other_seed_other_weights(shards: Path, reference: Path, tmp_path: Path) -> None:
    assert train.main(words(shards, tmp_path / "other", seed=1, export="false")) == 0
    assert not torch.equal(weights(tmp_path / "other")["visual.proj"], weights(reference)["visual.proj"])


def test_killed_and_resumed_gives_the_same_weights(shards: Path, reference: Path, tmp_path: Path) -> None:
    line = words(shards, tmp_path / "out", checkpoint_every=1, log_every=1, keep_checkpoints=1)
    process = subprocess.Popen([sys.executable, "-m", "trainer.train", *line], stderr=subprocess.PIPE)
    deadline = time.monotonic() + HUNG
    while checkpoint.latest(tmp_path / "out") is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    killed = checkpoint.latest(tmp_path / "out")
    assert killed is not None
    assert checkpoint.load(killed)["step"] < 12  # steps a run without the kill makes
    assert train.main(line) == 0
    assert_equal(weights(tmp_path / "out"), weights(reference))
    assert [record["step"] for record in metrics(tmp_path / "out")] == list(range(1, 13))
    # Run again after the end, it does nothing, successfully.
    assert train.main(line) == 0
    assert_equal(weights(tmp_path / "out"), weights(reference))


def state(step: int) -> dict[str, object]:
    return {**dict.fromkeys(checkpoint.KEYS), "step": step}


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.pt.0123456789ab.part").write_bytes(b"cut")
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000002.pt", "step-00000003.pt"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    """One bit of a weight, which torch would read without a word."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace(path: Path) -> None:
    path.write_text("<html>not found</html>")


def delete_a_piece(path: Path) -> None:
    """Removes one tensor and keeps the checksums of the others valid."""
    with zipfile.ZipFile(path) as old:
        pieces = {name: old.read(name) for name in old.namelist() if not name.endswith("/data/5")}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in pieces.items():
            new.writestr(name, data)


def rename(path: Path) -> None:
    """Gives the name to an earlier checkpoint, which would be exported as the last step."""
    shutil.copy(path.with_name("step-00000009.pt"), path)


def strange(path: Path) -> None:
    torch.save({"step": 12, "model": {}, "model_config": {}}, path)


@pytest.mark.parametrize("damage", [cut, empty, flip, replace, delete_a_piece, rename, strange])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    shards: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    line = words(shards, tmp_path / "out", checkpoint_every=3, keep_checkpoints=2)
    assert train.main(line) == 0
    damage(tmp_path / "out" / "checkpoints" / "step-00000012.pt")
    capsys.readouterr()
    assert train.main(line) == 0
    output = capsys.readouterr().err
    assert "step-00000012.pt: damaged" in output
    assert "resuming from step-00000009.pt" in output
    assert_equal(weights(tmp_path / "out"), weights(reference))


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    empty(tmp_path / "step-00000009.pt")
    checkpoint.save(tmp_path, 3, state(3), keep=1)
    assert checkpoint.newest_whole(tmp_path)[0] == tmp_path / "step-00000003.pt"


def test_with_every_checkpoint_damaged_nothing_is_trained_anew(
    shards: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(reference / "checkpoints", output / "checkpoints")
    for path in (output / "checkpoints").iterdir():
        cut(path)
    assert train.main(words(shards, output)) == 2
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert export.main([str(output), str(tmp_path / "model")]) == 2


FULL = """\
import resource, signal, sys
from trainer.train import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_a_line_and_leaves_nothing(
    shards: Path, tmp_path: Path
) -> None:
    line = words(shards, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", FULL, *line], capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 1, done.stderr
    assert "the checkpoint cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def test_a_model_that_cannot_be_written_leaves_nothing(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert export.main([str(reference), str(tmp_path / "file" / "model")]) == 1
    assert "the model cannot be written: Not a directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_that_is_a_file_is_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert train.main(words(shards, tmp_path / "out")) == 2
    assert "output: the folder" in capsys.readouterr().err


@pytest.mark.parametrize("group", [False, True], ids=["the process", "its group"])
def test_sigterm_writes_a_checkpoint_that_the_same_command_resumes_from(
    shards: Path, reference: Path, tmp_path: Path, group: bool
) -> None:
    line = words(shards, tmp_path / "out", log_every=1, workers=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.train", *line], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_step_2(process)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=HUNG)[1]
    assert process.returncode == 143, output
    assert "stopped by SIGTERM; the same command resumes" in output
    assert "Traceback" not in output
    step = int(weights(tmp_path / "out")["step"])
    assert step == metrics(tmp_path / "out")[-1]["step"] < 12
    assert train.main(line) == 0
    assert_equal(weights(tmp_path / "out"), weights(reference))


def test_a_training_ends_when_its_terminal_is_closed(shards: Path, tmp_path: Path) -> None:
    """As under nohup: neither the progress nor the error can be printed."""
    line = words(shards, tmp_path / "out", log_every=1, workers=1)
    terminal, other_end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "trainer.train", *line], stderr=other_end)
    os.close(other_end)
    output = b""
    while b"samples/s" not in output:
        output += os.read(terminal, 4096)
    os.close(terminal)
    try:
        assert process.wait(HUNG) == 1
    finally:
        process.kill()


def test_an_output_belongs_to_one_training_until_it_ends(
    shards: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(shards, tmp_path / "out", log_every=1, workers=1, checkpoint_every=1)
    process = subprocess.Popen([sys.executable, "-m", "trainer.train", *line], stderr=subprocess.PIPE, text=True)
    wait_for_step_2(process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert train.main(line) == 2
        assert f"output: {tmp_path / 'out'} is in use by pid {process.pid} on " in capsys.readouterr().err
    finally:
        process.kill()  # its loader outlives it for a while, and holds nothing
    process.communicate(timeout=HUNG)
    assert train.main(line) == 0
    assert_equal(weights(tmp_path / "out"), weights(reference))


def test_the_first_line_says_which_precision_and_why(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    options = {"epochs": 1, "device": "cpu", "export": "false", "samples": 16}
    assert train.main(words(shards, tmp_path / "auto", **options, precision="auto")) == 0
    first, *others = capsys.readouterr().err.splitlines()
    assert "on cpu in fp32 (auto: this CPU has no instructions for bf16)" in first
    assert "warning" not in "".join(others)
    assert train.main(words(shards, tmp_path / "bf16", **options, precision="bf16")) == 0
    output = capsys.readouterr().err
    assert output.count("warning: this CPU emulates bf16, which takes about 2 to 10 times as long as fp32") == 1


def test_a_resumed_run_keeps_the_precision_that_auto_chose(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(shards, tmp_path / "out", precision="bf16", samples=24, checkpoint_every=2, export="false")
    assert train.main(line) == 0
    (tmp_path / "out" / "checkpoints" / "step-00000003.pt").unlink()
    capsys.readouterr()
    assert train.main([*line, "precision=fp32"]) == 2
    assert "precision: bf16 in the checkpoint, fp32 now" in capsys.readouterr().err
    assert train.main([*line, "precision=auto"]) == 0
    assert "in bf16 (auto: as in the checkpoint)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.002}, "lr: 0.001 in the checkpoint, 0.002 now"),
        ({"batch_size": 4}, "batch_size"),
        ({"seed": 5}, "seed"),
    ],
)
def test_a_resumed_run_must_be_the_same_run(
    shards: Path, reference: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    assert train.main(words(shards, reference, **change)) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_not_resumed_on_other_data_nor_overwritten(
    shards: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_shards(tmp_path / "shards", samples(40))
    assert train.main(words(other, reference)) == 2
    assert "not the data" in capsys.readouterr().err
    assert train.main([*words(shards, reference), "--resume", "none"]) == 2
    assert "resume=latest" in capsys.readouterr().err


def test_learning_rate_warms_up_in_a_line_and_falls_in_a_cosine(reference: Path, shards: Path) -> None:
    config = load_config(words(shards, reference)[0], words(shards, reference)[1:])
    rates = [learning_rate(step, 12, config) for step in range(12)]
    assert rates[:4] == pytest.approx([0.00025, 0.0005, 0.00075, 0.001])
    assert rates[4] == 0.001
    assert rates[8] == pytest.approx(0.0005)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[11] < 0.00005


def test_gains_biases_and_temperature_are_not_decayed(shards: Path, tmp_path: Path) -> None:
    config = load_config(words(shards, tmp_path / "o")[0], words(shards, tmp_path / "o")[1:])
    model, _, _ = create("scorer-64")
    decayed, free = make_optimizer(model, config).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in free["params"]} <= {
        *("bias", "in_proj_bias", "weight", "logit_scale", "class_embedding"),
    }
    assert "logit_scale" in {names[id(p)] for p in free["params"]}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0.0)
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.98), 1e-6)


def test_corrupt_samples_are_named_counted_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = samples(32)
    pairs[19] = (b"<html>not a picture</html>", "a red herring")
    shards = write_shards(tmp_path / "shards", pairs)
    assert train.main(words(shards, tmp_path / "out", epochs=2, log_every=1)) == 0
    output = " ".join(capsys.readouterr().err.split())
    met = output.count("corrupt sample 00001.tar:000000019: not a JPEG")
    assert met >= 2
    assert f"{met} corrupt samples replaced" in output
    assert metrics(tmp_path / "out")[-1]["corrupt"] == met
    assert metrics(tmp_path / "out")[-1]["samples"] == 64


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = encode_trimmed
    calls = []

    def broken(model: object, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        calls.append(1)
        features = encode(model, tokens, normalize)
        return (
            features * torch.where(torch.arange(len(features)) == 2, torch.nan, 1.0)[:, None]
            if len(calls) == 3
            else features
        )

    monkeypatch.setattr("trainer.training.encode_trimmed", broken)
    line = words(shards, tmp_path / "out", checkpoint_every=1)
    assert train.main(line) == 1
    output = capsys.readouterr().err
    assert "step 3: loss nan" in output
    assert output.count(".tar:0000000") == 1
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())


@pytest.fixture
def make_run(shards: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(**changes: object) -> Run:
        line = words(shards, tmp_path / "out", **changes)
        return Run(load_config(line[0], line[1:]))

    return make


def gradients(run: Run, work: Callable[[], object]) -> dict[str, torch.Tensor]:
    run.optimizer.zero_grad()
    work()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_gradient_caching_has_the_gradient_of_the_large_batch(make_run: Callable[..., Run], loss: str) -> None:
    large, cached = make_run(loss=loss), make_run(loss=loss, micro_batch_size=3)
    batch = large.batches[0]
    want, got = (gradients(run, lambda: run.backward(batch.pixels, batch.tokens)) for run in (large, cached))  # noqa: B023
    assert want.keys() == got.keys() == dict(large.model.named_parameters()).keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_gradient_caching_counts_a_batch_once_in_batch_norms(make_run: Callable[..., Run]) -> None:
    run = make_run(model="tiny-rn-64", micro_batch_size=4)
    batch = run.batches[0]
    run.backward(batch.pixels, batch.tokens)
    counted = {name: int(value) for name, value in run.model.named_buffers() if "num_batches" in name}
    assert counted
    assert set(counted.values()) == {-(-run.config.batch_size // 4)}


def test_gradient_caching_replays_random_numbers(make_run: Callable[..., Run]) -> None:
    run = make_run(micro_batch_size=3, grad_checkpointing="true")
    run.model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.5)
    batch = run.batches[0]

    def with_all_activations() -> None:
        parts = zip(batch.pixels.tensor_split(3), [trim(run.model, part) for part in batch.tokens.tensor_split(3)])
        image, text, scale = zip(*(run._encode(i, *part) for i, part in enumerate(parts)))
        run._loss([torch.cat(image), torch.cat(text), scale[0]]).loss.backward()

    want = gradients(run, with_all_activations)
    got = gradients(run, lambda: run.backward(batch.pixels, batch.tokens))
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    other = gradients(run, lambda: (setattr(run, "step", 1), run.backward(batch.pixels, batch.tokens)))
    assert not torch.allclose(other["visual.conv1.weight"], got["visual.conv1.weight"])


@pytest.mark.parametrize(("precision", "loss"), [("bf16", "siglip"), ("fp16", "clip")])
def test_caching_checkpointing_and_low_precision_train_together_and_resume(
    shards: Path, tmp_path: Path, precision: str, loss: str
) -> None:
    options = {"precision": precision, "loss": loss, "micro_batch_size": 4, "grad_checkpointing": "true", "epochs": 1}
    line = words(shards, tmp_path / "out", **options, checkpoint_every=2, log_every=1)
    assert train.main(line) == 0
    record = metrics(tmp_path / "out")
    assert record[-1]["loss"] < record[0]["loss"]
    resume = f"resume={tmp_path / 'out' / 'checkpoints' / 'step-00000002.pt'}"
    assert train.main([*line, f"output={tmp_path / 'again'}", resume]) == 0
    assert_equal(weights(tmp_path / "again"), weights(tmp_path / "out"))
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out' / 'model'}")
    assert (model.logit_bias is not None) == (loss == "siglip")


def test_a_gradient_that_overflows_in_fp16_is_null_in_the_metrics(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
    assert train.main(words(shards, tmp_path / "out", precision="fp16", epochs=1, log_every=1)) == 0
    assert {record["grad_norm"] for record in metrics(tmp_path / "out")} == {None}


def test_a_locked_tower_does_not_change(shards: Path, reference: Path, tmp_path: Path) -> None:
    before = weights(reference)
    for tower in ("image", "text"):
        line = words(shards, tmp_path / tower, pretrained=reference / "model", **{f"lock_{tower}": "true"}, epochs=1)
        assert train.main(line) == 0
        after = weights(tmp_path / tower)
        changed = {name for name, value in after.items() if name != "step" and not torch.equal(value, before[name])}
        assert "logit_scale" in changed
        towers = {"image" if name.startswith("visual.") else "text" for name in changed - {"logit_scale"}}
        assert towers == {"image", "text"} - {tower}


def test_a_loss_lost_for_good_stops_the_run_and_names_samples(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = Towers.forward

    def collapsed(towers: Towers, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        image, text, *others = forward(towers, pixels, tokens)
        same = torch.nn.functional.normalize(torch.ones_like(image), dim=-1)
        return (image * 0 + same, text * 0 + same, *others)

    monkeypatch.setattr("trainer.training.PATIENCE", 3)
    monkeypatch.setattr(Towers, "forward", collapsed)
    assert train.main(words(shards, tmp_path / "out")) == 1
    output = capsys.readouterr().err
    assert "step 7: 3 steps in a row have a loss no better than chance" in output
    assert output.count("(loss ") == 5


def test_tensorboard_has_the_metrics(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert train.main(words(shards, tmp_path / "out", tensorboard="true", log_every=4, epochs=1)) == 0
    losses = scalars(tmp_path / "out", "loss")
    assert losses == pytest.approx({record["step"]: record["loss"] for record in metrics(tmp_path / "out")})


@pytest.mark.slow
def test_a_compiled_model_trains_and_keeps_its_names(shards: Path, reference: Path, tmp_path: Path) -> None:
    assert train.main(words(shards, tmp_path / "out", compile="true", epochs=1)) == 0
    assert weights(tmp_path / "out").keys() == weights(reference).keys()
    open_clip.create_model(f"local-dir:{tmp_path / 'out' / 'model'}")


def test_a_number_of_samples_may_end_inside_an_epoch(shards: Path, tmp_path: Path) -> None:
    assert train.main(words(shards, tmp_path / "out", samples=60, log_every=1)) == 0
    assert [record["samples"] for record in metrics(tmp_path / "out")] == [8, 16, 24, 32, 40, 48, 56]


def test_plan_writes_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*words(shards, tmp_path / "out"), "--plan"]) == 0
    output = capsys.readouterr().out
    assert "3.7 M parameters" in output
    assert "12 of 8 samples" in output
    assert not (tmp_path / "out").exists()


def test_a_wrong_command_ends_with_2_and_says_why(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(words(shards, tmp_path / "out", model="ViT-B-23")) == 2
    assert "ViT-B-32" in capsys.readouterr().err
    assert train.main(words(shards, tmp_path / "out", batch_size=64)) == 2
    assert "only 36 samples" in capsys.readouterr().err
    assert train.main(words(tmp_path / "nowhere", tmp_path / "out")) == 2
    assert "not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_one_readable_sample_end_the_run_in_plain_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    shards = write_shards(tmp_path / "shards", [(b"no image", "a caption")] * 8)
    assert train.main(words(shards, tmp_path / "out", workers=workers)) == 2
    output = capsys.readouterr().err
    assert "20 samples in a row cannot be read, among them 00000.tar:" in output
    assert "Traceback" not in output


def test_a_trained_model_loads_in_open_clip_with_identical_weights(reference: Path) -> None:
    trained = weights(reference)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{reference / 'model'}")
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    # Our preprocessing, in batches, is open_clip's, and so is the tokenizer.
    ours, batch, tokenizer = load(str(reference / "model"))
    images = [picture("red", 1, size) for size in ((90, 70), (64, 64), (30, 200))]
    assert torch.allclose(batch(images), torch.stack([preprocess(image) for image in images]), atol=1e-6)
    caption = ["two red squares"]
    assert torch.equal(tokenizer(caption), open_clip.get_tokenizer(f"local-dir:{reference / 'model'}")(caption))
    assert not ours.training


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_rounded_export_holds_the_rounded_weights_and_is_small(
    reference: Path, tmp_path: Path, precision: str
) -> None:
    assert export.main([str(reference), str(tmp_path / "model"), "--precision", precision]) == 0
    assert (tmp_path / "model" / "open_clip_model.safetensors").stat().st_size <= 7_500_000
    model = open_clip.create_model(f"local-dir:{tmp_path / 'model'}")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    trained = weights(reference)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name].to(dtype).float()), name


def test_a_training_does_not_replace_a_stranger(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "out" / "model" / "code.py"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert train.main(words(shards, tmp_path / "out")) == 2
    assert "is not an earlier export" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_an_export_replaces_the_folder_it_runs_in(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(reference / "model", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    assert export.main([str(reference), "."]) == 0


def test_damaged_metrics_do_not_stop_a_resumed_run(shards: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "out")
    log = tmp_path / "out" / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'[1]\n{"a": 1}\n\xff\n{"step": 99}\n{"st')
    assert train.main(words(shards, tmp_path / "out")) == 0
    assert log.read_bytes() == whole


def test_metrics_that_cannot_be_written_end_the_run_in_a_line(shards: Path, tmp_path: Path) -> None:
    line = words(shards, tmp_path / "out", log_every=1, checkpoint_every=100)
    full = FULL.replace("4_000_000", "1_000")
    done = subprocess.run([sys.executable, "-c", full, *line], capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 1, done.stderr
    assert "metrics.jsonl: the metrics cannot be written: " in done.stderr
    assert "Traceback" not in done.stderr


class Kill(Hook):
    """Kills a process that reads samples, as the system does when memory runs out."""

    def after_step(self, batch: object, numbers: dict[str, float]) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)


def test_a_killed_reader_ends_the_run_in_a_line(shards: Path, tmp_path: Path) -> None:
    conf, *changes = words(shards, tmp_path / "out", workers=1, epochs=200)
    with pytest.raises(OSError, match=r"DataLoader worker .*\n.*set fewer `workers`"):
        loop.train(load_config(conf, changes), hooks=[Kill])


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_reader_killed_while_it_hands_over_a_batch_ends_the_run_in_the_same_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def lost(loader: object) -> Iterator[object]:
        yield from ()
        raise error

    monkeypatch.setattr("trainer.data.DataLoader.__iter__", lost)
    conf, *changes = words(shards, tmp_path / "out")
    with pytest.raises(OSError, match=r"DataLoader worker lost: (end of|.*reset by).*\n.*set fewer `workers`"):
        loop.train(load_config(conf, changes))


def test_a_device_that_does_not_exist_is_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device in ("", "gpu", "meta", "cuda:99"):
        line = words(shards, tmp_path / "out", device=f"'{device}'")
        assert train.main(line) == 2
        assert f"device: {'found ' * (device in ('', 'gpu'))}{device!r}" in capsys.readouterr().err
    assert train.main([*words(shards, tmp_path / "out", device="gpu"), "--plan"]) == 2


def test_a_folder_without_a_model_is_not_pretrained(
    shards: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(words(shards, tmp_path / "out", pretrained=reference)) == 2
    assert "has no open_clip_config.json" in capsys.readouterr().err


def test_export_does_not_replace_a_stranger(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert export.main([str(reference), str(tmp_path)]) == 2
    assert export.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert (tmp_path / "thesis.txt").exists()


def test_a_trained_model_recognises_its_training_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path / "shards", samples(64))
    line = words(shards, tmp_path / "out", batch_size=4, epochs=4, precision="bf16", log_every=1)
    assert train.main(line) == 0
    temperatures = [record["temperature"] for record in metrics(tmp_path / "out")]
    assert temperatures[0] == pytest.approx(0.07, rel=0.02)
    for label in COLOURS:
        (tmp_path / "test" / label).mkdir(parents=True)
        for i in range(4):
            picture(label, 1000 + i).save(tmp_path / "test" / label / f"{i}.png")
    (tmp_path / "templates").write_text("a {c} picture\n")
    capsys.readouterr()
    model = ["--model", str(tmp_path / "out" / "model")]
    assert (
        evaluate(["zeroshot", *model, "--data", str(tmp_path / "test"), "--templates", str(tmp_path / "templates")])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["task"] == "zeroshot_classification"
    assert result["metrics"]["acc1"] >= 0.9
    assert result["metrics"]["acc5"] is None
    assert evaluate(["retrieval", *model, "--data", str(shards)]) == 0
    measures = ("recall@1", "recall@5", "recall@10", "auc")
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {
        f"{kind}_retrieval_{measure}" for kind in ("image", "text") for measure in measures
    }


def test_the_checkpoint_is_read_without_running_code(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"model": Path, "model_config": {}, "step": 1}, path)
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint"):
        checkpoint.load(path)


def test_preprocessing_takes_any_mode() -> None:
    _, preprocess, _ = create("scorer-64")
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert preprocess([Image.new(mode, (70, 90))]).shape == (1, 3, 64, 64)
