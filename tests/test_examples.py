"""The steps and scripts of examples/, and the code of docs/write-a-step.md, run as they are written."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import types
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.recipe import find_step
from pipeline.step import VectorFilter
from tests.conftest import ROOT, environment
from tests.stages import finished
from tests.tables import check_filter, make_batch, run_step

EXAMPLES = ROOT / "examples"
CAPTIONS = [{"caption": "A RED CAR"}, {"caption": "a red car on the road"}]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts examples/ on the import path for the duration of a test."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "steps"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def documented() -> Iterator[dict[str, Any]]:
    """Runs the Python blocks of the page in order as one module. Yields its names."""
    module = types.ModuleType("write_a_step")
    sys.modules[module.__name__] = module
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/write-a-step.md").read_text(), re.M | re.S):
        exec(block, module.__dict__)
    yield module.__dict__
    del sys.modules[module.__name__]


def check_vector_filter(step: VectorFilter) -> None:
    """The first vector of each cell is kept: here, two directions with two vectors each."""
    vectors = np.float32([[1, 2, 3], [-1, -2, -3], [2, 4, 6], [-2, -4, -6]])
    groups = step.groups(vectors, step.fit(vectors, len(vectors)))
    assert groups.tolist() == [groups[0], groups[1]] * 2
    assert groups[0] != groups[1]
    reasons, details = step.judge_group(make_batch([{}, {}]), vectors[[0, 2]])
    assert reasons.to_pylist() == [None, "one_of_a_kind"]
    assert details.to_pylist() == [None, None]


def check_fitted(step: Any) -> None:
    """The mean of two perpendicular vectors is equally near to both."""
    vectors = pa.array([[2.0, 0.0], [0.0, 1.0], None], pa.list_(pa.float16(), 2))
    batch = make_batch([{}, {}, {}]).append_column("image_embedding", vectors)
    step.use(step.fit(batch.slice(0, 2), 3))
    kept, _ = run_step(step, batch)
    assert kept["typicality_score"].to_pylist() == [pytest.approx(0.5**0.5), pytest.approx(0.5**0.5), None]


def check_words(kept: pa.Table) -> None:
    assert kept["words"].to_pylist() == [3, 6]


@pytest.mark.usefixtures("examples")
def test_the_example_steps() -> None:
    check_filter(find_step("steps.no_shouting")(), CAPTIONS, ["no_shouting", None])  # type: ignore[arg-type]
    check_words(run_step(find_step("steps.caption_words")(), make_batch(CAPTIONS))[0])  # type: ignore[arg-type]
    check_vector_filter(find_step("steps.one_of_a_kind")())  # type: ignore[arg-type]
    check_fitted(find_step("steps.typicality")())
    batch = make_batch([{}, {}]).append_column(
        "image_embedding", pa.array([[0.6, 0.8], [3.0, 4.0]], pa.list_(pa.float16(), 2))
    )
    kept, _ = run_step(find_step("steps.vector_length")(), batch)  # type: ignore[arg-type]
    assert kept["vector_length"].to_pylist() == pytest.approx([1, 5], abs=1e-3)


def test_the_steps_of_the_docs(documented: dict[str, Any]) -> None:
    assert documented["kept"]["caption"].to_pylist() == ["a red car"]
    assert documented["drops"]["reason"].to_pylist() == ["no_shouting"]
    check_words(run_step(documented["CaptionWords"](), make_batch(CAPTIONS))[0])
    check_fitted(documented["Typicality"]())
    check_vector_filter(documented["OneOfAKind"]())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with pictures in three formats."""
    folder = tmp_path_factory.mktemp("run")
    finished.write(folder / "shards", ("JPEG", "PNG", "WEBP"))
    return folder


def test_the_torch_loop_reads_every_sample(run: Path) -> None:
    spec = importlib.util.spec_from_file_location("torch_loop", EXAMPLES / "torch_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(str(run)) == finished.SAMPLES


@pytest.mark.slow
def test_hugging_face_reads_every_sample(tmp_path: Path) -> None:
    finished.write(tmp_path / "shards")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "datasets>=5,<6", "pillow"], check=True)
    env = environment(HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1", PYTHONPATH="")
    done = subprocess.run(
        [python, EXAMPLES / "hugging_face.py", tmp_path], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{finished.SAMPLES} samples"


@pytest.mark.slow
def test_open_clip_train_trains(tmp_path: Path) -> None:
    """In our environment, but with the webdataset that it needs."""
    finished.write(tmp_path / "run/shards")
    package = ["-m", "pip", "install", "-q", "--no-deps", "-t", tmp_path / "peer", "webdataset==0.2.86"]
    subprocess.run([sys.executable, *package], check=True)
    # Where torch is a CPU build, open_clip can be imported only after trainer.model.
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport runpy, sys\n"
        "if sys.argv[1] == '-c':\n    code, sys.argv = sys.argv[2], sys.argv[2:]\n    exec(code)\n"
        "else:\n    import trainer.model\n    module, sys.argv = sys.argv[2], sys.argv[2:]\n"
        "    runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
    )
    python.chmod(0o755)
    env = environment(tmp_path / "peer", PYTHON=str(python))
    options = ["--model", "RN50", "--batch-size", "5", "--precision", "fp32", "--device", "cpu"]
    done = subprocess.run(
        ["sh", EXAMPLES / "open_clip_train.sh", "run", *options],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("runs/open_clip/*/checkpoints/epoch_1.pt"))
