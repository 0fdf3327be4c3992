"""Mixes several datasets, each with a fixed share of the samples."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, repeat

import numpy as np

from trainer.order import mix, shuffled, unshuffled
from trainer.shards import CorruptSampleError, Shards, ShardsError

CYCLE = 1 << 16
"""Draws after which the pattern of sources repeats; shares are rounded to 1/CYCLE."""


class Mixture:
    """Sources with weights, behind the interface of `Shards`.

    Each source gets `weight / sum of weights` of the samples, rounded to 1/65536, in every window to within about one
    sample per source. Each source is sampled in random order without replacement; when it is exhausted, its next pass
    starts in a new order, independent of the epoch. An epoch has as many samples as all sources together, so a source
    with more weight than its part of them repeats within an epoch, and one with less does not complete.
    """

    def __init__(self, parts: Sequence[tuple[Shards, float]]) -> None:
        self.parts = [shards for shards, _ in parts]
        self.folder = " + ".join(shards.folder for shards in self.parts)
        self.name = " + ".join(shards.name for shards in self.parts)
        self.draws = _shares([weight for _, weight in parts], [shards.folder for shards in self.parts])
        """Samples of each source in a cycle."""
        # Source i's k-th draw is due at (k + 1/2) / draws[i]: the interleaving that keeps every prefix in proportion.
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.draws])
        self._source = np.repeat(np.arange(len(self.draws)), self.draws)[np.argsort(due, kind="stable")]
        self._earlier = np.zeros(CYCLE, np.int64)
        for i, count in enumerate(self.draws):
            self._earlier[self._source == i] = np.arange(count)
        self._ends = list(accumulate(len(shards) for shards in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """Equal for equal contents and equal shares."""
        lines = [f"{shards.fingerprint} {count}" for shards, count in zip(self.parts, self.draws)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def order(self, positions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The sample numbers, int64, at these positions of an epoch; as `Shards.order`, but numbers may repeat."""
        cycle, place = np.divmod(positions.astype(np.int64) + epoch * len(self), CYCLE)
        sources = self._source[place]
        numbers = np.empty(len(positions), np.int64)
        for i, shards in enumerate(self.parts):
            mine = sources == i
            passes, at = np.divmod(cycle[mine] * self.draws[i] + self._earlier[place[mine]], len(shards))
            found = np.empty(len(at), np.int64)
            own_seed = int(mix(seed, i)[0] >> np.uint64(1))
            for turn in np.unique(passes):
                now = passes == turn
                found[now] = shuffled(at[now], len(shards), own_seed, int(turn))
            numbers[mine] = found + (self._ends[i] - len(shards))
        return numbers

    def positions(self, numbers: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Shards.positions`; but a number may be at several positions of an epoch, or at none."""
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        first, last = epoch * len(self), (epoch + 1) * len(self)
        for i, shards in enumerate(self.parts):
            end = self._ends[i]
            mine = np.flatnonzero((numbers >= end - len(shards)) & (numbers < end))
            own, places = numbers[mine] - (end - len(shards)), np.flatnonzero(self._source == i)

            def drawn(until: int, places: np.ndarray = places) -> int:
                """Samples of this source among the first `until` of the run."""
                return until // CYCLE * len(places) + int(np.searchsorted(places, until % CYCLE))

            low, high, own_seed = drawn(first), drawn(last), int(mix(seed, i)[0] >> np.uint64(1))
            for turn in range(low // len(shards), -(-high // len(shards))) if len(mine) else ():
                draws = unshuffled(own, len(shards), own_seed, turn) + turn * len(shards)
                within = (draws >= low) & (draws < high)
                cycle, place = np.divmod(draws[within], len(places))
                found.append((mine[within], cycle * CYCLE + places[place] - first))
        indices, positions = zip(*found)
        return np.concatenate(indices), np.concatenate(positions)

    def uids(self) -> Iterator[list[str | None]]:
        """As `Shards.uids`."""
        return (uids for shards in self.parts for uids in shards.uids())

    def key(self, number: int) -> str:
        """`FOLDER/SHARD.tar:KEY`."""
        shards, own = self._locate(number)
        return f"{shards.folder}/{shards.key(own)}"

    def read(self, number: int) -> tuple[bytes, str]:
        """As `Shards.read`."""
        shards, own = self._locate(number)
        return shards.read(own)

    def read_many(
        self, numbers: Iterable[int], draws: Iterable[int] | None = None
    ) -> Iterator[tuple[bytes, str] | CorruptSampleError]:
        """As `Shards.read_many`."""
        pairs = zip(numbers, repeat(0) if draws is None else draws)
        located = [(*self._locate(number), draw) for number, draw in pairs]
        read = {}
        for part in self.parts:
            mine = [(own, draw) for of, own, draw in located if of is part]
            read[id(part)] = part.read_many(*zip(*mine)) if mine else iter(())
        return (next(read[id(part)]) for part, _, _ in located)

    def _locate(self, number: int) -> tuple[Shards, int]:
        at = bisect_right(self._ends, number)
        return self.parts[at], number - (self._ends[at] - len(self.parts[at]))


def _shares(weights: list[float], names: list[str]) -> list[int]:
    # Largest remainders: whole numbers in proportion to the weights that add up to the cycle.
    for name, weight in zip(names, weights):
        if not 0 < weight < float("inf"):
            raise ShardsError(f"shards: {name}: weight {weight}, expected a number above 0")
    exact = [weight / sum(weights) * CYCLE for weight in weights]
    draws = [int(share) for share in exact]
    for i in sorted(range(len(draws)), key=lambda i: draws[i] - exact[i])[: CYCLE - sum(draws)]:
        draws[i] += 1
    for name, share in zip(names, draws):
        if not share:
            raise ShardsError(f"shards: {name}: its weight is less than 1/{CYCLE} of all weights")
    return draws
