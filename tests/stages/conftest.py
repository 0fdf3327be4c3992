from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[[Path], int]) -> str:
    """A folder with a small, untrained dual encoder. All scores are defined and distinct."""
    folder = tmp_path_factory.mktemp("tiny")
    small_model(folder)
    return str(folder)
