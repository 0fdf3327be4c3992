"""`events.jsonl`: what the commands of a run did and when, one JSON object per line, to monitor a run from outside.

Every event has `time` (seconds since 1970) and `event`:

| event | when | fields |
|---|---|---|
| `command` | a command begins | `name, host, pid, passes` |
| `reused` | an earlier command has completed a pass | `passes`: a list of `Bar.to_json` |
| `started` | adjacent passes begin | the same |
| `progress` | every PERIOD seconds while rows arrive | the same |
| `finished`, `stopped` | these passes are done; the command ends before they are done | the same |
| `end` | the command ends without being killed | `status, kept`, and `error` if it failed |

The file is a log and not part of the books: `seal.json` does not list it, and no decision depends on it. It holds at
most LINES lines. Beyond that, every second `progress` event is removed, so older ones become sparser.

A local file is appended to and flushed at each event. An object store cannot append: there the file is replaced as a
whole, every REMOTE_PERIOD seconds and at each event other than `progress`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from typing import IO, Any

from pipeline.scheduler.progress import Bar
from pipeline.storage import Store

NAME = "events.jsonl"
PERIOD = 5.0
"""Seconds between two `progress` events."""
REMOTE_PERIOD = 30.0
"""Seconds between two writes of `progress` events to an object store."""
LINES = 2000


class Events:
    """Writes the events of one command. If the store fails, events are lost, but the run continues."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._file: IO[str] | None = None
        self._reported = self._written = 0.0
        self._closed = False
        self._lines = [json.dumps(event) for event in read_events(store)]

    def add(self, event: str, **fields: Any) -> None:
        """Adds an event."""
        if self._closed:
            return
        self._lines.append(json.dumps({"time": round(time.time(), 3), "event": event, **fields}))
        with contextlib.suppress(Exception):  # an unreachable store may raise anything
            if len(self._lines) > LINES:
                self._lines = thinned(self._lines)
                self._close()
            if not self._store.local:
                if event != "progress" or time.monotonic() - self._written > REMOTE_PERIOD:
                    self._write()
            elif self._file is None:
                self._write()
                self._file = open(self._store.path(NAME), "a", encoding="utf-8")  # noqa: SIM115
            else:
                self._file.write(f"{self._lines[-1]}\n")
                self._file.flush()

    def command(self, name: str, passes: list[str]) -> None:
        """Adds the event that a command begins. `passes` are the labels of its passes in order."""
        self.add("command", name=name, host=socket.gethostname(), pid=os.getpid(), passes=passes)

    def end(self, status: int, **fields: Any) -> None:
        """Adds the event that a command ends, and closes the file."""
        self.add("end", status=status, **fields)
        self.close()

    def close(self) -> None:
        """Closes the file. Later events are ignored."""
        self._close()
        self._closed = True

    def watch(self, event: str, bars: Sequence[Bar]) -> None:
        """Adds an event that `Progress` reports, `progress` events at most every PERIOD seconds."""
        now = time.monotonic()
        if event == "progress" and now - self._reported < PERIOD:
            return
        if event != "reused":
            self._reported = now
        self.add(event, passes=[bar.to_json() for bar in bars])

    def _write(self) -> None:
        self._written = time.monotonic()
        self._store.write(NAME, "".join(f"{line}\n" for line in self._lines).encode())

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def thinned(lines: list[str]) -> list[str]:
    """Removes every second `progress` event, and then the oldest lines beyond three quarters of LINES."""
    kept, drop = [], False
    for line in lines:
        if json.loads(line)["event"] == "progress":
            drop = not drop
            if drop:
                continue
        kept.append(line)
    return kept[-LINES * 3 // 4 :]


def read_events(store: Store) -> list[dict[str, Any]]:
    """The events of a run, oldest first; empty if there is no file. Skips damaged lines, and lines left incomplete by a
    killed command."""
    found = []
    for line in (store.read_if_there(NAME) or b"").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if _is_event(event):
                found.append(event)
    return found


def _is_event(event: Any) -> bool:
    if not (isinstance(event, dict) and isinstance(event.get("event"), str) and _is_number(event.get("time"))):
        return False
    passes = event.get("passes", [])
    return isinstance(passes, list) and all(
        isinstance(p, str) if event["event"] == "command" else _is_bar(p) for p in passes
    )


def _is_bar(bar: Any) -> bool:
    """Whether this is what `Bar.to_json` returns."""
    return (
        isinstance(bar, dict)
        and isinstance(bar.get("pass"), str)
        and all(_is_number(bar.get(key)) for key in ("rows", "kept", "units", "rate", "seconds"))
        and all(bar.get(key) is None or _is_number(bar[key]) for key in ("rows_total", "units_total", "workers", "eta"))
        and all(
            isinstance(counts := bar.get(key, {}), dict) and all(map(_is_number, counts.values()))
            for key in ("dropped", "spent")
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1 << 62  # neither NaN nor infinite
