"""Every shipped recipe passes `--plan` and runs, on a small pool with small local models.

A new recipe in conf/ is picked up by itself; OVERRIDES names the words it needs. Its pool has the columns of `widened`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipeline import init, open_run, run
from pipeline.demo import scorer, web
from pipeline.models.score_mixture import Curve, Mixture
from tests.conftest import ROOT, Command
from trainer import export

ELSEWHERE = {  # need target sets or a crawl, which their own tests make
    "datacomp_image_based", "negclip_normsim",  # test_datacomp
    "common_crawl",  # test_wat
}  # fmt: skip
RECIPES = {
    name: path
    for name, path in init.recipes().items()
    if "steps" in yaml.safe_load(path.read_text(encoding="utf-8")) and name not in ELSEWHERE
}
SCORER = [f"steps.clip_score.model={ROOT}/pipeline/demo/scorer", "steps.clip_score.batch_size=16"]
BY_NAME = ["steps.clip_score.pretrained=null"]  # of an architecture; a folder has its own weights
SMALL_PICTURES = ["steps.image_size.min_side=100"]
SMALL_FILES = ["steps.byte_size.min=500"]
RARE_ENTRIES = ["steps.balance.min_count=2", "steps.balance.2.min_count=2"]

# The overrides that each recipe needs, besides ALLOWED and the path of the pool. `{folder}` is the folder of the test.
OVERRIDES: dict[str, list[str]] = {
    "400m": [*SCORER, *BY_NAME, *SMALL_PICTURES, *SMALL_FILES, *RARE_ENTRIES],
    "commonpool": SMALL_PICTURES,
    "coyo": SMALL_PICTURES,
    "datacomp_basic": SMALL_PICTURES,
    "demo": [*SCORER, f"steps.balance.entries={ROOT}/pipeline/demo/entries.json"],
    "dfn": SCORER,
    "laion400m": [*SCORER, *BY_NAME, *SMALL_FILES],
    "laion5b": [*SCORER, *BY_NAME, *SMALL_FILES],
    "metaclip": [f"steps.match_entries.entries={ROOT}/pipeline/demo/entries.json"],
    "multilingual": [f"steps.match_entries.entries={{{{en: {ROOT}/pipeline/demo/entries.json}}}}"],
    "learned": [*SCORER, *BY_NAME, "steps.learned_score.mixture={folder}/mixture.json"],
}
PICTURES = 40


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A folder with `pool.parquet` and the files that recipes name, and the port where its pictures are served.

    The pool has the columns of LAION-like tables, COYO and CommonPool, so that each recipe finds its own.
    """
    folder = tmp_path_factory.mktemp("recipes")
    with web.open_port(0) as server:
        web.build(folder, PICTURES, 0, server.server_port)
        rows = pq.read_table(folder / "truth" / "truth.parquet").to_pylist()
        pq.write_table(widened([row for row in rows if row["good"]], folder / "site"), folder / "pool.parquet")
        mixture = Mixture(0.0, {"clip_score": Curve((0.0, 1.0), (-2.0, 2.0), 0.0)})
        (folder / "mixture.json").write_bytes(mixture.to_bytes({}))
        # An evaluation set of pictures that are also on the web.
        on_the_web = [folder / "site" / row["url"].rpartition("/")[2] for row in rows if row["good"]]
        (folder / "eval").mkdir()
        for picture in [path for path in on_the_web if path.is_file()][:8]:
            Image.open(picture).convert("RGB").save(folder / "eval" / f"{picture.stem}.jpg", quality=70)
        with web.serving(server, folder):
            yield folder, server.server_port


def widened(rows: list[dict[str, Any]], pictures: Path) -> pa.Table:
    def sha256(url: str) -> str:
        file = pictures / url.rpartition("/")[2]
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "0" * 64

    captions = [row["caption"] for row in rows]
    columns: dict[str, list[Any]] = {
        "url": [row["url"] for row in rows],
        "caption": captions,
        "text": captions,
        "uid": [hashlib.sha256(row["url"].encode()).hexdigest()[:32] for row in rows],
        "sha256": [sha256(row["url"]) for row in rows],
        "clip_b32_similarity_score": [0.2 + i / 1000 for i in range(len(rows))],
        "clip_l14_similarity_score": [0.2 + i / 1000 for i in range(len(rows))],
        "clip_similarity_vitb32": [0.3] * len(rows),
        "aesthetic_score_laion_v2": [5.0] * len(rows),
        "original_width": [200] * len(rows),
        "original_height": [200] * len(rows),
        "face_bboxes": [[[0.1, 0.1, 0.3, 0.3]] for _ in rows],
    }
    return pa.table(columns)


def words(name: str, folder: Path, port: int) -> list[str]:
    """The overrides with which a recipe runs on the pool of `site`."""
    given = [word.format(folder=folder) for word in OVERRIDES.get(name, [])]
    text = RECIPES[name].read_text(encoding="utf-8")
    if "- download" in text:
        given.append(f'steps.download.allow_addrs=["127.0.0.1:{port}"]')
    if "- decontaminate" in text:
        given.append(f"steps.decontaminate.sets={{demo: {folder}/eval}}")
    return [f"pool.path={folder}/pool.parquet", f"run={folder}/{name}", *given]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_plan(
    name: str, site: tuple[Path, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run.main(["--plan", str(RECIPES[name]), *words(name, *site)]) == 0
    assert "write_shards" in capsys.readouterr().out


def test_a_plan_names_the_evaluation_sets_that_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(["--plan", str(RECIPES["400m"])]) == 0
    assert "note: decontaminate: eval/coco, eval/flickr30k, eval/imagenet: not found" in capsys.readouterr().out


def test_a_run_in_a_bucket_without_the_package_for_it_is_refused(
    site: tuple[Path, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan needs no bucket, so it only mentions the missing package."""

    def lacking(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", lacking)
    given = [str(RECIPES["metaclip"]), *words("metaclip", *site), "run=s3://bucket/run"]
    expected = "run: s3://bucket/run cannot be used here: Install s3fs to access S3; pip install 'winnow-clip[s3]'"
    assert run.main(["--plan", *given]) == 0
    assert f"note: {expected}" in capsys.readouterr().out
    assert run.main(given) == 2
    assert f"error: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_comes_from(name: str) -> None:
    """The comment before the first key gives the source of the recipe and a command."""
    head = RECIPES[name].read_text(encoding="utf-8").partition("\nname:")[0]
    assert all(line.startswith("#") for line in head.strip().splitlines())
    assert "pipeline.run" in head or "make demo" in head


LITERATURE = (
    "laion400m coyo laion5b datacomp_basic datacomp_clip_score datacomp_image_based metaclip multilingual "
    "negclip_normsim dfn learned common_crawl"
).split()


@pytest.mark.parametrize("name", LITERATURE)
def test_a_recipe_of_the_literature_names_its_paper_and_what_it_leaves_out(name: str) -> None:
    head = init.recipes()[name].read_text(encoding="utf-8").partition("\nname:")[0].replace("\n# ", " ")
    assert re.search(r"\b20[12]\d\b", head), "the year of a paper"
    assert re.search(r"left out|leaves out", head, re.IGNORECASE)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, site: tuple[Path, int], run: Command) -> None:
    folder, _ = site
    done = run(str(RECIPES[name]), *words(name, *site))
    assert done.returncode == 0, done.stderr
    finished = open_run(folder / name)
    assert finished.finished
    assert finished.kept > 0, json.dumps({k: v.dropped for k, v in finished.funnel.lines.items()})
    if "decontaminate" in finished.funnel.lines:
        assert finished.funnel.lines["decontaminate"].dropped.keys() == {"demo"}


@pytest.mark.slow
def test_a_filter_network_is_trained_exported_and_filters(
    site: tuple[Path, int], run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From clean pairs through `conf/filter_network.yaml` and `trainer.export` to `conf/dfn.yaml`."""
    monkeypatch.setattr(scorer, "SCENES", 1024)
    scorer.make_shards(tmp_path / "clean" / "shards")
    conf, out = ROOT / "conf/filter_network.yaml", tmp_path / "network"
    # The settings of the demo's scorer, because ViT-B/32 is too large for a test.
    small = ["model=tiny-rn-64", "samples=9600", "batch_size=64", "lr=3e-3", "warmup=20", "compile=false", "workers=1"]
    train(str(conf), f"shards={tmp_path}/clean", f"output={out}", *small, "precision=fp32")
    assert export.main([str(out), str(tmp_path / "filter"), "--precision", "fp16"]) == 0
    assert scorer.separation(tmp_path / "filter", pairs=200) > 0.7  # colours are learned first; half is chance
    folder, port = site
    done = run(
        str(RECIPES["dfn"]), *words("dfn", folder, port), f"steps.clip_score.model={tmp_path}/filter",
        f"run={tmp_path}/dfn",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    finished = open_run(tmp_path / "dfn")
    (scored,) = (line for label, line in finished.funnel.lines.items() if label.startswith("threshold"))
    assert finished.kept == scored.rows_in - sum(scored.dropped.values()) == math.ceil(0.15 * scored.rows_in)


def train(*arguments: str) -> None:
    command = [sys.executable, "-m", "trainer.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
