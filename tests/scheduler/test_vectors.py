"""Whole-run filters over vectors, whose decisions must depend on the rows only, not on units or partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.filters.image_cluster import ImageCluster
from pipeline.filters.semantic_dedup import SemanticDedup
from pipeline.scheduler import vectors
from pipeline.scheduler.passes import BarrierPass, Pass, PoolPass, UnitPass, commit, new_attempt, read_unit
from pipeline.scheduler.run_pass import UnitWriter, run_pass
from pipeline.schema import DROP, SAMPLE
from pipeline.similarity import embeddings
from pipeline.stages.neg_clip_loss import NegClipLoss
from pipeline.step import VectorFilter
from pipeline.text.hashing import hash64

DIMENSION = 16
VECTOR = pa.list_(pa.float16(), DIMENSION)


def run_tasks(items: Sequence[Any], work: Callable[..., Iterable[Any]], at_once: int = 1) -> list[Any]:
    return [record for start in range(0, len(items), at_once) for record in work(items[start : start + at_once])]


def texts(matrix: np.ndarray) -> np.ndarray:
    """Caption vectors at different distances from the vectors of the pictures."""
    noise = np.random.default_rng(1).normal(size=matrix.shape) * np.linspace(0.05, 0.5, len(matrix))[:, None]
    return (matrix + noise).astype(np.float16)


def stored(folder: Path, matrix: np.ndarray, units: int, missing: Sequence[int] = ()) -> list[Pass]:
    """A run of two passes in which row i has the uid `i` and the vector matrix[i], or none if it is in `missing`."""
    types = {f.name: f.type for f in SAMPLE} | {"score": pa.float32()}
    before = [
        PoolPass("k", "pool", adds=types, root=f"{folder}/pool"),
        UnitPass("k", "embed", adds={"embedding": VECTOR, "text": VECTOR}, root=f"{folder}/embed"),
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
        batch = pa.table({"unit": pa.array([unit] * len(mine), pa.int32()), "row": rows})
        for name, source in (("embedding", matrix), ("text", texts(matrix))):
            values = [None if i in missing else source[i].astype(np.float16) for i in mine]
            batch = batch.append_column(name, pa.array(values, VECTOR))
        writer = UnitWriter(before[1], unit, np.arange(len(mine)))
        writer.add(batch)
        writer.commit({})
    return before


def dropped(
    folder: Path, step: VectorFilter, matrix: np.ndarray, units: int, missing: Sequence[int] = ()
) -> dict[int, tuple[str, str]]:
    """The reason and detail of each dropped row, by row number."""
    before = stored(folder, matrix, units, missing)
    p = BarrierPass("k", step.label, [step], root=f"{folder}/barrier")
    files, reasons = vectors.decide(p, before, units, len(matrix), max(1, units // 2), run_tasks)
    drops = [row for name in files.values() for row in p.store.read_table(name).to_pylist()]
    assert sum(reasons.values()) == len(drops)
    assert not p.store.names("spool"), "spool files are removed"
    return {d["row"] * units + d["unit"]: (d["reason"], d["detail"]) for d in drops}


def processed(
    folder: Path, step: Any, matrix: np.ndarray, units: int, missing: Sequence[int] = ()
) -> tuple[dict[int, Any], dict[int, str]]:
    """The value that a fitted step of one column adds to each kept row, and the reason of each drop, by row number."""
    before = stored(folder, matrix, units, missing)
    p = UnitPass("k", step.label, [step], adds=dict(step.adds), root=f"{folder}/fitted")
    assert p.fitted is step
    vectors.fit_step(p, before, units, len(matrix), run_tasks)
    assert not p.store.names("spool"), "spool files are removed"
    p.setup()
    list(run_pass([*before, p], 2, range(units)))
    added: dict[int, Any] = {}
    gone: dict[int, str] = {}
    for unit in range(units):
        for table in read_unit([*before, p], unit, step.adds):
            for row, *values in zip(*(table[name].to_pylist() for name in ("row", *step.adds))):
                added[row * units + unit] = values[0] if values else None
        drops = p.drops(before, unit)
        gone |= {row * units + unit: reason for row, reason in zip(*(drops[c].to_pylist() for c in ("row", "reason")))}
    return added, gone


def planted(n: int = 600, copies: int = 150, seed: int = 0) -> np.ndarray:
    """Random directions. The last `copies` are near copies of the first ones."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(n, DIMENSION))
    matrix[n - copies :] = matrix[:copies] + 0.02 * rng.normal(size=(copies, DIMENSION))
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)


def brute_force(matrix: np.ndarray, eps: float, order: np.ndarray) -> set[int]:
    """SemDeDup within one cluster by brute force: drops a row that is too similar to any earlier row."""
    units = matrix.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    gone = set()
    for place, i in enumerate(order):
        if place and (units[order[:place]] @ units[i]).max() > 1 - eps:
            gone.add(int(i))
    return gone


def test_one_cluster_gives_the_result_of_brute_force(tmp_path: Path) -> None:
    matrix = planted(2000, 400)
    found = dropped(tmp_path, SemanticDedup(vector="embedding", clusters=1), matrix, 3)
    assert set(found) == brute_force(matrix, 0.03, np.arange(2000))
    assert set(range(1600, 2000)) <= set(found)
    assert {reason for reason, _ in found.values()} == {"semantic_dedup"}
    assert all(detail.split()[0] == f"{i - 1600:032x}" for i, (_, detail) in found.items() if i >= 1600)


def test_many_clusters_give_the_result_of_the_paper_in_numpy(tmp_path: Path) -> None:
    """Compares with SemDeDup in plain NumPy on 2,000 points."""
    matrix = planted(2000, 400)
    points = matrix.astype(np.float64)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    centroids = points[:40].copy()
    for _ in range(10):  # spherical k-means
        home = (points @ centroids.T).argmax(axis=1)
        sums = np.stack([points[home == k].sum(axis=0) for k in range(40)])
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    home = (points @ centroids.T).argmax(axis=1)
    gone = set()
    for k in range(40):
        members = np.flatnonzero(home == k)
        similar = np.triu(points[members] @ points[members].T, 1).max(axis=0, initial=-1)
        gone |= set(members[similar > 1 - 0.03].tolist())

    class Given(SemanticDedup):
        def fit(self, sample: np.ndarray, rows: int) -> np.ndarray:
            return centroids.astype(np.float32)

    assert set(dropped(tmp_path, Given(vector="embedding"), matrix, 3)) == gone
    assert 200 < len(gone) < 400 + 200


def test_the_fit_does_not_depend_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    sample = np.random.default_rng(3).normal(size=(4000, 48)).astype(np.float32)
    threads, found = faiss.omp_get_max_threads(), []
    for cores in (1, 2, 5):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        found.append(embeddings.spherical_kmeans(sample, 40, 0))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert faiss.omp_get_max_threads() == threads


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600])
def test_each_row_is_compared_with_all_earlier_ones(rows: int) -> None:
    matrix = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
    units = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    earlier = np.where(np.tri(rows, k=-1, dtype=bool), units @ units.T, -np.inf)
    table = pa.table({"uid": [f"{i:03d}" for i in range(rows)]})
    reason, detail = SemanticDedup(eps=0.05).judge_group(table, matrix)
    nearest, best = earlier.argmax(axis=1), earlier.max(axis=1)
    assert (np.abs(best - 0.95) > 1e-6).all()
    assert [text and text[:3] for text in detail.to_pylist()] == [
        f"{at:03d}" if similarity > 0.95 else None for at, similarity in zip(nearest, best)
    ]
    assert pc.is_valid(reason).to_pylist() == (best > 0.95).tolist()


@pytest.mark.parametrize("column", [pa.float16(), pa.float32(), pa.float64()])
def test_only_vectors_without_nan_and_infinity_are_finite(column: pa.DataType) -> None:
    rows = [[1.0, 2.0], None, [float("nan"), 0.0], [0.0, float("inf")], [-6e4, 6e4]]
    chunks = [pa.array(part, pa.list_(pa.float64(), 2)).cast(pa.list_(column, 2)) for part in (rows[:2], rows[2:], [])]
    assert embeddings.finite(pa.chunked_array(chunks)).tolist() == [True, False, False, False, True]
    assert embeddings.finite(pa.chunked_array([], pa.list_(column, 2))).tolist() == []


def test_what_float32_cannot_hold_is_not_finite() -> None:
    column = pa.chunked_array([pa.array([[1e39, 0.0], [1.0, 0.0]], pa.list_(pa.float64(), 2))])
    assert embeddings.finite(column).tolist() == [False, True]


def test_the_row_with_the_higher_score_stays(tmp_path: Path) -> None:
    matrix = planted()
    found = dropped(tmp_path, SemanticDedup(vector="embedding", clusters=1, keep_highest="score"), matrix, 3)
    order = np.lexsort((np.arange(len(matrix)), -(np.arange(len(matrix)) % 7)))
    assert set(found) == brute_force(matrix, 0.03, order)


@pytest.mark.parametrize("units", [1, 4, 9])
def test_results_do_not_depend_on_units_or_partitions(
    tmp_path: Path, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = planted()
    step = SemanticDedup(vector="embedding", clusters=8)
    whole = dropped(tmp_path / "whole", step, matrix, 2)
    monkeypatch.setattr(vectors, "PIECE_BYTES", 8000)  # about 80 rows
    assert dropped(tmp_path / "pieces", step, matrix, units) == whole
    assert len(whole) > 100


def test_a_large_group_is_divided_and_equal_vectors_are_spread_evenly(tmp_path: Path) -> None:
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
    assert 1 <= kept_of_equals <= 10, "one for each part over which the equal vectors were spread"


def test_rows_without_a_finite_vector_are_kept(tmp_path: Path) -> None:
    matrix = planted()
    matrix[5, 3] = np.inf
    matrix[6, 0] = np.nan
    found = dropped(tmp_path, SemanticDedup(vector="embedding", clusters=1), matrix, 3, missing=[7])
    assert not {5, 6, 7} & set(found)
    # The copies of these rows have no earlier match left.
    assert not {455, 456, 457} & set(found)
    assert 458 in found


def test_no_vectors_at_all(tmp_path: Path) -> None:
    assert dropped(tmp_path, SemanticDedup(vector="embedding"), planted(6, 0), 2, missing=range(6)) == {}


@dataclass(kw_only=True)
class Meets(VectorFilter):
    """Puts each row into the groups of its two largest components, and drops all but one row of a large group."""

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


def clip_losses(matrix: np.ndarray, members: Sequence[int], temperature: float) -> np.ndarray:
    """Computes −τ times the contrastive loss of each pair, in one batch of the pairs `members`, by its definition."""
    image, text = (m[list(members)].astype(np.float16).astype(np.float64) for m in (matrix, texts(matrix)))
    image, text = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (image, text))
    chances = np.exp(image @ text.T / temperature)
    own = np.diag(chances)
    return temperature * (np.log(own / chances.sum(axis=1)) + np.log(own / chances.sum(axis=0))) / 2


def neg_clip_loss(**options: Any) -> NegClipLoss:
    return NegClipLoss(image_vector="embedding", text_vector="text", **options)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_neg_clip_loss_of_a_small_run_is_the_loss_of_one_batch(tmp_path: Path, temperature: float) -> None:
    matrix = planted(300, 60)
    found, gone = processed(tmp_path, neg_clip_loss(temperature=temperature), matrix, 4, missing=[3, 250])
    assert not gone
    assert (found[3], found[250]) == (None, None), "null for rows without vectors, which count in no batch either"
    scored = [i for i in range(300) if found[i] is not None]
    assert len(scored) == 298
    np.testing.assert_allclose([found[i] for i in scored], clip_losses(matrix, scored, temperature), atol=2e-5)


def test_neg_clip_loss_averages_over_disjoint_batches_that_a_row_joins(tmp_path: Path) -> None:
    matrix = planted(500, 60)
    step = neg_clip_loss(batch_size=100, draws=3, temperature=0.1)
    found, _ = processed(tmp_path, step, matrix, 3)
    number = {int(hash64([f"{i:032x}"], purpose="neg_clip_loss")[0]): i for i in range(500)}
    batches = [{number[key] for key in keys} for *_, keys in step._batches]
    assert len(set.union(*batches)) == 300
    for row in (0, 7, 499, *sorted(batches[0])[:3]):
        losses = []
        for batch in batches:
            members = sorted(batch | {row})
            losses.append(clip_losses(matrix, members, 0.1)[members.index(row)])
        assert found[row] == pytest.approx(np.mean(losses), abs=2e-5)


@pytest.mark.parametrize("units", [1, 4, 9])
def test_neg_clip_loss_does_not_depend_on_units(tmp_path: Path, units: int) -> None:
    matrix = planted()
    options: dict[str, Any] = {"batch_size": 128, "draws": 2}
    found, _ = processed(tmp_path / "a", neg_clip_loss(**options), matrix, units)
    assert found == processed(tmp_path / "b", neg_clip_loss(**options), matrix, 2)[0]
    assert found != processed(tmp_path / "c", neg_clip_loss(**options, seed=1), matrix, 2)[0]


def test_neg_clip_loss_without_any_vectors(tmp_path: Path) -> None:
    found, gone = processed(tmp_path, neg_clip_loss(), planted(6, 0), 2, missing=range(6))
    assert found == dict.fromkeys(range(6))
    assert not gone


def image_cluster(folder: Path, target: np.ndarray, **options: Any) -> ImageCluster:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "target.npy", target.astype(np.float32))
    return ImageCluster(vector="embedding", target=str(folder / "target.npy"), **options)


def crowds(centres: int = 8, each: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around distant centres, and the number of the centre of each."""
    around = np.repeat(np.eye(DIMENSION)[:centres], each, axis=0)
    noise = 0.05 * np.random.default_rng(3).normal(size=around.shape)
    return (around + noise).astype(np.float16), np.repeat(np.arange(centres), each)


def test_image_cluster_keeps_the_clusters_of_the_target_set(tmp_path: Path) -> None:
    matrix, centre = crowds()
    # Two targets near centre 2, and one between 5 and 6 but nearer to 5.
    eye = np.eye(DIMENSION)
    target = np.array([5 * eye[2], eye[2] + 0.1, eye[5] + 0.8 * eye[6]])
    step = image_cluster(tmp_path, target, clusters=8)
    added, gone = processed(tmp_path, step, matrix, 4, missing=[0, 130])
    assert set(added) == {i for i in range(len(matrix)) if centre[i] in (2, 5) and i != 130}
    assert {i for i, reason in gone.items() if reason == "missing"} == {0, 130}
    assert set(gone.values()) == {"missing", "image_cluster"}


@pytest.mark.parametrize("units", [1, 9])
def test_image_cluster_does_not_depend_on_units(tmp_path: Path, units: int) -> None:
    matrix = planted()
    target = matrix[:5] + 0.01
    fates = processed(tmp_path / "a", image_cluster(tmp_path, target), matrix, units)
    assert fates == processed(tmp_path / "b", image_cluster(tmp_path, target), matrix, 2)
    assert 20 < len(fates[0]) < 300


def test_image_cluster_without_any_vectors(tmp_path: Path) -> None:
    step = image_cluster(tmp_path, planted(3, 0))
    assert processed(tmp_path, step, planted(6, 0), 2, missing=range(6))[1] == dict.fromkeys(range(6), "missing")
