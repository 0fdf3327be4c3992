from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binom

from tests.trainer.labelled import texture
from tests.trainer.shards import jpeg, write_shards
from trainer.evaluate.__main__ import main
from trainer.evaluate.overlap import contamination
from trainer.search import main as search


def test_contamination_by_hand() -> None:
    right = np.array([1] * 6 + [0] * 4 + [1] * 9 + [0], bool)
    overlap = np.array([0] * 10 + [1] * 10, bool)
    found = contamination(right, overlap)
    assert (found["images"], found["overlap"], found["overlap_share"]) == (20, 10, 0.5)
    assert (found["acc1_all"], found["acc1_clean"], found["acc1_overlap"]) == (0.75, 0.6, 0.9)
    assert found["acc1_all_minus_clean"] == pytest.approx(0.15)
    assert found["p_value"] == pytest.approx(binom.sf(8, 10, 0.6))
    low, high = found["acc1_overlap_interval"]
    # Clopper-Pearson: the ends at which 9 of 10 becomes a chance of a quarter of a percent.
    assert binom.sf(8, 10, low) == pytest.approx(0.0025, rel=1e-3)
    assert binom.cdf(9, 10, high) == pytest.approx(0.0025, rel=1e-3)


def test_nothing_in_common_or_everything() -> None:
    right = np.array([True, False])
    clean, dirty = (contamination(right, np.full(2, value)) for value in (False, True))
    assert (clean["overlap"], clean["acc1_overlap"], clean["p_value"], clean["acc1_clean"]) == (0, None, None, 0.5)
    assert (dirty["overlap"], dirty["acc1_clean"], dirty["p_value"], dirty["acc1_overlap"]) == (2, None, None, 0.5)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve training pictures, and a test set of which half are six of these, enlarged and compressed again."""
    shards = write_shards(tmp_path / "shards", [(jpeg(texture(i)), f"texture {i}") for i in range(12)], per_shard=5)
    for name, seeds in (("even", (0, 2, 4, 100, 102, 104)), ("odd", (1, 3, 5, 101, 103, 105))):
        (tmp_path / "test" / name).mkdir(parents=True)
        for seed in seeds:
            texture(seed, 96).save(tmp_path / "test" / name / f"{seed:03d}.jpg", quality=60)
    return tmp_path / "test", shards


def pairs(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {Path(line["image"]).stem: line["train"] for line in lines}


def test_near_copies_are_found_by_either_detector(
    evaluate, data: tuple[Path, Path], tmp_path: Path, model: str
) -> None:  # type: ignore[no-untyped-def]
    test, shards = data
    copies = {f"{i:03d}": f"{i // 5:05d}.tar:{i:09d}" for i in range(6)}
    found = evaluate("overlap", "--data", test, "--train", shards, "--pairs", tmp_path / "a")
    assert (found["images"], found["overlap"]) == (12, 6)
    assert pairs(tmp_path / "a") == copies
    words = ["--by", "embedding", "--min-cosine", 0.999]
    by_shards = evaluate("overlap", "--data", test, "--train", shards, "--pairs", tmp_path / "b", *words)
    assert pairs(tmp_path / "b") == copies
    assert by_shards == found
    # From embeddings that are there already, in several parts.
    assert search(["embed", str(shards), "--model", model, "--out", str(tmp_path / "emb"), "--part", "5"]) == 0
    assert evaluate("overlap", "--data", test, "--train", tmp_path / "emb", *words) == found


def test_stored_hashes_are_used(evaluate, data: tuple[Path, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    test, shards = data
    for number, count in enumerate((5, 5, 2)):
        column = pa.array([2**64 - 1] * count, pa.uint64())
        pq.write_table(pa.table({"phash": column}), shards / f"{number:05d}.parquet")
    assert evaluate("overlap", "--data", test, "--train", shards)["overlap"] == 0
    assert evaluate("overlap", "--data", test, "--train", shards, "--max-hamming", 16)["overlap"] == 0


def test_a_test_picture_that_cannot_be_read_is_an_error(
    model: str, data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (data[0] / "odd" / "x.jpg").write_bytes(b"")
    assert main(["overlap", "--model", model, "--data", str(data[0]), "--train", str(data[1])]) == 2
    assert "x.jpg" in capsys.readouterr().err
