from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline import pool, recipe
from pipeline.scheduler import ingest, isolation
from pipeline.scheduler.passes import Pass, make_passes

DEADLY = '''
import os, signal
from dataclasses import dataclass
import pyarrow as pa
from pipeline.step import Stage

@dataclass(kw_only=True)
class Deadly(Stage):
    """Stands in for a decoder that crashes on some inputs."""
    def process(self, batch: pa.Table) -> pa.Table:
        for caption in batch["caption"].to_pylist():
            if "segfault" in caption:
                os.kill(os.getpid(), signal.SIGSEGV)
            if "bug" in caption:
                raise ValueError("a bug, not a crash")
        return batch
'''


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Pass]:
    (tmp_path / "deadly.py").write_text(DEADLY)
    sys.modules.pop("deadly", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = request.param
    rows = "".join(f"http://h/{i},{words.get(i, 'harmless')} picture {i}\n" for i in range(12))
    (tmp_path / "p.csv").write_text("url,caption\n" + rows)
    checked = recipe.Recipe(name="t", pool=recipe.PoolSpec(path=str(tmp_path / "p.csv")), run=str(tmp_path / "run"))
    import deadly

    checked.steps = [deadly.Deadly()]
    passes = make_passes(checked, {}, {})
    (split,) = pool.splits(checked.pool)
    ingest.scatter(passes[0], 0, 0, [split], checked.pool, {}, 1, 1)
    list(ingest.gather(passes[0], 0, 1, {}, 1, 1))
    return passes


@pytest.mark.parametrize("passes", [{4: "segfault"}], indirect=True)
def test_a_row_that_kills_its_worker_becomes_a_drop(passes: list[Pass]) -> None:
    record = isolation.run_isolated(passes, 1, 0)
    assert record["kept"] == 11
    (drop,) = passes[1].drops(passes[:1], 0).to_pylist()
    assert (drop["step"], drop["reason"]) == ("deadly", "decoder_crash")


@pytest.mark.parametrize("passes", [{4: "bug"}], indirect=True)
def test_an_exception_is_raised_as_a_bug(passes: list[Pass]) -> None:
    with pytest.raises(RuntimeError, match="a bug, not a crash"):
        isolation.run_isolated(passes, 1, 0)


@pytest.mark.parametrize("passes", [{}], indirect=True)
def test_attempts_are_counted_across_processes(passes: list[Pass]) -> None:
    assert [isolation.attempt(passes[1], 0) for _ in range(5)] == [1, 2, 3, 4, 4]
