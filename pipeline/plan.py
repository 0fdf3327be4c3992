"""Prints the passes and cost of a recipe for `--plan`, with the basis of each estimate. Starts and fetches nothing."""

from __future__ import annotations

import os
from collections import defaultdict

from rich.table import Table

from pipeline import pool
from pipeline.pool import PoolError
from pipeline.recipe import Recipe, RecipeError
from pipeline.scheduler import ingest
from pipeline.scheduler.passes import BarrierPass, Pass, PoolPass, SinkPass, make_passes
from pipeline.step import Estimate, Step
from trainer.terminal import Console

_POOL = Estimate(1.0, 20_000, "rows of the pool; rate measured on 10,000 web rows", stored=120)
COLUMNS = ("pass", "steps", "units", "workers", "rows in", "rows out", "fetched", "stored", "core-h", "GPU-h")


def print_plan(console: Console, recipe: Recipe) -> None:
    """Prints the passes with units, resources, rows, bytes and hours. Raises RecipeError if the rows are unknown."""
    if not console.is_terminal:
        console.width = 180
    local = recipe.pool.is_local
    if local:
        try:
            rows = sum(pool.count(recipe.pool, split) for split in pool.splits(recipe.pool))
        except PoolError as error:
            raise RecipeError([f"pool: {error}"]) from None
        counted = "counted"
        types = pool.columns(recipe.pool)
    elif recipe.pool.rows:
        rows, counted, types = recipe.pool.rows, "pool.rows", {}
    else:
        raise RecipeError(["pool.rows: a remote pool is not counted; set the number of rows to plan for"])
    units = ingest.unit_count(rows, recipe.unit_rows, pool.size(recipe.pool) if local else 0)
    passes = make_passes(recipe, {"files": pool.stamp(recipe.pool)} if local else {}, types)
    console.say(f"{recipe.name}: {rows:,} rows ({counted})\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in ("steps", "workers") else "right")
    kept = float(rows)
    totals: defaultdict[str, float] = defaultdict(float)
    used: dict[str, Estimate] = {}
    for i, p in enumerate(passes):
        before, cost = kept, defaultdict[str, float](float)
        steps: list[Step | None] = [*p.steps] or [None]  # the pool pass has no steps
        for step in steps:
            estimate = step.estimate(kept) if step else _POOL
            used.setdefault(step.name() if step else p.label, estimate)
            cost[step.resource if step else "cpu"] += kept / estimate.rate / 3600
            cost["fetched"] += kept * estimate.fetched
            kept *= estimate.keep
            cost["stored"] += kept * estimate.stored
        for kind, amount in cost.items():
            totals[kind] += amount
        table.add_row(
            str(i),
            " + ".join(p.labels),
            _units(p, units, kept),
            _workers(p),
            *(f"{n:,.0f}" for n in (before, kept)),
            *(_bytes(cost[kind]) for kind in ("fetched", "stored")),
            *(f"{cost[kind]:,.1f}" if cost[kind] else "" for kind in ("cpu", "gpu")),
        )
    console.print(table)
    fetched, stored = _bytes(totals["fetched"]) or "nothing", _bytes(totals["stored"])
    hours = f"{totals['cpu']:,.1f} core-hours" + (f" and {totals['gpu']:,.1f} GPU-hours" if totals["gpu"] else "")
    cores = os.cpu_count() or 1
    console.say(f"\nabout {kept:,.0f} samples; {fetched} fetched, {stored} stored; {hours}")
    here, cluster = totals["cpu"] / cores, totals["cpu"] / 1600
    console.say(f"CPU time: {here:,.1f} hours here ({cores} cores), {cluster:,.1f} hours on 100 nodes of 16 cores")
    if totals["gpu"] and not _has_gpu():
        console.say("This machine has no GPU: a run here does the GPU work on CPU cores, which is many times slower.")
    console.say("\nbasis of the estimates (share kept, rows/s on one core or GPU):")
    for name, estimate in used.items():
        console.say(f"  {name}: keeps {estimate.keep:.0%}, {estimate.rate:,.0f}/s: {estimate.basis}")
    for note in recipe.notes():
        console.say(f"note: {note}")


def _workers(p: Pass) -> str:
    """The kind of worker of a pass and the resource that the scheduler reserves for each."""
    if isinstance(p, PoolPass | SinkPass):
        return "tasks, 1 core each"
    if isinstance(p, BarrierPass):
        return "Dask on Ray, columns only"
    if any(step.resource == "gpu" for step in p.steps):
        return "actors, 1 GPU each" if _has_gpu() else "actors, 1 GPU each (where there is one)"
    return "actors, 1 core each"


def _has_gpu() -> bool:
    return os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd")


def _units(p: Pass, units: int, rows: float) -> str:
    """The work items of a pass: units, parts of the output, or the whole run."""
    if isinstance(p, SinkPass):
        return f"{len(p.sink.plan(int(rows))) - 1:,} parts"
    return f"{units:,} units" if p.over_units else "whole run"


def _bytes(n: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n:,.0f} B" if n else ""
