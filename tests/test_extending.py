"""Steps from outside the package: one file and one line of YAML each, for every kind of step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import verify
from tests.conftest import ROOT, Command, environment

EMBED = '''
from dataclasses import dataclass
import numpy as np
import pyarrow as pa
from pipeline.step import Stage


@dataclass(kw_only=True)
class Embed(Stage):
    """Stands in for a model: the embedding is a function of the caption's number."""
    needs = ("caption",)
    adds = {"image_embedding": pa.list_(pa.float16(), 4)}
    expensive = True

    def process(self, batch):
        numbers = np.array([int(c.split()[-1]) % 9 for c in batch["caption"].to_pylist()])
        turns = numbers[:, None] * np.array([1.0, 2.0, 3.0, 4.0])
        flat = pa.array(np.cos(turns).astype(np.float16).reshape(-1))
        return batch.append_column("image_embedding", pa.FixedSizeListArray.from_arrays(flat, 4))
'''
RECIPE = """
name: extended
pool: {path: pool.csv}
run: out
unit_rows: 100
steps:
  - steps.no_shouting
  - steps.caption_words
  - embed.embed
  - steps.vector_length
  - steps.typicality
  - threshold: {column: vector_length, min: 0.0}
  - steps.one_of_a_kind: {planes: 6}
  - steps.write_jsonl: {rows_per_file: 4}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "examples/steps", tmp_path / "steps")
    (tmp_path / "embed").mkdir()
    (tmp_path / "embed/__init__.py").write_text("")
    (tmp_path / "embed/embed.py").write_text(EMBED)
    (tmp_path / "r.yaml").write_text(RECIPE)
    lines = [f"http://h/{i},a calm picture {i}" for i in range(300)] + ["http://h/loud,LOOK AT THIS 7"]
    (tmp_path / "pool.csv").write_text("url,caption\n" + "\n".join(lines) + "\n")
    return tmp_path


def test_every_kind_of_step_from_outside(run: Command, project: Path) -> None:
    plan = run("r.yaml", "--plan", ray=False)
    assert plan.returncode == 0, plan.stderr
    for text in ("no_shouting + caption_words", "one_of_a_kind", "write_jsonl", "custom step", "parts"):
        assert text in plan.stdout

    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    books = json.loads((project / "out/funnel.json").read_text())
    dropped = {line["step"]: line["dropped"] for line in books["steps"]}
    assert dropped["no_shouting"] == {"no_shouting": 1}
    kept = 300 - dropped["one_of_a_kind"]["one_of_a_kind"]
    assert kept == books["kept"]
    assert 2 <= kept <= 9, "nine directions, and one row in each cell"
    index = json.loads((project / "out/jsonl/index.json").read_text())
    assert sum(index["rows"].values()) == kept
    captions = [
        json.loads(line)["caption"]
        for file in index["rows"]
        for line in (project / "out/jsonl" / file).read_text().splitlines()
    ]
    assert len({int(c.split()[-1]) % 9 for c in captions}) == kept
    assert (project / "out/jsonl/_SUCCESS").exists()
    assert verify.main([str(project / "out"), "--deep"]) == 0

    again = run("r.yaml")
    assert "write_jsonl" in again.stdout.split("nothing was measured")[0], "what was written is reused"
    (project / "out/jsonl/00000.jsonl").write_text("{}\n")
    assert verify.main([str(project / "out")]) == 1
    assert run("r.yaml").returncode == 0
    assert verify.main([str(project / "out")]) == 0, "the same command wrote the damaged part again"


def test_the_reference_describes_them() -> None:
    names = ["steps.write_jsonl", "steps.one_of_a_kind", "steps.vector_length", "steps.no_shouting"]
    argv = [sys.executable, "-m", "pipeline.cli", "steps", *names]
    env = environment(ROOT / "examples")
    output = subprocess.run(argv, env=env, check=True, capture_output=True, text=True).stdout
    for head in ("`write_jsonl` (sink)", "`one_of_a_kind` (filter)", "`vector_length` (stage)", "| `rows_per_file` |"):
        assert head in output
