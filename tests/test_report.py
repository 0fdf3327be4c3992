"""The report shows the books of a run, as text only, in one file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline import open_run, report, verify
from pipeline.filters.balance import Balance
from pipeline.report import Histogram
from tests import browser
from tests.filters.barrier import decide
from tests.tables import make_batch


@pytest.fixture
def page(painted: Path, tmp_path: Path) -> str:
    out = tmp_path / "report.html"
    assert report.main([str(painted / "out"), "--out", str(out)]) == 0
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


def test_it_is_one_file_of_text_that_cannot_run(page: str) -> None:
    assert page.count("<script") == 1
    assert "<script>alert" not in page
    assert not re.search(r"<[^>]+ on\w+=", page), "an event handler"
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "something from outside"
    assert "\u202e" not in page
    assert len(page) < 3_000_000, "a caption of a megabyte is cut"


def test_the_same_run_gives_the_same_page(painted: Path, page: str, tmp_path: Path) -> None:
    assert report.main([str(painted / "out"), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_it_goes_into_the_run_and_leaves_its_books_alone(painted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(painted / "stricter", tmp_path / "run"))
    assert report.main([str(run)]) == 0
    assert (run / "report/index.html").stat().st_size > 10_000
    assert verify.main([str(run), "--deep"]) == 0
    fsspec.filesystem("memory").put(str(run), "/report/run", recursive=True)
    assert report.main(["memory://report/run"]) == 0
    assert fsspec.filesystem("memory").exists("/report/run/report/index.html")


@pytest.mark.parametrize(("name", "said"), [("nothing", "is not the folder of a run"), ("cut", "is not finished")])
def test_what_cannot_be_reported_is_said(
    painted: Path, tmp_path: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(painted / "out", tmp_path / "cut")
    (tmp_path / "cut/seal.json").unlink()
    assert report.main([str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["cat", "a cat in 3 captions", "café"])
def test_the_report_finds_the_rarest_entry_in_the_detail_of_balance(tmp_path: Path, entry: str) -> None:
    (tmp_path / "entries.json").write_text(json.dumps([entry]))
    balance = Balance(entries=str(tmp_path / "entries.json"), max_per_entry=1)
    drops = [drop for drop in decide(balance, make_batch([{"caption": entry}] * 40)) if drop]
    assert drops
    for _, detail in drops:
        found = report._RAREST.search(detail or "")
        assert found is not None
        assert (found["entry"], found["captions"]) == (entry, "40")


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
def test_it_opens_without_a_complaint(page: str, tmp_path: Path) -> None:
    with browser.chromium() as opened:
        assert browser.problems(opened, f"file://{tmp_path / 'report.html'}") == []
