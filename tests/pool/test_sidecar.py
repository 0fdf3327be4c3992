"""Vectors in files next to the tables of a pool: CommonPool's `.npz`, clip-retrieval's `.npy`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import pool
from pipeline.pool import sidecar
from pipeline.recipe import PoolSpec

NPZ = {"image_embedding": "{stem}.npz#l14_img", "text_embedding": "{stem}.npz#l14_txt"}
NPY = {"image_embedding": "../img_emb/img_emb_{number}.npy"}


def vectors(rows: int, seed: int, width: int = 8, dtype: str = "f2") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(dtype)


def table(rows: int, start: int = 0) -> pa.Table:
    return pa.table(
        {"url": [f"http://h/{start + i}" for i in range(rows)], "caption": [f"row {start + i}" for i in range(rows)]}
    )


def commonpool(folder: Path, save: Callable[..., None] = np.savez) -> dict[str, np.ndarray]:
    """Two tables of 40 and 25 rows in row groups of 10, with two arrays each; returns those of the pool."""
    folder.mkdir(exist_ok=True)
    found: dict[str, list[np.ndarray]] = {"l14_img": [], "l14_txt": []}
    for number, rows in enumerate((40, 25)):
        pq.write_table(table(rows, 40 * number), folder / f"part{number}.parquet", row_group_size=10)
        arrays = {name: vectors(rows, 2 * number + i) for i, name in enumerate(found)}
        save(folder / f"part{number}.npz", **arrays)
        for name, values in arrays.items():
            found[name].append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def read(**options: Any) -> pa.Table:
    spec = PoolSpec(**options)
    types = pool.columns(spec)
    splits = pool.splits(spec, rows=10)
    return pa.concat_tables(batch for split in splits for batch in pool.read(spec, split, types))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch", [3, 50_000])
def test_each_row_gets_its_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., None], batch: int
) -> None:
    monkeypatch.setattr("pipeline.pool.rows.BATCH_ROWS", batch)
    expected = commonpool(tmp_path / "metadata", save)
    rows = read(path=str(tmp_path / "metadata"), embeddings=NPZ)
    assert rows["url"].to_pylist() == [f"http://h/{i}" for i in range(65)]
    for column, name in (("image_embedding", "l14_img"), ("text_embedding", "l14_txt")):
        assert rows[column].type == pa.list_(pa.float16(), 8)
        found = rows[column].combine_chunks().flatten().to_numpy().reshape(-1, 8)
        assert np.array_equal(found, expected[name])


def test_a_folder_of_clip_retrieval(tmp_path: Path) -> None:
    for folder in ("metadata", "img_emb"):
        (tmp_path / folder).mkdir()
    for number in range(2):
        pq.write_table(table(5, 5 * number), tmp_path / f"metadata/metadata_{number}.parquet")
        np.save(tmp_path / f"img_emb/img_emb_{number}.npy", vectors(5, number, dtype="f4"))
    rows = read(path=str(tmp_path / "metadata/*.parquet"), embeddings=NPY)
    assert rows["image_embedding"].type == pa.list_(pa.float32(), 8)
    assert np.array_equal(rows["image_embedding"][7].as_py(), vectors(5, 1, dtype="f4")[2])


def test_rows_of_a_list_of_captions_share_a_vector(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a", "b"], "caption": [["one", "two"], ["three"]]}), tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", vectors(2, 0))
    rows = read(path=str(tmp_path / "a.parquet"), captions="each", embeddings={"v": "{stem}.npy"})
    assert rows["v"].to_pylist() == [vectors(2, 0)[i].tolist() for i in (0, 0, 1)]


def test_the_pool_changes_with_its_vectors(tmp_path: Path) -> None:
    commonpool(tmp_path / "metadata")
    spec = PoolSpec(path=str(tmp_path / "metadata"), embeddings=NPZ)
    before = pool.stamp(spec)
    assert len(before) == 4
    np.savez(tmp_path / "metadata/part1.npz", l14_img=vectors(25, 9), l14_txt=vectors(25, 9))
    assert pool.stamp(spec) != before
    assert pool.size(spec) > pool.size(PoolSpec(path=spec.path)) + 65 * 2 * 16 - 1


def spoil(folder: Path, **arrays: np.ndarray) -> None:
    np.savez(folder / "part1.npz", **arrays)


BAD: list[tuple[Callable[[Path], None], dict[str, str], str]] = [
    (lambda at: (at / "part1.npz").unlink(), NPZ, "part1.npz does not exist"),
    (lambda at: (at / "part1.npz").write_bytes(b"PK nonsense"), NPZ, "cannot be read: File is not a zip file"),
    (lambda at: spoil(at, b32_img=vectors(25, 0)), NPZ, "holds b32_img; expected `#` and one of them"),
    (lambda at: spoil(at, l14_img=vectors(24, 0)), NPZ, "has 24 vectors, expected one for each of the 25 rows"),
    (lambda at: spoil(at, l14_img=vectors(25, 0, dtype="f8")), NPZ, "found float64 of shape (25, 8), expected float16"),
    (lambda at: spoil(at, l14_img=vectors(25, 0)[:, 0]), NPZ, "found float16 of shape (25,), expected"),
    (lambda at: spoil(at, l14_img=np.asfortranarray(vectors(25, 0))), NPZ, "of shape (25, 8) by columns, expected"),
    (lambda at: spoil(at, l14_img=np.array([{}] * 25)), NPZ, "found object of shape (25,)"),
    (lambda at: spoil(at, l14_img=vectors(25, 0, 9), l14_txt=vectors(25, 0)), NPZ, "they are from different models"),
    (lambda at: None, {"caption2": "{stem}.npz"}, "holds l14_img, l14_txt; expected `#` and one of them, found 'none'"),
    (lambda at: (at / "part1.parquet").rename(at / "z.parquet"), {"v": "{number}.npy"}, "z.parquet has no number at"),
    (lambda at: (at / "a.csv").write_text("url,caption\nu,c\n"), NPZ, "a.csv is not a parquet file"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "embeddings", "message"), BAD)
def test_files_that_do_not_fit_the_pool_are_refused_before_the_start(
    tmp_path: Path, damage: Callable[[Path], None], embeddings: dict[str, str], message: str
) -> None:
    commonpool(tmp_path / "metadata")
    if "{number}" in str(embeddings):
        np.save(tmp_path / "metadata/0.npy", vectors(40, 0))
    damage(tmp_path / "metadata")
    with pytest.raises(pool.PoolError, match="embeddings") as raised:
        pool.columns(PoolSpec(path=str(tmp_path / "metadata"), embeddings=embeddings))
    assert message in str(raised.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    pq.write_table(table(5), tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", vectors(5, 0))
    spec = PoolSpec(path=str(tmp_path / "a.parquet"), embeddings={"v": "{stem}.npy"})
    types = pool.columns(spec)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-3])
    message = r"a\.npy is truncated: found 205 bytes, expected 208"
    with pytest.raises(pool.PoolError, match=message):
        pool.columns(spec)
    with pytest.raises(pool.PoolError, match=message):
        list(pool.read(spec, pool.splits(spec)[0], types))


def test_addresses_in_a_store() -> None:
    assert sidecar.locate("../img_emb/i_{number}.npy", "s3://b/x/metadata/metadata_07.parquet") == (
        "s3://b/x/img_emb/i_07.npy", ""
    )  # fmt: skip
    assert sidecar.locate("{stem}.npz#a", "part.parquet") == ("part.npz", "a")
