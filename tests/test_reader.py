"""The read API on small real runs, compared with the files of the runs."""

from __future__ import annotations

import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipeline
from examples import read_a_run
from pipeline import Run, RunError, open_run
from pipeline.storage import DamagedError
from tests import painted
from tests.conftest import ROOT
from tests.test_run import RECIPE

LABELS = ["pool", "no_shouting", "exact_dedup", "paint", "threshold", "write_shards"]
LOOSER = RECIPE.replace("  - exact_dedup: {by: [url]}\n", "").replace("top_fraction: 0.5", "top_fraction: 0.4")
STRICTER = RECIPE.replace("  - steps_of_mine", "  - caption_length: {min_chars: 17}\n  - steps_of_mine")
LAST = STRICTER.replace("samples_per_shard: 100", "samples_per_shard: 100, drop_last: true")


@pytest.fixture(scope="module")
def runs(finished: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, which tests must not change.

    `changed` had its filters changed twice. `arm` has the last recipe of `changed`, and uses the measurements of `out`.
    """
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("runs"), dirs_exist_ok=True))
    for recipe, overrides in (
        (STRICTER, ["run=changed"]),
        (LOOSER, ["run=changed"]),
        (LAST, ["run=changed"]),
        (LAST, ["run=arm", "reuse=out"]),
    ):
        (folder / "r.yaml").write_text(recipe)
        painted.run(folder, ray_address, "r.yaml", *overrides)
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """A copy of `out` in another folder."""
    return Path(shutil.copytree(runs / "out", tmp_path / "copy"))


def rows(tables: Any) -> list[dict[str, Any]]:
    return [row for table in tables for row in table.to_pylist()]


def parquet(run: Path, pattern: str, columns: list[str]) -> list[dict[str, Any]]:
    return [row for file in sorted(run.glob(pattern)) for row in pq.read_table(file, columns=columns).to_pylist()]


def number(caption: str) -> int:
    return int(caption.split()[-1])


def colour(picture: bytes) -> int:
    return int(Image.open(io.BytesIO(picture)).getpixel((4, 4))[0])


def test_the_package_imports_the_read_api_on_first_use() -> None:
    code = "import sys, pipeline; assert 'pyarrow' not in sys.modules; pipeline.open_run; print(pipeline.__all__)"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output == "['Run', 'RunError', 'open_run']\n"
    with pytest.raises(AttributeError, match="has no attribute 'open_rnu'"):
        pipeline.open_rnu  # noqa: B018


def test_recipe_steps_and_books(runs: Path) -> None:
    run = open_run(runs / "out")
    assert (run.name, run.finished, run.units, run.rows_in, run.kept) == ("painted", True, 8, 721, 350)
    assert run.recipe["steps"][1] == {"exact_dedup": {"by": ["url"]}}
    assert [step.label for step in run.steps] == LABELS == list(run.funnel.lines)
    paint = run.steps[3]
    assert (paint.step, paint.options) == ("steps_of_mine.paint.Paint", {"slow": 0.0, "size": 8})
    assert (paint.needs, paint.adds) == (("caption",), {"image": "binary", "shade": "float"})
    assert run.steps[0].options["path"] == "pool.csv"
    assert run.steps[4].options["top_fraction"] == 0.5
    assert pickle.loads(pickle.dumps(run)).kept == 350


@pytest.mark.parametrize("name", ["out", "changed", "arm"])
def test_rows_after_each_step_are_those_of_the_funnel(runs: Path, name: str) -> None:
    run = open_run(runs / name)
    for label, line in run.funnel.lines.items():
        tables = list(run.scan(["caption"], after=label))
        assert len(tables) == run.units
        assert sum(map(len, tables)) == line.kept, label
        at = [(row["unit"], row["row"]) for row in rows(tables)]
        assert at == sorted(set(at)), "in the order of unit and row, each once"
        assert sum(map(len, run.drops(label))) == sum(line.dropped.values())
    assert rows(run.scan(["uid", "url", "shade"])) == [
        {"unit": at["unit"], "row": at["row"], **row}
        for at, row in zip(rows(run.scan()), parquet(runs / name, "shards/0*.parquet", ["uid", "url", "shade"]))
    ]
    columns = ["uid", "url", "caption", "step", "reason", "detail", "value"]
    dropped = rows(run.drops())
    assert [{c: row[c] for c in columns} for row in dropped] == parquet(runs / name, "drops/*.parquet", columns)
    places = [(row["unit"], row["row"]) for row in dropped + rows(run.scan())]
    assert sorted(places) == [(row["unit"], row["row"]) for row in rows(run.scan(after="pool"))], "each row once"


def test_filters_that_were_changed_twice_and_reuse_give_the_same(runs: Path) -> None:
    changed, arm = open_run(runs / "changed"), open_run(runs / "arm")
    assert len(list((runs / "changed/passes").glob("paint-*/commits/*.001.json"))) > 0, "measured in parts"
    assert not list((runs / "arm/passes").glob("paint-*/units/*.arrow")), "pictures stay in the other run"
    for label in changed.funnel.lines:
        assert rows(changed.scan(["uid"], label)) == rows(arm.scan(["uid"], label))
        assert rows(changed.drops(label)) == rows(arm.drops(label))
    for run in (changed, arm):
        scored = rows(run.scan(["caption", "shade", "image"], after="paint"))
        assert len(scored) == run.funnel.lines["paint"].kept
        for row in scored:
            assert row["shade"] == pytest.approx(number(row["caption"]) * 7 % 100 / 100)
            assert abs(colour(row["image"]) - number(row["caption"]) % 256) < 6, "the picture belongs to the caption"
        assert "last_shard_short" in {row["reason"] for row in rows(run.drops("write_shards"))}


def test_columns(runs: Path) -> None:
    run = open_run(runs / "out")
    texts = {"uid": pa.string(), "url": pa.string(), "caption": pa.string()}
    for label in ("pool", "no_shouting", "exact_dedup"):
        assert run.columns(label) == texts
    for label in ("paint", "threshold", None):
        assert run.columns(label) == {**texts, "image": pa.binary(), "shade": pa.float32()}
    for table in run.scan(["shade", "uid"], units=[7, 2]):
        assert table.schema == pa.schema(
            [("unit", pa.int32()), ("row", pa.int32()), ("shade", pa.float32()), ("uid", pa.string())]
        )
    assert [table["unit"][0].as_py() for table in run.scan(units=[7, 2])] == [7, 2]
    assert [row["unit"] for row in rows(run.drops("no_shouting", units=range(8)))] == [
        row["unit"] for row in rows(run.scan("caption", "pool")) if row["caption"].isupper()
    ]


def test_pictures_stream(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.scheduler.passes.HEAVY_ROWS", 7)
    sizes = []
    for table in open_run(runs / "out").scan(["image", "caption"]):
        sizes.append(len(table))
        for image, caption in zip(table["image"].to_pylist(), table["caption"].to_pylist()):
            assert abs(colour(image) - number(caption) % 256) < 6
    assert max(sizes) == 7
    assert sum(sizes) == 350


@pytest.mark.parametrize(
    ("step", "reason", "count"),
    [
        (None, None, 371),
        ("threshold", None, 350),
        (None, "exact_dedup", 20),
        ("exact_dedup", "exact_dedup", 20),
        ("threshold", "exact_dedup", 0),
        ("no_shouting", None, 1),
        ("paint", None, 0),
        ("write_shards", None, 0),
    ],
)  # fmt: skip
def test_drops(runs: Path, copy: Path, step: str | None, reason: str | None, count: int) -> None:
    run = open_run(runs / "out")
    tables = list(run.drops(step, reason))
    assert len(tables) == run.units
    assert tables[0].column_names == ["unit", "row", "uid", "url", "caption", "step", "reason", "detail", "value"]
    assert sum(map(len, tables)) == count
    shutil.rmtree(copy / "passes")
    left = [{**row, "unit": None, "row": None} for row in rows(tables)]
    assert rows(open_run(copy).drops(step, reason)) == left


def test_take(runs: Path) -> None:
    run = open_run(runs / "out")
    (dropped,) = run.drops("threshold", units=[3])
    chosen = dropped["row"].to_numpy()[[4, 0, 4, 2]]
    table = run.take(3, chosen, ["caption", "image", "shade"])
    assert table.column_names == ["unit", "row", "caption", "image", "shade"]
    assert table["row"].to_pylist() == chosen.tolist()
    for row in table.to_pylist():
        assert abs(colour(row["image"]) - number(row["caption"]) % 256) < 6
        assert row["shade"] == pytest.approx(number(row["caption"]) * 7 % 100 / 100)
    ((loud,),) = [rows([table]) for table in run.drops("no_shouting") if len(table)]
    (row,) = run.take(loud["unit"], [loud["row"]], ["image", "caption", "shade"]).to_pylist()
    assert (row["image"], row["caption"], row["shade"]) == (None, "PLEASE LOOK AT THIS", None), "never measured"
    assert run.take(0, [], "image").schema == pa.schema(
        [("unit", pa.int32()), ("row", pa.int32()), ("image", pa.binary())]
    )


def test_pictures(runs: Path, copy: Path) -> None:
    run = open_run(runs / "out")
    kept = rows(run.scan(["uid", "image"]))[5:300:50]
    gone = rows(run.drops("threshold"))[:3]
    loud = rows(run.drops("no_shouting"))[0]["uid"]
    found = run.pictures([loud, "f" * 32, *(row["uid"] for row in kept + gone)])
    images = [run.take(row["unit"], [row["row"]], "image")["image"][0].as_py() for row in gone]
    expected = {row["uid"]: row["image"] for row in kept}
    assert found == expected | {row["uid"]: image for row, image in zip(gone, images)}
    shutil.rmtree(copy / "passes")
    assert open_run(copy).pictures(found) == expected, "those that the shards hold"
    assert run.pictures([]) == {}


def test_a_run_without_its_passes(runs: Path, copy: Path) -> None:
    shutil.rmtree(copy / "passes")
    run, whole = open_run(copy), open_run(runs / "out")
    assert (run.rows_in, run.kept, list(run.funnel.lines)) == (721, 350, LABELS)
    columns = ["caption", "shade"]
    assert rows(run.scan(columns)) == [{**row, "unit": None, "row": None} for row in rows(whole.scan(columns))]
    assert run.columns() == {k: v for k, v in whole.columns().items() if k != "image"}
    for refused in (
        lambda: run.scan(["shade"], after="paint"),
        lambda: run.take(0, [0], "uid"),
        lambda: run.columns("pool"),
        lambda: run.units,
    ):
        with pytest.raises(RunError, match=r"passes/.*: missing or not complete. .* drops\(\) and scan\(\) after"):
            refused()
    with pytest.raises(RunError, match="no column 'image' after write_shards"):
        run.scan(["image"])


def test_an_unfinished_run(copy: Path) -> None:
    """A run that was interrupted during its threshold. `drops` and `shards` are from an earlier recipe."""
    at = copy / "run.json"
    at.write_text(at.read_text().replace('"top_fraction": 0.5', '"top_fraction": 0.3'))
    for folder in (*copy.glob("passes/03-*"), *copy.glob("passes/04-*")):
        (folder / "complete.json").unlink()
    run = open_run(copy)
    assert not run.finished
    assert sum(map(len, run.scan(["shade"], after="paint"))) == 700
    assert sum(map(len, run.drops("exact_dedup"))) == 20
    assert len(run.pictures([row["uid"] for row in rows(run.scan(["uid"], "paint", units=[0]))][:3])) == 3
    for refused in (lambda: run.funnel, lambda: run.kept, lambda: run.scan(), lambda: run.drops()):
        with pytest.raises(RunError, match=f"{copy} is not finished, so .* cannot be read yet; run its command"):
            refused()


@pytest.mark.parametrize("name", ["out", "changed", "arm"])
def test_picture_ranges_are_the_pictures(runs: Path, name: str) -> None:
    run = open_run(runs / name)
    for table in run.scan(["image"], after="paint", units=[3]):
        files, ranges = run.picture_ranges(3, table["row"].to_numpy()[::-1])
        for (number, at, size), image in zip(ranges.tolist(), table["image"].to_pylist()[::-1]):
            assert Path(files[number]["name"]).read_bytes()[at : at + size] == image
    with pytest.raises(DamagedError, match="lacks rows"):
        run.picture_ranges(3, [100_000])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: run.scan(["shad"]), "no column 'shad' after write_shards; did you mean shade?"),
        (lambda run: run.scan(["shade"], after="pool"), "no column 'shade' after pool; it can be read after paint"),
        (lambda run: run.scan(after="treshold"), "no step 'treshold'; did you mean threshold?"),
        (lambda run: run.columns("x"), "no step 'x'; the steps are pool, no_shouting, "),
        (lambda run: run.drops("pain"), "no step 'pain'; did you mean paint?"),
        (lambda run: run.scan(units=[8]), "no unit 8; they are numbered 0 to 7"),
        (lambda run: run.take(9, [0], "uid"), "no unit 9"),
        (lambda run: run.take(0, [100_000], "uid"), "unit 0 has the rows 0 to "),
        (lambda run: run.take(0, [0], "imag"), "no column 'imag'; did you mean image?"),
    ],
)
def test_missing_passes_and_columns_are_reported(runs: Path, ask: Callable[[Run], Any], message: str) -> None:
    with pytest.raises(RunError, match="out: ") as error:
        ask(open_run(runs / "out"))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "is not the folder of a run: there is no"),
        ("{", "run.json: not the description of a run of Winnow"),
        ("[1]", "run.json: not the description of a run of Winnow"),
        ('{"name": "x", "recipe": {}, "passes": []}', "run.json: not the description of a run of Winnow"),
        ('{"name": "x", "recipe": {}, "passes": [{"root": "a", "measures": false}]}', "written by an earlier version"),
        ('{"name": "x", "recipe": {}, "passes": [{"schema": "?"}]}', "run.json: not the description of a run"),
    ],
)
def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path, contents: str | None, message: str) -> None:
    if contents is not None:
        (tmp_path / "run.json").write_text(contents)
    with pytest.raises(RunError, match=str(tmp_path)) as error:
        open_run(tmp_path)
    assert message in str(error.value)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(RunError, match="is not the folder of a run"):
            open_run(path)
    with pytest.raises(RunError, match="nothing://x cannot be read: ValueError: "):
        open_run("nothing://x")


def test_damage_is_named(copy: Path) -> None:
    file = sorted(copy.glob("passes/paint-*/units/*.parquet"))[2]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=f"{file}: damaged"):
        list(open_run(copy).scan(["shade"]))


def test_pictures_of_a_lender_that_is_gone_are_named(runs: Path, tmp_path: Path) -> None:
    (painted,) = (runs / "out/passes").glob("paint-*")
    hidden = painted.rename(tmp_path / "hidden")
    try:
        assert len(rows(open_run(runs / "arm").scan(["shade"]))), "numbers were copied"
        with pytest.raises(DamagedError, match=rf"{painted}/units/\S+\.arrow: missing"):
            list(open_run(runs / "arm").scan(["image"]))
    finally:
        hidden.rename(painted)


def test_an_object_store(runs: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(runs / "out"), "/read/run", recursive=True)
    like(open_run("memory://read/run"), open_run(runs / "out"))


def like(remote: Run, local: Run) -> None:
    for label in local.funnel.lines:
        assert rows(remote.scan(["uid"], label)) == rows(local.scan(["uid"], label))
    assert rows(remote.scan(["image", "shade"])) == rows(local.scan(["image", "shade"]))
    assert rows(remote.drops()) == rows(local.drops())
    uids = [row["uid"] for row in [*rows(local.scan(["uid"]))[:3], *rows(local.drops("threshold"))[:2]]]
    assert remote.pictures(uids) == local.pictures(uids)
    assert len(local.pictures(uids)) == 5


def test_the_example(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = read_a_run.main(str(runs / "out"), "shade")
    shades = np.array([i * 7 % 100 / 100 for i in range(700)], np.float32)
    assert counts.tolist() == np.histogram(shades, bins=40, range=(0, 1))[0].tolist()
    assert len(capsys.readouterr().out.splitlines()) == 40
