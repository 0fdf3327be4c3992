"""Rows measured once are not fetched or scored again when the filters, the run or the pool change.

pytest -m slow tests/demo/test_measured_once.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from pipeline import open_run, verify
from pipeline.demo import web
from tests.conftest import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RECIPE = """
name: measured-once
pool: {path: @POOL@.parquet}
run: out
workers: 2
steps:
@TEXT@
  - exact_dedup: {by: [url]}
  - download: {image_size: 96, timeout: 30, retries: 1, allow_addrs: ["127.0.0.1:@PORT@"]}
  - image_size: {min_side: 64}
  - near_dedup: {max_hamming: 4}
  - clip_score: {model: @SCORER@, batch_size: 64}
  - threshold: {column: clip_score, top_fraction: 0.8}
  - write_shards: {samples_per_shard: 40}
"""
RECIPES = {
    "first": "  - caption_length: {min_words: 4}\n  - language: {keep: [en]}",
    "looser": "  - caption_length: {min_words: 2}\n  - language: {keep: [en]}",
    "stricter": "  - caption_length: {min_words: 6}\n  - language: {keep: [en]}",
    "moved": "  - language: {keep: [en]}\n  - caption_length: {min_words: 3}",
}


class Counting(web.Handler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:  # noqa: N802
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    with web.open_port(0) as server:
        server.RequestHandlerClass = Counting
        web.build(tmp_path / "web", 260, 0, server.server_port)
        with web.serving(server, tmp_path / "web"):
            yield tmp_path, server.server_port


def scored(run: Path) -> int:
    """Rows that a model has scored for a run; rows borrowed from another run do not count."""
    records = [json.loads(file.read_bytes()) for file in run.glob("passes/clip_score-*/commits/*.json")]
    return sum(record["rows_in"] for record in records if "borrowed" not in record)


def tars(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(run.glob("shards/*.tar"))]


def test_only_rows_never_measured_are_fetched_and_scored(site: tuple[Path, int]) -> None:
    folder, port = site
    whole = pq.read_table(folder / "web/pool.parquet")
    pq.write_table(whole, folder / "whole.parquet")
    pq.write_table(whole.slice(0, len(whole) * 3 // 4), folder / "part.parquet")
    redirects = {
        urlsplit(target).path
        for answer, target in json.loads((folder / "web/site/answers.json").read_text()).values()
        if answer == "redirect"
    }

    def run(recipe: str, out: str, pool: str, *overrides: str) -> set[str]:
        """Runs a recipe. Returns the paths that it requested."""
        text = RECIPE.replace("@TEXT@", RECIPES[recipe]).replace("@PORT@", str(port)).replace("@POOL@", pool)
        (folder / "r.yaml").write_text(text.replace("@SCORER@", str(ROOT / "pipeline/demo/scorer")))
        Counting.asked.clear()
        argv = [sys.executable, "-m", "pipeline.run", "r.yaml", f"run={out}", *overrides]
        done = subprocess.run(
            argv, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert verify.main([str(folder / out), "--deep"]) == 0
        return set(Counting.asked)

    def rows(out: str, after: str) -> dict[str, str]:
        """The path of each row that survived a step, by uid."""
        tables = list(open_run(folder / out).scan(["uid", "url"], after=after))
        return {row["uid"]: urlsplit(row["url"]).path for t in tables for row in t.to_pylist()}

    fetched: dict[str, str] = {}
    judged: set[str] = set()
    total = 0
    for recipe in RECIPES:
        asked = run(recipe, "out", "part")
        due, before = rows("out", "exact_dedup"), set(fetched.values())
        new = {uid: path for uid, path in due.items() if uid not in fetched}
        kept = rows("out", "download")
        assert {kept[uid] for uid in new if uid in kept} <= asked, "each new picture was fetched"
        assert not (asked & before) - set(new.values()) - redirects, "and none of the others"
        fetched |= due
        reached = set(rows("out", "near_dedup"))
        assert scored(folder / "out") - total == len(reached - judged), recipe
        total, judged = scored(folder / "out"), judged | reached
    assert len(fetched) > 100
    assert len(judged) > 100

    # A new run on the same measurements gives the same bytes without a request.
    pages = {"/robots.txt"}
    assert run("moved", "again", "part", "reuse=out") <= pages
    assert scored(folder / "again") == 0
    assert tars(folder / "again") == tars(folder / "out")

    # The pool has grown by a third.
    asked = run("moved", "grown", "whole", "reuse=again")
    due = rows("grown", "exact_dedup")
    new = {uid: path for uid, path in due.items() if uid not in fetched}
    assert len(new) > 30
    assert not (asked & set(fetched.values())) - set(new.values()) - redirects
    assert scored(folder / "grown") == len(set(rows("grown", "near_dedup")) - judged)
    run("moved", "fresh", "whole", "reuse=grown")
    assert tars(folder / "fresh") == tars(folder / "grown")
