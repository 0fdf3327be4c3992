"""Whole-run filters over vectors: what they decide depends on the rows alone, whatever the units and partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from pipeline import vectors
from pipeline.filters.semantic_dedup import SemanticDedup
from pipeline.passes import BarrierPass, Pass, PoolPass, UnitPass, UnitWriter, commit, new_attempt
from pipeline.schema import DROP, SAMPLE
from pipeline.step import VectorFilter

DIMENSION = 16
VECTOR = pa.list_(pa.float16(), DIMENSION)


def run_tasks(items: Sequence[Any], work: Callable[..., Iterable[Any]], at_once: int = 1) -> list[Any]:
    return [record for start in range(0, len(items), at_once) for record in work(items[start : start + at_once])]


def stored(folder: Path, matrix: np.ndarray, units: int, missing: Sequence[int] = ()) -> list[Pass]:
    """A run of two passes in which row i has the uid `i` and the vector matrix[i]; none for those of `missing`."""
    types = {f.name: f.type for f in SAMPLE} | {"score": pa.float32()}
    before = [
        PoolPass("k", "pool", adds=types, root=f"{folder}/pool"),
        UnitPass("k", "embed", adds={"embedding": VECTOR}, root=f"{folder}/embed"),
    ]
    numbers = np.arange(len(matrix))
    for unit in range(units):
        mine = numbers[numbers % units == unit]
        uids = [f"{i:032x}" for i in mine]
        rows = pa.array(np.arange(len(mine), dtype=np.int32))
        table = pa.table(
            {"row": rows, "uid": uids, "url": uids, "caption": uids, "score": pa.array(mine % 7, pa.float32())}
        )
        commit(before[0], unit, new_attempt(unit), len(mine), table, None, DROP.empty_table(), {})
        values = [None if i in missing else matrix[i].astype(np.float16) for i in mine]
        batch = pa.table(
            {"unit": pa.array([unit] * len(mine), pa.int32()), "row": rows, "embedding": pa.array(values, VECTOR)}
        )
        writer = UnitWriter(before[1], unit, np.arange(len(mine)))
        writer.add(batch)
        writer.commit({})
    return before


def dropped(
    folder: Path, step: VectorFilter, matrix: np.ndarray, units: int, missing: Sequence[int] = ()
) -> dict[int, tuple[str, str]]:
    """Reason and detail of each dropped row, by its number."""
    before = stored(folder, matrix, units, missing)
    p = BarrierPass("k", step.label, [step], root=f"{folder}/barrier")
    files, reasons = vectors.decide(p, before, units, len(matrix), max(1, units // 2), run_tasks)
    drops = [row for name in files.values() for row in p.store.read_table(name).to_pylist()]
    assert sum(reasons.values()) == len(drops)
    assert not p.store.names("spool"), "what the rows travelled in is left behind"
    return {d["row"] * units + d["unit"]: (d["reason"], d["detail"]) for d in drops}


def planted(n: int = 600, copies: int = 150, seed: int = 0) -> np.ndarray:
    """Random directions, of which the last `copies` almost repeat the first ones."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(n, DIMENSION))
    matrix[n - copies :] = matrix[:copies] + 0.02 * rng.normal(size=(copies, DIMENSION))
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)


def brute_force(matrix: np.ndarray, eps: float, order: np.ndarray) -> set[int]:
    """SemDeDup within one cluster, written down again: a row goes if any row before it is that similar."""
    units = matrix.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    gone = set()
    for place, i in enumerate(order):
        if place and (units[order[:place]] @ units[i]).max() > 1 - eps:
            gone.add(int(i))
    return gone


def test_one_cluster_is_brute_force(tmp_path: Path) -> None:
    matrix = planted(2000, 400)
    found = dropped(tmp_path, SemanticDedup(vector="embedding", clusters=1), matrix, 3)
    assert set(found) == brute_force(matrix, 0.03, np.arange(2000))
    assert set(range(1600, 2000)) <= set(found)
    assert {reason for reason, _ in found.values()} == {"semantic_dedup"}
    assert all(detail.split()[0] == f"{i - 1600:032x}" for i, (_, detail) in found.items() if i >= 1600)


def test_the_row_with_the_higher_score_stays(tmp_path: Path) -> None:
    matrix = planted()
    found = dropped(tmp_path, SemanticDedup(vector="embedding", clusters=1, keep_highest="score"), matrix, 3)
    order = np.lexsort((np.arange(len(matrix)), -(np.arange(len(matrix)) % 7)))
    assert set(found) == brute_force(matrix, 0.03, order)


@pytest.mark.parametrize("units", [1, 4, 9])
def test_units_and_partitions_decide_nothing(tmp_path: Path, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = planted()
    step = SemanticDedup(vector="embedding", clusters=8)
    whole = dropped(tmp_path / "whole", step, matrix, 2)
    monkeypatch.setattr(vectors, "PIECE_BYTES", 8000)  # some 80 rows
    assert dropped(tmp_path / "pieces", step, matrix, units) == whole
    assert len(whole) > 100


def test_a_crowded_group_is_divided_and_equal_vectors_are_dealt_out(tmp_path: Path) -> None:
    class Small(SemanticDedup):
        largest_group: ClassVar[int] = 50
        seen: ClassVar[list[int]] = []

        def judge_group(self, rows: pa.Table, vectors: np.ndarray) -> tuple[pa.StringArray, pa.StringArray]:
            self.seen.append(len(rows))
            return super().judge_group(rows, vectors)

    matrix = np.concatenate([planted(300, 0), np.repeat(planted(1, 0), 500, axis=0)])
    found = dropped(tmp_path, Small(vector="embedding", clusters=2), matrix, 3)
    assert max(Small.seen) < 100
    assert sum(Small.seen) == len(matrix)
    kept_of_equals = 500 - sum(i >= 300 for i in found)
    assert 1 <= kept_of_equals <= 10, "one for each part that the equal vectors were dealt to"


def test_rows_without_a_finite_vector_go_on(tmp_path: Path) -> None:
    matrix = planted()
    matrix[5, 3] = np.inf
    matrix[6, 0] = np.nan
    found = dropped(tmp_path, SemanticDedup(vector="embedding", clusters=1), matrix, 3, missing=[7])
    assert not {5, 6, 7} & set(found)
    # What repeats them has nothing before it any more.
    assert not {455, 456, 457} & set(found)
    assert 458 in found


def test_no_vectors_at_all(tmp_path: Path) -> None:
    assert dropped(tmp_path, SemanticDedup(vector="embedding"), planted(6, 0), 2, missing=range(6)) == {}


@dataclass(kw_only=True)
class Meets(VectorFilter):
    """Rows meet in the two groups of the largest components of their vectors; all of a crowd but one are dropped."""

    vector: str = "embedding"
    needs = ("embedding", "score")

    def fit(self, sample: np.ndarray, rows: int) -> np.ndarray:
        return np.eye(DIMENSION, dtype=np.float32)

    def groups(self, vectors: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        return np.argsort(-vectors @ fitted.T, axis=1)[:, :2]

    def judge_group(self, rows: pa.Table, vectors: np.ndarray) -> tuple[pa.StringArray, pa.StringArray]:
        assert rows.column_names == ["unit", "row", "uid", "score"]
        assert rows["uid"].to_pylist() == sorted(rows["uid"].to_pylist())
        reasons = [None] + ["crowd"] * (len(rows) - 1)
        return pa.array(reasons, pa.string()), pa.array(reasons, pa.string())


def test_a_row_of_several_groups_is_dropped_once(tmp_path: Path) -> None:
    matrix = planted(200, 0)
    found = dropped(tmp_path, Meets(), matrix, 4)
    first: set[int] = set()
    pairs = np.argsort(-matrix.astype(np.float32), axis=1)[:, :2]
    for group in range(DIMENSION):
        members = [i for i in range(200) if group in pairs[i]]
        first |= set(members[1:])
    assert set(found) == first
