"""Stable hashes of strings: the same on every machine and with every library version.

All random decisions (sampling, ties, the cap of a concept) are functions of such a hash of the row's uid, so a repeated
or resumed run makes the same decisions on any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b, sha256
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa


def hash64(strings: pa.Array | pa.ChunkedArray | Iterable[str], *, seed: int = 0, purpose: str = "") -> np.ndarray:
    """BLAKE2b of each string as uint64, keyed by the seed. About 0.6 µs per string of 32 characters on one core.

    `purpose` (at most 16 bytes) makes uses of the same seed independent. Otherwise the rows kept by one sample would
    also be favoured by every later one.
    """
    if isinstance(strings, pa.Array | pa.ChunkedArray):
        strings = strings.to_pylist()
    keyed = blake2b(digest_size=8, key=str(seed).encode(), person=purpose.encode())

    def digest(string: str) -> bytes:
        hasher = keyed.copy()
        hasher.update(string.encode())
        return hasher.digest()

    return np.frombuffer(b"".join(map(digest, strings)), dtype="<u8").astype(np.uint64, copy=False)


def uniform(strings: pa.Array | pa.ChunkedArray | Iterable[str], *, seed: int = 0, purpose: str = "") -> np.ndarray:
    """A uniform float64 in [0, 1) for each string: the upper 53 bits of `hash64`."""
    return (hash64(strings, seed=seed, purpose=purpose) >> np.uint64(11)) * 2.0**-53


def uid_pairs(uids: Iterable[str]) -> np.ndarray:
    """Uids of 32 hex digits as DataComp's subset files store them: pairs of their upper and lower 64 bits, (n,)."""
    return np.frombuffer(bytes.fromhex("".join(uids)), ">u8").astype("<u8").view(np.dtype("u8,u8"))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, local or in an object store, in hex."""
    digest = sha256()
    with fsspec.open(str(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
