"""A subset of a dataset by sample numbers: the arms of a study train on subsets without copying shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from trainer.order import shuffled, unshuffled
from trainer.shards import CorruptSampleError, Shards, ShardsError

if TYPE_CHECKING:
    from trainer.mixture import Mixture


class Subset:
    """The samples of `whole` whose numbers are in `path`, behind the interface of `Shards`.

    `path` is an .npy file of int64 (n,), n ≥ 1: distinct numbers from 0 to `len(whole) - 1`, ascending. It is
    memory-mapped. Samples keep their numbers, so messages name them as they would without the subset. Raises
    ShardsError.
    """

    def __init__(self, whole: Shards | Mixture, path: str) -> None:
        self.whole, self.path = whole, path
        self.folder, self.name = f"{whole.folder} ({path})", whole.name
        try:
            self.numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ShardsError(f"subset: {path}: not an .npy file of sample numbers ({error})") from error
        found = self.numbers
        if found.ndim != 1 or found.dtype != np.dtype("<i8"):
            raise ShardsError(f"subset: {path}: {found.dtype} of shape {found.shape}, expected int64 of shape (n,)")
        if not len(found) or found[0] < 0 or found[-1] >= len(whole) or not (found[1:] > found[:-1]).all():
            raise ShardsError(
                f"subset: {path}: expected at least one number, ascending, from 0 to {len(whole) - 1:,}, the last "
                f"sample of {whole.folder}"
            )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def fingerprint(self) -> str:
        """Equal for the same samples of equal contents."""
        return hashlib.sha256(self.whole.fingerprint.encode() + np.ascontiguousarray(self.numbers).data).hexdigest()

    def order(self, positions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """As `Shards.order`: the sample numbers at these positions of an epoch, each number exactly once."""
        return np.asarray(self.numbers[shuffled(positions, len(self), seed, epoch)])

    def positions(self, numbers: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Shards.positions`; numbers that are not in the subset have no position."""
        places = np.searchsorted(self.numbers, numbers)
        found = np.flatnonzero(np.append(self.numbers, -1)[places] == numbers)
        return found, unshuffled(places[found], len(self), seed, epoch)

    def uids(self) -> Iterator[list[str | None]]:
        """As `Shards.uids`, for all samples of `whole`."""
        return self.whole.uids()

    def key(self, number: int) -> str:
        """As `Shards.key`."""
        return self.whole.key(number)

    def read(self, number: int) -> tuple[bytes, str]:
        """As `Shards.read`."""
        return self.whole.read(number)

    def read_many(
        self, numbers: Iterable[int], draws: Iterable[int] | None = None
    ) -> Iterator[tuple[bytes, str] | CorruptSampleError]:
        """As `Shards.read_many`."""
        return self.whole.read_many(numbers, draws)
