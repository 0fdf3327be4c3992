from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_order_depends_only_on_seed_and_epoch() -> None:
    whole = shuffled(np.arange(1000), 1000, seed=0, epoch=0)
    parts = [shuffled(np.arange(start, start + 100), 1000, seed=0, epoch=0) for start in range(0, 1000, 100)]
    assert np.array_equal(whole, np.concatenate(parts))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (shuffled(np.arange(1000), 1000, seed, epoch) == whole).mean() < 0.02
    assert abs(np.corrcoef(whole, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_disappear_end_a_training_in_a_line(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path / "shards", samples(8))
    _, preprocess, tokenizer = create("scorer-64")
    batches = Batches(Shards(folder), 8, preprocess.size, tokenizer, seed=1)
    (folder / "00000.tar").unlink()
    with pytest.raises(ShardsError, match=r"No such file or directory: .*00000.tar.*the shards changed") as error:
        next(batches.from_step(0, 1, workers, pin=False))
    assert "Traceback" not in str(error.value)


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


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("spoilt", [0, 5])
def test_ranks_together_see_what_one_rank_sees(tmp_path: Path, world: int, spoilt: int) -> None:
    pairs = [(b"no image" if i < spoilt else image, caption) for i, (image, caption) in enumerate(samples(37))]
    _, preprocess, tokenizer = create("scorer-64")
    batches = Batches(Shards(write_shards(tmp_path / "shards", pairs)), 16, preprocess.size, tokenizer, seed=1)
    for step, whole in zip(range(4), batches.from_step(0, 4, 0, pin=False)):
        parts = [next(batches.from_step(step, step + 1, 0, False, rank, world)) for rank in range(world)]
        assert all(len(part.pixels) == len(part.tokens) == len(part.numbers) == 16 // world for part in parts)
        assert [number for part in parts for number in part.numbers] == whole.numbers
        assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert sorted(line for part in parts for line in part.corrupt) == sorted(whole.corrupt)


def test_a_corrupt_sample_is_named_and_replaced_by_a_readable_one(tmp_path: Path) -> None:
    pairs = [(b"no image" if i < 12 else image, caption) for i, (image, caption) in enumerate(samples(37))]
    _, preprocess, tokenizer = create("scorer-64")
    batches = Batches(Shards(write_shards(tmp_path / "shards", pairs)), 32, preprocess.size, tokenizer, seed=1)
    batch = batches[0]
    assert len(batch.numbers) == 32
    assert min(batch.numbers) >= 12
    assert len({line.partition(": ")[0] for line in batch.corrupt}) >= 7  # of 37, only 5 are not in the batch
    assert all(line.startswith("00000.tar:0000000") and "not a JPEG" in line for line in batch.corrupt)
    assert any(batch.numbers[i] != batches[1].numbers[i] for i in range(32))


def test_shards_without_one_readable_sample_stop_the_run(tmp_path: Path) -> None:
    _, preprocess, tokenizer = create("scorer-64")
    folder = write_shards(tmp_path / "shards", [(b"no image", "a caption")] * 8)
    with pytest.raises(ShardsError, match=r"in a row cannot be read.*00000.tar:"):
        Batches(Shards(folder), 4, preprocess.size, tokenizer, seed=0)[0]


def test_a_batch_that_ranks_cannot_share_is_refused(folder: Path) -> None:
    _, preprocess, tokenizer = create("scorer-64")
    with pytest.raises(ShardsError, match="multiple of the 3 ranks"):
        Batches(Shards(folder), 8, preprocess.size, tokenizer, seed=1).from_step(0, 1, 0, False, 0, 3)


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
    left, right = (square_crop(image, 8, place).float().mean(dim=(1, 2)) for place in (0.0, 0.999))
    assert left[0] > 190 > 60 > left[2]
    assert right[2] > 190 > 60 > right[0]


@pytest.mark.parametrize("shape", [(80, 64), (256, 192), (64, 64), (20, 300), (700, 500)])
def test_the_crop_equals_that_of_pillow(shape: tuple[int, int]) -> None:
    image = smooth(shape)
    side = min(shape)
    x, y = (int(0.3 * (length - side + 1)) for length in shape)
    expected = image.resize((64, 64), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    difference = square_crop(image, 64, 0.3).permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
    assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("shape", "decoded"),
    [((400, 300), (400, 300)), ((450, 386), (225, 193)), ((380, 420), (380, 420)), ((1600, 800), (400, 200))],
)
def test_a_large_jpeg_is_decoded_small_but_never_below_one_and_a_half_times_the_target(
    shape: tuple[int, int], decoded: tuple[int, int]
) -> None:
    encoded = jpeg(smooth(shape))
    assert decode(encoded, 128).size == decoded
    assert decode(encoded).size == shape
    small, whole = (square_crop(decode(encoded, size), 128, 0.5).numpy().astype(int) for size in (128, None))
    assert abs(small - whole).mean() < 1.5


def smooth(shape: tuple[int, int]) -> Image.Image:
    return picture("green", 1, (9, 7)).resize(shape, Image.Resampling.BICUBIC)


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
    ("spoil", "message"),
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
def test_damaged_shards_are_refused_by_name(tmp_path: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = write_shards(tmp_path / "shards", samples(20))
    spoil(folder)
    with pytest.raises(ShardsError, match=message):
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
