"""Randomness by counter: the value at any position is a pure function of whole numbers, with no state behind it."""

from __future__ import annotations

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
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [mix(seed, epoch, turn) for turn in range(8)]
    numbers = positions.astype(np.uint64)
    outside = np.arange(len(numbers))
    while len(outside):
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for key in keys:
            left, right = right, left ^ (_absorb(key, right) & mask)
        numbers[outside] = walked = (left << half) | right
        outside = outside[walked >= count]
    return numbers.astype(np.int64)


def _absorb(state: np.ndarray, value: int | np.ndarray) -> np.ndarray:
    # Arrays of unsigned numbers wrap around silently, which is what is wanted.
    state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
