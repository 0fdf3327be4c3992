"""The comparison of two runs, against set algebra by hand over the files of their ledgers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import diff, open_run
from pipeline.diff import SAMPLES, Side, compare, to_json
from pipeline.report.histogram import Tally
from tests import browser


def ledger(run: Path) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Of a run's files: the captions kept, by uid, and step and reason of the rows dropped."""
    kept, dropped = {}, {}
    for file in run.glob("shards/*.parquet"):
        kept |= {row["uid"]: row["caption"] for row in pq.read_table(file).to_pylist()}
    for file in run.glob("drops/*.parquet"):
        dropped |= {row["uid"]: (row["step"], row["reason"]) for row in pq.read_table(file).to_pylist()}
    return kept, dropped


def number(caption: str) -> int:
    return int(caption.split()[-1])


@pytest.fixture(params=["units", "partitions", "without passes"])
def pair(request: pytest.FixtureRequest, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two runs: of one pool, of two pools in several partitions, and two of one pool that lost its passes."""
    monkeypatch.setattr(diff, "PARTITION_ROWS", 150)
    a, b = painted / "out", painted / ("other" if request.param == "partitions" else "stricter")
    if request.param == "without passes":
        b = Path(shutil.copytree(b, tmp_path / "b"))
        shutil.rmtree(b / "passes")
    return a, b


def test_equals_set_algebra_by_hand(pair: tuple[Path, Path]) -> None:
    for first, second in (pair, pair[::-1]):
        (kept_a, dropped_a), (kept_b, dropped_b) = ledger(first), ledger(second)
        a, b = open_run(first), open_run(second)
        found = to_json(compare(a, b), a, b)
        gained, lost = kept_b.keys() - kept_a.keys(), kept_a.keys() - kept_b.keys()
        assert found["both"] == len(kept_a.keys() & kept_b.keys())
        assert (found["gained"], found["lost"]) == (len(gained), len(lost))
        assert max(len(gained), len(lost)) > 50
        for side, uids, dropped in (("gained", gained, dropped_a), ("lost", lost, dropped_b)):
            by_hand = Counter(dropped.get(uid, ("(not in the pool)", None)) for uid in uids)
            assert {(by["step"], by["reason"]): by["rows"] for by in found[f"{side}_by"]} == by_hand
            captions = [(kept_a | kept_b)[uid] for uid in uids]
            for name, value_of in (
                ("languages", lambda c: "de" if number(c) % 3 == 0 else "en"),
                ("hosts", lambda c: f"h{number(c) % 5}.example"),
                ("concepts", lambda c: next((e for e in ("red circle", "blue star") if f" {e} " in c), None)),
            ):
                counts = Counter(value for value in map(value_of, captions) if value)
                assert {v["value"]: v[side] for v in found[name] if v[side]} == counts
            assert {row["uid"] for row in found["samples"][side]} <= uids
            for row in found["samples"][side]:
                assert dropped.get(row["uid"], ("(not in the pool)", None)) == (row["step"], row["reason"])


@pytest.mark.parametrize("name", ["out", "other"])
def test_a_run_does_not_differ_from_itself(painted: Path, name: str) -> None:
    run = open_run(painted / name)
    found = to_json(compare(run, run), run, run)
    assert (found["both"], found["gained"], found["lost"]) == (run.kept, 0, 0)
    assert not any(found[name] for name in ("recipe", "gained_by", "lost_by", "languages", "hosts", "concepts"))
    assert found["samples"] == {"gained": [], "lost": []}


def test_samples_do_not_depend_on_the_order_of_rows() -> None:
    uids = [f"{n:032x}" for n in range(100)]
    rows = pa.table({"key": uids, "uid": uids, "url": uids, "caption": uids, "language": uids}, schema=diff.KEPT)
    dropped = pa.table({"key": uids, "step": ["a", "b"] * 50, "reason": uids, "detail": uids}, schema=diff.DROPPED)
    whole, parts = Side(), Side()
    whole.add(rows, dropped, ())
    for low in (70, 20, 0):
        parts.add(rows.slice(low, {70: 30, 20: 50, 0: 20}[low]), dropped, ())
    assert whole.samples == parts.samples
    assert Counter(row.step for row in whole.samples) == {"a": diff.SAMPLES, "b": diff.SAMPLES}


def test_a_tally_forgets_the_rarest() -> None:
    tally = Tally(10)
    tally.add(pa.array(["often"] * 5 + [None]))
    assert tally.counts == {"often": 5}
    tally.add(pa.array([str(n) for n in range(20)]))
    assert len(tally.counts) == 5
    assert tally.counts["often"] == 5


def test_the_command(painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(painted / "out"), str(painted / "stricter")
    assert diff.main([a, b]) == 0
    output = capsys.readouterr().out
    assert "steps.threshold.min: 0.5 → 0.7" in output
    assert "the same pool" in output
    assert diff.main([a, b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_pool"] is True
    assert diff.main([a, b, "--html", str(tmp_path / "diff.html")]) == 0
    html = (tmp_path / "diff.html").read_text()
    assert html.count("data:image/jpeg;base64,") > SAMPLES
    assert "<script>alert" not in html
    assert "onmouseover=alert(1)>" not in html
    assert diff.main([a, b, "--html", str(tmp_path / "nowhere" / "diff.html")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert diff.main([a, str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


@pytest.mark.browser
def test_the_page(painted: Path, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    assert diff.main([str(painted / "out"), str(painted / "other"), "--html", str(page)]) == 0
    with browser.chromium() as opened:
        assert browser.problems(opened, f"file://{page}") == []
