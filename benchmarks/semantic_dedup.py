"""Compares `semantic_dedup` over stored embeddings with plain faiss k-means and a matrix product in each cluster.

    python benchmarks/semantic_dedup.py [--rows 2000000] [--dimension 512] [--rounds 1]

Makes unit vectors around random centres, a fifth of them copies of others at a cosine of 0.970 to 0.995, and stores
them in fp16 twice: as a run of units of 10,000 rows, and as one array. `winnow` runs the barrier of `semantic_dedup` on
two workers of a local Ray, including the start of Ray. `bare` is one process with two threads, which maps the array,
trains the same k-means on as many vectors, assigns all vectors, compares those of each cluster, and writes only a mask.
For recall, brute force finds which rows of a sample have an earlier row with a cosine above 1 − eps; recall is the
share of those that was dropped. Memory is the sum over all processes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from fetch import measure

from pipeline.filters.semantic_dedup import SemanticDedup
from pipeline.scheduler import cluster, vectors
from pipeline.scheduler.passes import BarrierPass, PoolPass, UnitPass, commit, new_attempt
from pipeline.scheduler.run_pass import UnitWriter
from pipeline.scheduler.workers import map_tasks
from pipeline.schema import DROP, SAMPLE

UNIT_ROWS = 10_000
SAMPLE_ROWS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        {"winnow": winnow, "bare": bare}[args.job[0]](Path(args.job[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, args.rows, args.dimension)
        figures: dict[str, list[tuple[float, float, float, float]]] = {"winnow": [], "bare": []}
        for _ in range(args.rounds):
            for contender in figures:
                command = [sys.executable, __file__, "--job", contender, str(folder)]
                usage = measure(command, folder, 3600)
                dropped = np.load(folder / f"{contender}.npy")
                peak = usage.memory / 1e6
                figures[contender].append((usage.seconds, usage.cpu, peak, recall(folder, dropped)))
                print(f"{contender}: {usage.seconds:.0f} s, dropped {dropped.sum():,}", file=sys.stderr)
    print(f"{args.rows:,} rows of {args.dimension} dimensions in fp16")
    print(f"{'contender':<10} {'seconds':>9} {'CPU s':>9} {'peak MB':>9} {'recall':>8}")
    medians = {who: [statistics.median(values) for values in zip(*rows)] for who, rows in figures.items()}
    for who, (seconds, cpu, peak, recalled) in medians.items():
        print(f"{who:<10} {seconds:>9.1f} {cpu:>9.1f} {peak:>9,.0f} {recalled:>8.4f}")
    (ours, our_cpu, peak, recalled), (theirs, their_cpu, *_) = medians["winnow"], medians["bare"]
    ratios = f"time_ratio={ours / theirs:.2f} cpu_ratio={our_cpu / their_cpu:.2f}"
    print(f"RESULT {ratios} peak_mb={peak:.0f} recall={recalled:.4f}")


def write(folder: Path, rows: int, dimension: int) -> None:
    """Writes `vectors.npy`, and the same vectors as two passes of a run.

    Row i of the array is row i % UNIT_ROWS of unit i // UNIT_ROWS.
    """
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, rows // 500), dimension)).astype(np.float32)
    matrix = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float16, (rows, dimension))
    before = run_passes(folder, dimension)
    for unit, low in enumerate(range(0, rows, UNIT_ROWS)):
        n = min(UNIT_ROWS, rows - low)
        new = centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, dimension)).astype(np.float32)
        if unit:
            copies = rng.permutation(n)[: n // 5]
            near = matrix[rng.integers(low, size=len(copies))].astype(np.float32)
            cosine = rng.uniform(0.970, 0.995, size=(len(copies), 1)).astype(np.float32)
            noise = rng.normal(size=near.shape).astype(np.float32)
            noise /= np.linalg.norm(noise, axis=1, keepdims=True)
            new[copies] = cosine * near + np.sqrt(1 - cosine**2) * noise
        new /= np.linalg.norm(new, axis=1, keepdims=True)
        matrix[low : low + n] = new
        uids = [f"{i:032x}" for i in range(low, low + n)]
        row = pa.array(np.arange(n, dtype=np.int32))
        texts = pa.table({"row": row, "uid": uids, "url": uids, "caption": uids})
        commit(before[0], unit, new_attempt(unit), n, texts, None, DROP.empty_table(), {})
        writer = UnitWriter(before[1], unit, np.arange(n))
        flat = pa.array(matrix[low : low + n].reshape(-1))
        embedding = pa.FixedSizeListArray.from_arrays(flat, dimension)
        writer.add(pa.table({"unit": pa.array([unit] * n, pa.int32()), "row": row, "embedding": embedding}))
        writer.commit({})


def run_passes(folder: Path, dimension: int) -> list[UnitPass]:
    types = {f.name: f.type for f in SAMPLE}
    vector = {"embedding": pa.list_(pa.float16(), dimension)}
    return [
        PoolPass("k", "pool", adds=types, root=f"{folder}/run/pool"),
        UnitPass("k", "embed", adds=vector, root=f"{folder}/run/embed"),
    ]


def winnow(folder: Path) -> None:
    rows, dimension = np.load(folder / "vectors.npy", mmap_mode="r").shape
    units = -(-rows // UNIT_ROWS)
    step = SemanticDedup(vector="embedding")
    p = BarrierPass("k", step.label, [step], root=f"{folder}/run/barrier")
    cluster.start_ray(2)
    per_file = 1_000_000 // UNIT_ROWS
    files, _ = vectors.decide(p, run_passes(folder, dimension), units, rows, per_file, map_tasks)
    cluster.stop_ray()
    dropped = np.zeros(rows, bool)
    for name in files.values():
        drops = p.store.read_table(name, ["unit", "row"])
        dropped[drops["unit"].to_numpy().astype(np.int64) * UNIT_ROWS + drops["row"].to_numpy()] = True
    np.save(folder / "winnow.npy", dropped)


def bare(folder: Path) -> None:
    import faiss

    matrix = np.load(folder / "vectors.npy", mmap_mode="r")
    rows, dimension = matrix.shape
    step = SemanticDedup()
    k = max(1, round(rows**0.5))
    faiss.omp_set_num_threads(2)
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[: step.sample_rows(rows)])
    means = faiss.Kmeans(dimension, k, niter=step.iterations, seed=0, spherical=True)
    means.train(matrix[chosen].astype(np.float32))
    cluster = np.empty(rows, np.int64)
    for low in range(0, rows, UNIT_ROWS):
        similar = matrix[low : low + UNIT_ROWS].astype(np.float32) @ means.centroids.T
        cluster[low : low + UNIT_ROWS] = similar.argmax(axis=1)
    order = np.argsort(cluster, kind="stable")
    dropped = np.zeros(rows, bool)
    for members in np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1):
        block = matrix[members].astype(np.float32)
        similar = np.triu(block @ block.T, 1)
        dropped[members] = similar.max(axis=0) > 1 - step.eps
    np.save(folder / "bare.npy", dropped)


def recall(folder: Path, dropped: np.ndarray) -> float:
    """Returns the share dropped among sampled rows with an earlier row above the limit, by brute force in fp32."""
    matrix = np.load(folder / "vectors.npy", mmap_mode="r")
    rows = np.sort(np.random.default_rng(1).permutation(len(matrix))[:SAMPLE_ROWS])
    sample = matrix[rows].astype(np.float32)
    best = np.full(len(rows), -1.0, np.float32)
    for low in range(0, len(matrix), 50_000):
        block = matrix[low : low + 50_000].astype(np.float32)
        similar = sample @ block.T
        similar[np.arange(low, low + len(block)) >= rows[:, None]] = -1
        best = np.maximum(best, similar.max(axis=1))
    # With a margin for the rounding of fp16: rows just above the limit may fall on either side.
    copies = best > 1 - SemanticDedup().eps + 1e-3
    return float(dropped[rows[copies]].mean())


if __name__ == "__main__":
    main()
