"""The main command, end to end on Ray, with user-defined steps in place of the network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline import verify
from pipeline.run import _explain as explained
from pipeline.scheduler.claim import hold
from pipeline.storage import Store
from tests.conftest import HUNG, Command, environment

STEPS = '''
import errno, io, os, signal, time
from dataclasses import dataclass
from pathlib import Path
from PIL import Image
import pyarrow as pa
import pyarrow.compute as pc
from pipeline.step import Filter, Stage


@dataclass(kw_only=True)
class Paint(Stage):
    """Stands in for a download: a small picture whose colour is a function of the caption."""
    needs = ("caption",)
    adds = {"image": pa.binary(), "shade": pa.float32()}
    expensive = True
    slow: float = 0.0
    size: int = 8

    def setup(self):
        self.done = 0

    def process(self, batch):
        images, shades = [], []
        for caption in batch["caption"].to_pylist():
            if "segfault" in caption:
                signal.raise_signal(signal.SIGSEGV)
            if "diskfull" in caption:
                raise OSError(errno.ENOSPC, "No space left on device")
            with (Path(__file__).parent / "painted.log").open("a") as log:
                log.write(caption + "\\n")
            n = int(caption.split()[-1])
            out = io.BytesIO()
            Image.new("RGB", (self.size, self.size), (n % 256, n // 256 % 256, 90)).save(out, "JPEG")
            images.append(out.getvalue())
            shades.append(round(n * 7 % 100 / 100, 2))
            time.sleep(self.slow)
        batch = batch.append_column("image", pa.array(images, pa.binary()))
        return batch.append_column("shade", pa.array(shades, pa.float32()))
'''
EIGHT_LINES = """
from dataclasses import dataclass
import pyarrow.compute as pc
from pipeline.step import Filter

@dataclass(kw_only=True)
class NoShouting(Filter):
    needs = ("caption",)
    def keep(self, batch):
        return pc.invert(pc.utf8_is_upper(batch["caption"]))
"""
RECIPE = """
name: painted
pool: {path: pool.csv}
run: out
unit_rows: 100
steps:
  - no_shouting.no_shouting
  - exact_dedup: {by: [url]}
  - steps_of_mine.paint
  - threshold: {column: shade, top_fraction: 0.5}
  - write_shards: {samples_per_shard: 100}
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> Path:
    """A user's own folder: a recipe, a pool and two step modules outside the package."""
    return furnish(tmp_path)


def furnish(tmp_path: Path) -> Path:
    for package in ("steps_of_mine", "no_shouting"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "steps_of_mine" / "paint.py").write_text(STEPS)
    (tmp_path / "no_shouting" / "no_shouting.py").write_text(EIGHT_LINES)
    (tmp_path / "r.yaml").write_text(RECIPE)
    pool(tmp_path, 700)
    return tmp_path


def pool(folder: Path, n: int, words: dict[int, str] | None = None) -> None:
    lines = [f"http://h/{i},{(words or {}).get(i, 'a calm picture')} {i}" for i in range(n)]
    lines += [f"http://h/{i},the same url again {i}" for i in range(20)] + ["http://h/loud,PLEASE LOOK AT THIS"]
    (folder / "pool.csv").write_text("url,caption\n" + "\n".join(lines) + "\n")


def shards(run: Path) -> dict[str, str]:
    files = [p for p in (run / "shards").iterdir() if p.name != "OWNER"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def books_balance(run: Path, rows: int) -> None:
    funnel = json.loads((run / "funnel.json").read_text())
    manifest = json.loads((run / "shards" / "manifest.json").read_text())
    drops = [u for f in (run / "drops").glob("*.parquet") for u in pq.read_table(f)["uid"].to_pylist()]
    kept = [u for f in (run / "shards").glob("*.parquet") for u in pq.read_table(f)["uid"].to_pylist()]
    assert funnel["rows_in"] == rows == len(drops) + len(kept)
    assert funnel["kept"] == manifest["samples"] == len(kept)
    assert len({*drops, *kept}) == rows, "every row of the pool is in exactly one of the two"
    for before, after in zip(funnel["steps"], funnel["steps"][1:]):
        assert before["kept"] == after["rows_in"]
        assert before["rows_in"] == before["kept"] + sum(before["dropped"].values())


def test_a_run_its_outputs_and_what_may_change_afterwards(run: Command, project: Path) -> None:
    done = run("r.yaml", "workers=2")
    assert done.returncode == 0, done.stderr
    assert "721 rows in = 350 kept + 371 dropped" in done.stdout
    books_balance(project / "out", 721)
    drops = {
        r["caption"]: (r["step"], r["reason"])
        for f in (project / "out/drops").iterdir()
        for r in pq.read_table(f).to_pylist()
    }
    assert drops["PLEASE LOOK AT THIS"] == ("no_shouting", "no_shouting"), "a filter defined outside the package"
    assert sum(step == "exact_dedup" for step, _ in drops.values()) == 20

    import webdataset as wds

    tars = sorted(str(p) for p in (project / "out/shards").glob("*.tar"))
    manifest = json.loads((project / "out/shards/manifest.json").read_text())
    assert [s["samples"] for s in manifest["shards"]] == [100, 100, 100, 50]
    samples = list(wds.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg", "txt", "json"))
    assert len(samples) == manifest["samples"]
    for image, text, sample in samples:
        assert text == sample["caption"]
        assert abs(image.getpixel((4, 4))[0] - int(text.split()[-1]) % 256) < 6, "the picture belongs to the caption"

    first = shards(project / "out")
    painted = project / "steps_of_mine/painted.log"
    assert len(painted.read_text().splitlines()) == 700
    painted.write_text("")
    again = run("r.yaml", "workers=1")
    assert again.returncode == 0
    assert (
        "reused pool, exact_dedup, paint, threshold, write_shards; nothing was measured again by paint" in again.stdout
    )
    assert shards(project / "out") == first

    fewer = run("r.yaml", "steps.threshold.top_fraction=0.2")
    assert fewer.returncode == 0, fewer.stderr
    assert "reused pool, exact_dedup, paint;" in fewer.stdout
    assert painted.read_text() == "", "a changed threshold measures nothing again"
    books_balance(project / "out", 721)
    assert len(list((project / "out/shards").glob("*.tar"))) == 2, "shards of the larger set are gone"

    other = run("r.yaml", "steps.paint.size=9")
    assert other.returncode == 2
    assert "steps.paint.size: (not set) → 9" in other.stderr
    assert painted.read_text() == ""
    assert run("r.yaml", "name=another").returncode == 2

    arm = run("r.yaml", "run=arm", "reuse=out")
    assert arm.returncode == 0, arm.stderr
    assert painted.read_text() == "", "another run on the same committed results"
    assert shards(project / "arm") == first


def test_filters_above_an_expensive_step_change_without_measuring_again(
    run: Command, finished: Path, project: Path
) -> None:
    shutil.copytree(finished, project, dirs_exist_ok=True)
    painted = project / "steps_of_mine/painted.log"
    (project / "looser.yaml").write_text(RECIPE.replace("  - exact_dedup: {by: [url]}\n", ""))
    (project / "moved.yaml").write_text(
        RECIPE.replace("  - exact_dedup: {by: [url]}\n", "").replace("  - threshold", "  - exact_dedup\n  - threshold")
    )
    for recipe, new, line in (
        ("looser.yaml", 20, "paint: 700 of 720 rows had been measured before"),
        ("moved.yaml", 0, "nothing was measured again by paint"),
        ("r.yaml", 0, "nothing was measured again by paint"),
    ):
        painted.write_text("")
        done = run(recipe)
        assert done.returncode == 0, done.stderr
        assert len(painted.read_text().splitlines()) == new, recipe
        assert line in done.stdout
        books_balance(project / "out", 721)
        assert verify.main([str(project / "out"), "--deep"]) == 0
        arm = run(recipe, f"run={recipe}-arm", "reuse=out")
        assert arm.returncode == 0, arm.stderr
        assert shards(project / f"{recipe}-arm") == shards(project / "out"), "as a run from scratch"


def spoil_a_byte(run: Path) -> None:
    tar = run / "shards/00001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)


def lose_a_drop(run: Path) -> None:
    (file,) = (run / "drops").iterdir()
    pq.write_table(pq.read_table(file).slice(1), file)


def lose_a_sample(run: Path) -> None:
    table = run / "shards/00000.parquet"
    pq.write_table(pq.read_table(table).slice(1), table)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_a_byte, "shards/00001.tar: damaged: its sha256"),
        (lose_a_drop, "rows in funnel.json, "),
        (lose_a_sample, "shards/00000.parquet: damaged"),
        (lambda run: (run / "shards/00002.tar").unlink(), "shards/00002.tar: missing"),
        (lambda run: (run / "shards/_SUCCESS").unlink(), "_SUCCESS: missing"),
        (lambda run: (run / "funnel.json").unlink(), "funnel.json: missing"),
    ],
)
def test_verify_finds_every_mismatch_with_the_records(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(finished / "out", tmp_path / "copy")
    assert verify.main([str(tmp_path / "copy")]) == 0
    damage(tmp_path / "copy")
    assert verify.main([str(tmp_path / "copy")]) == 1
    assert message in capsys.readouterr().err


def test_the_same_bytes_with_other_workers_and_after_a_kill(
    run: Command, finished: Path, ray_address: str, project: Path
) -> None:
    env = environment(project, RAY_ADDRESS=ray_address)
    words = ["r.yaml", "run=killed", "workers=2", "steps.paint.slow=0.005"]
    argv = [sys.executable, "-m", "pipeline.run", *words, "report=false"]
    driver = subprocess.Popen(argv, cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + HUNG
    while not list((project / "killed").glob("passes/paint-*/commits/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    committed = len(list((project / "killed").glob("passes/paint-*/commits/*.json")))
    assert 0 < committed < 8, "the kill came in the middle"
    assert not (project / "killed/shards/_SUCCESS").exists()
    (paint,) = (project / "killed/passes").glob("01-*")
    (paint / "units/.0000001-ab.arrow.0123456789ab.part").write_bytes(b"what a killed worker has left")
    (paint / "units/0000001-ab.parquet").write_bytes(b"and one that came as far as its record")
    resumed = run(*words)
    assert resumed.returncode == 0, resumed.stderr
    assert list(verify.problems(Store(str(project / "killed")), Console(quiet=True))) == [], "nothing unnamed is left"
    books_balance(project / "killed", 721)
    assert shards(project / "killed") == shards(finished / "out"), "which had one worker"


def test_a_row_that_kills_workers_costs_only_itself(run: Command, project: Path) -> None:
    pool(project, 120, {60: "segfault picture"})
    done = run("r.yaml", "unit_rows=50")
    assert done.returncode == 0, done.stderr
    books_balance(project / "out", 141)
    assert "decoder_crash 1" in done.stdout


def test_a_full_disk_is_reported_and_commits_stay_complete(run: Command, project: Path) -> None:
    pool(project, 200, {60: "diskfull picture"})
    full = run("r.yaml")
    assert full.returncode == 1
    assert "the disk of" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (project / "out/shards/_SUCCESS").exists()
    for record in (project / "out").glob("passes/*/commits/*.json"):
        for name in ("table", "heavy"):
            file = json.loads(record.read_text()).get(name)
            assert file is None or (record.parent.parent / file["name"]).exists()


def test_everything_dropped_is_an_empty_but_valid_dataset(run: Command, project: Path) -> None:
    (project / "pool.csv").write_text("url,caption\nhttp://h/1,LOUD\nhttp://h/2,LOUDER\n,\n")
    done = run("r.yaml")
    assert done.returncode == 1
    why = "no_shouting dropped the last 2 of 3 rows (no_shouting 2)"
    assert f"no row was kept: {why}" in done.stderr
    assert "allow_empty: true" in done.stderr
    done = run("r.yaml", "allow_empty=true")
    assert done.returncode == 0, done.stderr
    assert f"No row was kept: {why}" in done.stdout
    assert json.loads((project / "out/shards/manifest.json").read_text())["samples"] == 0
    assert (project / "out/shards/_SUCCESS").exists()
    books_balance(project / "out", 3)


def test_an_empty_pool_and_a_short_last_shard(run: Command, project: Path) -> None:
    (project / "pool.csv").write_text("url,caption\n")
    assert run("r.yaml", "run=empty", "allow_empty=true").returncode == 0
    pool(project, 250)
    done = run("r.yaml", "steps.write_shards.drop_last=true")
    assert done.returncode == 0, done.stderr
    assert "last_shard_short 25" in done.stdout
    books_balance(project / "out", 271)


def test_a_folder_with_foreign_files_is_refused(run: Command, project: Path) -> None:
    (project / "out/shards").mkdir(parents=True)
    (project / "out/shards/00000.tar").write_bytes(b"somebody's work")
    refused = run("r.yaml", ray=False, RAY_ADDRESS="127.0.0.1:1")
    assert refused.returncode == 2
    assert "out/shards holds files that do not belong to a run" in refused.stderr
    assert [p.name for p in (project / "out").iterdir()] == ["shards"]


def test_a_pool_that_changed_is_named(run: Command, finished: Path, project: Path) -> None:
    shutil.copytree(finished, project, dirs_exist_ok=True, copy_function=shutil.copyfile)
    refused = run("r.yaml", ray=False, RAY_ADDRESS="127.0.0.1:1")
    assert refused.returncode == 2
    assert "the files of the pool have changed since: their names, sizes or times" in refused.stderr


def test_a_cluster_that_does_not_answer_is_named_at_once(run: Command, project: Path) -> None:
    started = run("r.yaml", ray=False, RAY_ADDRESS="127.0.0.1:1")
    assert started.returncode == 1
    assert started.stderr == "error: no cluster answers at RAY_ADDRESS=127.0.0.1:1 (Connection refused)\n"


def test_a_directory_in_use_is_refused(run: Command, project: Path) -> None:
    with hold(Store(str(project / "out"))):
        refused = run("r.yaml", ray=False, RAY_ADDRESS="127.0.0.1:1")
    assert refused.returncode == 2
    assert f"{project}/out is in use by another command: pid {os.getpid()} on " in refused.stderr
    assert not (project / "out/run.json").exists()


def test_an_invalid_recipe_starts_nothing(run: Command, project: Path) -> None:
    (project / "r.yaml").write_text(RECIPE.replace("top_fraction", "top_fractoin").replace("pool.csv", "nowhere.csv"))
    wrong = run("r.yaml", ray=False, RAY_ADDRESS="127.0.0.1:1")
    assert wrong.returncode == 2
    assert "did you mean top_fraction?" in wrong.stderr
    assert "nowhere.csv does not exist" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not (project / "out").exists()


def test_a_plan_runs_nothing(run: Command, project: Path) -> None:
    plan = run("r.yaml", "--plan", "name=my [red] set", ray=False, RAY_ADDRESS="127.0.0.1:1")
    assert plan.returncode == 0, plan.stderr
    for text in (
        "my [red] set: 721 rows (counted)",
        "no_shouting + exact_dedup ",
        "whole run",
        "core-hours",
        "custom step without an estimate",
    ):
        assert text in plan.stdout
    assert not (project / "out").exists()


def test_the_traceback_of_a_worker_is_shortened_to_a_line() -> None:
    remote = "The remote function failed to import:\n\nTraceback (most recent call last):\n  File\nImportError: x"
    line = explained(RuntimeError(remote), "out")
    assert line.startswith("RuntimeError: The remote function failed to import: … ImportError: x (")
