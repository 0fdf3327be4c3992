"""Shows the progress of a run. Only reads its folder, while a command works on it or afterwards.

    python -m pipeline.status runs/demo
    python -m pipeline.status s3://bucket/runs/400m --follow
    python -m pipeline.status runs/demo --json | jq .passes

Rows, drops, rates and workers are those of the last command's `events.jsonl`, which is written every few seconds (in an
object store every half minute). Whether the command still lives is read from its claim of the folder.
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

from pipeline.reader import Run, RunError, open_run
from pipeline.scheduler.claim import find_owner
from pipeline.scheduler.events import PERIOD, read_events
from pipeline.scheduler.progress import clock
from pipeline.storage import DamagedError, Store
from trainer.terminal import Console, guarded, interrupted

RECENT = 60.0
"""Seconds over which the present rate of a pass is measured."""
REASONS = 4
"""Most frequent reasons of drops that are shown for a pass."""


def read_status(path: str) -> dict[str, Any]:
    """The state of a run, as plain data. RunError if there is no run.

    `state` is `running`, `finished` (the books are sealed), or `stopped`: no command works on it, and the last one did
    not come to its end. For each pass: `state` (`waiting, running, done, reused` or `stopped`) and the fields of
    `Bar.to_json`, of which `rate` is that of the last RECENT seconds while the pass runs.
    """
    store = Store(path)
    run, owner, events = open_run(path), find_owner(store), read_events(store)
    running = owner is not None and owner.alive
    starts = [i for i, event in enumerate(events) if event["event"] == "command"]
    events = events[starts[-1] :] if starts else []
    if running and owner and events and (owner.host, owner.pid) != (events[0].get("host"), events[0].get("pid")):
        events = []  # of the previous command: the current one has only begun
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
    for label, at in passes.items():
        if at["state"] == "running":
            recent = [point for point in course[label] if now - point[0] <= RECENT] or course[label][-1:]
            (since, before), (until, rows) = recent[0], recent[-1]
            at["rate"] = round((rows - before) / (until - since), 1) if until > since else at["rate"]
            at["since"] = course[label][0][0]
    return list(passes.values())


def _books(run: Run) -> list[dict[str, Any]]:
    """The steps of a finished run without events, as its funnel has them."""
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


def shown(status: dict[str, Any]) -> Group:
    """The status for people."""
    now, owner = time.time(), status["owner"]
    said = f"{status['name']} in {status['run']}: {status['state']}"
    if status["started"] is not None:
        said += f", started {_ago(now - status['started'])}"
    if status["state"] == "running":
        said += f" by pid {owner['pid']} on {owner['host']}, last heartbeat {_ago(now - owner['beat'])}"
    elif owner:
        said += f"; pid {owner['pid']} on {owner['host']} sent its last heartbeat {_ago(now - owner['beat'])}"
    lines: list[Any] = [Text(said)]
    if status["error"]:
        lines.append(Text(f"the last command failed: {status['error']}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("pass", "state", "rows", "units", "rows/s", "eta", "workers", "kept", "dropped"):
        table.add_column(title, justify="left" if title in ("pass", "state", "dropped") else "right", no_wrap=True)
    for at in status["passes"]:
        if "rows" not in at:
            table.add_row(at["pass"], at["state"])
            continue
        total = at.get("rows_total")
        units = at.get("units_total")
        reasons = Counter(at["dropped"]).most_common(REASONS)
        more = " …" if len(at["dropped"]) > REASONS else ""
        going = at["state"] == "running"
        elapsed = f" {clock(now - at['since'])}" if going and "since" in at else ""
        table.add_row(
            at["pass"],
            at["state"] + elapsed,
            f"{at['rows']:,}" + (f"/{total:,}" if going and total else ""),
            f"{at['units']:,}/{units:,}" if units else "",
            f"{at['rate']:,.0f}" if at["rate"] and at["state"] != "reused" else "",
            clock(at["eta"]) if going and at.get("eta") is not None else "",
            str(at["workers"]) if going and at.get("workers") else "",
            f"{at['kept']:,}",
            ", ".join(f"{reason} {n:,}" for reason, n in reasons) + more,
        )
    return Group(*lines, table)


def _ago(seconds: float) -> str:
    return f"{clock(max(0.0, seconds))} ago"


@guarded()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status",
        description=__doc__,
        epilog="exit status: 0 the run was read, whatever its state; 2 there is no run; 1 it cannot be read",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the folder or address of a run")
    parser.add_argument("--follow", action="store_true", help="refresh until no command works on the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with --follow one a line")
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
                live.update(shown(status), refresh=True)
            else:
                console.print(shown(status))
            if not args.follow or status["state"] != "running":
                return 0
            time.sleep(PERIOD)
    except RunError as error:
        Console(stderr=True).error(error)
        return 2
    except (DamagedError, OSError) as error:
        Console(stderr=True).error(error)
        return 1
    except KeyboardInterrupt as stop:
        return interrupted(stop)
    finally:
        if live:
            live.stop()


if __name__ == "__main__":
    sys.exit(main())
