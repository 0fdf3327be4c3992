"""The report shows the books of a run, as text only, in one file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from pipeline import open_run, verify
from pipeline.ledger import Funnel, Line
from pipeline.reader import Run
from pipeline.report import limits, sections
from pipeline.report.__main__ import main
from pipeline.report.histogram import Histogram, Tally
from pipeline.scheduler.events import Events
from pipeline.scheduler.meter import Spent
from pipeline.scheduler.passes import UnitPass
from pipeline.step import Step
from pipeline.storage import Store
from tests import browser


@pytest.fixture
def page(painted: Path, tmp_path: Path) -> str:
    out = tmp_path / "report.html"
    assert main([str(painted / "out"), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_books_are_in_the_report(painted: Path, page: str) -> None:
    run = open_run(painted / "out")
    for label, line in run.funnel.lines.items():
        assert f"<bdi>{label}</bdi>" in page
        assert f'<td class="number">{line.kept:,}</td>' in page
        for reason, rows in line.dropped.items():
            assert re.search(rf'<bdi>{reason}</bdi></td><td class="number">{rows:,}</td>', page), reason
    lowest = min(v for t in run.scan("shade", after="threshold") for v in t["shade"].to_pylist())
    assert f"cut at {lowest:.4g}" in page
    assert "data:image/jpeg;base64," in page
    assert "samples_per_shard: 100" in page


def test_the_report_is_one_file_in_which_no_text_can_run(page: str) -> None:
    assert page.count("<script") == 1
    assert "<script>alert" not in page
    assert not re.search(r"<[^>]+ on\w+=", page), "an event handler"
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "something from outside"
    assert "\u202e" not in page
    assert "not UTF-8: ��&lt;script&gt;alert(1)&lt;/script&gt; 600" in page
    assert len(page) < 3_000_000, "a caption of a megabyte is cut"


def test_the_same_run_gives_the_same_page(painted: Path, page: str, tmp_path: Path) -> None:
    assert main([str(painted / "out"), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_it_is_written_into_the_run_and_changes_nothing_else(painted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(painted / "stricter", tmp_path / "run"))
    assert main([str(run)]) == 0
    assert (run / "report/index.html").stat().st_size > 10_000
    assert verify.main([str(run), "--deep"]) == 0
    fsspec.filesystem("memory").put(str(run), "/report/run", recursive=True)
    assert main(["memory://report/run"]) == 0
    assert fsspec.filesystem("memory").exists("/report/run/report/index.html")


@pytest.mark.parametrize(("name", "message"), [("nothing", "is not the folder of a run"), ("cut", "is not finished")])
def test_runs_that_cannot_be_reported_are_refused(
    painted: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(painted / "out", tmp_path / "cut")
    (tmp_path / "cut/seal.json").unlink()
    assert main([str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_the_concepts_are_those_that_balance_counted(painted: Path, page: str) -> None:
    run = open_run(painted / "out")
    figures = run.funnel.lines["balance"].figures
    assert sum(figure["entries"] for figure in figures) == 2
    for figure in figures:
        cells = "".join(f'<td class="number">{figure[key]:,}</td>' for key in ("entries", "matches", "kept"))
        assert cells in page


def bar(label: str, seconds: float, **spent: float) -> dict[str, Any]:
    counts = dict.fromkeys(("rows", "kept", "units", "rate"), 0)
    return {"pass": label, "seconds": seconds, "spent": spent, **counts}


@pytest.mark.parametrize(
    ("spent", "by"),
    [
        ({"waiting": 30, "working": 10, "cpu": 9}, "the pass before it"),
        ({"waiting": 1, "working": 40, "cpu": 9}, "reading and writing"),
        ({"working": 11, "cpu": 9}, "computing: fetch"),
        ({"working": 11, "cpu": 3, "queued": 6}, "too few cores"),
        ({"working": 11, "cpu": 2, "queued": 1, "child_cpu": 7, "child_queued": 2}, "computing: decoding"),
        ({"working": 11, "cpu": 2, "queued": 1, "child_cpu": 2}, "hosts and the network"),
        ({}, "not recorded"),
    ],
)
def test_what_limited_a_pass(spent: dict[str, float], by: str) -> None:
    step = SimpleNamespace(label="fetch", repeatable=False)
    run = cast(Run, SimpleNamespace(funnel=Funnel({"fetch": Line(100, seconds=10.0)})))
    limit = limits._limit(run, UnitPass("key", "fetch", cast("list[Step]", [step]), {}, "nowhere"), Spent(spent))
    assert limit.by == by
    assert limit.total == pytest.approx(spent.get("waiting", 0) + spent.get("working", 0))


def test_the_time_of_a_pass_is_that_of_all_commands_that_worked_on_it(tmp_path: Path) -> None:
    log = Events(Store(str(tmp_path)))
    for event, passes in (
        ("started", [bar("a", 0)]),
        ("finished", [bar("a", 9, working=9)]),
        ("started", [bar("a", 0), bar("b", 0)]),  # with other options: `a` begins anew
        ("progress", [bar("a", 2, working=1), bar("b", 2, waiting=2)]),
        ("stopped", [bar("a", 3, working=2), bar("b", 3, waiting=3)]),
        ("started", [bar("a", 0), bar("b", 0)]),  # goes on
        ("finished", [bar("a", 4, working=4), bar("b", 5, working=5)]),
        ("reused", [bar("a", 0)]),
    ):
        log.add(event, passes=passes)
    run = cast(Run, SimpleNamespace(path=str(tmp_path)))
    assert limits._spent(run) == {
        "a": {"working": 6, "seconds": 7},
        "b": {"waiting": 3, "working": 5, "seconds": 8},
    }


def test_what_limited_each_pass_is_in_the_report(painted: Path, page: str) -> None:
    for limit in limits.pass_limits(open_run(painted / "out")):
        # Dask runs the tasks of a filter over the whole run; they are not measured.
        assert (limit.by == "not recorded") == (limit.label in ("threshold.2", "balance"))
        assert f"<bdi>{limit.by}</bdi>" in page


@pytest.mark.parametrize(
    ("options", "cuts", "kept", "dropped"),
    [
        ({"min": 5.0}, [5.0], ["5", "6"], [4.0, 3.0]),
        ({"max": 4.0}, [4.0], ["4", "3"], [5.0, 6.0]),
        ({"min": 3.0, "max": 6.0}, [3.0, 6.0], ["3", "6"], [2.0, 7.0]),
        ({"top_fraction": 0.5}, [5.0], ["5", "6"], [4.0, 3.0]),
    ],
)
def test_the_rows_on_both_sides_of_a_cut(
    options: dict[str, float], cuts: list[float], kept: list[str], dropped: list[float]
) -> None:
    low, high = options.get("min", -9.0), options.get("max", 9.0)
    low = 5.0 if "top_fraction" in options else low
    values = [float(i) for i in range(10)]

    def rows(chosen: list[float]) -> pa.Table:
        texts = {name: [f"{v:g}" for v in chosen] for name in ("uid", "url", "caption", "detail")}
        number = {"unit": pa.array([0] * len(chosen), pa.int32()), "row": pa.array(map(int, chosen), pa.int32())}
        return pa.table({**number, **texts, "reason": ["threshold"] * len(chosen), "value": chosen, "score": chosen})

    run = SimpleNamespace(
        columns=lambda label: {"score": pa.float64()},
        drops=lambda label: [rows([v for v in values if not low <= v <= high])],
        scan=lambda columns, after: [rows([v for v in values if low <= v <= high])],
    )
    step = SimpleNamespace(label="threshold", options={"column": "score", **options})
    judged = sections.judge(cast(Run, run), cast(Any, step), Line(), {0}, Tally(10))
    assert judged.cuts == cuts
    assert [row.note for row in judged.above.rows()[:2]] == kept
    assert [float(row.note) for row in judged.below.rows()[:2]] == dropped


def test_a_step_may_name_a_column_that_is_no_number() -> None:
    """`balance: {column: entries}` names a column of lists, and its drops have the number that decided."""
    drop = {"unit": pa.array([0], pa.int32()), "row": pa.array([0], pa.int32()), "reason": ["balance"], "value": [0.25]}
    run = SimpleNamespace(
        columns=lambda label: {"entries": pa.list_(pa.string())},
        drops=lambda label: [pa.table(drop | {name: ["x"] for name in ("uid", "url", "caption", "detail")})],
    )
    step = SimpleNamespace(label="balance", options={"column": "entries"})
    judged = sections.judge(cast(Run, run), cast(Any, step), Line(), {0}, Tally(10))
    assert (judged.column, judged.dropped.total, len(judged.random.rows())) == (None, 1, 1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
@pytest.mark.parametrize("seed", range(3))
def test_a_histogram_counts_every_number_in_its_place(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.uniform(-5, 5), 10 ** rng.uniform(-2, 2), 50) * scale for _ in range(20)]
    histogram = Histogram()
    for part in parts:
        histogram.add(np.append(part, [np.nan, np.inf]))
    values = np.concatenate(parts)
    bars = histogram.bars()
    assert histogram.total == sum(n for _, _, n in bars) == len(values)
    for low, high, n in bars:
        assert n == np.count_nonzero((values >= low) & (values < high))
    wide = histogram.bars(4 * histogram.width)
    assert sum(n for _, _, n in wide) == len(values)
    for low, high, n in wide:
        assert n == np.count_nonzero((values >= low) & (values < high))


@pytest.mark.browser
def test_the_page_opens_without_errors(page: str, tmp_path: Path) -> None:
    with browser.chromium() as opened:
        assert browser.problems(opened, f"file://{tmp_path / 'report.html'}") == []
