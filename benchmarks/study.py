"""Compares the cost of counting the rows of a study's cuts with a plain pyarrow scan of the same columns.

    python benchmarks/study.py [--rows N] [--scores N] [--cuts N]        default: 1,000,000 rows, 6 scores, 50 cuts

Makes a finished run with one measure pass per score, like that of a recipe with six scorers. `bare` scans the scores of
all units with `pyarrow.dataset`. `scan` does the same through the read API. `study` computes all cuts by fraction
exactly, with the rows of each and the overlap of each pair. The three take turns, `--times` times, each time in a new
process. The least wall and CPU times are reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from pipeline.condition import Condition
from pipeline.ledger import Funnel, Line
from pipeline.reader import describe, open_run
from pipeline.recipe import PoolSpec, Recipe
from pipeline.scheduler.passes import commit, make_passes, new_attempt
from pipeline.schema import DROP
from pipeline.step import Stage
from pipeline.storage import Store


@dataclass(kw_only=True)
class Score(Stage):
    """Stands for a scorer that added one column."""

    column: str
    expensive = True

    def __post_init__(self) -> None:
        self.adds = {self.column: pa.float32()}  # type: ignore[misc]


def make_run(folder: Path, rows: int, scores: int, unit_rows: int = 10_000) -> None:
    """Writes a run of synthetic rows with normally distributed scores."""
    steps = [Score(column=f"score_{i}") for i in range(scores)]
    for i, step in enumerate(steps):
        step.__dict__["_label"] = f"score_{i}"  # which the recipe reader would set
    recipe = Recipe(name="made", pool=PoolSpec(path="made.parquet"), run=str(folder), steps=[*steps])
    passes = make_passes(recipe, {"made": rows}, {})
    rng = np.random.default_rng(0)
    units = -(-rows // unit_rows)
    for p in passes:
        for unit in range(units):
            count = min(unit_rows, rows - unit * unit_rows)
            columns: dict[str, Any] = {"row": np.arange(count, dtype=np.int32)}
            if p.kind == "pool":
                uids = [f"{unit * unit_rows + i:032x}" for i in range(count)]
                columns |= {"uid": uids, "url": uids, "caption": uids}
            columns |= {name: rng.normal(0.25, 0.05, count).astype(np.float32) for name in p.adds if p.kind != "pool"}
            part = 0 if p.kind == "measure" else None
            commit(p, unit, new_attempt(unit), count, pa.table(columns), None, DROP.empty_table(), {}, part)
        whole = {"parts": {}} if p.kind == "measure" else {"units": units}
        p.finish(Funnel({p.label: Line(rows_in=rows)}), **whole)
    claim = {"name": "made", "recipe": {}, "passes": describe(passes, recipe)}
    Store(str(folder)).write("run.json", json.dumps(claim).encode())


def bare(run: Path, scores: int) -> int:
    """Scans the scores of all rows with pyarrow alone, and returns the number of rows."""
    rows = 0
    for folder in run.glob("passes/score-*"):
        dataset = pyarrow.dataset.dataset(sorted(map(str, folder.glob("units/*.parquet"))))
        column = next(name for name in dataset.schema.names if name.startswith("score_"))
        rows += sum(map(len, dataset.to_batches(columns=[column])))
    return rows // scores


def scan(run: Path, scores: int) -> int:
    """Does the same through the read API."""
    return sum(map(len, open_run(run).scan([f"score_{i}" for i in range(scores)])))


def study(run: Path, scores: int, cuts: int) -> int:
    """Counts the rows of `cuts` cuts and their overlaps, and returns the sum of the counts."""
    from pipeline.study import candidates, study_plan
    from pipeline.study.kept import Cuts, jaccard, overlaps

    grid = [
        study_plan.Cut((Condition(f"score_{i % scores}", "top_fraction", round((i // scores + 1) / 10, 2)),))
        for i in range(cuts)
    ]
    with tempfile.TemporaryDirectory(dir=run.parent) as out:
        columns = [f"score_{i}" for i in range(scores)]
        opened = candidates.open_candidates(open_run(run), columns[-1], columns, Path(out) / "candidates")
        both = overlaps(Cuts(opened, grid))
        jaccard(both)
        return int(both.diagonal().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--scores", type=int, default=6)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the run; by default a temporary folder")
    parser.add_argument("--only", choices=("bare", "scan", "study"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        started, cpu_started = time.perf_counter(), time.process_time()
        work = {"bare": bare, "scan": scan, "study": study}[args.only]
        answer = work(args.folder, args.scores, *([args.cuts] if args.only == "study" else []))
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        own = next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
        print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "own": own / 1024, "answer": answer}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "run"
        if not (folder / "run.json").exists():
            make_run(folder, args.rows, args.scores)
        runs: dict[str, list[dict[str, float]]] = {"bare": [], "scan": [], "study": []}
        words = ["--scores", str(args.scores), "--cuts", str(args.cuts), "--folder", str(folder)]
        for _ in range(args.times):
            for name, results in runs.items():
                command = [sys.executable, __file__, "--only", name, *words]
                results.append(json.loads(subprocess.check_output(command)))
    least = {name: {key: min(r[key] for r in results) for key in results[0]} for name, results in runs.items()}
    print(f"{args.rows:,} rows, {args.scores} scores, {args.cuts} cuts")
    print(f"{'':>6} {'wall s':>8} {'CPU s':>8} {'own MB':>8} {'peak MB':>8}")
    for name, r in least.items():
        print(f"{name:>6} {r['wall']:>8.2f} {r['cpu']:>8.2f} {r['own']:>8.0f} {r['peak']:>8.0f}")
    wall, cpu = (least["study"][key] / least["bare"][key] for key in ("wall", "cpu"))
    print(f"RESULT rows={args.rows} wall_ratio={wall:.2f} cpu_ratio={cpu:.2f} study_own_mb={least['study']['own']:.0f}")


if __name__ == "__main__":
    main()
