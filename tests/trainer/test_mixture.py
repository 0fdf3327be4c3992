from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.shards import samples, write_shards
from trainer.data import Batches, open_shards
from trainer.mixture import Mixture
from trainer.model import create
from trainer.shards import Shards, ShardsError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Shards]:
    folder = tmp_path_factory.mktemp("sources")
    return [Shards(write_shards(folder / str(count), samples(count))) for count in (40, 7, 20)]


def source_of(numbers: np.ndarray) -> np.ndarray:
    return np.searchsorted([40, 47], numbers, side="right")


@pytest.mark.parametrize("weights", [(1, 1, 1), (70, 20, 10), (0.5, 0.001, 0.499), (3, 1, 2)])
def test_every_window_has_its_shares(sources: list[Shards], weights: tuple[float, ...]) -> None:
    mixture = Mixture(list(zip(sources, weights)))
    drawn = source_of(np.concatenate([mixture.order(np.arange(67), 5, epoch) for epoch in range(60)]))
    for i, weight in enumerate(weights):
        counts = np.concatenate([[0], np.cumsum(drawn == i)])
        for length in (1, 10, 67, 256, 1000, len(drawn)):
            found = counts[length:] - counts[:-length]
            assert abs(found - length * weight / sum(weights)).max() <= 2


def test_each_pass_over_a_source_has_every_sample_once(sources: list[Shards]) -> None:
    mixture = Mixture(list(zip(sources, (1, 2, 1))))
    drawn = np.concatenate([mixture.order(np.arange(67), 5, epoch) for epoch in range(9)])
    for i, count in enumerate((40, 7, 20)):
        mine = drawn[source_of(drawn) == i]
        passes = [mine[start : start + count].tolist() for start in range(0, len(mine) - count + 1, count)]
        assert len(passes) >= 3
        assert all(
            sorted(numbers) == sorted(passes[0]) == list(range(min(mine), min(mine) + count)) for numbers in passes
        )
        assert passes[0] != passes[1]


def test_the_order_is_a_function_of_the_position(sources: list[Shards]) -> None:
    mixture = Mixture(list(zip(sources, (1, 2, 1))))
    whole = mixture.order(np.arange(67), 5, 3)
    assert np.concatenate([mixture.order(np.array([i]), 5, 3) for i in range(67)]).tolist() == whole.tolist()
    assert mixture.order(np.arange(67), 6, 3).tolist() != whole.tolist()


def test_samples_keep_their_captions_and_names(sources: list[Shards]) -> None:
    mixture = Mixture(list(zip(sources, (1, 1, 1))))
    assert len(mixture) == 67
    expected = samples(40) + samples(7) + samples(20)
    assert [mixture.read(number) for number in range(67)] == expected
    numbers = [66, 0, 41, 40, 39, 47, 0]
    assert list(mixture.read_many(numbers)) == [expected[number] for number in numbers]
    assert mixture.key(46) == f"{sources[1].folder}/00000.tar:000000006"


def test_ranks_and_workers_see_the_same_mixture(sources: list[Shards]) -> None:
    _, preprocess, tokenizer = create("scorer-64")
    batches = Batches(Mixture(list(zip(sources, (6, 1, 1)))), 16, preprocess.size, tokenizer, seed=1)
    assert batches.per_epoch == 4
    for step, batch in zip(range(2, 5), batches.from_step(2, 5, 2, pin=False)):
        parts = [next(batches.from_step(step, step + 1, 0, False, rank, 2)) for rank in range(2)]
        assert parts[0].numbers + parts[1].numbers == batch.numbers
        assert Counter(source_of(np.array(batch.numbers)).tolist()) == {0: 12, 1: 2, 2: 2}


def test_the_fingerprint_covers_contents_and_weights(sources: list[Shards]) -> None:
    same = Mixture(list(zip(sources, (1, 2, 1)))).fingerprint
    assert Mixture(list(zip(sources, (2, 4, 2)))).fingerprint == same
    assert Mixture(list(zip(sources, (1, 1, 1)))).fingerprint != same
    assert Mixture(list(zip(sources[::-1], (1, 2, 1)))).fingerprint != same


def test_a_configuration_names_one_source_or_several(sources: list[Shards]) -> None:
    paths = [shards.folder for shards in sources]
    assert isinstance(open_shards(paths[0]), Shards)
    assert open_shards(Path(paths[0])).fingerprint == sources[0].fingerprint
    mixed = open_shards([{"path": paths[0], "weight": 2}, {"path": paths[1], "weight": 0.5}])
    assert mixed.fingerprint == Mixture([(sources[0], 4), (sources[1], 1)]).fingerprint


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "empty"),
        ([{"path": "a"}], "expected {path: …, weight: …}"),
        (["a"], "expected {path: …, weight: …}"),
        ([{"path": "SOURCE", "weight": "1"}], "not a number"),
        ([{"path": "SOURCE", "weight": True}], "not a number"),
        ([{"path": "SOURCE", "weight": 0}], "expected a number above 0"),
        ([{"path": "SOURCE", "weight": float("nan")}], "expected a number above 0"),
        ([{"path": "SOURCE", "weight": 1e-6}, {"path": "SOURCE", "weight": 1}], "less than 1/65536"),
        ([{"path": "absent", "weight": 1}], "absent is not a folder"),
    ],
)
def test_invalid_weights_are_refused(sources: list[Shards], entries: list, message: str) -> None:  # type: ignore[type-arg]
    for entry in entries:
        if isinstance(entry, dict) and entry["path"] == "SOURCE":
            entry["path"] = sources[0].folder
    with pytest.raises(ShardsError, match=message):
        open_shards(entries)
