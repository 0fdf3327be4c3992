"""The output of `winnow status` for a run that is working, was killed, or is finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline import status
from pipeline.scheduler import events
from pipeline.scheduler.claim import hold
from pipeline.status import read_status
from pipeline.storage import Store
from tests import painted as runs
from tests.conftest import HUNG


def test_a_finished_run(painted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_status(str(painted / "stricter"))
    assert (found["state"], found["owner"], found["error"]) == ("finished", None, None)
    states = {at["pass"]: at["state"] for at in found["passes"]}
    assert states["pool"] == states["caption_length"] == "reused"
    assert states["threshold.2"] == states["write_shards"] == "done"
    funnel = json.loads((painted / "stricter/funnel.json").read_text())
    last = funnel["steps"][-1]
    assert found["passes"][-1]["kept"] == last["kept"] == funnel["kept"]
    by_pass = {at["pass"]: at["dropped"] for at in found["passes"]}
    assert by_pass["threshold.2"] == next(s["dropped"] for s in funnel["steps"] if s["step"] == "threshold.2")
    assert status.main([str(painted / "out"), "--follow"]) == 0
    assert "finished" in capsys.readouterr().out
    assert status.main([str(painted / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "painted"


def test_a_run_without_events_shows_its_funnel(painted: Path, tmp_path: Path) -> None:
    run = shutil.copytree(painted / "out", tmp_path / "out")
    (run / events.NAME).unlink()
    found = read_status(str(run))
    assert [at["pass"] for at in found["passes"]][:3] == ["pool", "caption_length", "paint"]
    assert found["passes"][0]["rows"] == 601


def test_the_status_of_a_run_during_work_and_after_a_kill(
    painted: Path, ray_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.furnish(tmp_path)
    going = runs.command(folder, ray_address, "r.yaml", "steps.paint.slow=0.02")
    try:
        found = _wait(
            folder / "out",
            lambda found: any(at["pass"] == "paint" and at["state"] == "running" and at.get("rows") for at in found),
        )
        assert found["state"] == "running"
        assert found["owner"]["pid"] == going.pid
        (paint,) = [at for at in found["passes"] if at["pass"] == "paint"]
        assert 0 < paint["rows"] < 600
        assert paint["rows_total"] in (600, None)
        assert paint["workers"] >= 1
        assert [at["state"] for at in found["passes"] if at["pass"] == "write_shards"] == ["waiting"]
        assert status.main([str(folder / "out")]) == 0
        assert "running, started 0:0" in capsys.readouterr().out
        exported = _exported("ray_winnow_rows_total{", 'pass="paint"')
        assert any(float(line.split()[-1]) > 0 for line in exported), exported
    finally:
        os.kill(going.pid, signal.SIGKILL)
        going.wait()
    found = read_status(str(folder / "out"))
    assert found["state"] == "stopped"
    assert found["owner"]["alive"] is False
    assert {at["state"] for at in found["passes"]} <= {"done", "stopped", "waiting"}
    assert status.main([str(folder / "out")]) == 0
    assert "sent its last heartbeat" in " ".join(capsys.readouterr().out.split())


def _wait(run: Path, ready) -> dict:  # type: ignore[no-untyped-def, type-arg]
    end = time.monotonic() + HUNG
    while time.monotonic() < end:
        if (run / "run.json").exists():
            found = read_status(str(run))
            if ready(found["passes"]):
                return found
        time.sleep(0.1)
    raise AssertionError("the run made no progress")


def _exported(*words: str) -> list[str]:
    """Waits for lines of Ray's metrics that contain these words, and returns them."""
    import ray

    end = time.monotonic() + HUNG
    while time.monotonic() < end:
        for node in ray.nodes():
            with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60) as answer:
                lines = [line for line in answer.read().decode().splitlines() if all(word in line for word in words)]
            if lines:
                return lines
        time.sleep(0.5)
    return []


def test_an_owner_that_has_only_begun_hides_the_events_before(tmp_path: Path, painted: Path) -> None:
    run = shutil.copytree(painted / "out", tmp_path / "out")
    with hold(Store(str(run))):
        found = read_status(str(run))
        assert found["state"] == "running"
        assert found["owner"]["pid"] == os.getpid()
    assert read_status(str(run))["state"] == "finished"


def test_a_folder_without_a_run_has_no_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
