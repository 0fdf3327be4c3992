"""Progress display: live bars, one per pass, on a terminal; plain lines elsewhere; the funnel at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.ledger import Funnel
from pipeline.scheduler.meter import Spent
from trainer.terminal import Console

WIDTH = 12
"""Characters in a bar."""
PLAIN_EVERY = 10.0
"""Seconds between plain lines when the output is not a terminal."""


@dataclass
class Bar:
    """The progress of a running pass."""

    label: str
    total: int | None
    """Rows that will reach the pass; None if that is not known yet."""
    units: int | None
    """Units that the pass will process; None for a pass that is not run by units."""
    started: float
    changed: float
    """When the pass started, and when it last made progress, in seconds of `time.monotonic`."""
    units_done: int = 0
    rows: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows dropped, by reason."""
    workers: int | None = None
    """Worker processes; None for a pass that runs as Ray tasks."""
    spent: Spent = field(default_factory=Spent)
    """The time of its workers or tasks by use, in seconds."""
    first: tuple[float, int] | None = None
    """When the first rows were reported, and how many. The ETA ignores the time before, when workers were starting."""

    @property
    def rate(self) -> float:
        """Rows per second since the pass started."""
        return self.rows / max(1e-3, self.changed - self.started)

    @property
    def eta(self) -> int | None:
        """Estimated seconds until the pass is done, or None. Based on rows, or on units while the number of rows that
        will reach the pass is unknown."""
        if self.total is None and self.units and self.units_done:
            return int((self.units - self.units_done) / self.units_done * (self.changed - self.started)) or None
        since, rows = self.first or (self.changed, self.rows)
        if not self.total or self.rows >= self.total or self.rows == rows:
            return None
        return int((self.total - self.rows) / (self.rows - rows) * (self.changed - since))

    def to_json(self) -> dict[str, Any]:
        """Plain data for logs and tools. `dropped` counts rows by reason, `seconds` is the time since the pass started,
        and `spent` is the time of its workers by use."""
        return {
            "pass": self.label,
            "rows": self.rows,
            "rows_total": self.total,
            "kept": self.kept,
            "dropped": dict(self.reasons),
            "units": self.units_done,
            "units_total": self.units,
            "workers": self.workers,
            "rate": round(self.rate, 1),
            "eta": self.eta,
            "seconds": round(self.changed - self.started, 3),
            "spent": {what: round(seconds, 3) for what, seconds in self.spent.items()},
        }


Watcher = Callable[[str, Sequence[Bar]], None]
"""Called with `started`, `progress`, `finished` or `stopped` and the running passes, or with `reused` and a pass that
an earlier command has completed."""


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Shows rows, rows/s, kept rows and drops by reason for the running passes, and notifies its watchers."""

    def __init__(self, console: Console, *watchers: Watcher) -> None:
        self.watchers = list(watchers)
        self._console = console
        self._bars: dict[str, Bar] = {}
        self._live: Live | None = None
        self._printed = time.monotonic()

    def begin(self, passes: list[tuple[str, int | None]], units: int | None = None) -> None:
        """Starts the display for passes, given as (label, expected rows or None), of `units` units each."""
        self.end()
        now = time.monotonic()
        self._bars = {label: Bar(label, total, units, now, now) for label, total in passes}
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._lines, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            self._console.print(f"{' → '.join(self._bars)} …")
        self._tell("started")

    def add(
        self,
        label: str,
        rows: int,
        kept: int,
        reasons: dict[str, int],
        units: int = 0,
        workers: int | None = None,
        spent: Spent | None = None,
    ) -> None:
        """Adds finished rows and units to a pass. `reasons` counts the dropped rows by reason, `workers` is the current
        number of workers, and `spent` is time of theirs, in seconds."""
        bar = self._bars.get(label)
        if bar is None:
            return
        bar.rows += rows
        bar.kept += kept
        bar.units_done += units
        bar.workers = workers
        bar.spent += spent or {}
        bar.changed = time.monotonic()
        if bar.rows and bar.first is None:
            bar.first = (bar.changed, bar.rows)
        bar.reasons.update(reasons)
        self._tell("progress")
        if self._live is None and time.monotonic() - self._printed > PLAIN_EVERY:
            self._printed = time.monotonic()
            for running in self._bars.values():
                if running.rows and running.rows != running.total:
                    self._console.say(_line(running))

    def reused(self, label: str, funnel: Funnel) -> None:
        """Reports a pass that an earlier command has completed."""
        now = time.monotonic()
        bar = Bar(label, funnel.rows_in, None, now, now, rows=funnel.rows_in, kept=funnel.kept)
        for line in funnel.lines.values():
            bar.reasons.update(line.dropped)
        self._tell("reused", [bar])

    def end(self, done: bool = True) -> None:
        """Ends the display and prints a plain line for each pass. `done` says whether the passes are complete."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        for bar in self._bars.values():
            self._console.say(_line(bar))
        if self._bars:
            self._tell("finished" if done else "stopped")
        self._bars = {}

    def _tell(self, event: str, bars: Sequence[Bar] | None = None) -> None:
        for watcher in self.watchers:
            watcher(event, list(self._bars.values()) if bars is None else bars)

    def _lines(self) -> Group:
        """One line per running pass, cut at the width of the terminal. The rarest drop reasons come last."""
        name = max((len(label) for label in self._bars), default=0)
        lines = []
        for bar in self._bars.values():
            done = round(WIDTH * min(1.0, bar.rows / bar.total)) if bar.total else 0
            line = Text(f"{bar.label:<{name}}  ", no_wrap=True, overflow="ellipsis")
            line.append("━" * done, "green").append("━" * (WIDTH - done), "dim")
            lines.append(line.append("  " + _line(bar).removeprefix(f"{bar.label}: ")))
        return Group(*lines)


def _line(bar: Bar) -> str:
    total = f"/{bar.total:,}" if bar.total is not None else ""
    units = [f"{bar.units_done:,}/{bar.units:,} units"] if bar.units else []
    parts = [f"{bar.label}: {bar.rows:,}{total} rows", *units, f"{bar.rate:,.0f}/s"]
    parts += [f"eta {clock(bar.eta)}"] if bar.eta is not None else []
    parts.append(f"kept {bar.kept:,}")
    if reasons := _ranked(bar.reasons):
        more = " …" if len(reasons) > 4 else ""
        parts.append(f"dropped {' '.join(reasons[:4])}{more}")
    return ", ".join(parts)


def _ranked(reasons: dict[str, int]) -> list[str]:
    """The reasons with their numbers of rows, the most frequent first."""
    return [f"{reason} {n:,}" for reason, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]


def print_funnel(console: Console, funnel: Funnel) -> None:
    """Prints for each step the rows in, rows kept, seconds, and drops by reason."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("step", "rows in", "kept", "share", "seconds"):
        table.add_column(title, justify="left" if title == "step" else "right", no_wrap=True)
    table.add_column("dropped")
    for label, line in funnel.lines.items():
        share = line.kept / line.rows_in if line.rows_in else 0.0
        table.add_row(
            label,
            f"{line.rows_in:,}",
            f"{line.kept:,}",
            f"{share:.1%}",
            f"{line.seconds:.1f}",
            ", ".join(_ranked(line.dropped)),
        )
    console.print(table)
    console.say(f"{funnel.rows_in:,} rows in = {funnel.kept:,} kept + {funnel.rows_in - funnel.kept:,} dropped")
