"""Reads embeddings as matrices from Arrow columns, and loads files of vectors and linear heads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BLOCK = 2048
"""Rows per product with centroids: takes 800 MB with 100,000 of them."""


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """The vectors of a fixed-size list column without nulls, float32 of shape (n, d)."""
    none = np.empty((0, column.type.list_size), np.float32)
    return np.concatenate([none, *map(_values, column.chunks)]).astype(np.float32, copy=False)


def finite(column: pa.ChunkedArray) -> np.ndarray:
    """True for vectors that are not null and have only numbers in the range of float32: bool of shape (n,)."""
    valid = pc.is_valid(column).to_numpy()
    vectors = column if valid.all() else column.filter(pa.array(valid))
    chunks = map(_values, vectors.chunks)  # in their own type, since converting float16 takes longer
    valid[valid] = np.concatenate([np.empty(0, bool), *(_in_range(values).all(axis=1) for values in chunks)])
    return valid


def finite_units(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The mask of `finite`, and the vectors that it selects, divided by their norms: float32 of shape (m, d)."""
    valid = finite(column)
    return valid, unit(matrix(column.filter(pa.array(valid))))


def _in_range(values: np.ndarray) -> np.ndarray:
    if values.dtype.itemsize > 4:
        return np.asarray(np.abs(values) <= np.finfo(np.float32).max)
    return np.isfinite(values)


def _values(chunk: pa.FixedSizeListArray) -> np.ndarray:
    return chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, chunk.type.list_size)


def check_vectors(types: Mapping[str, pa.DataType], **columns: str) -> Iterator[tuple[str, str]]:
    """Yields `(option, problem)` for each option that names a column of `types` without vectors."""
    for option, column in columns.items():
        if column in types and not is_vector(types[column]):
            yield option, f"the column {column!r} holds {types[column]}, expected vectors: a fixed-size list of floats"


def check_width(types: Mapping[str, pa.DataType], column: str, path: str) -> Iterator[str]:
    """Yields a problem if the vectors of a column and of a `.npy` file differ in their number of dimensions."""
    if column not in types or not is_vector(types[column]):
        return
    shape, width = load_vectors(path).shape, types[column].list_size
    if shape[1] != width:
        yield f"{path} has shape {shape}, and {column} has {width} dimensions: they are from different models"


def is_vector(dtype: pa.DataType) -> bool:
    """True for a fixed-size list of floats."""
    return pa.types.is_fixed_size_list(dtype) and pa.types.is_floating(dtype.value_type)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each vector divided by its norm, as float32. Zero vectors stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(norms, 1e-12), np.float32)


def check_clusters(clusters: int | None) -> Iterator[tuple[str, str]]:
    """Yields `(option, problem)` if the number of clusters is out of range (None is a default), or faiss is missing."""
    if clusters is not None and not 1 <= clusters <= 1_000_000:
        yield "clusters", f"must be from 1 to 1,000,000, found {clusters}"
    try:
        import faiss  # noqa: F401
    except ImportError:
        yield "vector", "requires faiss, which is not installed: pip install 'winnow-clip[search]'"


def spherical_kmeans(sample: np.ndarray, k: int, seed: int, iterations: int = 20) -> np.ndarray:
    """Unit centroids of spherical k-means over a sample of vectors: float32 of shape (min(k, m), d). Needs faiss.

    Uses all cores, since nothing else in a run can start before the fit is done; a Ray worker would use one. The result
    does not depend on the number of cores.
    """
    import faiss

    sample = unit(sample)
    k = min(k, len(sample))
    means = faiss.Kmeans(sample.shape[1], k, niter=iterations, seed=seed, spherical=True, min_points_per_centroid=1)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    try:
        means.train(sample)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.asarray(means.centroids)


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The index of the centroid with the highest cosine to each vector: int64 of shape (n,)."""
    best = [np.empty(0, np.int64)]
    for low in range(0, len(vectors), _BLOCK):
        best.append(np.argmax(unit(vectors[low : low + _BLOCK]) @ centroids.T, axis=1))
    return np.concatenate(best)


def load_vectors(path: str | Path) -> np.ndarray:
    """The vectors of a `.npy` file: float32 of shape (m, d). Raises OSError if the file cannot be read, and ValueError
    if it is invalid."""
    try:
        with open(path, "rb") as file:
            vectors = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:  # a damaged header may claim any size
        raise ValueError(f"{path}: not a .npy file of numbers ({error})") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or not vectors.size:
        shape = getattr(vectors, "shape", "several arrays")
        raise ValueError(f"{path}: expected vectors of shape (m, d), found {shape}")
    if vectors.dtype.kind != "f" or not _in_range(vectors).all():
        raise ValueError(
            f"{path}: expected finite floats, found {vectors.dtype} with integers, text, NaN or numbers beyond float32"
        )
    return vectors.astype(np.float32)


class Head(NamedTuple):
    """A linear head: score = weight · x + bias."""

    weight: np.ndarray
    """float32 of shape (d,)."""
    bias: float


def load_head(path: str | Path) -> Head:
    """Loads a linear head from a torch state dict (`.pth`, `.pt`), `.safetensors` or `.npz`.

    The file has `weight` of shape (1, d) and `bias` of shape (1,), with any prefix. Unpickles only tensors. Raises
    OSError or ValueError.
    """
    suffix = Path(path).suffix
    try:
        with open(path, "rb") as file:
            if suffix == ".npz":
                arrays = dict(np.load(file, allow_pickle=False))
            elif suffix == ".safetensors":
                from safetensors.numpy import load

                arrays = load(file.read())
            elif suffix in (".pth", ".pt"):
                import torch

                state = torch.load(file, map_location="cpu", weights_only=True)
                arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
            else:
                raise ValueError("expected .pth, .pt, .safetensors or .npz")
    except OSError:
        raise
    except Exception as error:  # each library raises different errors for invalid files
        raise ValueError(f"{path}: not a linear head: {' '.join(str(error).split())[:200]}") from None
    weights = [a for name, a in arrays.items() if name.rpartition(".")[2] == "weight"]
    biases = [a for name, a in arrays.items() if name.rpartition(".")[2] == "bias"]
    if len(weights) != 1 or weights[0].ndim != 2 or weights[0].shape[0] != 1 or [b.size for b in biases] != [1]:
        shapes = ", ".join(f"{name} {tuple(a.shape)}" for name, a in arrays.items()) or "nothing"
        raise ValueError(f"{path}: expected one `weight` of shape (1, d) and one `bias` of shape (1,), found {shapes}")
    if odd := [name for name, a in arrays.items() if a.dtype.kind not in "fiu"]:
        raise ValueError(f"{path}: expected numbers, found {odd[0]} {arrays[odd[0]].dtype}")
    head = Head(weights[0][0].astype(np.float32), float(biases[0].reshape(())))
    if not (np.isfinite(head.weight).all() and np.isfinite(head.bias)):
        raise ValueError(f"{path}: the weights contain NaN or infinity")
    return head
