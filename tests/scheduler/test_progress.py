"""Progress lines of a running pass."""

from __future__ import annotations

import io

import pytest

from pipeline.scheduler import progress as progress_module
from pipeline.scheduler.progress import PLAIN_EVERY, Progress
from trainer.terminal import Console


def test_the_eta_ignores_the_start_up_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    out = io.StringIO()
    progress = Progress(Console(file=out))
    progress.begin([("download", 1000)], units=10)
    for now in (60.0, 61 + PLAIN_EVERY):  # noqa: B007 (the clock reads it)
        progress.add("download", 100, 90, {"http_404": 10}, units=1)
    progress.end()
    first, second, last = out.getvalue().splitlines()[1:]
    assert first == "download: 100/1,000 rows, 1/10 units, 2/s, kept 90, dropped http_404 10"
    assert f"eta 0:01:{8 * (1 + PLAIN_EVERY) - 60:02.0f}" in second
    assert last.startswith("download: 200/1,000 rows, 2/10 units")
