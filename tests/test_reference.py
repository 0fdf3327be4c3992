"""The generated pages of the documentation match the code."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline import reference
from pipeline.recipe import PoolSpec, Recipe, built_in_steps, find_step
from tests.conftest import ROOT
from trainer.config import TrainConfig


@pytest.mark.parametrize(
    ("page", "written", "command"),
    [
        ("steps.md", reference.steps_page(), "winnow steps > docs/steps.md"),
        ("configuration.md", reference.configuration_page(), "winnow steps --configuration > docs/configuration.md"),
    ],
)
def test_generated_pages_are_up_to_date(page: str, written: str, command: str) -> None:
    assert (ROOT / "docs" / page).read_text() == written, f"run: {command}"


@pytest.mark.parametrize("name", built_in_steps())
def test_every_step_and_option_is_documented(name: str) -> None:
    step = find_step(name)
    assert step.name() == name
    assert step.__doc__
    documented = reference.field_docs(step)
    undocumented = [o.name for o in dataclasses.fields(step) if not documented.get(o.name)]
    assert not undocumented


@pytest.mark.parametrize("cls", [Recipe, PoolSpec])
def test_every_key_of_a_recipe_is_documented(cls: type) -> None:
    documented = reference.field_docs(cls)
    undocumented = [f.name for f in dataclasses.fields(cls) if f.name != "source" and not documented.get(f.name)]
    assert not undocumented


def test_the_page_of_keys_has_every_key() -> None:
    page = reference.configuration_page()
    keys = [f.name for cls in (Recipe, PoolSpec, TrainConfig) for f in dataclasses.fields(cls) if f.name != "source"]
    assert [key for key in keys if f"\n| `{key}` |" not in page] == []


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(["dwnload"]) == 2
    assert "did you mean download?" in capsys.readouterr().err
