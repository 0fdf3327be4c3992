"""Measures how fast the studio answers requests over HTTP on a large run.

    python benchmarks/studio.py [--rows 1000000] [--questions 60]

Writes a run of synthetic rows (six scores, two languages, 50,000 hosts, 2,000 concepts, captions of about 60
characters), opens it as `winnow studio` does, and sends the page's requests over loopback. For each kind of request it
prints the median, the 95th percentile and the maximum of the wall time, and the CPU time of the process per answer. No
request repeats the one before it. The limit for the 95th percentile is 200 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import aiohttp
import numpy as np
import pyarrow as pa
from aiohttp import web

from pipeline.filters.balance import Balance
from pipeline.ledger import Funnel
from pipeline.reader import describe, open_run
from pipeline.recipe import PoolSpec
from pipeline.scheduler.passes import BarrierPass, PoolPass, UnitPass, commit, new_attempt
from pipeline.schema import DROP, SAMPLE
from pipeline.step import Stage
from pipeline.studio.server import application
from pipeline.studio.studio import Studio

UNIT_ROWS = 10_000
SCORES = [f"score_{name}" for name in "abcdef"]
HOSTS, CONCEPTS = 50_000, 2_000


@dataclass(kw_only=True)
class Scores(Stage):
    """Stands for the steps that computed the columns."""

    adds: ClassVar = {**dict.fromkeys(SCORES, pa.float32()), "language": pa.string()}


def write(folder: Path, rows: int) -> str:
    """Writes a run and returns its path."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{n}" for n in range(CONCEPTS)])
    (folder / "entries.json").write_text(json.dumps(words.tolist()))
    run = f"{folder}/run"
    types = {field.name: field.type for field in SAMPLE}
    passes = [
        PoolPass("k0", "pool", adds=types, root=f"{run}/passes/00-pool"),
        UnitPass("k1", "scores", [Scores()], Scores.adds, f"{run}/passes/01-scores"),
        BarrierPass("k2", "balance", [Balance(entries=str(folder / "entries.json"))], {}, f"{run}/passes/02-balance"),
    ]
    units = -(-rows // UNIT_ROWS)
    for unit in range(units):
        n = min(UNIT_ROWS, rows - unit * UNIT_ROWS)
        # Zipfian, like the words of natural text.
        drawn = words[np.minimum(rng.zipf(1.3, (n, 10)) - 1, CONCEPTS - 1)]
        numbers = np.arange(n, dtype=np.int32)
        texts = {
            "row": numbers,
            "uid": [f"{value:032x}" for value in rng.integers(1 << 62, size=n).tolist()],
            "url": [f"https://host-{h}.example/{unit}/{i}.jpg" for i, h in enumerate(rng.integers(HOSTS, size=n))],
            "caption": [f"a picture of {' '.join(line)} somewhere" for line in drawn],
        }
        scores = {name: rng.normal(0.25, 0.05, n).astype(np.float32) for name in SCORES}
        language = rng.choice(["en", "de"], n, p=[0.7, 0.3])
        for p, table in zip(passes, (texts, {"row": numbers, **scores, "language": language})):
            commit(p, unit, new_attempt(unit), n, pa.table(table), None, DROP.empty_table(), {})
    passes[0].finish(Funnel.of(["pool"], rows, [], {}), units=units)
    passes[1].finish(Funnel.of(["scores"], rows, [], {}))
    recipe = SimpleNamespace(pool=PoolSpec(path="none"), run=run)
    claim = {"name": "synthetic", "recipe": {"steps": []}, "passes": describe(passes, recipe)}
    Path(run, "run.json").write_text(json.dumps(claim, default=str))
    return run


def requests(kind: str, count: int) -> list[tuple[str, dict]]:
    """Returns the path and the body of `count` different requests of one kind."""
    made: list[tuple[str, dict]] = []
    for i in range(count):
        moved = 0.2 + 0.1 * i / count
        cuts = [{"column": SCORES[0], "min": moved}, {"column": SCORES[1], "min": 0.2}]
        view: dict[str, str] = {}
        path, more = "summary", {"columns": SCORES}
        if kind == "top fraction":
            cuts[0] = {"column": SCORES[0], "top_fraction": 0.2 + 0.5 * i / count}
        elif kind == "by host":
            view = {"host": f"host-{i}.example"}
        elif kind == "by concept":
            view = {"concept": f"w{i}"}
        elif kind == "by text":
            view = {"text": f"w{i + 7} w"}
        elif kind == "rows at a cut":
            path, more = "tiles", {"show": 0}
        elif kind == "rows kept and dropped":
            path, more = "tiles", {"show": "sample"}
        made.append((path, {"cuts": cuts, "view": view, **more}))
    return made


async def measure(studio: Studio, count: int) -> float:
    """Prints the table and returns the largest 95th percentile in milliseconds."""
    token, worst = "benchmark", 0.0
    runner = web.AppRunner(application(studio, token, ["127.0.0.1:0"]), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    headers = {"Host": "127.0.0.1:0", "Cookie": f"winnow_studio_0={token}"}
    kinds = (
        "a moved cut",
        "top fraction",
        "by host",
        "by concept",
        "by text",
        "rows at a cut",
        "rows kept and dropped",
    )
    print(f"{'request':<22} {'median ms':>9} {'95% ms':>9} {'max ms':>9} {'cpu ms':>9}")
    async with aiohttp.ClientSession(headers=headers) as session:
        for kind in kinds:
            times, cpu_started = [], time.process_time()
            for path, body in requests(kind, count):
                started = time.perf_counter()
                async with session.post(f"{address}/{path}", json=body) as answer:
                    answer.raise_for_status()
                    await answer.read()
                times.append(1000 * (time.perf_counter() - started))
            cpu = 1000 * (time.process_time() - cpu_started) / count
            median, high = np.percentile(times, [50, 95])
            worst = max(worst, high)
            print(f"{kind:<22} {median:>9.0f} {high:>9.0f} {max(times):>9.0f} {cpu:>9.0f}")
    await runner.cleanup()
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=60, help="requests of each kind (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), args.rows)
        started, cpu = time.perf_counter(), time.process_time()
        studio = Studio(open_run(path), "scores", folder)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        print(f"{studio.rows.n:,} rows opened in {seconds:.1f} s ({cpu:.1f} s of CPU)")
        worst = asyncio.run(measure(studio, args.questions))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"RESULT rows={args.rows} open_s={seconds:.1f} open_cpu_s={cpu:.1f} worst_95_ms={worst:.0f} peak_gb={peak:.2f}"
    )


if __name__ == "__main__":
    main()
