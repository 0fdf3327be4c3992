"""Random access to the samples of a folder of shards, in an order that is a pure function of (seed, epoch, position).

The manifest says what there is, the byte-offset index where. Nothing but JPEG, PNG, WebP and UTF-8 text is decoded.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.model import Tokenizer, to_tensor

FORMAT = "winnow-shards/1"
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
"""A picture with more pixels than this (8000 x 8000) is counted as corrupt before it is decoded."""


class ShardsError(ValueError):
    """A folder of shards that is absent, unfinished or damaged; the message names the file."""


class CorruptSampleError(ValueError):
    """One sample that cannot be read; the message says why."""


class Shards:
    """The samples of a folder of shards (`RUN/shards`, or `RUN` itself) by number, 0 to `len(shards) - 1`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = _shards_folder(Path(folder))
        manifest = _read_manifest(self.folder / "manifest.json")
        self.name: str = manifest["name"]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        for shard in self._shards:
            _check_shard(self.folder, shard)
        self._ends = list(accumulate(shard["samples"] for shard in self._shards))
        if not self._ends or self._ends[-1] != manifest["samples"] or not self._ends[-1]:
            total = self._ends[-1] if self._ends else 0
            raise ShardsError(
                f"{self.folder / 'manifest.json'}: says {manifest['samples']} samples, its shards add up to {total}"
                + ("" if total else "; there is nothing to read")
            )

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """Equal for equal contents: a hash over the shards' own hashes."""
        return hashlib.sha256("\n".join(shard["sha256"] for shard in self._shards).encode()).hexdigest()

    def key(self, number: int) -> str:
        """`SHARD.tar:KEY`, the name of a sample in messages, from the tar's own header."""
        shard, row = self._locate(number)
        start = int(self._index(shard)[row, 0])
        name = self._bytes(shard)[start - 512 : start - 412].rstrip(b"\0")
        return f"{shard['name']}:{name.decode('ascii', 'replace').partition('.')[0]}"

    def read(self, number: int) -> tuple[bytes, str]:
        """The encoded image and the caption. Raises CorruptSampleError."""
        shard, row = self._locate(number)
        image_at, image_size, _, _, text_at, text_size = map(int, self._index(shard)[row])
        data = self._bytes(shard)
        for at, size in ((image_at, image_size), (text_at, text_size)):
            if at < 512 or size < 0 or at + size > len(data):
                raise CorruptSampleError(f"the index points outside {shard['name']}")
        try:
            return data[image_at : image_at + image_size], data[text_at : text_at + text_size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptSampleError("the caption is not UTF-8") from error

    def _locate(self, number: int) -> tuple[dict[str, Any], int]:
        at = bisect_right(self._ends, number)
        return self._shards[at], number - (self._ends[at - 1] if at else 0)

    def _bytes(self, shard: dict[str, Any]) -> mmap.mmap:
        return _map(str(self.folder / shard["name"]))

    def _index(self, shard: dict[str, Any]) -> np.ndarray:
        return _load_index(str(self.folder / shard["index"]))


# Bounded, because each open map holds a file descriptor and a big dataset has tens of thousands of shards.
@lru_cache(maxsize=256)
def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@lru_cache(maxsize=256)
def _load_index(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _shards_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ShardsError(f"shards: {folder} is not a folder")
    if not (folder / "manifest.json").is_file() and (folder / "shards").is_dir():
        folder = folder / "shards"
    if not (folder / "manifest.json").is_file():
        raise ShardsError(f"shards: {folder} has no manifest.json; expected the shards/ folder of a finished run")
    if not (folder / "_SUCCESS").exists():
        raise ShardsError(
            f"shards: {folder} has no _SUCCESS: the run that writes it is not finished; run it again first"
        )
    return folder


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ShardsError(f"{path}: format {manifest['format']!r}, expected {FORMAT!r}")
        for shard in manifest["shards"]:
            if any(Path(shard[key]).name != shard[key] for key in ("name", "index")):
                raise ShardsError(f"{path}: {shard['name']!r} is not a plain file name")
            _ = int(shard["samples"]), int(shard["bytes"]), str(shard["sha256"])
        _ = str(manifest["name"]), int(manifest["samples"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ShardsError):
            raise
        raise ShardsError(f"{path}: not a manifest of shards ({type(error).__name__}: {error})") from error
    return dict(manifest)


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    tar, index = folder / shard["name"], folder / shard["index"]
    for path in (tar, index):
        if not path.is_file():
            raise ShardsError(f"{path}: missing, but the manifest lists it")
    if (found := tar.stat().st_size) != shard["bytes"]:
        raise ShardsError(
            f"{tar}: {found} bytes, but the manifest says {shard['bytes']}; the file is cut or was changed"
        )
    try:
        offsets = np.load(index, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ShardsError(f"{index}: not an index ({error})") from error
    if offsets.shape != (shard["samples"], 6) or offsets.dtype != np.int64:
        raise ShardsError(
            f"{index}: {offsets.dtype} of shape {offsets.shape}, expected int64 of shape ({shard['samples']}, 6)"
        )


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hashes whole numbers, elementwise, to uniform uint64 (rounds of SplitMix64: Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for value in values:
            state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def shuffled(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The sample numbers at these positions of the epoch's random order of 0..count-1.

    A keyed Feistel network over the next power of four, walked until it falls inside the range (Black and Rogaway
    2002): a permutation that needs no table, so any worker finds any position of 400 million samples in O(1).
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    numbers = positions.astype(np.uint64)
    outside = np.ones(len(numbers), bool)
    while outside.any():
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for turn in range(8):
            left, right = right, left ^ (mix(seed, epoch, turn, right) & mask)
        numbers[outside] = (left << half) | right
        outside = numbers >= count
    return numbers.astype(np.int64)


@dataclass
class Batch:
    """B samples that could be read, and those that could not."""

    pixels: Tensor
    """uint8 (B, 3, size, size)"""
    tokens: Tensor
    """int64 (B, context_length)"""
    numbers: list[int]
    """sample numbers, as `Shards.key` takes them"""
    corrupt: list[str]
    """one line each: `SHARD.tar:KEY: why`"""

    def pin_memory(self) -> Batch:
        """What the DataLoader calls so that copies to a GPU overlap with work there."""
        return replace(self, pixels=self.pixels.pin_memory(), tokens=self.tokens.pin_memory())


class Batches(Dataset[Batch]):
    """Batch `step` of a training run, for any step, in any process: always the same pixels and tokens."""

    def __init__(self, shards: Shards, batch_size: int, size: int, tokenizer: Tokenizer, seed: int) -> None:
        self.shards, self.batch_size, self.size = shards, batch_size, size
        self.tokenizer, self.seed = tokenizer, seed
        self.per_epoch = len(shards) // batch_size
        if not self.per_epoch:
            raise ShardsError(f"batch_size: found {batch_size}, but {shards.folder} has only {len(shards)} samples")

    def __getitem__(self, step: int) -> Batch:
        epoch, batch = divmod(step, self.per_epoch)
        positions = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        numbers = shuffled(positions, len(self.shards), self.seed, epoch)
        places = mix(self.seed, epoch, 1 << 32, numbers) / 2**64
        pixels, captions, read, corrupt = [], [], [], []
        for number, place in zip(numbers.tolist(), places.tolist()):
            try:
                encoded, caption = self.shards.read(number)
                pixels.append(to_tensor(square_crop(decode(encoded), self.size, place)))
            except CorruptSampleError as error:
                corrupt.append(f"{self.shards.key(number)}: {error}")
            else:
                captions.append(caption)
                read.append(number)
        if not read:
            raise ShardsError(
                f"{self.shards.folder}: no sample of a batch of {self.batch_size} is readable: {corrupt[0]}"
            )
        return Batch(torch.stack(pixels), self.tokenizer(captions), read, corrupt)

    def from_step(self, start: int, stop: int, workers: int, pin: bool) -> Iterator[Batch]:
        """Batches start to stop - 1, prepared ahead by worker processes."""
        order = range(start, stop)
        return iter(DataLoader(self, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin))


def decode(encoded: bytes) -> Image.Image:
    """A JPEG, PNG or WebP as RGB. Raises CorruptSampleError."""
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS:
                return image.convert("RGB")
            size = f"{image.width} x {image.height}"
    # Pillow's decoders raise nearly anything on hostile bytes.
    except Exception as error:
        raise CorruptSampleError(f"{type(error).__name__}: {error}") from error
    raise CorruptSampleError(f"{size} pixels, more than {MAX_PIXELS:,}")


def square_crop(image: Image.Image, size: int, place: float) -> Image.Image:
    """The largest square at `place` (0..1) along the longer side, resized to `size`: CLIP's only augmentation."""
    side = min(image.size)
    x, y = (int(place * (length - side + 1)) for length in image.size)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
