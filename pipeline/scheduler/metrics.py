"""The progress of a run as Prometheus metrics, which Ray exports from the driver.

Ray serves them at each node's metrics port with the prefix `ray_`: `ray_winnow_rows_total{run="demo",pass="download"}`
(docs.ray.io, "Collecting and monitoring metrics").
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge

from pipeline.scheduler.progress import Bar


class Metrics:
    """Rows, kept rows, drops by reason and units of each pass as counters; workers and rows/s as gauges."""

    def __init__(self, run: str) -> None:
        """`run`: the name of the recipe, a tag of every metric."""
        tags = ("run", "pass")
        self._run = run
        self._rows = Counter("winnow_rows_total", "Rows that a pass has processed.", tags)
        self._kept = Counter("winnow_kept_rows_total", "Rows that a pass has kept.", tags)
        self._dropped = Counter("winnow_dropped_rows_total", "Rows that a pass has dropped.", (*tags, "reason"))
        self._units = Counter("winnow_units_total", "Units that a pass has committed.", tags)
        self._workers = Gauge("winnow_workers", "Workers of a pass that is running.", tags)
        self._rate = Gauge("winnow_rows_per_second", "Rows per second of a pass since it started.", tags)
        self._counted: Tally[tuple[str, ...]] = Tally()

    def watch(self, event: str, bars: Sequence[Bar]) -> None:
        """Updates the metrics from the state of the running passes, as `Progress` reports it."""
        for bar in bars if event != "reused" else ():
            tags = {"run": self._run, "pass": bar.label}
            for name, counter, count in (
                ("rows", self._rows, bar.rows),
                ("kept", self._kept, bar.kept),
                ("units", self._units, bar.units_done),
            ):
                self._count(counter, (name, bar.label), count, tags)
            for reason, count in bar.reasons.items():
                self._count(self._dropped, ("dropped", bar.label, reason), count, tags | {"reason": reason})
            self._workers.set(0 if event in ("finished", "stopped") else bar.workers or 0, tags)
            self._rate.set(bar.rate, tags)

    def _count(self, counter: Counter, key: tuple[str, ...], count: int, tags: dict[str, str]) -> None:
        if (more := count - self._counted[key]) > 0:
            counter.inc(more, tags)
            self._counted[key] = count
