"""Evaluation while a model trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.labelled import write_folders
from tests.trainer.shards import samples, write_shards
from tests.trainer.test_train import BASE, assert_equal, metrics, scalars, weights
from trainer import checkpoint, loop, train
from trainer.config import ConfigError, load_config
from trainer.data import Batch
from trainer.evaluate.__main__ import main as evaluate
from trainer.evaluation import parse
from trainer.hooks import Hook


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "shards", samples(36))
    write_folders(folder / "colours", 3)
    (folder / "prompts.txt").write_text("a {c} picture\n")
    return folder


def configuration(data: Path, output: Path, **changes: object) -> list[str]:
    """A file in JSON, which is YAML: 12 steps, 4 an epoch."""
    conf = output.with_suffix(".yaml")
    conf.write_text(json.dumps({**BASE, "shards": str(data / "shards"), "output": str(output), **changes}))
    return [str(conf)]


def tasks(data: Path) -> list[dict[str, Any]]:
    colours = {"data": str(data / "colours"), "templates": str(data / "prompts.txt"), "every": 5}
    return [{"zeroshot": colours}, {"retrieval": {"data": str(data / "shards"), "name": "seen"}}]


def figures(output: Path, name: str) -> dict[int, dict[str, float]]:
    """By step, what the task of this name gave."""
    found: dict[int, dict[str, float]] = {}
    for record in metrics(output):
        if own := {key.removeprefix(f"{name}/"): v for key, v in record.items() if key.startswith(f"{name}/")}:
            assert record["step"] not in found
            found[int(record["step"])] = own
    return found


@pytest.fixture(scope="module")
def evaluated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "out"
    line = configuration(data, output, evaluate=tasks(data), tensorboard=True, checkpoint_every=6, lock_image=False)
    assert train.main(line) == 0
    return output


def test_tasks_run_at_their_steps_and_do_not_change_the_weights(data: Path, evaluated: Path, tmp_path: Path) -> None:
    assert list(figures(evaluated, "zeroshot/colours")) == [0, 5, 10, 12]
    assert list(figures(evaluated, "seen")) == [0, 4, 8, 12]
    assert train.main(configuration(data, tmp_path / "plain")) == 0
    assert_equal(weights(evaluated), weights(tmp_path / "plain"))
    trained = [record for record in metrics(evaluated) if "loss" in record]
    assert [r["loss"] for r in trained] == [r["loss"] for r in metrics(tmp_path / "plain")]


def test_the_last_figures_are_those_of_the_command_for_the_exported_model(
    data: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ["--model", str(evaluated / "model"), "--templates", str(data / "prompts.txt")]
    assert evaluate(["zeroshot", "--data", str(data / "colours"), *words]) == 0
    assert figures(evaluated, "zeroshot/colours")[12] == json.loads(capsys.readouterr().out)["metrics"]


def test_tensorboard_has_the_figures(evaluated: Path) -> None:
    wanted = {step: result["acc1"] for step, result in figures(evaluated, "zeroshot/colours").items()}
    assert scalars(evaluated, "zeroshot/colours/acc1") == pytest.approx(wanted)


def test_weights_and_biases_has_the_figures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    line = configuration(data, tmp_path / "out", evaluate=tasks(data), wandb="trials", epochs=1, export=False)
    assert train.main(line) == 0
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))


def test_a_resumed_run_evaluates_each_step_once(data: Path, evaluated: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    line = configuration(data, output, evaluate=tasks(data), checkpoint_every=4, keep_checkpoints=9)
    assert train.main(line) == 0
    complete = metrics(output)
    # As if killed behind the checkpoint of step 8, before the evaluation that is due there.
    (output / "checkpoints" / "step-00000012.pt").unlink()
    lines = [json.dumps(record) + "\n" for record in complete if record["step"] < 8 or "loss" in record]
    (output / "metrics.jsonl").write_text("".join(lines))
    assert train.main(line) == 0
    for name in ("zeroshot/colours", "seen"):
        assert figures(output, name) == figures(evaluated, name)


def test_bad_data_is_found_before_the_first_step(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    line = configuration(data, tmp_path / "out", evaluate=[{"zeroshot": {"data": str(tmp_path / "empty")}}])
    assert train.main(line) == 2
    output = capsys.readouterr().err
    assert "step 1" not in output
    assert str(tmp_path / "empty") in output
    assert checkpoint.latest(tmp_path / "out") is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("zeroshot", "entry 1: found 'zeroshot', expected TASK: {data: …}"),
        ({"zero_shot": {"data": "a"}}, "entry 1: no task 'zero_shot'; did you mean zeroshot?"),
        ({"zeroshot": {}}, "zeroshot: the following arguments are required: --data"),
        ({"zeroshot": {"data": "a", "template": "b"}}, "zeroshot: template: no such option; did you mean templates?"),
        ({"zeroshot": {"data": "a", "every": 0}}, "zeroshot: every: found 0, expected a whole number above 0"),
        ({"zeroshot": {"data": "a", "model": "b"}}, "zeroshot: model: no such option"),
        ({"fewshot": {"data": "a", "shots": [1, "x"]}}, "fewshot: argument --shots: invalid int value: 'x'"),
    ],
)
def test_mistakes_are_named(entry: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([entry])
    assert message in str(error.value)


def test_two_entries_of_one_name_need_names() -> None:
    with pytest.raises(ConfigError, match="give each a `name`"):
        parse([{"zeroshot": {"data": "x/val"}}, {"zeroshot": {"data": "y/val"}}])


def test_options_are_those_of_the_command() -> None:
    shifts = {"data": "a", "shift": ["b", "c=d"], "baselines": "e.csv", "batch_size": 8}
    few, robust = parse([{"fewshot": {"data": "a", "shots": [1, 4], "l2": 0.5}}, {"robustness": shifts}])
    assert (few.options.shots, few.options.l2, few.every) == ([1, 4], 0.5, None)
    assert (robust.options.shift, robust.options.batch_size) == (["b", "c=d"], 8)


def test_a_hook_of_ones_own_follows_the_run(data: Path, tmp_path: Path) -> None:
    class Norms(Hook):
        seen: list[float] = []  # noqa: RUF012

        def after_step(self, batch: Batch, numbers: dict[str, float]) -> None:
            assert len(batch.numbers) == self.run.config.batch_size
            self.seen.append(numbers["grad_norm"])

        def finish(self) -> None:
            self.seen.append(self.run.step)

    line = configuration(data, tmp_path / "out", epochs=1, log_every=1)
    loop.train(load_config(line[0]), hooks=[Norms])
    assert Norms.seen == [*(record["grad_norm"] for record in metrics(tmp_path / "out")), 4]


def test_the_hook_in_the_documentation_runs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "(Hook)" in block]
    [conf] = configuration(data, tmp_path / "out", epochs=1)
    exec(code.replace("conf/train_demo.yaml", conf).replace("> 10", "> 0"), {})
    steps = [line.split()[0] for line in capsys.readouterr().out.splitlines() if ".tar:" in line]
    assert steps == ["1", "2", "3", "4"]


def test_evaluation_does_not_change_the_random_numbers_of_the_training(data: Path, tmp_path: Path) -> None:
    class Watch(Hook):
        states: list[torch.Tensor] = []  # noqa: RUF012

        def after_step(self, batch: Batch, numbers: dict[str, float]) -> None:
            self.states.append(torch.get_rng_state())
            assert self.run.model.training

    for name, wanted in (("with", tasks(data)), ("without", None)):
        line = configuration(data, tmp_path / name, epochs=1, evaluate=wanted, export=False)
        loop.train(load_config(line[0]), hooks=[Watch])
    assert len(Watch.states) == 8
    for one, other in zip(Watch.states[:4], Watch.states[4:]):
        assert torch.equal(one, other)
