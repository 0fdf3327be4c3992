from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.schema import wrong_type
from pipeline.similarity import embeddings
from pipeline.step import FILE, Estimate, Filter
from pipeline.text.hashing import file_digest
from trainer.hamming import Index

_BLOCK = 4096


class _Pictures(NamedTuple):
    """The pictures of an evaluation set that have a hash."""

    names: np.ndarray
    hashes: np.ndarray


@dataclass(kw_only=True)
class Decontaminate(Filter):
    """Drops near copies of evaluation pictures, by perceptual hash and by embedding.

    A model that was trained on evaluation pictures looks better than it is (Radford et al., 2021, section 5). DataComp
    (Gadre et al., 2023) removed near copies of its evaluation sets from CommonPool. The drop reason is the name of the
    set, so the funnel counts the copies found of each set. The detail names the evaluation picture and the distance, as
    in `val/n01440764/2.jpg at 3 bits`, or its number in the file of vectors and the cosine.

    The hashes of the sets are computed once and cached in ~/.cache/winnow. Flat pictures have no hash. A row without a
    hash is not compared by hash, and one without an embedding not by embedding.

    If a set does not exist, the run does not start, unless `missing: skip` allows it. The shipped recipes have this
    setting, so they can be planned before the sets are in place: unpack the pictures of ImageNet's validation set to
    `eval/imagenet`, and so on. A set that is added to a recipe later is compared with the stored hashes, so nothing is
    fetched again.
    """

    sets: dict[str, str] | None = field(default=None, metadata=FILE)
    """Evaluation sets by name, compared by perceptual hash: a folder of pictures, at any depth, or shards."""
    max_hamming: int = 4
    """Maximum number of differing bits, 0 to 10 of 64. Re-encoded and resized copies differ in up to 4."""
    vectors: dict[str, str] | None = field(default=None, metadata=FILE)
    """Evaluation sets by name, compared by embedding: a `.npy` file of embeddings of shape (m, d), by the model that
    made `vector`."""
    missing: Literal["fail", "skip"] = "fail"
    """What to do if a set or a file of vectors does not exist: `fail` before the start, or `skip` it, which `--plan`
    and the run report."""
    min_cosine: float = 0.95
    """Lowest cosine of a copy, above 0 and at most 1. It depends on the model: inspect the pairs that are found."""
    column: str = "phash"
    """The column of hashes."""
    vector: str = "image_embedding"
    """The column of embeddings; read only if `vectors` is given."""

    def __post_init__(self) -> None:
        self.needs = (*([self.column] if self.sets else []), *([self.vector] if self.vectors else []))  # type: ignore[misc]
        # Checked once, before the start: a worker that cannot see a set that exists must fail, not skip it.
        given = [(key, *pair) for key in ("sets", "vectors") for pair in (getattr(self, key) or {}).items()]
        self._absent = {(key, name): path for key, name, path in given if not Path(path).exists()}

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.999, 20_000, "keep assumed; rate for sets of 50,000 pictures")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.sets and not self.vectors:
            yield "sets", "`sets`, `vectors` or both must be given, found neither"
        if not 0 <= self.max_hamming <= 10:
            yield "max_hamming", f"must be from 0 to 10 of 64 bits, found {self.max_hamming}"
        if not 0 < self.min_cosine <= 1:
            yield "min_cosine", f"must be above 0 and at most 1, found {self.min_cosine}"
        for key, given in (("sets", self.sets or {}), ("vectors", self.vectors or {})):
            for name, path in given.items():
                if (key, name) in self._absent:
                    if self.missing != "skip":
                        cure = "put the set there, or set `missing: skip` to run without it"
                        yield key, f"{name}: {path} does not exist; {cure}"
                    continue
                try:
                    _read_set(path) if key == "sets" else embeddings.load_vectors(path)
                except (OSError, ValueError) as error:
                    yield key, f"{name}: {error}"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        if self.sets:
            yield from (("column", p) for p in wrong_type(types, self.column, pa.types.is_integer, "uint64 hashes"))
        if self.vectors:
            yield from embeddings.check_vectors(types, vector=self.vector)
        for name, path in self._present("vectors"):
            for problem in embeddings.check_width(types, self.vector, path):
                yield "vectors", f"{name}: {problem}"

    def fingerprint(self) -> object:
        hashes = {name: _read_set(path).hashes for name, path in self._present("sets")}
        sets = {name: hashlib.sha256(bits.tobytes()).hexdigest() for name, bits in hashes.items()}
        return {**sets, **{f"{name} vectors": file_digest(path) for name, path in self._present("vectors")}}

    def notes(self) -> Iterator[str]:
        if self._absent:
            yield f"{', '.join(sorted(set(self._absent.values())))}: not found, so copies of their pictures are kept"

    def _present(self, key: Literal["sets", "vectors"]) -> list[tuple[str, str]]:
        """Name and path of the sets that exist."""
        return [(name, path) for name, path in (getattr(self, key) or {}).items() if (key, name) not in self._absent]

    @cached_property
    def _indexes(self) -> list[tuple[str, _Pictures, Index]]:
        read = [(name, _read_set(path)) for name, path in self._present("sets")]
        return [(name, pictures, Index(pictures.hashes, self.max_hamming)) for name, pictures in read]

    @cached_property
    def _targets(self) -> list[tuple[str, np.ndarray]]:
        return [(name, embeddings.unit(embeddings.load_vectors(path))) for name, path in self._present("vectors")]

    def setup(self) -> None:
        _ = self._indexes, self._targets

    def judge(self, batch: pa.Table) -> pa.StringArray:
        return pa.array([hits[0][0] if hits else None for hits in self._found(batch)], pa.string())

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        return pa.array(
            ["; ".join(f"{name}: {text}" for name, text, _ in hits) for hits in self._found(dropped)], pa.string()
        )

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        """The distance in bits, or the cosine, that decided."""
        return pa.array([hits[0][2] if hits else None for hits in self._found(dropped)], pa.float64())

    def _found(self, batch: pa.Table) -> list[list[tuple[str, str, float]]]:
        """The hits of each row: the name of the set, the picture and its distance as text, the distance."""
        hits: list[list[tuple[str, str, float]]] = [[] for _ in range(len(batch))]
        if self.sets:
            column = batch[self.column].combine_chunks()
            rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            hashes = column.drop_null().cast(pa.uint64(), safe=False).to_numpy()
            for name, pictures, index in self._indexes:
                place, distance = index.nearest(hashes)
                for i in np.flatnonzero(place >= 0).tolist():
                    picture, bits = pictures.names[place[i]], int(distance[i])
                    hits[rows[i]].append((name, f"{picture} at {bits} bits", float(bits)))
        if self.vectors:
            finite, units = embeddings.finite_units(batch[self.vector])
            rows = np.flatnonzero(finite)
            for name, targets in self._targets:
                best, cosine = _nearest(units, targets)
                for i in np.flatnonzero(cosine >= self.min_cosine).tolist():
                    rounded = round(float(cosine[i]), 4)
                    hits[rows[i]].append((name, f"number {best[i]:,} at cosine {rounded}", rounded))
        return hits


def _nearest(units: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index and cosine of the nearest target to each unit vector, compared a block of targets at a time."""
    place, cosine = np.zeros(len(units), np.int64), np.full(len(units), -1.0, np.float32)
    for low in range(0, len(targets), _BLOCK):
        block = units @ targets[low : low + _BLOCK].T
        at = block.argmax(axis=1) if len(block) else np.empty(0, np.int64)
        value = block[np.arange(len(block)), at]
        nearer = value > cosine
        place[nearer], cosine[nearer] = low + at[nearer], value[nearer]
    return place, cosine


def _read_set(path: str) -> _Pictures:
    """The hashes of an evaluation set, from the cache if its files have not changed.

    Raises ValueError for a picture that cannot be decoded: a set compared only in part must not pass as compared.
    """
    from trainer import atomic
    from trainer.samples import read_pictures

    cache = _cache_file(path)
    if cache.is_file():
        with np.load(cache, allow_pickle=False) as saved:
            return _Pictures(saved["names"], saved["hashes"])
    samples, _ = read_pictures(path)
    root = f"{path.rstrip('/')}/"
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = [pair for pair in threads.map(_hashed, samples) if pair is not None]
    names = np.array([name.removeprefix(root) for name, _ in found], np.str_)
    pictures = _Pictures(names, np.array([bits for _, bits in found], np.uint64))
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(cache) as file:
        np.savez(file, names=pictures.names, hashes=pictures.hashes)
    return pictures


def _hashed(sample: object) -> tuple[str, int] | None:
    """The name and hash of a picture, or None if it is flat."""
    from pipeline.fetch.decoder import phash
    from trainer.pictures import decode
    from trainer.samples import Sample
    from trainer.shards import CorruptSampleError

    assert isinstance(sample, Sample)
    try:
        if sample.problem:
            raise CorruptSampleError(sample.problem)
        bits = phash(np.asarray(decode(sample.encoded, 256)))
    except CorruptSampleError as error:
        raise ValueError(f"{sample.where}: {error}; take it out of the set") from None
    return None if bits is None else (sample.where, bits)


def _cache_file(path: str) -> Path:
    """The cache file of a set, named by a digest of the paths, sizes and modification times of its files."""
    place = Path(path)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    listing = [f"{p} {(stat := p.stat()).st_size} {stat.st_mtime_ns}" for p in files] or [path]
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256("\n".join(["1", *listing]).encode()).hexdigest()[:32]
    return Path(root) / "winnow" / "sets" / f"{digest}.npz"
