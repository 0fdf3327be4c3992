from __future__ import annotations

import io
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter

from pipeline.fetch.decoder import phash
from pipeline.filters.decontaminate import Decontaminate
from pipeline.step import apply
from tests.images import encoded
from tests.tables import make_batch

VECTOR = pa.list_(pa.float16(), 8)


def picture(seed: int, size: int = 128) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An evaluation set of five pictures in two classes, one of them flat."""
    for name in ("birds", "cats"):
        (tmp_path / "val" / name).mkdir(parents=True)
    for seed in range(4):
        picture(seed).save(tmp_path / "val" / ("birds" if seed < 2 else "cats") / f"{seed}.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "val/cats/flat.png")
    return tmp_path / "val"


def hashed(image: Image.Image) -> int | None:
    return phash(np.asarray(image))


def judged(step: Decontaminate, rows: list[dict]) -> list[tuple[str, str, float] | None]:
    assert not list(step.check())
    step.setup()
    batch = make_batch(rows)
    if "image_embedding" in batch.column_names:
        at = batch.column_names.index("image_embedding")
        batch = batch.set_column(at, "image_embedding", batch["image_embedding"].cast(VECTOR))
    kept, drops = apply(step, batch)
    found = {d["row"]: (d["reason"], d["detail"], d["value"]) for d in drops.to_pylist()}
    assert len(kept) + len(found) == len(rows)
    return [found.get(i) for i in range(len(rows))]


def test_copies_are_dropped_with_set_picture_and_distance(folder: Path) -> None:
    copy = Image.open(io.BytesIO(encoded(picture(2).resize((70, 70)), "JPEG", quality=60))).convert("RGB")
    bits = bin(hashed(copy) ^ hashed(picture(2))).count("1")  # type: ignore[operator]
    rows = [{"phash": hashed(image)} for image in (picture(0), copy, picture(9), picture(0).filter(ImageFilter.BLUR))]
    rows += [{"phash": None}]
    found = judged(Decontaminate(sets={"val": str(folder)}), rows)
    assert found[0] == ("val", "val: birds/0.png at 0 bits", 0.0)
    assert found[1] == ("val", f"val: cats/2.png at {bits} bits", bits)
    assert found[2] is None, "another picture"
    assert found[4] is None, "a row without a hash cannot be compared"


def test_several_sets_and_vectors(folder: Path, tmp_path: Path) -> None:
    targets = np.eye(8, dtype=np.float32)[:3]
    np.save(tmp_path / "flickr.npy", targets * 7)
    (tmp_path / "other").mkdir()
    picture(5).save(tmp_path / "other/five.png")
    step = Decontaminate(
        sets={"val": str(folder), "other": str(tmp_path / "other")}, vectors={"flickr": str(tmp_path / "flickr.npy")}
    )
    near = targets[1] + 0.05 * targets[2]
    rows = [
        {"phash": hashed(picture(5)), "image_embedding": [0.0] * 7 + [1.0]},
        {"phash": 1, "image_embedding": near.tolist()},
        {"phash": hashed(picture(1)), "image_embedding": near.tolist()},
        {"phash": 1, "image_embedding": (targets[1] + targets[2]).tolist()},
        {"phash": 1, "image_embedding": None},
        {"phash": None, "image_embedding": [float("nan")] * 8},
    ]
    found = judged(step, rows)
    cosine = round(float(near @ targets[1] / np.linalg.norm(near)), 4)
    assert found[0] == ("other", "other: five.png at 0 bits", 0.0)
    assert found[1] is not None
    assert found[1][:2] == ("flickr", f"flickr: number 1 at cosine {cosine}")
    assert found[2] is not None
    assert found[2][1] == f"val: birds/1.png at 0 bits; flickr: number 1 at cosine {cosine}"
    assert found[3:] == [None, None, None]


def test_the_hashes_of_a_set_are_kept_until_its_files_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decontaminate(sets={"val": str(folder)})
    before = step.fingerprint()
    monkeypatch.setattr("pipeline.filters.decontaminate._hashed", lambda sample: 1 / 0)
    assert Decontaminate(sets={"val": str(folder)}).fingerprint() == before
    monkeypatch.undo()
    picture(77).save(folder / "cats/new.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    assert Decontaminate(sets={"val": str(folder)}).fingerprint() != before


def test_a_set_that_is_missing_is_skipped_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    sets = {"val": str(folder), "coco": str(tmp_path / "coco")}
    assert [key for key, _ in Decontaminate(sets=sets).check()] == ["sets"]
    step = Decontaminate(sets=sets, vectors={"flickr": str(tmp_path / "flickr.npy")}, missing="skip")
    assert not list(step.check_columns({"image_embedding": VECTOR}))
    (note,) = step.notes()
    assert note.startswith(f"{tmp_path}/coco, {tmp_path}/flickr.npy: not found, so copies of their pictures are kept")
    rows = [{"phash": hashed(picture(seed)), "image_embedding": [1.0] * 8} for seed in (1, 9)]
    assert [found and found[0] for found in judged(step, rows)] == ["val", None]
    assert judged(Decontaminate(sets={"coco": sets["coco"]}, missing="skip"), rows) == [None, None]
    before = step.fingerprint()
    (tmp_path / "coco").mkdir()
    picture(9).save(tmp_path / "coco/9.png")
    added = Decontaminate(sets=sets, missing="skip")
    assert added.fingerprint() != before, "a run that knew no copies of it is decided again"
    assert [found and found[0] for found in judged(added, rows)] == ["val", "coco"]


def test_a_worker_that_does_not_see_a_set_fails(folder: Path) -> None:
    step = pickle.loads(pickle.dumps(Decontaminate(sets={"val": str(folder)}, missing="skip")))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="val"):
        step.setup()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "`sets`, `vectors` or both must be given, found neither"),
        ({"sets": {"x": "nowhere"}}, "x: nowhere does not exist; put the set there, or set `missing: skip`"),
        ({"vectors": {"x": "nowhere.npy"}}, "x: nowhere.npy does not exist"),
        ({"sets": {"x": "@/broken"}}, r"x: .*broken.png: .*; take it out of the set"),
        ({"sets": {"x": "@/empty"}}, "x: .*expected shards, a picture or a folder of pictures"),
        ({"vectors": {"x": "@/flat.npy"}}, r"x: .*expected vectors of shape \(m, d\), found \(4,\)"),
        ({"sets": {"x": "@/val"}, "max_hamming": 11}, "must be from 0 to 10"),
        ({"sets": {"x": "@/val"}, "min_cosine": 0}, "must be above 0"),
    ],
)
def test_bad_sets_are_named_before_the_start(folder: Path, tmp_path: Path, options: dict, problem: str) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "flat.npy", np.zeros(4, np.float32))
    options = {
        key: {k: v.replace("@", str(tmp_path)) for k, v in value.items()} if isinstance(value, dict) else value
        for key, value in options.items()
    }
    ((_, found),) = Decontaminate(**options).check()
    assert re.search(problem, found), found


def test_vectors_of_another_model_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((3, 4), np.float32))
    step = Decontaminate(vectors={"x": str(tmp_path / "v.npy")})
    ((key, problem),) = step.check_columns({"image_embedding": VECTOR})
    assert key == "vectors"
    assert "has shape (3, 4), and image_embedding has 8 dimensions" in problem
