"""The wheel works when it is installed into a new environment and used in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HUNG

CHECKOUT = Path(__file__).parent.parent
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def call(*command: str | Path, folder: Path, seconds: int = 300) -> str:
    """Returns the standard output of a command, or fails with everything that it printed."""
    done = subprocess.run(command, cwd=folder, env=ENV, timeout=seconds, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `winnow` command of a fresh environment that holds the wheel and its dependencies."""
    place = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", CHECKOUT, "--no-deps", "--wheel-dir", place, folder=place)
    [wheel] = place.glob("*.whl")
    call(sys.executable, "-m", "venv", place / "venv", folder=place)
    pip = [place / "venv/bin/python", "-m", "pip", "install", "-c", CHECKOUT / "constraints.txt"]
    call(*pip, wheel, "torchvision", folder=place, seconds=1500)
    return place / "venv/bin/winnow"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_recipe_from_init_runs_and_verifies(installed: Path, tmp_path: Path) -> None:
    assert "400m" in call(installed, "init", folder=tmp_path)
    call(installed, "init", "demo", folder=tmp_path)
    web = subprocess.Popen(
        [installed, "web", "runs/demo-web", "--pictures", "150", "--port", "0"],
        cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert web.stdout is not None
        served = re.search(r"http://127\.0\.0\.1:(\d+)", web.stdout.readline())
        assert served
        allow = f'steps.download.allow_addrs=["127.0.0.1:{served[1]}"]'
        assert allow in web.stdout.readline()
        call(installed, "run", "demo.yaml", allow, folder=tmp_path, seconds=600)
    finally:
        web.terminate()
        web.wait(timeout=HUNG)
    assert "the books balance" in call(installed, "verify", "runs/demo", folder=tmp_path)
    assert json.loads((tmp_path / "runs/demo/shards/manifest.json").read_text())["samples"] > 20


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo_needs_no_checkout(installed: Path, tmp_path: Path) -> None:
    out = call(installed, "demo", "--pictures", "500", "--port", "0", folder=tmp_path, seconds=1200)
    assert "Zero-shot accuracy" in out
    assert (tmp_path / "runs/demo/model/open_clip_model.safetensors").is_file()
