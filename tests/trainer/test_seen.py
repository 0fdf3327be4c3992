"""`trainer.seen`, compared with the recorded batches of real trainings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.shards import samples, write_shards, write_tar
from trainer import seen, train
from trainer.data import Batch
from trainer.mixture import Mixture
from trainer.order import shuffled, unshuffled
from trainer.shards import Shards
from trainer.training import Run

BASE = {"model": "scorer-64", "batch_size": 8, "lr": 0.001, "warmup": 2, "workers": 0, "precision": "fp32"}


def uid_of(name: str, number: int) -> str:
    return hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:32]


def with_tables(folder: Path, count: int, spoilt: tuple[int, ...] = ()) -> Path:
    """Shards as a run writes them, with the uids in the tables."""
    pairs = [(b"no image" if i in spoilt else image, caption) for i, (image, caption) in enumerate(samples(count))]
    write_shards(folder, pairs)
    for start in range(0, count, 16):
        uids = [uid_of(folder.name, i) for i in range(start, min(start + 16, count))]
        pq.write_table(pa.table({"uid": uids}), folder / f"{start // 16:05d}.parquet")
    return folder


def with_json(folder: Path, count: int) -> Path:
    """Tars alone, with the uids in the JSON of each sample."""
    folder.mkdir()
    members = []
    for i, (image, caption) in enumerate(samples(count)):
        about = {"uid": uid_of(folder.name, i)} if i % 5 else {}
        members += [(f"{i:09d}.jpg", image), (f"{i:09d}.json", json.dumps(about).encode())]
        members += [(f"{i:09d}.txt", caption.encode())]
    write_tar(folder / "00000.tar", members)
    return folder


def recorded(output: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> list[list[int]]:
    """Trains, and returns the sample numbers of each step."""
    steps: list[list[int]] = []
    real = Run.train_step

    def train_step(self: Run, batch: Batch) -> dict[str, float]:
        steps.append(batch.numbers)
        return real(self, batch)

    conf = output.with_suffix(".yaml")
    conf.write_text(
        "".join(f"{key}: {json.dumps(value)}\n" for key, value in {**BASE, "export": False, **changes}.items())
    )
    with monkeypatch.context() as patched:
        patched.setattr(Run, "train_step", train_step)
        assert train.main([str(conf), f"output={output}"]) == 0
    return steps


def asked(
    capsys: pytest.CaptureFixture[str], folder: Path, output: Path, uids: list[str], *words: str
) -> dict[str, list[int]]:
    (folder / "uids.txt").write_text("\ufeff# who asked\n" + "\n".join(uids).upper() + "\n")
    capsys.readouterr()
    assert seen.main([str(output), "--uids", str(folder / "uids.txt"), *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["uid"] for line in lines] == uids
    assert all(bool(line["steps"]) <= bool(line["samples"]) for line in lines)
    return {line["uid"]: line["steps"] for line in lines}


def steps_of(steps: list[list[int]], number: int) -> list[int]:
    return [i for i, numbers in enumerate(steps, 1) for one in numbers if one == number]


@pytest.mark.parametrize("spoilt", [(), (3, 4, 5, 6, 20, 21, 22, 23, 24, 25, 30)])
def test_steps_are_those_of_a_recorded_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoilt: tuple[int, ...]
) -> None:
    data = with_tables(tmp_path / "data", 36, spoilt)
    steps = recorded(tmp_path / "out", monkeypatch, shards=str(data), samples=8 * 11)
    assert len(steps) == 11, "2 epochs of 4 steps, of which 4 samples are left out, and 3 steps"
    uids = [uid_of("data", i) for i in range(36)]
    found = asked(capsys, tmp_path, tmp_path / "out", [*uids, uid_of("other", 1)])
    assert found == {uid: steps_of(steps, i) for i, uid in enumerate(uids)} | {uid_of("other", 1): []}
    assert sum(map(len, found.values())) == 88


def test_mixtures_with_uids_in_tables_and_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [with_tables(tmp_path / "a", 20, (1, 2)), with_json(tmp_path / "b", 7)]
    shards = [{"path": str(source), "weight": weight} for source, weight in zip(sources, (1, 2))]
    steps = recorded(tmp_path / "out", monkeypatch, shards=shards, epochs=4)
    named = [(uid_of("a", i), i) for i in range(20)] + [(uid_of("b", i), 20 + i) for i in range(7) if i % 5]
    found = asked(capsys, tmp_path, tmp_path / "out", [uid for uid, _ in named])
    assert found == {uid: steps_of(steps, number) for uid, number in named}
    assert max(map(len, found.values())) > 4, "a sample repeats within an epoch"


@pytest.mark.parametrize("count", [1, 2, 3, 64, 1000, 4097])
def test_unshuffled_is_the_inverse(count: int) -> None:
    order = shuffled(np.arange(count), count, seed=3, epoch=5)
    assert unshuffled(order, count, seed=3, epoch=5).tolist() == list(range(count))


@pytest.mark.parametrize("weights", [(1, 1, 1), (70, 20, 10), (0.5, 0.001, 0.499)])
def test_positions_are_the_inverse_of_order_in_mixtures(tmp_path: Path, weights: tuple[float, ...]) -> None:
    parts = [Shards(write_shards(tmp_path / str(n), samples(n))) for n in (40, 7, 20)]
    mixture = Mixture(list(zip(parts, weights)))
    for epoch in (0, 1, 5, 977, 978, 1955):  # a cycle is 978 epochs of 67
        expected: dict[int, list[int]] = {}
        for position, number in enumerate(mixture.order(np.arange(67), 5, epoch).tolist()):
            expected.setdefault(number, []).append(position)
        indices, positions = mixture.positions(np.arange(67), 5, epoch)
        found: dict[int, list[int]] = {}
        for number, position in sorted(zip(indices.tolist(), positions.tolist())):
            found.setdefault(number, []).append(position)
        assert found == expected


def test_bad_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_tables(tmp_path / "data", 16)
    recorded(tmp_path / "out", monkeypatch, shards=str(data), epochs=1)
    uids = tmp_path / "uids.txt"
    other = with_tables(tmp_path / "other", 17)
    for text, words, message in [
        ("12\n", [], "uids.txt:1: found '12', expected 32 hex digits"),
        ("", [], "lists no uid"),
        (uid_of("data", 1), ["--shards", str(other)], "trained on other data than"),
    ]:
        uids.write_text(text)
        assert seen.main([str(tmp_path / "out"), "--uids", str(uids), *words]) == 2
        assert message in capsys.readouterr().err
    assert seen.main([str(tmp_path / "none"), "--uids", str(uids)]) == 2
    pq.write_table(pa.table({"uid": ["a"]}), data / "00000.parquet")
    assert seen.main([str(tmp_path / "out"), "--uids", str(uids)]) == 2
    assert "1 rows, expected the 16 of 00000.tar" in capsys.readouterr().err
