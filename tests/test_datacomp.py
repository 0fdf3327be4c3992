"""The recipes of DataComp and negCLIPLoss: compared with independent code for the published rules, planned, and run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import pool
from pipeline.recipe import Recipe, load
from pipeline.run import main
from pipeline.step import Filter, Stage
from tests.conftest import ROOT, Command
from tests.filters.barrier import decide
from tests.images import encoded
from tests.tables import make_batch, run_step

ENGLISH = ["a red bicycle leans against the wall", "two children play football in the park", "the old bridge at night"]
OTHER = [
    "ein rotes Fahrrad steht an der Wand vor dem Haus",
    "deux enfants jouent au football dans le parc",
    "日本の古い橋",
]
SHORT = ["a dog", "cat", "a b c", "of it", "snow on it", ""]


def commonpool(n: int, seed: int = 0) -> pd.DataFrame:
    """Metadata with the columns of CommonPool: captions in unambiguous languages, and many values at the limits."""
    rng = np.random.default_rng(seed)
    captions = [rng.choice([*ENGLISH * 3, *OTHER, *SHORT]) for _ in range(n)]
    return pd.DataFrame(
        {
            "uid": [hashlib.md5(str(i).encode()).hexdigest() for i in range(n)],
            "url": [f"http://host{i}.example.org/{i}.jpg" for i in range(n)],
            "text": captions,
            "original_width": rng.choice([150, 199, 200, 400, 600, 601], n),
            "original_height": rng.choice([150, 199, 200, 400, 600, 601], n),
            "clip_b32_similarity_score": rng.integers(100, 400, n) / 1000,
            "clip_l14_similarity_score": rng.integers(100, 400, n) / 1000,
            "face_bboxes": [[] for _ in range(n)],
            "sha256": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(n)],
        }
    )


def recipe(name: str, table: pd.DataFrame, *overrides: str) -> Recipe:
    """Loads a shipped recipe with this pool, as a command does."""
    pq.write_table(pa.Table.from_pandas(table), "pool.parquet")
    return load(str(ROOT / f"conf/{name}.yaml"), ["pool.path=pool.parquet", *overrides], pool.columns)


def survivors(steps: list[Any], table: pd.DataFrame) -> set[str]:
    """The uids that the steps keep if every download succeeds."""
    renamed = table.rename(columns={"text": "caption"})
    rows = renamed.to_dict("records")
    for row in rows:
        row |= {f"pool_{side}": row[side] for side in ("original_width", "original_height")}
    batch = make_batch(rows)
    for step in steps:
        if isinstance(step, Filter) and step.scope == "run":
            batch = batch.filter(pa.array([reason is None for reason in decide(step, batch)]))
        elif isinstance(step, Stage | Filter):
            batch = run_step(step, batch)[0]
    return set(batch["uid"].to_pylist())


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def without_download(steps: list[Any]) -> list[Any]:
    return [step for step in steps if step.name() not in ("download", "write_shards")]


def test_basic_filtering_by_datacomps_rules() -> None:
    table = commonpool(600)
    english = table.text.isin([*ENGLISH, "a dog", "cat", "snow on it"])  # lid.176 agrees
    words, chars = table.text.str.split().str.len(), table.text.str.len()
    short, long = (getattr(table[["original_width", "original_height"]], extreme)(axis=1) for extreme in ("min", "max"))
    expected = table[english & (words > 2) & (chars > 5) & (short >= 200) & (long / short <= 3.0)]
    found = survivors(without_download(recipe("datacomp_basic", table).steps), table)
    assert found == set(expected.uid)
    assert 50 < len(found) < 300


@pytest.mark.parametrize("n", [10, 37, 500])
def test_clip_score_filtering_by_datacomps_rules(n: int) -> None:
    table = commonpool(n)
    scores = table.clip_l14_similarity_score.to_numpy()
    cut = -np.sort(-scores)[int(len(scores) * 0.3)]
    theirs, surely = set(table.uid[scores >= cut]), set(table.uid[scores > cut])
    found = survivors(without_download(recipe("datacomp_clip_score", table).steps), table)
    # DataComp's code also keeps the row at position int(0.3 n) and all its ties.
    assert surely <= found <= theirs
    assert len(found) == int(np.ceil(0.3 * n))


TARGETS = {"datacomp_image_based": "steps.image_cluster.target=t.npy", "negclip_normsim": "steps.norm_sim.target=t.npy"}


@pytest.mark.parametrize("name", ["datacomp_basic", "datacomp_clip_score", *TARGETS])
def test_the_recipes_can_be_planned_and_name_their_papers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("t.npy", np.ones((3, 768), np.float32))
    targets = [TARGETS[name]] if name in TARGETS else []
    assert recipe(name, commonpool(20), *targets).name == name
    assert main([str(ROOT / f"conf/{name}.yaml"), "--plan", "pool.path=pool.parquet", *targets]) == 0
    assert "write_shards" in capsys.readouterr().out
    text = (ROOT / f"conf/{name}.yaml").read_text()
    assert "Gadre et al." in text or "Wang et al." in text
    assert "Left out:" in text


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_target_set_of_another_model_is_refused(name: str) -> None:
    from pipeline.recipe import RecipeError

    np.save("t.npy", np.ones((3, 512), np.float32))
    with pytest.raises(RecipeError, match=r"t\.npy has shape \(3, 512\), and image_embedding has 768 dimensions"):
        recipe(name, commonpool(20), TARGETS[name])


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels).resize((240, 220)), "JPEG")


@pytest.mark.slow
def test_image_based_and_negcliploss_run_at_small_scale(
    run: Command, tmp_path: Path, small_model: Callable[[Path], int]
) -> None:
    width = small_model(tmp_path / "model")
    table = commonpool(90).assign(text=[f"{ENGLISH[i % 3]} number {i}" for i in range(90)])
    table["image"] = [picture(i) for i in range(90)]
    table["sha256"] = [hashlib.sha256(image).hexdigest() for image in table["image"]]
    pq.write_table(pa.Table.from_pandas(table), "pool.parquet")
    np.save("t.npy", np.random.default_rng(0).normal(size=(4, width)).astype(np.float32))
    both = [
        *("pool.path=pool.parquet", "pool.image=image", "pool.rows=null", "unit_rows=40", "steps.download.inline=true"),
        *(
            f"steps.clip_score.model={tmp_path}/model",
            "steps.clip_score.pretrained=null",
            "steps.clip_score.batch_size=32",
        ),
    ]
    for name, target in TARGETS.items():
        target = target.replace("t.npy", f"{tmp_path}/t.npy")  # workers run in another directory
        done = run(str(ROOT / f"conf/{name}.yaml"), *both, target, f"run=runs/{name}")
        assert done.returncode == 0, done.stderr + done.stdout
        funnel = json.loads(Path(f"runs/{name}/funnel.json").read_text())
        assert 0 < funnel["kept"] < 90
        assert not list(Path(f"runs/{name}/passes").glob("*/fit.arrow")), "the fit of a step is removed"
    # 30% of 90 by negCLIPLoss, then 66.7% of these.
    assert funnel["kept"] == int(np.ceil(0.667 * 27))
    again = run(str(ROOT / f"conf/{name}.yaml"), *both, target, f"run=runs/{name}")
    assert "reused" in again.stdout
