"""The log of events: complete, bounded, and the same on an object store."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipeline.ledger import Funnel, Line
from pipeline.scheduler import events
from pipeline.scheduler.events import Events, read_events
from pipeline.scheduler.meter import Spent
from pipeline.scheduler.progress import Progress
from pipeline.storage import Store
from trainer.terminal import Console


def test_a_command_and_its_passes_are_logged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PERIOD", 0.0)
    log = Events(store)
    progress = Progress(Console(file=io.StringIO()), log.watch)
    log.command("demo", ["pool", "download"])
    progress.reused("pool", Funnel({"pool": Line(100, {"null_url": 3})}))
    progress.begin([("download", 97)], units=2)
    progress.add("download", 50, 40, {"http_404": 10}, units=1, workers=2, spent=Spent(working=1.5))
    progress.end()
    log.end(0, kept=40)
    log.add("late")
    found = read_events(store)
    assert [event["event"] for event in found] == [
        "command", "reused", "started", "progress", "finished", "end",
    ]  # fmt: skip
    assert found[1]["passes"][0]["dropped"] == {"null_url": 3}
    bar = found[3]["passes"][0]
    assert (bar["pass"], bar["rows"], bar["rows_total"], bar["kept"]) == ("download", 50, 97, 40)
    assert (bar["dropped"], bar["units"], bar["units_total"], bar["workers"]) == ({"http_404": 10}, 1, 2, 2)
    assert bar["spent"] == {"working": 1.5}
    Events(store).command("demo", [])
    assert len(read_events(store)) == 7, "the events of earlier commands are kept"


def test_progress_is_reported_once_a_period(tmp_path: Path) -> None:
    log = Events(Store(str(tmp_path)))
    progress = Progress(Console(file=io.StringIO()), log.watch)
    progress.begin([("download", 1000)])
    for _ in range(100):
        progress.add("download", 10, 10, {})
    assert [event["event"] for event in read_events(Store(str(tmp_path)))] == ["started"]


def test_the_log_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LINES", 40)
    log = Events(store)
    log.command("demo", [])
    for number in range(400):
        log.add("progress", number=number)
        if number % 50 == 0:
            log.add("finished", number=number)
    log.end(0)
    found = read_events(store)
    assert len(found) <= 40
    assert [event["number"] for event in found if event["event"] == "finished"] == list(range(0, 400, 50))
    assert found[-2]["number"] >= 398
    assert found[0]["event"] == "command"


def test_a_half_line_is_skipped_and_mended(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / events.NAME).write_text('{"time": 1, "event": "command"}\n[1]\n{"time": 2, "ev')
    log = Events(store)
    log.add("end")
    assert [json.loads(line)["event"] for line in store.read(events.NAME).splitlines()] == ["command", "end"]


def test_a_failing_store_does_not_end_the_run(tmp_path: Path) -> None:
    log = Events(Store(str(tmp_path / "run")))
    (tmp_path / "run").write_text("a file where the folder should be")
    log.command("demo", [])
    log.end(0)


BAR = {"pass": "p", "rows": 1, "kept": 1, "units": 1, "rate": 1.0, "seconds": 1.0}
DAMAGED: list[dict[str, object] | str] = [
    '"an event"', "[" * 100_000, '{"event": "end", "time": NaN}', '{"event": "end", "time": 1e999}',
    {"event": "end", "time": "now"}, {"event": "command", "time": 1, "passes": [1]},
    {"event": "progress", "time": 1, "passes": 3}, {"event": "progress", "time": 1, "passes": ["p"]},
    *({"event": "progress", "time": 1, "passes": [{key: BAR[key] for key in BAR if key != lost}]} for lost in BAR),
    *({"event": "progress", "time": 1, "passes": [BAR | {key: "x"}]} for key in [*BAR, "rows_total", "dropped", "eta"]
      if key != "pass"),
]  # fmt: skip


def test_damaged_lines_are_skipped(store: Store) -> None:
    """A damaged log must not prevent `status` and `report` from reading a run, because nothing else depends on it."""
    good = {"event": "progress", "time": 1, "passes": [BAR]}
    lines = [line if isinstance(line, str) else json.dumps(line) for line in [*DAMAGED, good]]
    store.write(events.NAME, b"\xff\xfe\n" + "\n".join(lines).encode())
    assert read_events(store) == [good]
