"""Training on a subset of a dataset, and on pictures stored in other files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.shards import samples, write_shards
from trainer.data import open_shards
from trainer.shards import ABSENT, CorruptSampleError, Shards, ShardsError


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return str(write_shards(tmp_path / "shards", samples(40)))


def save(path: Path, numbers: Any) -> str:
    np.save(path, numbers)
    return str(path)


def test_a_subset_reads_only_its_own_samples(shards: str, tmp_path: Path) -> None:
    chosen = np.array([1, 5, 17, 39])
    subset = open_shards(shards, save(tmp_path / "s.npy", chosen))
    assert len(subset) == 4
    order = subset.order(np.arange(4), seed=3, epoch=1)
    assert sorted(order.tolist()) == chosen.tolist()
    assert [subset.read(n) for n in chosen.tolist()] == [samples(40)[n] for n in chosen.tolist()]
    assert list(subset.read_many([17, 1])) == [samples(40)[17], samples(40)[1]]
    assert subset.key(17).startswith("00001.tar:")


def test_the_fingerprint_is_of_contents_and_numbers(shards: str, tmp_path: Path) -> None:
    first, second = (open_shards(shards, save(tmp_path / f"{n}.npy", np.array([0, n]))).fingerprint for n in (1, 2))
    again = open_shards(shards, save(tmp_path / "again.npy", np.array([0, 1]))).fingerprint
    assert first == again != second
    assert first != open_shards(shards).fingerprint


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.array([], np.int64), "at least one number"),
        (np.array([3, 3]), "ascending"),
        (np.array([4, 2]), "ascending"),
        (np.array([-1, 2]), "from 0 to 39"),
        (np.array([2, 40]), "from 0 to 39"),
        (np.array([1.0]), "float64 of shape (1,), expected int64"),
        (np.array([[1]]), "of shape (1, 1)"),
        (np.array([object()]), "not an .npy file of sample numbers"),
    ],
)
def test_wrong_subsets(shards: str, tmp_path: Path, numbers: Any, message: str) -> None:
    path = save(tmp_path / "s.npy", numbers)
    with pytest.raises(ShardsError) as caught:
        open_shards(shards, path)
    assert message in str(caught.value)
    assert path in str(caught.value)


def test_a_subset_that_is_missing(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ShardsError, match=r"nowhere\.npy"):
        open_shards(shards, str(tmp_path / "nowhere.npy"))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of pictures that are concatenated in two files."""
    folder, pairs = tmp_path / "index", samples(6)
    folder.mkdir()
    files, rows, captions = [], [], b""
    for number, part in enumerate((pairs[:4], pairs[4:])):
        path, data = tmp_path / f"{number}.bin", b"head"
        for image, caption in part:
            rows.append([len(data), len(image), ABSENT, ABSENT, len(captions), len(caption)])
            data += image
            captions += caption.encode() + b"\n"
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files.append({"url": str(path), "bytes": len(data), "sha256": digest, "samples": len(part)})
    np.save(folder / "index.npy", np.array(rows, np.int64))
    (folder / "captions.txt").write_bytes(captions)
    about = {"format": "winnow-pictures/1", "name": "made", "index": "1", "files": files}
    (folder / "pictures.json").write_text(json.dumps(about))
    return folder


def test_pictures_in_other_files(index: Path) -> None:
    shards = Shards(index)
    assert (len(shards), shards.name) == (6, "made")
    assert list(shards.read_many(range(6))) == samples(6)
    assert shards.key(5) == "1.bin:sample 5"


def test_remote_pictures_with_local_captions(index: Path) -> None:
    import fsspec

    about = json.loads((index / "pictures.json").read_text())
    for entry in about["files"]:
        data = Path(entry["url"]).read_bytes()
        entry["url"] = f"memory://study{entry['url']}"
        fsspec.filesystem("memory").pipe_file(entry["url"], data)
    (index / "pictures.json").write_text(json.dumps(about))
    assert list(Shards(index).read_many([5, 0, 3])) == [samples(6)[n] for n in (5, 0, 3)]


@pytest.mark.parametrize("what", ["picture", "caption"])
def test_a_range_outside_its_file_is_a_corrupt_sample(index: Path, what: str) -> None:
    rows = np.load(index / "index.npy")
    rows[2, 1 if what == "picture" else 4] += 1 << 20
    np.save(index / "index.npy", rows)
    with pytest.raises(CorruptSampleError):
        Shards(index).read(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(format="winnow-pictures/9"), "format 'winnow-pictures/9'"),
        (lambda about: about["files"][0].update(samples=3), "expected int64 of shape (5, 6)"),
        (lambda about: about["files"][0].update(bytes=3), "not of 3 bytes"),
        (lambda about: about["files"][0].update(url="nowhere.bin"), "nowhere.bin: missing"),
        (lambda about: about.pop("files"), "not an index of pictures"),
    ],
)
def test_wrong_indexes(index: Path, change: Any, message: str) -> None:
    about = json.loads((index / "pictures.json").read_text())
    change(about)
    (index / "pictures.json").write_text(json.dumps(about))
    with pytest.raises(ShardsError) as caught:
        Shards(index)
    assert message in str(caught.value)
