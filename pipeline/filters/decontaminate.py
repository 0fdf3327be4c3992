from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

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

    Models that were trained on the pictures that they are tested on look better than they are (Radford et al., 2021,
    section 5; DataComp, Gadre et al., 2023, removes near copies of its evaluation sets from CommonPool). The reason of
    a drop is the name of the set, so the funnel counts the hits of each set, and the detail names the evaluation
    picture: `val/n01440764/2.jpg at 3 bits`, or its number in the file of vectors and the cosine.

    Hashes of the sets are computed once and kept in ~/.cache/winnow. Flat pictures have no hash, and rows without hash
    or embedding are not compared by it.

    A set that is missing stops the run before it starts, unless `missing: skip` allows it. The shipped recipes do, so
    that they can be planned before the sets are there: unpack the pictures of ImageNet's validation set to
    `eval/imagenet`, and so on. A set that is added to a run later is applied to the stored hashes: nothing is fetched
    again.
    """

    sets: dict[str, str] | None = field(default=None, metadata=FILE)
    """Evaluation sets by name: a folder of pictures (and of folders of them), or shards. Each picture is compared by
    perceptual hash."""
    max_hamming: int = 4
    """Maximum number of differing bits, of 64. Re-encoded and resized copies differ in up to 4."""
    vectors: dict[str, str] | None = field(default=None, metadata=FILE)
    """Evaluation sets by name: a `.npy` file of their embeddings, (m, d), by the model that made `vector`."""
    missing: str = "fail"
    """What to do about a set or a file of vectors that does not exist: `fail` before the start, or `skip` it, which
    `--plan` and the run report."""
    min_cosine: float = 0.95
    """Lowest cosine of copies. It depends on the model: look at the pairs."""
    column: str = "phash"
    """The column of hashes."""
    vector: str = "image_embedding"
    """The column of embeddings; read only if `vectors` is given."""

    def __post_init__(self) -> None:
        self.needs = (*([self.column] if self.sets else []), *([self.vector] if self.vectors else []))  # type: ignore[misc]
        # Found once, before the start: a worker that does not see a set that is there must fail, not skip it.
        given = [(key, *pair) for key in ("sets", "vectors") for pair in (getattr(self, key) or {}).items()]
        self._absent = {(key, name): path for key, name, path in given if not Path(path).exists()}

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.999, 20_000, "keep assumed; rate for sets of 50,000 pictures")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.sets and not self.vectors:
            yield "sets", "give `sets`, `vectors`, or both: nothing to compare with"
        if not 0 <= self.max_hamming <= 10:
            yield "max_hamming", f"must be from 0 to 10 of 64 bits, found {self.max_hamming}"
        if not 0 < self.min_cosine <= 1:
            yield "min_cosine", f"must be above 0 and at most 1, found {self.min_cosine}"
        if self.missing not in ("fail", "skip"):
            yield "missing", f"must be fail or skip, found {self.missing!r}"
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
        for name, path in self._vectors:
            for problem in embeddings.check_width(types, self.vector, path):
                yield "vectors", f"{name}: {problem}"

    def fingerprint(self) -> object:
        sets = {name: hashlib.sha256(_read_set(path).hashes.tobytes()).hexdigest() for name, path in self._sets}
        return {**sets, **{f"{name} vectors": file_digest(path) for name, path in self._vectors}}

    def notes(self) -> Iterator[str]:
        if self._absent:
            yield f"{', '.join(sorted(set(self._absent.values())))}: not there, so copies of their pictures are kept"

    @property
    def _sets(self) -> list[tuple[str, str]]:
        return [(name, path) for name, path in (self.sets or {}).items() if ("sets", name) not in self._absent]

    @property
    def _vectors(self) -> list[tuple[str, str]]:
        return [(name, path) for name, path in (self.vectors or {}).items() if ("vectors", name) not in self._absent]

    @cached_property
    def _indexes(self) -> list[tuple[str, _Pictures, Index]]:
        read = [(name, _read_set(path)) for name, path in self._sets]
        return [(name, pictures, Index(pictures.hashes, self.max_hamming)) for name, pictures in read]

    @cached_property
    def _targets(self) -> list[tuple[str, np.ndarray]]:
        return [(name, embeddings.unit(embeddings.load_vectors(path))) for name, path in self._vectors]

    def setup(self) -> None:
        _ = self._indexes, self._targets

    def judge(self, batch: pa.Table) -> pa.StringArray:
        names = [[name for name, _, _ in found] for found in self._found(batch)]
        return pa.array([found[0] if found else None for found in names], pa.string())

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        return pa.array(
            ["; ".join(f"{name}: {text}" for name, text, _ in of) for of in self._found(dropped)], pa.string()
        )

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        """The distance in bits, or the cosine, that decided."""
        return pa.array([found[0][2] if found else None for found in self._found(dropped)], pa.float64())

    def _found(self, batch: pa.Table) -> list[list[tuple[str, str, float]]]:
        """For each row its hits: the set, the picture and how near it is, the number of that."""
        hits: list[list[tuple[str, str, float]]] = [[] for _ in range(len(batch))]
        if self.sets:
            column = batch[self.column].combine_chunks()
            there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            hashes = column.drop_null().cast(pa.uint64(), safe=False).to_numpy()
            for name, pictures, index in self._indexes:
                place, distance = index.nearest(hashes)
                for i in np.flatnonzero(place >= 0).tolist():
                    picture, bits = pictures.names[place[i]], int(distance[i])
                    hits[there[i]].append((name, f"{picture} at {bits} bits", float(bits)))
        if self.vectors:
            finite = embeddings.finite(batch[self.vector])
            units = embeddings.unit(embeddings.matrix(batch[self.vector].filter(pa.array(finite))))
            there = np.flatnonzero(finite)
            for name, targets in self._targets:
                best, cosine = _nearest(units, targets)
                for i in np.flatnonzero(cosine >= self.min_cosine).tolist():
                    near = round(float(cosine[i]), 4)
                    hits[there[i]].append((name, f"number {best[i]:,} at cosine {near}", near))
        return hits


def _nearest(units: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each unit vector the place and cosine of the nearest target, compared a block at a time."""
    place, cosine = np.zeros(len(units), np.int64), np.full(len(units), -1.0, np.float32)
    for low in range(0, len(targets), _BLOCK):
        block = units @ targets[low : low + _BLOCK].T
        at = block.argmax(axis=1) if len(block) else np.empty(0, np.int64)
        value = block[np.arange(len(block)), at]
        nearer = value > cosine
        place[nearer], cosine[nearer] = low + at[nearer], value[nearer]
    return place, cosine


def _read_set(path: str) -> _Pictures:
    """The hashes of an evaluation set, from the cache if its files have not changed since.

    ValueError for a picture that cannot be decoded: a set that is compared in part would pass for a clean one.
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
    """The name and hash of a picture; None if it is flat."""
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
    """Named by the files of the set, their sizes and times."""
    place = Path(path)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    listing = [f"{p} {(stat := p.stat()).st_size} {stat.st_mtime_ns}" for p in files] or [path]
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256("\n".join(["1", *listing]).encode()).hexdigest()[:32]
    return Path(root) / "winnow" / "sets" / f"{digest}.npz"
