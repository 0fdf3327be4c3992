from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.models import encoder_of, write_model
from trainer.evaluate.__main__ import main
from trainer.features import Encoder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model of random weights."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def encoder(model: str) -> Encoder:
    return encoder_of(model)


@pytest.fixture
def evaluate(model: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a task of `trainer.evaluate` on the tiny model and gives the metrics."""

    def run(task: str, *words: object) -> dict[str, Any]:
        out = tmp_path / "result.json"
        assert main([task, "--model", model, "--output", str(out), *map(str, words)]) == 0
        metrics: dict[str, Any] = json.loads(out.read_text())["metrics"]
        return metrics

    return run
