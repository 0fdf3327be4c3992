"""Compares the search behind `near_dedup` with a plain self-join in polars, over the same 64-bit hashes.

    python benchmarks/dedup.py [ROWS …] [--hot 0.01] [--alone]    default: 1000000 10000000

Needs polars, except with --alone. The hashes are random. One in fifty has a planted neighbour at a distance of 1 to 4
bits, and the share `--hot` lies in three hot buckets, within each of which all hashes share 44 bits. `winnow` is
`pipeline.similarity.hash_clusters.clusters`, which returns the cluster number of each hash. `polars` joins the hashes
with themselves under each of the same 15 masks and drops the pairs that differ in more than 4 bits, without clustering
them. For 10 million hashes, the hot buckets alone would give it 3 billion pairs under each of six masks, which do not
fit in memory: to compare the two at that size, pass `--hot 0`; to measure winnow with hot buckets, `--alone`. Each
contender runs in a separate process. Time covers the search only; memory is the peak of the process above its size
before the search. Recall is the share of planted pairs that were found.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

MAX_HAMMING = 4
ONE = np.uint64(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--hot", type=float, default=0.01, help="share of the hashes in hot buckets")
    parser.add_argument("--alone", action="store_true", help="without polars")
    parser.add_argument("--contender", choices=("winnow", "polars"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(contend(args.contender, args.rows[0], args.hot)))
        return
    print(f"{'rows':>12} {'contender':>10} {'seconds':>8} {'CPU s':>7} {'MB':>7} {'recall':>8}")
    results = {}
    for rows in args.rows:
        for contender in ("winnow",) if args.alone else ("winnow", "polars"):
            words = [sys.executable, __file__, str(rows), "--contender", contender, "--hot", str(args.hot)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{contender} failed: {done.stderr.strip().splitlines()[-1]}")
            result = results[rows, contender] = json.loads(done.stdout)
            print(
                f"{rows:>12,} {contender:>10} {result['seconds']:>8.2f} {result['cpu']:>7.2f} {result['mb']:>7,.0f} "
                f"{result['recall']:>8.4f}"
            )
    words = []
    for rows in args.rows:
        ours, theirs = results[rows, "winnow"], results.get((rows, "polars"))
        if theirs:
            words.append(f"time_ratio_{rows}={ours['seconds'] / theirs['seconds']:.2f}")
            words.append(f"cpu_ratio_{rows}={ours['cpu'] / theirs['cpu']:.2f}")
        words.append(f"recall_{rows}={ours['recall']:.4f}")
    few, many = results[args.rows[0], "winnow"], results[args.rows[-1], "winnow"]
    growth = many["cpu"] / few["cpu"] / (args.rows[-1] / args.rows[0])
    print(f"RESULT {' '.join(words)} cpu_a_row_growth={growth:.2f}")


def planted(rows: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct hashes in random order, and the planted pairs as an (m, 2) array of hashes."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, rows, np.uint64)
    near = rows // 50
    hashes[:near] = hashes[near : 2 * near]
    for _ in range(MAX_HAMMING):
        flips = ONE << rng.integers(0, 64, near, np.uint64)
        hashes[:near] ^= np.where(rng.random(near) < 0.6, flips, np.uint64(0))
    hot = round(rows * share)
    prefixes = rng.integers(0, 2**44, 3, np.uint64) << np.uint64(20)
    hashes[rows - hot :] = prefixes[rng.integers(0, 3, hot)] | rng.integers(0, 2**20, hot, np.uint64)
    pairs = np.stack([hashes[:near], hashes[near : 2 * near]], axis=1)
    distinct = np.unique(hashes)
    return rng.permutation(distinct), pairs[pairs[:, 0] != pairs[:, 1]]


def contend(contender: str, rows: int, hot: float) -> dict[str, float]:
    from pipeline.similarity.hash_clusters import clusters
    from trainer.hamming import masks

    hashes, pairs = planted(rows, hot)
    if contender == "polars":
        import polars as pl
    else:
        clusters(hashes[:1000], MAX_HAMMING)  # imports SciPy
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu_started = time.perf_counter(), time.process_time()
    if contender == "winnow":
        labels = clusters(hashes, MAX_HAMMING)
    else:
        frame, linked = pl.DataFrame({"hash": hashes}), []
        for mask in masks(MAX_HAMMING):
            keyed = frame.with_columns(key=pl.col("hash") & pl.lit(mask, pl.UInt64))
            shared = keyed.filter(pl.len().over("key") > 1)
            joined = shared.join(shared, on="key").filter(pl.col("hash") < pl.col("hash_right"))
            close = (pl.col("hash") ^ pl.col("hash_right")).bitwise_count_ones() <= MAX_HAMMING
            linked.append(joined.filter(close).select("hash", "hash_right"))
        links = pl.concat(linked).unique()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    if contender == "winnow":
        order = np.argsort(hashes)
        one, two = (labels[order[np.searchsorted(hashes, side, sorter=order)]] for side in pairs.T)
        recall = float((one == two).mean())
    else:
        wanted = pl.DataFrame({"hash": pairs.min(axis=1), "hash_right": pairs.max(axis=1)}).unique()
        recall = len(wanted.join(links, on=["hash", "hash_right"], how="semi")) / len(wanted)
    return {"seconds": seconds, "cpu": cpu, "mb": memory / 1024, "recall": recall}


if __name__ == "__main__":
    main()
