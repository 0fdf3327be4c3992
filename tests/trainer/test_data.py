from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.shards import jpeg, picture, samples, write_shards
from trainer.data import Batches, CorruptSampleError, Shards, ShardsError, decode, shuffled, square_crop
from trainer.model import create


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("run") / "shards", samples(37))


def test_every_sample_is_found_by_its_number(folder: Path) -> None:
    shards = Shards(folder)
    assert len(shards) == 37
    assert [shards.read(i) for i in range(37)] == samples(37)
    assert shards.key(0) == "00000.tar:000000000"
    assert shards.key(36) == "00002.tar:000000036"


def test_the_run_folder_is_accepted_too(folder: Path) -> None:
    assert len(Shards(folder.parent)) == 37


@pytest.mark.parametrize("count", [1, 2, 3, 64, 1000, 4097])
def test_an_epoch_is_a_permutation(count: int) -> None:
    order = shuffled(np.arange(count), count, seed=3, epoch=5)
    assert sorted(order.tolist()) == list(range(count))


def test_order_depends_on_seed_and_epoch_and_not_on_how_it_is_asked_for() -> None:
    whole = shuffled(np.arange(1000), 1000, seed=0, epoch=0)
    parts = [shuffled(np.arange(start, start + 100), 1000, seed=0, epoch=0) for start in range(0, 1000, 100)]
    assert np.array_equal(whole, np.concatenate(parts))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (shuffled(np.arange(1000), 1000, seed, epoch) == whole).mean() < 0.02
    assert abs(np.corrcoef(whole, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_whatever_the_workers_and_the_start(folder: Path, workers: int) -> None:
    _, preprocess, tokenizer = create("scorer-64")
    batches = Batches(Shards(folder), 8, preprocess.size, tokenizer, seed=1)
    expected = [batches[step] for step in range(3, 8)]
    for got, want in zip(batches.from_step(3, 8, workers, pin=False), expected, strict=True):
        assert got.numbers == want.numbers
        assert torch.equal(got.pixels, want.pixels)
        assert torch.equal(got.tokens, want.tokens)
    assert expected[0].pixels.shape == (8, 3, 64, 64)
    assert expected[0].pixels.dtype == torch.uint8


def test_an_epoch_uses_no_sample_twice(folder: Path) -> None:
    _, preprocess, tokenizer = create("scorer-64")
    batches = Batches(Shards(folder), 8, preprocess.size, tokenizer, seed=1)
    numbers = [n for step in range(batches.per_epoch) for n in batches[step].numbers]
    assert len(set(numbers)) == len(numbers) == 32


def test_images_stay_with_their_captions(folder: Path) -> None:
    _, preprocess, tokenizer = create("scorer-64")
    batch = Batches(Shards(folder), 32, preprocess.size, tokenizer, seed=1)[0]
    brightest = batch.pixels.float().mean(dim=(2, 3)).argmax(dim=1)
    for channel, number, tokens in zip(brightest.tolist(), batch.numbers, batch.tokens):
        caption = samples(37)[number][1]
        assert torch.equal(tokens, tokenizer([caption])[0])
        assert "white" in caption or ("red", "green", "blue")[channel] in caption


def test_the_crop_is_a_square_that_moves_along_the_longer_side() -> None:
    image = picture("red", 0, (100, 50))
    image.paste((0, 0, 255), (50, 0, 100, 50))
    left, right = (np.asarray(square_crop(image, 8, place)).mean(axis=(0, 1)) for place in (0.0, 0.999))
    assert left[0] > 190 > 60 > left[2]
    assert right[2] > 190 > 60 > right[0]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_formats_that_are_read(kind: str) -> None:
    assert decode(jpeg(picture("red", 0), kind)).mode == "RGB"


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", jpeg(picture("red", 0), "GIF"), jpeg(picture("red", 0), "TIFF"), jpeg(picture("red", 0))[:400]],
)
def test_everything_else_is_a_corrupt_sample(data: bytes) -> None:
    with pytest.raises(CorruptSampleError):
        decode(data)


def spoil_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_tar(folder: Path) -> None:
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:-512])


def rename_shard(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    spoil_manifest(folder, shards=[{**shards[0], "name": "../../etc/passwd"}])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "_SUCCESS").unlink(), "no _SUCCESS.*run it again"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not a manifest"),
        (lambda folder: spoil_manifest(folder, format="winnow-shards/9"), "winnow-shards/9.*expected.*winnow-shards/1"),
        (lambda folder: spoil_manifest(folder, samples=5), "says 5 samples, its shards add up to 20"),
        (cut_tar, "00001.tar: .* bytes, but the manifest says"),
        (lambda folder: (folder / "00000.tar").unlink(), "00000.tar: missing"),
        (lambda folder: np.save(folder / "00000.index.npy", np.zeros((3, 6), np.int64)), "00000.index.npy.*shape"),
        (lambda folder: (folder / "00000.index.npy").write_bytes(b"x"), "00000.index.npy: not an index"),
        (rename_shard, "not a plain file name"),
    ],
)
def test_damaged_shards_are_refused_by_name(tmp_path: Path, spoil, said: str) -> None:  # type: ignore[no-untyped-def]
    folder = write_shards(tmp_path / "shards", samples(20))
    spoil(folder)
    with pytest.raises(ShardsError, match=said):
        Shards(folder)


def test_an_index_that_points_outside_is_a_corrupt_sample(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", samples(4))
    index = np.load(folder / "00000.index.npy")
    index[1, 1], index[2, 0] = 1 << 40, -4
    np.save(folder / "00000.index.npy", index)
    shards = Shards(folder)
    for number in (1, 2):
        with pytest.raises(CorruptSampleError, match="outside"):
            shards.read(number)
        shards.key(number)
