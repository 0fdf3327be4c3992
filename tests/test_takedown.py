"""`winnow takedown` on finished runs. Making the run needs Ray, but the command does not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import takedown
from pipeline.reader import open_run
from pipeline.stages.write_shards import WriteShards
from tests.conftest import Command
from tests.test_run import books_balance, shards
from tests.test_verify import problems
from trainer.shards import Shards


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a finished run `out`: 350 samples in shards of 100, 100, 100 and 50."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(str(tmp_path))  # the steps of the user
    for name in ("steps_of_mine", "no_shouting"):
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
    return tmp_path


def column(run: Path, shard: int, name: str) -> list[str]:
    found: list[str] = pq.read_table(run / f"shards/{shard:05d}.parquet")[name].to_pylist()
    return found


def listed(folder: Path, lines: list[str]) -> str:
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "list.txt")


def three_of_shard_1(run: Path) -> list[str]:
    return [f"uid {uid}" for uid in column(run, 1, "uid")[4:6]] + [f"url {column(run, 1, 'url')[99]}"]


def tar_bytes(run: Path, shard: int) -> dict[str, bytes]:
    import tarfile

    with tarfile.open(run / f"shards/{shard:05d}.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


@pytest.mark.parametrize("passes", [True, False])
def test_only_affected_shards_change_and_everything_follows(
    copy: Path, passes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy / "out"
    if not passes:
        shutil.rmtree(run / "passes")
    before, samples, gone = shards(run), tar_bytes(run, 1), column(run, 1, "key")
    entries = three_of_shard_1(run)
    uids = column(run, 1, "uid")
    assert takedown.main([str(run), listed(copy, entries)]) == 0
    output = capsys.readouterr().out
    assert "3 samples taken down (uid 2, url 1); 1 of 4 shards rewritten" in output
    assert ("passes still holds their pictures" in output) == passes
    assert problems(run) == []
    books_balance(run, 721)

    changed = {name for name, data in shards(run).items() if data != before[name]}
    documents = {"manifest.json", "sizes.json", "wids.json", "subset.npy", "croissant.json", "README.md"}
    assert changed == {"00001.tar", "00001.parquet", "00001.index.npy", *documents}
    keys = [gone[i] for i in (4, 5, 99)]
    rest = {name: data for name, data in samples.items() if name.partition(".")[0] not in keys}
    assert tar_bytes(run, 1) == rest, "the other samples keep their keys and bytes"
    manifest = json.loads((run / "shards/manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [100, 97, 100, 50]
    assert len(np.load(run / "shards/subset.npy")) == 347
    assert "taken_down 3" in (run / "shards/README.md").read_text().replace("\\", "")
    assert len(Shards(run)) == 347

    opened = open_run(run)
    assert opened.kept == 347
    drops = pa.concat_tables(opened.drops("write_shards", "taken_down"))
    assert set(drops["uid"].to_pylist()) == {uids[4], uids[5], uids[99]}
    assert {detail.partition(" ")[0] for detail in drops["detail"].to_pylist()} == {"uid", "url"}
    assert sum(map(len, opened.scan("uid"))) == 347

    once = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert takedown.main([str(run), listed(copy, entries)]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == once

    assert takedown.main([str(run), listed(copy, [f"url {column(run, 3, 'url')[0]}"])]) == 0
    assert problems(run) == []
    books_balance(run, 721)


def test_a_later_command_of_the_run_does_not_bring_them_back(run: Command, copy: Path) -> None:
    out = copy / "out"
    uids = [entry.split()[1] for entry in three_of_shard_1(out)[:2]]
    assert takedown.main([str(out), listed(copy, three_of_shard_1(out))]) == 0
    once = shards(out)
    (out / "shards/00001.tar").unlink()
    done = run("r.yaml")
    assert done.returncode == 0, done.stderr
    assert shards(out) == once, "a repair gives the same bytes"
    assert problems(out) == []
    done = run("r.yaml", "steps.threshold.top_fraction=0.9")
    assert done.returncode == 0, done.stderr
    kept = [uid for path in (out / "shards").glob("*.parquet") for uid in pq.read_table(path)["uid"].to_pylist()]
    assert not set(uids) & set(kept)
    assert "taken_down 3" in done.stdout
    assert problems(out) == []


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
def test_an_interrupted_command_is_continued(
    copy: Path, monkeypatch: pytest.MonkeyPatch, passes: bool, calls: int
) -> None:
    """The first command stops after it rewrote one or both shards, but not the files that describe them."""
    run = copy / "out"
    if not passes:
        shutil.rmtree(run / "passes")
    entries = [f"uid {column(run, 0, 'uid')[0]}", f"uid {column(run, 2, 'uid')[7]}"]
    shutil.copytree(run, copy / "undisturbed")
    assert takedown.main([str(copy / "undisturbed"), listed(copy, entries)]) == 0
    done = []
    real = WriteShards.remove

    def remove(self: WriteShards, *args: object) -> object:
        if len(done) == calls:
            raise OSError("the disk is gone")
        done.append(1)
        return real(self, *args)  # type: ignore[arg-type]

    def finish(*args: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(WriteShards, "remove", remove)
        broken.setattr(WriteShards, "finish", finish)
        broken.setattr(takedown, "AT_ONCE", 1)
        assert takedown.main([str(run), listed(copy, entries)]) == 1
    assert not (run / "shards/_SUCCESS").exists()
    assert takedown.main([str(run), listed(copy, entries)]) == 0
    assert shards(run) == shards(copy / "undisturbed")
    assert problems(run) == []
    books_balance(run, 721)


def test_a_shard_may_become_empty(copy: Path) -> None:
    run = copy / "out"
    assert takedown.main([str(run), listed(copy, [f"uid {uid}" for uid in column(run, 3, "uid")])]) == 0
    assert problems(run) == []
    assert len(Shards(run)) == 300


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nonsense"], "list.txt:1: found 'nonsense', expected one of uid, url"),
        ([f"phash {0:016x}"], "the shards have no column 'phash'"),
    ],
)
def test_an_unusable_list_changes_nothing(
    copy: Path, lines: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    once = {f: f.read_bytes() for f in (copy / "out").rglob("*") if f.is_file()}
    assert takedown.main([str(copy / "out"), listed(copy, lines)]) == 2
    assert message in capsys.readouterr().err
    assert {f: f.read_bytes() for f in (copy / "out").rglob("*") if f.is_file()} == once


def test_a_folder_without_a_finished_run_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = listed(copy, ["domain example.org"])
    assert takedown.main([str(copy / "nowhere"), path]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert not (copy / "nowhere").exists()
    (copy / "out/seal.json").unlink()
    assert takedown.main([str(copy / "out"), path]) == 2
    assert "is not finished" in capsys.readouterr().err
