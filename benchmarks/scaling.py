"""How cost and the driver's memory grow with the rows of a pool: they should grow linearly, and not at all.

    python benchmarks/scaling.py [ROWS …] [--rows-per-file N]        default: 50000 200000 800000

For each size, makes a pool of made-up URLs and captions, in one file or in many, and runs the steps that need no
network (text filters, exact deduplication, two barriers) with `python -m pipeline.run`, start of Ray included.

Memory is the peak of the driver's process, and of the largest worker: its own pages (RssAnon), and beside them those of
Ray's object store that it has touched (RssShmem), which all processes share and which `object_store_memory` bounds. The
resident size that `top` shows is the sum of both, and of files that are mapped.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
  - caption_frequency: {max_count: 10}
  - balance: {min_count: 20, max_per_entry: 200}
"""
WORDS = """a the of in on with and small large red green blue old new dog cat house tree river mountain street woman man
child boat bridge garden window table chair bird horse market morning evening light shadow under over beside behind
running sitting standing looking holding wearing playing crossing""".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[50_000, 200_000, 800_000])
    parser.add_argument("--rows-per-file", type=int, help="all in one file without it")
    args = parser.parse_args()
    figures = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "r.yaml").write_text(RECIPE)
            rng = random.Random(0)
            urls = [f"https://host{rng.randrange(5000)}.example.org/{rng.getrandbits(40):x}.jpg" for _ in range(rows)]
            captions = [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) for _ in range(rows)]
            table, each = pa.table({"url": urls, "caption": captions}), args.rows_per_file or rows
            (folder / "pool").mkdir()
            for start in range(0, rows, each):
                pq.write_table(table.slice(start, each), folder / f"pool/{start // each:06d}.parquet")
            figures.append((rows, *run(folder)))
    print(
        f"{'rows':>10} {'seconds':>9} {'rows/s':>9} {'driver MB':>10} {'worker MB':>10} {'shared MB':>10} {'files':>7}"
    )
    for rows, seconds, peak, worker, shared, files in figures:
        print(
            f"{rows:>10,} {seconds:>9.1f} {rows / seconds:>9,.0f} {peak:>10,.0f} {worker:>10,.0f} {shared:>10,.0f} "
            f"{files:>7,}"
        )
    (few, quick, small, one, _, _), (many, slow, large, other, _, _) = figures[0], figures[-1]
    print(
        f"RESULT rows_ratio={many / few:.1f} time_ratio={slow / quick:.2f} driver_memory_ratio={large / small:.2f} "
        f"worker_memory_ratio={other / one:.2f}"
    )


def run(folder: Path) -> tuple[float, float, float, float, int]:
    """Seconds of the whole command; peaks in MB of its own memory, and of a worker's own and shared pages; the files
    that the run has left."""
    started, peak, worker, shared = time.perf_counter(), 0.0, 0.0, 0.0
    command = [sys.executable, "-m", "pipeline.run", "r.yaml"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max(peak, megabytes(status, "VmHWM"))
        for pid in workers(process.pid):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            worker = max(worker, megabytes(status, "RssAnon"))
            shared = max(shared, megabytes(status, "RssShmem"))
        time.sleep(0.2)
    if process.wait():
        raise SystemExit(f"pipeline.run ended with status {process.returncode}")
    files = sum(path.is_file() for path in (folder / "run").rglob("*"))
    return time.perf_counter() - started, peak, worker, shared, files


def megabytes(status: str, key: str) -> float:
    """A line of /proc/PID/status."""
    return max((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{key}:")), default=0.0)


def workers(driver: int) -> list[int]:
    """The processes below the driver that run steps: Ray names them `ray::…`."""
    parents: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
    below = {driver}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return [pid for pid in below if names.get(pid, b"").startswith(b"ray::")]


if __name__ == "__main__":
    main()
