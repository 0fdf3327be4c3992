from __future__ import annotations

import dataclasses

import pytest

from pipeline import steps
from pipeline.recipe import built_in_steps, find_step
from tests.conftest import ROOT


def test_the_reference_in_the_docs_is_what_the_steps_say() -> None:
    written = (ROOT / "docs/steps.md").read_text()
    assert written == steps.reference(), "run: python -m pipeline.steps > docs/steps.md"


@pytest.mark.parametrize("name", built_in_steps())
def test_every_step_and_option_is_documented(name: str) -> None:
    step = find_step(name)
    assert step.name() == name
    assert step.__doc__
    documented = steps._option_docs(step)
    undocumented = [o.name for o in dataclasses.fields(step) if not documented.get(o.name)]
    assert not undocumented


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["dwnload"]) == 2
    assert "did you mean download?" in capsys.readouterr().err
