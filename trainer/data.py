"""Batches of a training run: chooses samples, captions and crops, and decodes them in worker processes.

Batch `step` is a pure function of (shards, seed, step). A run can therefore start at any step without delay, and gets
the same samples, captions and crops for any number of workers and ranks.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from trainer.mixture import Mixture
from trainer.model import Tokenizer
from trainer.order import mix, shuffled
from trainer.pictures import decode
from trainer.shards import CorruptSampleError, Shards, ShardsError
from trainer.subset import Subset

__all__ = [
    "Batch", "Batches", "CorruptSampleError", "Mixture", "Shards", "ShardsError",
    "decode", "mix", "open_shards", "shuffled", "square_crop",
]  # fmt: skip

MAX_REPLACEMENTS = 20
"""Replacements tried for an unreadable sample. If half of all samples are corrupt, one in a million needs more."""
# Distinct from the small round numbers of `order.shuffled`.
_CROPS, _REPLACEMENTS, _CAPTIONS = 1 << 32, 1 << 33, 1 << 34


def open_shards(
    source: str | Path | Sequence[dict[str, object]], subset: str | None = None
) -> Shards | Mixture | Subset:
    """Opens the configuration's `shards`: one source, or a list of `{path: SOURCE, weight: NUMBER}`.

    `subset` is the path of an .npy file of the sample numbers to keep. Raises ShardsError.
    """
    whole = _open_whole(source)
    return whole if subset is None else Subset(whole, subset)


def _open_whole(source: str | Path | Sequence[dict[str, object]]) -> Shards | Mixture:
    if isinstance(source, str | Path):
        return Shards(source)
    parts: list[tuple[Shards, float]] = []
    for entry in source:
        if not isinstance(entry, dict) or set(entry) != {"path", "weight"} or not isinstance(entry["path"], str):
            raise ShardsError(f"shards: found {entry!r}, expected {{path: …, weight: …}}")
        weight = entry["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ShardsError(f"shards: {entry['path']}: weight {weight!r} is not a number")
        parts.append((Shards(entry["path"]), float(weight)))
    if not parts:
        raise ShardsError("shards: the list is empty")
    return Mixture(parts)


@dataclass
class Batch:
    """B samples, and the unreadable samples that were replaced."""

    pixels: Tensor
    """uint8 (B, 3, size, size)"""
    tokens: Tensor
    """int64 (B, context_length)"""
    numbers: list[int]
    """sample numbers, as `Shards.key` takes them"""
    corrupt: list[str]
    """one line each: `SHARD.tar:KEY: why`"""

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that copies to a GPU overlap with computation."""
        return replace(self, pixels=self.pixels.pin_memory(), tokens=self.tokens.pin_memory())


class Batches(Dataset[Batch]):
    """The batches of a training run by step: any process gets the same pixels and tokens for a step.

    Workers do the cropping: pictures of different shapes do not stack into a batch, and a crop is smaller to transfer.
    The device receives uint8 and normalises it (`Preprocess.normalize`).
    """

    def __init__(
        self, shards: Shards | Mixture | Subset, batch_size: int, size: int, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.shards, self.batch_size, self.size = shards, batch_size, size
        self.tokenizer, self.seed = tokenizer, seed
        self.per_epoch = len(shards) // batch_size
        if not self.per_epoch:
            raise ShardsError(f"batch_size: found {batch_size}, but {shards.folder} has only {len(shards)} samples")

    def __getitem__(self, step: int) -> Batch:
        return self.part(step)

    def part(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The part of batch `step` for one rank: slice `rank` of its positions, divided into `world` equal slices.

        The part is always full. An unreadable sample is listed in `corrupt` and replaced by the sample at another
        position of the epoch. That position is a function of (seed, epoch, position), so it does not depend on ranks.
        """
        epoch, batch = divmod(step, self.per_epoch)
        count = self.batch_size // world
        positions = batch * self.batch_size + rank * count + np.arange(count)
        numbers = self.shards.order(positions, self.seed, epoch)
        places = (mix(self.seed, epoch, _CROPS, positions) / 2**64).tolist()
        draws = mix(self.seed, epoch, _CAPTIONS, positions)
        pixels = torch.empty((count, 3, self.size, self.size), dtype=torch.uint8)
        captions, corrupt = [""] * count, []
        left = np.arange(count)
        for attempt in range(MAX_REPLACEMENTS + 1):
            failed = []
            wanted = numbers[left].tolist()
            for i, number, sample in zip(left.tolist(), wanted, self.shards.read_many(wanted, draws[left].tolist())):
                try:
                    if isinstance(sample, CorruptSampleError):
                        raise sample
                    encoded, captions[i] = sample
                    pixels[i] = square_crop(decode(encoded, self.size), self.size, places[i])
                except CorruptSampleError as error:
                    corrupt.append(f"{self.shards.key(number)}: {error}")
                    failed.append(i)
            if not failed:
                return Batch(pixels, self.tokenizer(captions), numbers.tolist(), corrupt)
            left = np.array(failed)
            others = replacements(positions[left], len(self.shards), self.seed, epoch, attempt)
            numbers[left] = self.shards.order(others, self.seed, epoch)
        raise ShardsError(
            f"{self.shards.folder}: {MAX_REPLACEMENTS} samples in a row cannot be read, among them {corrupt[-1]}"
        )

    def from_step(
        self, start: int, stop: int, workers: int, pin: bool, rank: int = 0, world: int = 1
    ) -> Generator[Batch, None, None]:
        """Yields this rank's part of batches `start` to `stop` - 1, prepared in advance by worker processes."""
        if self.batch_size % world:
            raise ShardsError(f"batch_size: found {self.batch_size}, expected a multiple of the {world} ranks")
        parts = _Parts(self, rank, world)
        loader = DataLoader(
            parts, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin,
            worker_init_fn=_outlive_sigterm if workers else None,
        )  # fmt: skip
        return _delivered(loader)


def replacements(positions: np.ndarray, count: int, seed: int, epoch: int, attempt: int) -> np.ndarray:
    """Positions (int64) of the samples that replace those at `positions`, in an epoch of `count` samples.

    Attempts count from 0. An attempt is made if the sample and its replacements from earlier attempts cannot be read.
    """
    return (mix(seed, epoch, _REPLACEMENTS + attempt, positions) % np.uint64(count)).astype(np.int64)


@dataclass
class _Parts(Dataset["Batch | ShardsError"]):
    batches: Batches
    rank: int
    world: int

    def __getitem__(self, step: int) -> Batch | ShardsError:
        # The DataLoader would wrap an error raised in a worker process in that process's traceback.
        try:
            return self.batches.part(step, self.rank, self.world)
        except ShardsError as error:
            return error
        except OSError as error:  # a removed tar or a failing disk
            return ShardsError(f"{self.batches.shards.folder}: {error}; the shards changed or can no longer be read")


def _outlive_sigterm(_: int) -> None:
    # If the whole process group gets the signal, the training process can still finish its step; workers end with it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _delivered(loader: Iterable[Batch | ShardsError]) -> Generator[Batch, None, None]:
    try:
        for part in loader:
            if isinstance(part, ShardsError):
                raise ShardsError(*part.args)  # the traceback of `part` itself would keep the workers alive
            yield part
    except (EOFError, ConnectionError) as error:
        # Tensors come over a worker's socket, which may break before PyTorch notices that the process died.
        raise RuntimeError(f"DataLoader worker lost: {str(error) or 'end of its messages'}") from None


def square_crop(image: Image.Image, size: int, place: float) -> Tensor:
    """Crops the largest square, at `place` (0 to 1) along the longer side, and resizes it to uint8 (3, size, size).

    This is CLIP's only augmentation. The filter is Pillow's antialiased bicubic in PyTorch's faster implementation.
    """
    side = min(image.size)
    x, y = (int(place * (length - side + 1)) for length in image.size)
    pixels = torch.from_numpy(np.array(image))[y : y + side, x : x + side].permute(2, 0, 1)
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
