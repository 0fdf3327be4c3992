"""Shows the progress of a run, while a command works on it or afterwards. Only reads the run's folder.

    python -m pipeline.status runs/demo
    python -m pipeline.status s3://bucket/runs/400m --follow
    python -m pipeline.status runs/demo --json | jq .passes

Rows, drops, rates and workers come from `events.jsonl`, which the last command writes every few seconds (in an object
store, every half minute). The command's claim on the folder shows whether it is still alive.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.reader import Run, open_run
from pipeline.scheduler.claim import find_owner
from pipeline.scheduler.events import PERIOD, read_events
from pipeline.scheduler.progress import clock
from pipeline.storage import Store
from trainer.terminal import Console, entry_point, interrupted

RECENT = 60.0
"""Seconds over which the current rate of a pass is measured."""
REASONS = 4
"""Drop reasons shown for a pass, most frequent first."""


def read_status(path: str) -> dict[str, Any]:
    """The state of a run, as plain data. Raises RunError if there is no run.

    `state` is `running`, `finished` (the books are sealed), or `stopped` (no command works on the run, and the last one
    did not complete). For each pass: `state` (`waiting, running, done, reused` or `stopped`) and the fields of
    `Bar.to_json`. While a pass runs, `rate` is its rate over the last RECENT seconds.
    """
    store = Store(path)
    run, owner, events = open_run(path), find_owner(store), read_events(store)
    running = owner is not None and owner.alive
    starts = [i for i, event in enumerate(events) if event["event"] == "command"]
    events = events[starts[-1] :] if starts else []
    if running and owner and events and (owner.host, owner.pid) != (events[0].get("host"), events[0].get("pid")):
        events = []  # from the previous command: the current one has written none yet
    last = events[-1] if events else {}
    return {
        "run": run.path,
        "name": run.name,
        "state": "running" if running else "finished" if run.finished else "stopped",
        "owner": asdict(owner) if owner else None,
        "started": events[0]["time"] if events else None,
        "updated": last.get("time"),
        "error": last.get("error") if not running else None,
        "passes": _passes(events, running) if events or not run.finished else _books(run),
    }


def _passes(events: list[dict[str, Any]], running: bool) -> list[dict[str, Any]]:
    """The state of every pass after the events of one command."""
    labels = events[0].get("passes", []) if events else []
    passes: dict[str, dict[str, Any]] = {label: {"pass": label, "state": "waiting"} for label in labels}
    course: dict[str, list[tuple[float, int]]] = {}
    states = {"started": "running", "progress": "running", "finished": "done"}
    for event in events[1:]:
        for bar in event.get("passes", []):
            state = states.get(event["event"], event["event"])
            state = "stopped" if state == "running" and not running else state
            passes[bar["pass"]] = {"pass": bar["pass"], "state": state, **bar}
            course.setdefault(bar["pass"], []).append((event["time"], bar["rows"]))
    now = events[-1]["time"] if events else 0.0
    for label, bar in passes.items():
        if bar["state"] == "running":
            recent = [point for point in course[label] if now - point[0] <= RECENT] or course[label][-1:]
            (since, before), (until, rows) = recent[0], recent[-1]
            bar["rate"] = round((rows - before) / (until - since), 1) if until > since else bar["rate"]
            bar["since"] = course[label][0][0]
    return list(passes.values())


def _books(run: Run) -> list[dict[str, Any]]:
    """The steps of a finished run without events, from its funnel."""
    return [
        {
            "pass": label,
            "state": "done",
            "rows": line.rows_in,
            "rows_total": line.rows_in,
            "kept": line.kept,
            "dropped": line.dropped,
            "rate": round(line.rows_in / line.seconds, 1) if line.seconds else None,
            "seconds": line.seconds,
        }
        for label, line in run.funnel.lines.items()
    ]


def _render(status: dict[str, Any]) -> Group:
    """Formats the status for a terminal."""
    now, owner = time.time(), status["owner"]
    summary = f"{status['name']} in {status['run']}: {status['state']}"
    if status["started"] is not None:
        summary += f", started {_ago(now - status['started'])}"
    if status["state"] == "running":
        summary += f" by pid {owner['pid']} on {owner['host']}, last heartbeat {_ago(now - owner['beat'])}"
    elif owner:
        summary += f"; pid {owner['pid']} on {owner['host']} sent its last heartbeat {_ago(now - owner['beat'])}"
    lines: list[Any] = [Text(summary)]
    if status["error"]:
        lines.append(Text(f"the last command failed: {status['error']}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("pass", "state", "rows", "units", "rows/s", "eta", "workers", "kept", "dropped"):
        table.add_column(title, justify="left" if title in ("pass", "state", "dropped") else "right", no_wrap=True)
    for bar in status["passes"]:
        if "rows" not in bar:
            table.add_row(bar["pass"], bar["state"])
            continue
        total = bar.get("rows_total")
        units = bar.get("units_total")
        reasons = Counter(bar["dropped"]).most_common(REASONS)
        more = " …" if len(bar["dropped"]) > REASONS else ""
        running = bar["state"] == "running"
        elapsed = f" {clock(now - bar['since'])}" if running and "since" in bar else ""
        table.add_row(
            bar["pass"],
            bar["state"] + elapsed,
            f"{bar['rows']:,}" + (f"/{total:,}" if running and total else ""),
            f"{bar['units']:,}/{units:,}" if units else "",
            f"{bar['rate']:,.0f}" if bar["rate"] and bar["state"] != "reused" else "",
            clock(bar["eta"]) if running and bar.get("eta") is not None else "",
            str(bar["workers"]) if running and bar.get("workers") else "",
            f"{bar['kept']:,}",
            ", ".join(f"{reason} {n:,}" for reason, n in reasons) + more,
        )
    return Group(*lines, table)


def _ago(seconds: float) -> str:
    return f"{clock(max(0.0, seconds))} ago"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status",
        description=__doc__,
        epilog="exit status: 0 the run was read, whatever its state; 2 there is no run; 1 the run cannot be read",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the folder or address of a run")
    parser.add_argument("--follow", action="store_true", help="refresh until no command works on the run")
    parser.add_argument("--json", action="store_true", help="print a JSON object; with --follow, one per line")
    args = parser.parse_args(argv)
    console = Console()
    live = Live(console=console, auto_refresh=False) if args.follow and not args.json and console.is_terminal else None
    try:
        if live:
            live.start()
        while True:
            status = read_status(args.run)
            if args.json:
                print(json.dumps(status, ensure_ascii=False, indent=None if args.follow else 1), flush=True)
            elif live:
                live.update(_render(status), refresh=True)
            else:
                console.print(_render(status))
            if not args.follow or status["state"] != "running":
                return 0
            time.sleep(PERIOD)
    except KeyboardInterrupt as stop:
        return interrupted(stop)
    finally:
        if live:
            live.stop()


if __name__ == "__main__":
    sys.exit(main())
