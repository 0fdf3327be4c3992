"""Ingestion: units depend neither on the files of the pool nor on the size of pieces."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import pool
from pipeline.recipe import PoolSpec, Recipe
from pipeline.scheduler import ingest
from pipeline.scheduler.passes import make_passes, read_unit

ROWS, UNITS, PARTS = 1_000, 7, 3


def ingested(folder: Path, files: int, text: bool = False) -> tuple[list[pa.Table], list[str], int]:
    """Ingests a pool of this many files. Returns its units, the names of spool files, and the number of pieces."""
    (folder / "pool").mkdir(parents=True)
    each = ROWS // files
    for i in range(files):
        rows = range(i * each, (i + 1) * each)
        table = pa.table({"url": [f"http://h/{r // 2}" for r in rows], "caption": [f"number {r}" for r in rows]})
        if text:
            lines = "".join(f"{row['url']},{row['caption']}\n" for row in table.to_pylist())
            (folder / f"pool/{i:04d}.csv").write_text("url,caption\n" + lines)
        else:
            pq.write_table(table, folder / f"pool/{i:04d}.parquet", row_group_size=400)
    recipe = Recipe(name="t", pool=PoolSpec(path=str(folder / "pool")), run=str(folder / "run"))
    passes = make_passes(recipe, {}, {})
    splits = pool.splits(recipe.pool)
    starts = ingest.pieces([pool.count(recipe.pool, split) for split in splits])
    for piece, (first, last) in enumerate(zip(starts, [*starts[1:], len(splits)])):
        ingest.scatter(passes[0], piece, first, splits[first:last], recipe.pool, {}, UNITS, PARTS)
    spool = [name for name in passes[0].store.names("spool") if name.endswith(".arrow")]
    for part in reversed(range(PARTS)):
        list(ingest.gather(passes[0], part, len(starts), {}, UNITS, PARTS))
    units = [next(read_unit(passes, unit, ["uid", "url", "caption"])) for unit in range(UNITS)]
    return units, spool, len(starts)


def test_units_do_not_depend_on_the_files_of_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, spool, pieces = ingested(tmp_path / "whole", 1)
    assert sum(map(len, whole)) == ROWS
    assert min(map(len, whole)) > 0
    assert len(spool) == pieces == 1
    many, spool, pieces = ingested(tmp_path / "many", 100)
    assert many == whole
    assert len(spool) == pieces == 1, "small files are read together"
    monkeypatch.setattr(ingest, "SPOOL_ROWS", 150)
    monkeypatch.setattr(ingest, "LEAST_SPOOL_ROWS", 1)
    monkeypatch.setattr(ingest, "LEAST_SPOOLS", 5)
    cut, spool, pieces = ingested(tmp_path / "cut", 100)
    assert cut == whole
    assert len(spool) == pieces == 7
    monkeypatch.setattr("pipeline.pool.rows.BATCH_ROWS", 100)
    text, spool, pieces = ingested(tmp_path / "text", 1, text=True)
    assert text == whole
    assert (len(spool), pieces) == (4, 1), "a file that cannot be split is spooled in parts"
    monkeypatch.setattr(ingest, "SPOOL_BYTES", 1)
    wide, spool, _ = ingested(tmp_path / "wide", 1, text=True)
    assert wide == whole
    assert len(spool) == 10


def test_pieces_are_large_in_a_large_pool_and_many_in_a_small_one() -> None:
    assert ingest.pieces([]) == []
    assert ingest.pieces([10] * 100) == [0]
    assert len(ingest.pieces([10_000] * 1_000)) == 63, "ten million rows: 16 files each"
    assert len(ingest.pieces([10_000] * 100_000)) == 1_000, "a billion rows: a million each"
    assert ingest.pieces([3_000_000, 10, 2_000_000]) == [0, 1]


def test_vectors_and_bytes_of_a_pool_are_preserved(tmp_path: Path) -> None:
    rows = range(600)
    table = pa.table(
        {
            "url": [f"http://h/{r}" for r in rows],
            "caption": [f"number {r}" if r % 3 else "" for r in rows],
            "vector": pa.array([[float(r), 0.5] for r in rows], pa.list_(pa.float32(), 2)),
            "blob": pa.array([str(r).encode() for r in rows]),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    recipe = Recipe(name="t", pool=PoolSpec(path=str(tmp_path / "p.parquet")), run=str(tmp_path / "run"))
    types = pool.columns(recipe.pool)
    passes = make_passes(recipe, {}, types)
    ingest.scatter(passes[0], 0, 0, pool.splits(recipe.pool), recipe.pool, types, 1, 1)
    list(ingest.gather(passes[0], 0, 1, types, 1, 1))
    found = [row for part in read_unit(passes, 0, ["caption", "vector", "blob"]) for row in part.to_pylist()]
    assert len(found) == 400
    for row in found:
        n = int(row["caption"].split()[1])
        assert (row["vector"], row["blob"]) == ([float(n), 0.5], str(n).encode())


def test_heavy_rows_make_more_units_and_partitions() -> None:
    assert ingest.unit_count(10_000, 10_000) == 8
    assert ingest.unit_count(10_000, 10_000, 10 << 30) == 40
    assert ingest.partition_count(10_000, 40, 10 << 30) == 10
