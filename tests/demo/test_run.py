"""The parts of `make demo`: its recipe, entries, scorer and held-out scenes."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import pool, recipe
from pipeline.demo import captions, run, scorer
from pipeline.demo.scenes import COLOURS, SHAPES, random_scene


def test_the_recipe_is_valid(tmp_path):
    table = pa.table({"url": ["http://127.0.0.1:8765/a.jpg"], "caption": ["a red star over the sea"]})
    pq.write_table(table, tmp_path / "pool.parquet")
    path, *overrides = run.recipe(8765)
    assert (path, overrides) == ("conf/demo.yaml", [])
    checked = recipe.load(path, [f"pool.path={tmp_path}/pool.parquet"], pool.columns)
    assert checked.run == str(run.RUN)
    assert [step.name() for step in checked.steps][-1] == "write_shards"


def test_the_recipe_is_sound_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, *overrides = run.recipe(1234)
    checked = recipe.load(path, overrides, lambda _: {})
    steps = {step.name(): step for step in checked.steps}
    assert steps["download"].allow_addrs == ["127.0.0.1:1234"]
    assert Path(steps["clip_score"].model, "open_clip_model.safetensors").is_file()
    assert Path(steps["balance"].entries).is_file()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--help"], 0, "--pictures"),
        (["--pictures", "0"], 2, "--pictures"),
        (["--picture=many"], 2, "--pictures"),
        (["extra"], 2, "unrecognized arguments: extra"),
    ],
)
def test_help_or_a_usage_error_builds_nothing(words, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run.main(words)
    assert end.value.code == status
    assert message in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_every_caption_has_an_entry():
    entries = json.loads(Path("pipeline/demo/entries.json").read_text())
    rng = random.Random(0)
    for _ in range(500):
        caption = captions.english(random_scene(rng), rng).lower()
        assert any(entry in caption for entry in entries)


def test_the_committed_scorer_is_small_and_separates_true_from_wrong_captions():
    assert sum(file.stat().st_size for file in scorer.HERE.iterdir()) <= scorer.MAX_BYTES
    assert scorer.separation(scorer.HERE, pairs=150) > 0.99


def test_heldout_scenes_are_balanced(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PER_CONCEPT", 1)
    tasks = run.draw_heldout(tmp_path, seed=1)
    for task, classes in (("colour", len(COLOURS)), ("shape", len(SHAPES)), ("colour and shape", 120)):
        folders = list(tasks[task].iterdir())
        counts = {sum(1 for _ in folder.iterdir()) for folder in folders}
        assert (len(folders), counts) == (classes, {120 // classes})
        assert "{c}" in tasks[task].with_suffix(".txt").read_text()
    with Image.open(next(tasks["shape"].glob("heart/*.jpg"))) as image:
        assert image.format == "JPEG"
