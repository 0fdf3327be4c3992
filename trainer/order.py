"""Randomness by counter: the value at any position is a pure function of whole numbers, with no state behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hashes whole numbers, elementwise, to uniform uint64 (rounds of SplitMix64: Steele, Lea and Flood 2014)."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = _absorb(state, value)
    return state


def shuffled(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The sample numbers at these positions of the epoch's random order of 0..count-1.

    A keyed Feistel network over the next power of four, walked until it falls inside the range (Black and Rogaway
    2002): a permutation that needs no table, so any worker finds any position of 400 million samples in O(1).
    """
    half, mask, keys = _network(count, seed, epoch)

    def permute(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for key in keys:
            left, right = right, left ^ (_absorb(key, right) & mask)
        return left, right

    return _walked(positions, count, half, mask, permute)


def unshuffled(numbers: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The positions of these sample numbers in the epoch's order: the inverse of `shuffled`, as fast."""
    half, mask, keys = _network(count, seed, epoch)

    def permute(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for key in reversed(keys):
            left, right = right ^ (_absorb(key, left) & mask), left
        return left, right

    return _walked(numbers, count, half, mask, permute)


def _network(count: int, seed: int, epoch: int) -> tuple[np.uint64, np.uint64, list[np.ndarray]]:
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    return half, np.uint64((1 << int(half)) - 1), [mix(seed, epoch, turn) for turn in range(8)]


def _walked(
    values: np.ndarray, count: int, half: np.uint64, mask: np.uint64,
    permute: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:  # fmt: skip
    numbers = values.astype(np.uint64)
    outside = np.arange(len(numbers))
    while len(outside):
        left, right = permute(numbers[outside] >> half, numbers[outside] & mask)
        numbers[outside] = walked = (left << half) | right
        outside = outside[walked >= count]
    return numbers.astype(np.int64)


def _absorb(state: np.ndarray, value: int | np.ndarray) -> np.ndarray:
    # Unsigned arithmetic on arrays wraps around without a warning, as intended.
    state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
