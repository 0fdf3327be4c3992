"""Damage to a finished run: `verify` finds every kind of damage in every kind of file, `run` repairs or reports it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline import verify
from pipeline.storage import Store, sealed, unsealed
from tests.conftest import Command
from tests.test_run import shards

KINDS = [
    "run.json",
    "funnel.json",
    "seal.json",
    "drops/*.parquet",
    "shards/*.tar",
    "shards/0*.parquet",
    "shards/*.index.npy",
    "shards/manifest.json",
    "shards/sizes.json",
    "shards/wids.json",
    "shards/subset.npy",
    "shards/croissant.json",
    "shards/README.md",
    "shards/OWNER",
    "shards/_SUCCESS",
    "passes/00-*/commits/*.json",
    "passes/00-*/units/*.parquet",
    "passes/00-*/complete.json",
    "passes/01-*/commits/*.json",
    "passes/01-*/units/*.parquet",
    "passes/01-*/complete.json",
    "passes/paint-*/commits/*.json",
    "passes/paint-*/units/*.parquet",
    "passes/paint-*/units/*.arrow",
    "passes/paint-*/complete-*.json",
    "passes/03-*/drops/*.parquet",
    "passes/03-*/complete.json",
    "passes/04-*/commits/*.json",
    "passes/04-*/complete.json",
]

ALWAYS_HASHED = [kind for kind in KINDS if kind.startswith("passes") and kind.endswith(".json")]
ALWAYS_HASHED += ["seal.json", "shards/manifest.json"]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def swap(file: Path) -> None:
    """Swaps a file with another of the same suffix, preferably from its folder."""
    (run,) = (folder for folder in file.parents if folder.name == "out")
    kin = [*sorted(file.parent.iterdir()), *sorted(run.rglob("*.*")), *sorted(run.rglob("*.json"))]
    kin = [f for f in kin if f.is_file() and f != file]
    other = next((f for f in kin if f.suffixes == file.suffixes), kin[-1])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip, "cut": cut, "empty": empty, "delete": Path.unlink, "swap": swap
}  # fmt: skip
MATRIX = [
    (kind, damage) for kind in KINDS for damage in DAMAGES
    if kind != "shards/_SUCCESS" or damage in ("delete", "swap")  # it is empty
]  # fmt: skip


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished run `out`, which each test leaves as it was."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("project"), dirs_exist_ok=True))


@contextmanager
def damaged(run: Path, kind: str, damage: str) -> Iterator[Path]:
    """Damages a file for the duration of the block."""
    files = sorted(run.glob(kind))
    file = files[len(files) // 2]
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    DAMAGES[damage](file)
    try:
        yield file
    finally:
        for f in [f for f in run.rglob("*") if f.is_file() and f not in before]:
            f.unlink()  # a command recomputes it under other names
        for f, data in before.items():
            f.write_bytes(data)


def problems(run: Path, deep: bool = True) -> list[str]:
    return list(verify.problems(Store(str(run)), Console(quiet=True), deep))


def test_the_matrix_covers_every_file_of_a_run(project: Path) -> None:
    every = {file for file in (project / "out").rglob("*") if file.is_file()}
    every -= {project / "out/events.jsonl", project / "out/report/index.html"}  # nothing relies on these
    assert every == {file for kind in KINDS for file in (project / "out").glob(kind)}
    assert problems(project / "out") == []


@pytest.mark.parametrize(("kind", "damage"), MATRIX)
def test_every_damage_is_reported_with_its_file(project: Path, kind: str, damage: str) -> None:
    with damaged(project / "out", kind, damage) as file:
        lines = problems(project / "out")
        others = file.parent.glob("*.json") if damage == "swap" else ()  # which of the two is named is the same
        assert any(str(f) in line for f in (file, *others) for line in lines), lines
        assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(("kind", "damage"), MATRIX)
def test_a_quick_check_lists_what_it_did_not_check(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, damage: str
) -> None:
    monkeypatch.setattr(verify, "FULL_BYTES", 0)
    with damaged(project / "out", kind, damage) as file:
        status = verify.main([str(project / "out")])
        output = capsys.readouterr()
        if damage in ("cut", "empty", "delete") or kind in ALWAYS_HASHED:
            assert status == 1
            assert str(file) in output.err
        assert "not checked: the contents of" in output.out or status == 1
        assert "Traceback" not in output.err


def edit(run: Path, pattern: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a table, and the records so that they agree with it."""
    file = sorted(run.glob(pattern))[0]
    pq.write_table(change(pq.read_table(file)), file)
    entry = Store(str(run)).entry(str(file.relative_to(run)))
    seal = unsealed((run / "seal.json").read_bytes(), "")
    seal["files"] = [entry if e["name"] == entry["name"] else e for e in seal["files"]]
    (run / "seal.json").write_bytes(sealed(seal))


def with_uid(table: pa.Table, uid: str) -> pa.Table:
    at = table.column_names.index("uid")
    return table.set_column(at, "uid", pa.array([uid, *table["uid"].to_pylist()[1:]]))


def test_duplicate_and_missing_rows_are_named(project: Path, tmp_path: Path) -> None:
    """All records are valid; only the rows are wrong."""
    run = tmp_path / "out"
    shutil.copytree(project / "out", run)
    kept = pq.read_table(run / "shards/00000.parquet")["uid"][0].as_py()
    lost = pq.read_table(run / "drops/00000.parquet")["uid"][0].as_py()
    edit(run, "drops/*.parquet", lambda table: with_uid(table, kept))
    assert sorted(line.removeprefix(str(run)) for line in problems(run)) == sorted(
        [
            f"/drops/00000.parquet and {run}/shards/00000.parquet: {kept} occurs 1 times more than in the pool",
            f"/drops: {lost} of the pool is neither in the drops nor in the shards",
        ]
    )


def test_files_without_a_record_are_named(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "out"
    shutil.copytree(project / "out", run)
    (unit,) = run.glob("passes/paint-*/units")
    strays = [
        run / "shards/00099.tar",
        run / "drops/00099.parquet",
        unit / "0000000-aa.parquet",
        unit / ".0000000-aa.arrow.0123456789ab.part",
        run / ".funnel.json.0123456789ab.part",
    ]
    for stray in strays:
        stray.write_bytes(b"?")
    (run / "shards/.nfs0001").write_bytes(b"not ours")
    (run / "metrics.jsonl").write_bytes(b"of a training that has the run as its output")
    assert sorted(problems(run)) == sorted(f"{stray}: no record names this file" for stray in strays)


def test_a_dataset_alone_can_be_verified(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "out"
    shutil.copytree(project / "out", run)
    shutil.rmtree(run / "passes")
    assert verify.main([str(run), "--deep"]) == 0
    assert "not checked: downloads, scores" in capsys.readouterr().out
    flip(run / "shards/00002.tar")
    assert verify.main([str(run), "--deep"]) == 1


def test_a_folder_without_a_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(tmp_path / "nowhere")]) == 1
    assert "seal.json: missing: the run is not finished, or this is not the folder of a run" in capsys.readouterr().err


def test_the_same_command_repairs_reproducible_damage(run: Command, project: Path, tmp_path: Path) -> None:
    """One damage of each kind, all at once."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    once = shards(out)
    for kind, damage in [
        ("run.json", "flip"),
        ("funnel.json", "delete"),
        ("seal.json", "cut"),
        ("drops/*.parquet", "flip"),
        ("shards/*.tar", "flip"),
        ("shards/0*.parquet", "swap"),
        ("shards/*.index.npy", "delete"),
        ("shards/manifest.json", "delete"),
        ("passes/01-*/commits/*.json", "empty"),
        ("passes/paint-*/units/*.parquet", "cut"),
        ("passes/paint-*/units/*.arrow", "delete"),
        ("passes/03-*/drops/*.parquet", "flip"),
    ]:
        files = sorted(out.glob(kind))
        DAMAGES[damage](files[-1 if damage == "delete" else len(files) // 2])
    (out / "shards/00099.tar").write_bytes(b"?")
    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    assert "repaired: " in done.stdout
    assert problems(out) == []
    assert shards(out) == once


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("units/*.arrow", "its sha256 does not match its record"),
        ("commits/*.json", "the record does not match its own"),
    ],
)
def test_irreproducible_damage_is_named_with_its_cure(
    run: Command, project: Path, tmp_path: Path, kind: str, problem: str
) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "steps_of_mine/paint.py"
    step.write_text(step.read_text().replace("expensive = True", "expensive = True\n    repeatable = False"))
    file = sorted((tmp_path / "out").glob(f"passes/paint-*/{kind}"))[3]
    flip(file)
    done = run("r.yaml")
    assert done.returncode == 1
    assert f"{file}: damaged: {problem}" in done.stderr
    assert "(unit 3 of the pass paint)" in done.stderr
    assert "restore it from a copy; or, to fetch again what is still online, remove" in done.stderr
    assert "Traceback" not in done.stderr
    shutil.rmtree(file.parent.parent)
    done = run("r.yaml")
    assert done.returncode == 1
    assert f"{file.parent.parent}: only 0 of 8 units are there, and later passes depend on the others" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_repairs_or_reports_damage(
    run: Command, project: Path, tmp_path: Path, kind: str, repeatable: bool
) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    if not repeatable:
        step = tmp_path / "steps_of_mine/paint.py"
        step.write_text(step.read_text().replace("expensive = True", "expensive = True\n    repeatable = False"))
        if "/paint-" not in kind:
            pytest.skip("the step is not asked")
    for damage in [damage for damaged_kind, damage in MATRIX if damaged_kind == kind]:
        with damaged(out, kind, damage) as file:
            done = run("r.yaml")
            assert "Traceback" not in done.stderr
            if done.returncode == 0:
                assert problems(out) == [], damage
                continue
            assert done.returncode == 1
            assert not repeatable
            assert str(file) in done.stderr
            assert "of the pass paint). To continue, restore it from a copy" in done.stderr
