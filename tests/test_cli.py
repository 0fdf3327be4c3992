"""The `winnow` command and `winnow init`, as a user meets them. No Ray."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli, init, recipe
from pipeline.study.study_plan import load


@pytest.mark.parametrize("command", cli.COMMANDS.values(), ids=cli.COMMANDS)
def test_every_command_is_there(command: cli.Command) -> None:
    assert importlib.util.find_spec(command.module) is not None


def test_no_arguments_list_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_a_misspelt_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verfy"]) == 2
    assert "did you mean verify?" in capsys.readouterr().err


def test_a_command_gets_its_arguments_and_its_status_is_returned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["steps", "no_such_step"]) == 2
    assert cli.main(["steps", "sample"]) == 0
    assert "`sample` (filter)" in capsys.readouterr().out


def test_the_list_of_commands_imports_neither_ray_nor_torch() -> None:
    code = "import sys, pipeline.cli as c; c.main([]); assert not {'ray', 'torch', 'dask'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parent.parent)


def test_init_lists_all_shipped_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert init.main([]) == 0
    out = capsys.readouterr().out
    shipped = [path.stem for path in (Path(__file__).parent.parent / "conf").glob("*.yaml")]
    assert shipped
    assert all(name in out for name in shipped)


def test_init_demo_writes_a_recipe_and_the_files_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert init.main(["demo"]) == 0
    checked = recipe.load("demo.yaml", [], lambda _: {})
    assert [step.name() for step in checked.steps][-1] == "write_shards"
    assert (tmp_path / "demo/scorer/open_clip_model.safetensors").is_file()
    assert (tmp_path / "train_demo.yaml").is_file()


def test_init_study_writes_a_study_and_the_file_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert init.main(["study"]) == 0
    training = load("study.yaml").train
    assert training is not None
    assert Path(training.config).is_file()


def test_init_study_keeps_the_configuration_that_init_demo_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert init.main(["demo"]) == 0
    (tmp_path / "train_demo.yaml").write_text("mine")
    capsys.readouterr()
    assert init.main(["study"]) == 0
    assert capsys.readouterr().out == "wrote study.yaml\n"
    assert (tmp_path / "train_demo.yaml").read_text() == "mine"


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "400m.yaml").write_text("mine")
    assert init.main(["400m", "--folder", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "400m.yaml").read_text() == "mine"


def test_init_of_an_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert init.main(["500m"]) == 2
    assert "no shipped recipe '500m'" in capsys.readouterr().err
