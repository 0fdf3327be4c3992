"""Merging all captions of a picture: from a pool with repeated URLs and pictures to the batches of a training."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import takedown, verify
from pipeline.reader import open_run
from pipeline.storage import Store
from tests.conftest import Command
from tests.test_run import books_balance, furnish, shards
from tests.test_verify import edit, problems
from trainer.data import Batches
from trainer.mixture import Mixture
from trainer.order import mix
from trainer.shards import Shards

RECIPE = """
name: captions
pool: {path: pool.csv}
run: out
unit_rows: 50
steps:
  - exact_dedup: {by: [url], captions: merge}
  - steps_of_mine.paint
  - exact_dedup: {by: [shade], captions: merge}
  - write_shards: {samples_per_shard: 20}
"""
PICTURES = 90


def uid(url: str, caption: str) -> str:
    return hashlib.sha256(f"{url}\0{caption}".encode()).hexdigest()[:32]


def rows() -> list[tuple[str, str]]:
    """Picture i has one or two URLs, with one to six captions each. Its shade is a function of i."""
    return [
        (f"http://h/{i}/{copy}", f"caption {k} of copy {copy} of {i}")
        for i in range(PICTURES)
        for copy in range(1 + (i % 4 == 0))
        for k in range(1 + i % 6)
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = furnish(tmp_path_factory.mktemp("captions"))
    (folder / "r.yaml").write_text(RECIPE)
    lines = [f"{url},{caption}" for url, caption in rows()]
    (folder / "pool.csv").write_text("url,caption\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture
def made(run: Command, project: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which the first test makes."""
    if not (project / "out").exists():
        shutil.copytree(project, tmp_path, dirs_exist_ok=True)
        done = run("r.yaml")
        assert done.returncode == 0, done.stderr
        shutil.copytree(tmp_path / "out", project / "out")
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def expected() -> dict[str, list[str]]:
    """For each kept row, the uids of all captions of its shade, starting with its own."""
    by_url: dict[str, list[str]] = {}
    for url, caption in rows():
        by_url.setdefault(url, []).append(uid(url, caption))
    by_shade: dict[float, list[list[str]]] = {}
    for url, uids in by_url.items():
        i = int(url.split("/")[3])
        by_shade.setdefault(round(i * 7 % 100 / 100, 2), []).append(sorted(uids))
    groups = [sorted(lists) for lists in by_shade.values()]
    return {lists[0][0]: [one for uids in lists for one in uids] for lists in groups}


def captions_by_uid(run: Path) -> dict[str, Any]:
    table = pa.concat_tables(pq.read_table(path) for path in sorted((run / "shards").glob("*.parquet")))
    return dict(zip(table["uid"].to_pylist(), table["captions"].to_pylist()))


def test_every_row_is_a_caption_or_a_drop_and_the_keeper_is_named(made: Path) -> None:
    captions = captions_by_uid(made)
    assert {k: v and [one["uid"] for one in v] for k, v in captions.items()} == {
        keeper: uids if len(uids) > 1 else None for keeper, uids in expected().items()
    }
    texts = {uid(url, caption): caption for url, caption in rows()}
    assert all(one["caption"] == texts[one["uid"]] for several in captions.values() for one in several or ())
    books_balance(made, len(rows()))
    assert problems(made) == []
    drops = pa.concat_tables(open_run(made).drops(reason="merged"))
    assert len(drops) == len(rows()) - len(captions)
    lists = {other: keeper for keeper, uids in expected().items() for other in uids}
    keepers = dict(zip(drops["uid"].to_pylist(), drops["detail"].to_pylist()))
    for other, keeper in keepers.items():
        while keeper in keepers:  # merged by URL into a row that was then merged by shade
            keeper = keepers[keeper]
        assert keeper == lists[other]


def test_the_read_api_gives_the_captions_of_the_shards(made: Path) -> None:
    run, captions = open_run(made), captions_by_uid(made)
    read = pa.concat_tables(run.scan(["uid", "captions"]))
    assert dict(zip(read["uid"].to_pylist(), read["captions"].to_pylist())) == captions
    unit = read["unit"][0].as_py()
    mine = read.filter(pa.compute.equal(read["unit"], unit))
    taken = run.take(unit, mine["row"].to_numpy(), ["uid", "captions"])
    assert taken["captions"].to_pylist() == mine["captions"].to_pylist()


def test_the_json_lists_them(made: Path) -> None:
    import tarfile

    captions = captions_by_uid(made)
    with tarfile.open(made / "shards/00000.tar") as tar:
        samples = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
    assert [sample["captions"] for sample in samples] == [captions[sample["uid"]] for sample in samples]
    assert json.loads((made / "shards/manifest.json").read_text())["captions"] is True


def test_a_training_draws_one_by_seed_epoch_and_position(made: Path) -> None:
    class Words:
        """A tokenizer that gives different captions different tokens."""

        def __call__(self, texts: list[str]) -> list[str]:
            return texts

    plain, captions = Shards(made), captions_by_uid(made)
    uids = [one for held in plain.uids() for one in held]
    for data in (plain, Mixture([(plain, 1.0)])):
        batches = Batches(data, 16, 32, Words(), seed=3)  # type: ignore[arg-type]
        drawn: dict[str, set[str]] = {}
        for step in range(8 * batches.per_epoch):
            batch = batches[step]
            epoch, nth = divmod(step, batches.per_epoch)
            for i, (number, text) in enumerate(zip(batch.numbers, batch.tokens)):
                several = captions[str(uids[number])]
                drawn.setdefault(str(uids[number]), set()).add(text)
                if several:
                    draw = int(mix(3, epoch, 1 << 34, nth * 16 + i)[0])
                    assert text == several[draw % len(several)]["caption"]
            parts = [batches.part(step, rank, 2).tokens for rank in range(2)]
            assert [text for part in parts for text in part] == batch.tokens
        assert max(map(len, drawn.values())) > 4
    assert plain.read(0)[1] == pq.read_table(made / "shards/00000.parquet")["caption"][0].as_py()


@pytest.mark.slow
def test_merging_changes_nothing_else(run: Command, made: Path, tmp_path: Path) -> None:
    done = run("r.yaml", "workers=1", "unit_rows=1000", "run=other")
    assert done.returncode == 0, done.stderr
    assert captions_by_uid(tmp_path / "other") == captions_by_uid(made), "whatever the units and workers"
    assert shards(tmp_path / "other") == shards(made)


def without_last_caption(table: pa.Table) -> pa.Table:
    several = table["captions"].to_pylist()
    at = next(i for i, one in enumerate(several) if one)
    several[at] = several[at][:-1]
    return table.set_column(table.column_names.index("captions"), "captions", pa.array(several, table["captions"].type))


def with_a_stranger(table: pa.Table) -> pa.Table:
    several = table["captions"].to_pylist()
    at = next(i for i, one in enumerate(several) if one)
    several[at] = [*several[at], {"caption": "a stranger", "uid": "f" * 32, "language": None}]
    return table.set_column(table.column_names.index("captions"), "captions", pa.array(several, table["captions"].type))


@pytest.mark.parametrize(
    ("change", "message"),
    [(without_last_caption, "a merged row, is missing"), (with_a_stranger, "but no drop says that it was merged")],
)
@pytest.mark.parametrize("at_once", [10, 4_000_000])
def test_verify_compares_captions_with_drops(
    made: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str, at_once: int
) -> None:
    monkeypatch.setattr(verify, "MERGED_AT_ONCE", at_once)
    assert problems(made) == []
    edit(made, "shards/0*.parquet", change)
    store = Store(str(made / "shards"))
    manifest = json.loads((made / "shards/manifest.json").read_text())
    entry = store.entry("00000.parquet")
    manifest["files"]["00000.parquet"] = {key: entry[key] for key in ("bytes", "sha256")}
    (made / "shards/manifest.json").write_text(json.dumps(manifest))
    reseal(made)
    lines = problems(made)
    assert any(message in line for line in lines), lines


def reseal(run: Path) -> None:
    from pipeline.storage import sealed, unsealed

    seal = unsealed((run / "seal.json").read_bytes(), "")
    store = Store(str(run))
    seal["files"] = [store.entry(entry["name"]) for entry in seal["files"]]
    (run / "seal.json").write_bytes(sealed(seal))


def test_a_takedown_of_one_caption_removes_the_whole_sample(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    keeper, others = next((k, v) for k, v in expected().items() if len(v) > 3)
    (tmp_path / "list.txt").write_text(f"uid {others[2]}\n")
    assert takedown.main([str(made), str(tmp_path / "list.txt")]) == 0
    assert keeper not in captions_by_uid(made)
    assert problems(made) == []
    books_balance(made, len(rows()))
