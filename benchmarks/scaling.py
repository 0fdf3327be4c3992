"""Measures how CPU time, memory and files grow with a pool: memory should stay constant, the others grow linearly.

    python benchmarks/scaling.py [ROWS …] [--rows-per-file N]        default: 50000 200000 800000

For each size, makes a pool of synthetic URLs and captions, in one file or in many. Builds a list of entries from its
captions with `python -m pipeline.entries`, then runs every step that needs no network with `python -m pipeline.run`:
text filters, language, deduplication, matching, balancing. CPU time covers both commands, including the start of Ray.

Memory is the peak of each driver process and of the largest worker: its anonymous pages (RssAnon), and separately the
pages of Ray's object store that it has touched (RssShmem), which all processes share and `object_store_memory` bounds.
The resident size that `top` shows is the sum of both and of mapped files. Private pages (USS) would be misleading,
since the pages of libraries become private to the driver when the workers end.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fetch import descendants, measure

RECIPE = """
name: scaling
pool: {path: pool}
run: run
steps:
  - url_filter
  - caption_length
  - caption_pattern
  - language: {keep: [en]}
  - exact_dedup: {by: [url]}
  - exact_dedup: {by: [caption]}
  - caption_frequency: {max_count: 10}
  - match_entries: {entries: entries.tsv}
  - balance: {column: entries, tail_mass: 0.3}
"""
WORDS = """a the of in on with and small large red green blue old new dog cat house tree river mountain street woman man
child boat bridge garden window table chair bird horse market morning evening light shadow under over beside behind
running sitting standing looking holding wearing playing crossing""".split()
SAMPLING_SECONDS = 0.5


class Figures(NamedTuple):
    """The results for one size: seconds, CPU microseconds per row, peaks in MB, and the number of files of the run."""

    rows: int
    seconds: float
    cpu: float
    entries: float
    driver: float
    worker: float
    shared: float
    files: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[50_000, 200_000, 800_000])
    parser.add_argument("--rows-per-file", type=int, help="(default: all rows in one file)")
    args = parser.parse_args()
    print(
        f"{'rows':>11} {'seconds':>8} {'CPU µs/row':>11} {'entries MB':>11} {'driver MB':>10} {'worker MB':>10} "
        f"{'shared MB':>10} {'files':>7} {'files/M rows':>13}"
    )
    figures = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            write_pool(Path(name), rows, args.rows_per_file)
            f = run(Path(name), rows)
        figures.append(f)
        print(
            f"{f.rows:>11,} {f.seconds:>8.1f} {f.cpu:>11.1f} {f.entries:>11,.0f} {f.driver:>10,.0f} {f.worker:>10,.0f} "
            f"{f.shared:>10,.0f} {f.files:>7,} {f.files / f.rows * 1e6:>13,.0f}",
            flush=True,
        )
    few, many = figures[0], figures[-1]
    print(
        f"RESULT rows_ratio={many.rows / few.rows:.1f} cpu_per_row_ratio={many.cpu / few.cpu:.2f} "
        f"driver_memory_ratio={many.driver / few.driver:.2f} worker_memory_ratio={many.worker / few.worker:.2f} "
        f"entries_memory_ratio={many.entries / few.entries:.2f} files_per_million={many.files / many.rows * 1e6:.0f}"
    )


def write_pool(folder: Path, rows: int, rows_per_file: int | None) -> None:
    """Writes a pool with a few frequent captions, words that follow Zipf's law, and row groups of 100,000 rows."""
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "pool").mkdir()
    rng = random.Random(0)
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    weights = [1 / (i + 1) for i in range(len(WORDS))]
    each = rows_per_file or rows
    for start in range(0, rows, each):
        with pq.ParquetWriter(folder / f"pool/{start // each:06d}.parquet", schema) as writer:
            for low in range(start, min(rows, start + each), 100_000):
                n = min(100_000, min(rows, start + each) - low)
                urls = [f"https://host{rng.randrange(5000)}.example.org/{rng.getrandbits(40):x}.jpg" for _ in range(n)]
                captions = [" ".join(rng.choices(WORDS, weights, k=rng.randint(4, 14))) for _ in range(n)]
                writer.write_table(pa.table([urls, captions], schema=schema))


def run(folder: Path, rows: int) -> Figures:
    builder = [sys.executable, "-m", "pipeline.entries", "entries.tsv", "--captions", "pool", "--min-pmi", "1.1"]
    built = measure(builder, folder, 3600)
    peaks = {"driver": 0.0, "worker": 0.0, "shared": 0.0}
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, ended))
    watcher.start()
    try:
        used = measure([sys.executable, "-m", "pipeline.run", "r.yaml"], folder, 36000)
    finally:
        ended.set()
        watcher.join()
    files = sum(path.is_file() for path in (folder / "run").rglob("*"))
    cpu = (built.cpu + used.cpu) / rows * 1e6
    return Figures(rows, built.seconds + used.seconds, cpu, built.memory / 1e6, **peaks, files=files)


def watch(peaks: dict[str, float], ended: threading.Event) -> None:
    """Records the peaks of driver and workers, which Ray names `ray::…`, among the descendants of this process."""
    while not ended.wait(SAMPLING_SECONDS):
        for pid in descendants(os.getpid()):
            try:
                name = Path(f"/proc/{pid}/cmdline").read_bytes()
                kind = "worker" if name.startswith(b"ray::") else "driver" if b"pipeline.run\0r.yaml" in name else None
                if kind is None or b"meter\0" in name:
                    continue
                peaks[kind] = max(peaks[kind], megabytes(pid, "RssAnon"))
                peaks["shared"] = max(peaks["shared"], megabytes(pid, "RssShmem"))
            except OSError:  # the process has ended
                continue


def megabytes(pid: int, field: str) -> float:
    """Returns a field of /proc/PID/status in MB, or 0 if the process is ending, which has no such field."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0) / 1000


if __name__ == "__main__":
    main()
