from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from pipeline.text.hashing import hash64, uniform


def test_the_hash_is_blake2b_and_so_the_same_everywhere() -> None:
    reference = hashlib.blake2b("é".encode(), digest_size=8, key=b"7", person=b"sample").digest()
    assert hash64(["é"], seed=7, purpose="sample").tolist() == [int.from_bytes(reference, "little")]
    assert hash64(pa.chunked_array([["a"], ["b", ""]])).tolist() == hash64(["a", "b", ""]).tolist()
    assert hash64([]).dtype == np.uint64


def test_uniform_fills_the_unit_interval() -> None:
    u = uniform([str(i) for i in range(20_000)])
    assert u.min() >= 0
    assert u.max() < 1
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 150


def test_seed_and_purpose_give_independent_draws() -> None:
    uids = [str(i) for i in range(20_000)]
    u = uniform(uids, seed=1, purpose="sample")
    for other in (uniform(uids, seed=2, purpose="sample"), uniform(uids, seed=1, purpose="balance")):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
