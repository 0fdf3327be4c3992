"""`--plan`: what a recipe would run and cost, and where each estimate comes from. Nothing is started or fetched."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pipeline import ingest, pool
from pipeline.passes import Pass, make_passes
from pipeline.recipe import Recipe, RecipeError
from pipeline.step import Step


@dataclass(frozen=True)
class Estimate:
    """What a step does to a typical web pool."""

    keep: float
    """The share of rows that go on."""
    rate: float
    """Rows a second on one core, or on one GPU where the step runs on GPUs."""
    basis: str
    """Where the two come from; "assumed" where nobody has published or measured it."""
    stored: float = 0.0
    """Bytes written to the run per row that goes on."""
    fetched: float = 0.0
    """Bytes from the network per row that comes in."""


_WEB = "measured on 10,000 rows of img2dataset's test list"
ESTIMATES = {
    "pool": Estimate(1.0, 20_000, "rows of the pool; rate measured on 10,000 web rows", stored=120),
    "url_filter": Estimate(0.99, 500_000, "keep assumed"),
    "caption_length": Estimate(0.95, 500_000, _WEB),
    "caption_pattern": Estimate(0.97, 200_000, "keep assumed"),
    "caption_frequency": Estimate(0.90, 50_000, "keep assumed; COYO-700M drops captions shared by more than 10 rows"),
    "language": Estimate(0.40, 100_000, "English share of LAION-5B (2.3 of 5.85 billion); rate of fastText lid.176"),
    "exact_dedup": Estimate(0.97, 50_000, "keep assumed"),
    "near_dedup": Estimate(0.90, 20_000, "keep assumed"),
    "download": Estimate(
        0.75, 120, "keep assumed (link rot); stored: LAION-400M at 256 px is 10 TB; 110 KB fetched assumed",
        stored=25_000, fetched=110_000,
    ),
    "image_size": Estimate(0.80, 1e6, "keep assumed"),
    "aspect_ratio": Estimate(0.98, 1e6, "keep assumed"),
    "read_shards": Estimate(1.0, 300, "rate assumed", stored=26_000),
    "placeholder": Estimate(0.98, 50_000, "keep assumed"),
    "byte_size": Estimate(0.97, 1e6, "keep assumed"),
    "clip_score": Estimate(1.0, 1500, "rate assumed: ViT-B/32 on one GPU, bound by decoding", stored=8),
    "threshold": Estimate(0.5, 500_000, "min: keep assumed; top_fraction: as given"),
    "balance": Estimate(0.25, 50_000, "MetaCLIP (2023): 400 of 1,600 million for a cap of 20,000; √(cap/rows) assumed"),
    "sample": Estimate(0.5, 500_000, "as given"),
    "write_shards": Estimate(1.0, 3_000, "rate assumed", stored=26_000),
}  # fmt: skip
COLUMNS = ("pass", "steps", "tasks", "runs on", "rows in", "rows out", "fetched", "stored", "core-h", "GPU-h")
_UNKNOWN = Estimate(1.0, 10_000, "a step of your own: nothing known")


def print_plan(console: Console, recipe: Recipe) -> None:
    """Prints the passes with units, resources, rows, bytes and hours. RecipeError if the rows cannot be known."""
    if not console.is_terminal:
        console.width = 180
    paths = [recipe.pool.path] if isinstance(recipe.pool.path, str) else recipe.pool.path
    near = not any("://" in path for path in paths)
    if near:
        try:
            rows = sum(pool.count(recipe.pool, split) for split in pool.splits(recipe.pool))
        except pool.PoolError as error:
            raise RecipeError([f"pool: {error}"]) from None
        counted = "counted"
        types = pool.columns(recipe.pool)
    elif recipe.pool.rows:
        rows, counted, types = recipe.pool.rows, "pool.rows", {}
    else:
        raise RecipeError(["pool.rows: the pool cannot be counted from here; say how many rows to plan for"])
    units = ingest.unit_count(rows, recipe.unit_rows, pool.size(recipe.pool) if near else 0)
    passes = make_passes(recipe, {"files": pool.stamp(recipe.pool)} if near else {}, types)
    console.print(f"{recipe.name}: {rows:,} rows ({counted})\n", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in ("steps", "runs on") else "right")
    alive = float(rows)
    totals = {"core": 0.0, "gpu": 0.0, "fetched": 0.0, "stored": 0.0}
    used: dict[str, str] = {}
    for i, p in enumerate(passes):
        before, cost = alive, {"core": 0.0, "gpu": 0.0, "fetched": 0.0, "stored": 0.0}
        for name, step in [("pool", None)] if p.kind == "pool" else [(s.name(), s) for s in p.steps]:
            estimate = ESTIMATES.get(name, _UNKNOWN)
            used.setdefault(name, estimate.basis)
            cost["gpu" if step is not None and getattr(step, "gpu", False) else "core"] += alive / estimate.rate / 3600
            cost["fetched"] += alive * estimate.fetched
            alive *= _keep(step, estimate, alive)
            cost["stored"] += alive * estimate.stored
        for key in totals:
            totals[key] += cost[key]
        tasks = {"barrier": "all at once", "write": f"{_shards(p, alive)} shards"}.get(p.kind, f"{units:,} units")
        rows_in_out = f"{before:,.0f}", f"{alive:,.0f}"
        times = [f"{cost[kind]:,.1f}" if cost[kind] else "" for kind in ("core", "gpu")]
        sizes = [_bytes(cost[kind]) for kind in ("fetched", "stored")]
        table.add_row(str(i), " + ".join(p.labels), tasks, _runs_on(p), *rows_in_out, *sizes, *times)
    console.print(table)
    fetched, stored = _bytes(totals["fetched"]) or "nothing", _bytes(totals["stored"])
    hours = f"{totals['core']:,.1f} core-hours" + (f" and {totals['gpu']:,.1f} GPU-hours" if totals["gpu"] else "")
    cores = os.cpu_count() or 1
    console.print(f"\nabout {alive:,.0f} samples; {fetched} fetched, {stored} stored; {hours}", highlight=False)
    here, there = totals["core"] / cores, totals["core"] / 1600
    console.print(f"on CPUs: {here:,.1f} hours here ({cores} cores), {there:,.1f} on 100 nodes of 16", highlight=False)
    console.print("\nwhere the estimates come from (share kept, rows/s on one core or GPU):", highlight=False)
    for name, basis in used.items():
        estimate = ESTIMATES.get(name, _UNKNOWN)
        console.print(
            f"  {name}: keeps {estimate.keep:.0%}, {estimate.rate:,.0f}/s: {basis}", highlight=False, markup=False
        )


def _keep(step: Step | None, estimate: Estimate, rows: float) -> float:
    for option in ("top_fraction", "fraction"):
        value = getattr(step, option, None)
        if isinstance(value, int | float):
            return float(value)
    if step is not None and step.name() == "balance" and rows:
        cap = getattr(step, "max_per_entry", None) or 20_000
        return min(1.0, estimate.keep * ((cap / rows) / (20_000 / 1.6e9)) ** 0.5)
    # A language filter that keeps everything only measures.
    return 1.0 if step is not None and step.name() == "language" and not getattr(step, "keep", True) else estimate.keep


def _runs_on(p: Pass) -> str:
    if p.kind == "barrier":
        return "Dask on Ray, columns only"
    if any(getattr(step, "gpu", False) for step in p.steps):
        return "actors, 1 GPU each"
    return "actors, 1 core each" if any(type(s).setup is not Step.setup for s in p.steps) else "tasks, 1 core each"


def _shards(p: Pass, rows: float) -> str:
    return f"{-(-int(rows) // p.steps[0].samples_per_shard):,}" if p.kind == "write" else ""  # type: ignore[attr-defined]


def _bytes(n: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n:,.0f} B" if n else ""
