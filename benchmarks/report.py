"""Measures how the cost of a report grows with the run: time should grow at most linearly, memory hardly at all.

    python benchmarks/report.py [ROWS …]        default: 20000 1000000

For each size, runs a recipe of text filters and two cuts, without a report, over a pool of synthetic URLs, captions and
scores. Then writes the report with `python -m pipeline.report`. The pool has no pictures: a report shows pictures from
a fixed number of units, so their cost does not grow with the run.

CPU seconds count the report's process only, so other work on the machine hardly affects them. Memory is the peak
resident size of that process, including libraries.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RECIPE = """
name: report
pool: {path: pool}
run: run
report: false
steps:
  - url_filter
  - caption_length: {min_words: 4}
  - exact_dedup: {by: [url]}
  - threshold: {column: first_score, top_fraction: 0.6}
  - threshold: {column: second_score, min: -0.5}
"""
WORDS = np.array("a the of in on with and red green blue old new dog cat house tree river street bird horse".split())
BLOCK = 100_000
"""Rows per file of the pool."""


class Figure(NamedTuple):
    rows: int
    run_seconds: float
    seconds: float
    cpu_seconds: float
    megabytes: float
    page_megabytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[20_000, 1_000_000])
    args = parser.parse_args()
    figures = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as name:
            figures.append(measure(Path(name), rows))
        print(figures[-1], flush=True)
    few, many = figures[0], figures[-1]
    print(
        f"RESULT rows={many.rows} cpu_seconds={many.cpu_seconds:.1f} peak_mb={many.megabytes:.0f} "
        f"rows_ratio={many.rows / few.rows:.1f} cpu_ratio={many.cpu_seconds / few.cpu_seconds:.2f} "
        f"memory_ratio={many.megabytes / few.megabytes:.2f}"
    )


def measure(folder: Path, rows: int) -> Figure:
    """Makes a run of `rows` rows in `folder` and measures its report."""
    pool(folder / "pool", rows)
    (folder / "r.yaml").write_text(RECIPE)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipeline.run", "r.yaml"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    made = time.perf_counter()
    command = [sys.executable, "-m", "pipeline.report", "run"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"pipeline.report ended with status {os.waitstatus_to_exitcode(status)}")
    process.returncode = 0  # os.wait4 has already reaped it
    page = (folder / "run/report/index.html").stat().st_size
    seconds = time.perf_counter() - made
    return Figure(rows, made - started, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, page / 1e6)


def pool(folder: Path, rows: int) -> None:
    """Writes a pool whose two scores correlate."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for start in range(0, rows, BLOCK):
        n = min(BLOCK, rows - start)
        hosts, names = rng.integers(0, 200_000, n), rng.integers(0, 2**40, n)
        first = rng.normal(size=n)
        table = pa.table(
            {
                "url": [f"https://host{h}.example.org/{i:x}.jpg" for h, i in zip(hosts, names)],
                "caption": [" ".join(WORDS[rng.integers(0, len(WORDS), k)]) for k in rng.integers(2, 14, n)],
                "first_score": first,
                "second_score": 0.6 * first + 0.8 * rng.normal(size=n),
            }
        )
        pq.write_table(table, folder / f"{start // BLOCK:06d}.parquet")


if __name__ == "__main__":
    main()
