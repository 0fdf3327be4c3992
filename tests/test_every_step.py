"""All steps in one recipe: the result does not depend on unit size, number of workers or order of rows."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipeline import pool
from pipeline.ledger import Funnel
from pipeline.models.score_mixture import Curve, Mixture
from pipeline.recipe import built_in_steps, find_step, load
from pipeline.scheduler import executor
from pipeline.scheduler.claim import hold
from pipeline.scheduler.passes import Pass, make_passes, read_unit
from pipeline.scheduler.progress import Progress
from pipeline.scheduler.run_pass import run_pass
from pipeline.step import Filter
from pipeline.storage import Store
from tests.images import encoded
from trainer.terminal import Console

PICTURES = 180
MODEL = {"model": "model", "pretrained": None, "batch_size": 16, "precision": "fp32"}
ONE_OF_EACH: list[str | dict[str, Any]] = [
    {"takedown": {"file": "taken.txt", "by": ["url", "domain", "uid"]}},
    {"url_filter": {"block_hosts": "blocked.txt"}},
    {"caption_length": {"min_words": 3}},
    {"caption_pattern": {"patterns": [r"\$\d"]}},
    {"caption_frequency": {"max_count": 3}},
    {"exact_dedup": {"by": ["url"], "captions": "merge"}},
    {"language": {"keep": ["en", "de"], "min_score": 0.1}},
    {"text_safety": {"words": "unsafe.txt"}},
    {"sample": {"fraction": 0.9}},
    {"download": {"inline": True, "image_size": 64, "image_quality": True, "compute_phash": True}},
    {"placeholder": {"max_count": 5}},
    {"image_size": {"min_side": 40}},
    {"aspect_ratio": {"max": 1.8}},
    {"byte_size": {"min": 900}},
    "image_quality",
    "picture_hash",
    {"near_dedup": {"max_hamming": 4}},
    {"clip_score": {**MODEL, "embeddings": True}},
    {"decontaminate": {"sets": {"eval": "eval"}, "vectors": {"targets": "targets.npy"}, "min_cosine": 0.999}},
    {"linear_head": {"head": "head.npz", "column": "aesthetic_score"}},
    {"norm_sim": {"target": "targets.npy"}},
    {"neg_clip_loss": {"batch_size": 32, "draws": 2}},
    {"learned_score": {"mixture": "mixture.json"}},
    {"text_overlap": {"engine": "tests.plugins:RedBox"}},
    {"clip_score": {**MODEL, "column": "masked_clip_score", "mask": "text_boxes"}},
    {"text_reliance": {"max_drop": 0.001}},
    {"image_safety": {"scorer": "tests.plugins:Redness", "max_score": 0.8}},
    {"semantic_dedup": {"eps": 0.001, "clusters": 4}},
    {"image_cluster": {"target": "targets.npy", "clusters": 3}},
    {"threshold": {"column": "neg_clip_loss_score", "top_fraction": 0.9}},
    {"caption_entries": {"entries": "entries.txt"}},
    {"match_entries": {"entries": "entries.txt"}},
    {"balance": {"entries": "entries.txt", "max_per_entry": 6}},
    {"write_shards": {"samples_per_shard": 20}},
]
REPEATED = {"threshold": "keeps a share of what is left", "image_cluster": "fits clusters to what is left"}
ELSEWHERE = {"read_shards": "reads a pool of another kind", "write_subset": "takes the place of write_shards"}


def name_of(step: str | dict[str, Any]) -> str:
    return step if isinstance(step, str) else next(iter(step))


def picture(number: int) -> bytes:
    """A JPEG of 72 to 172 pixels. Some are flat, dark, wide or small, or have a red box that stands for text."""
    random = np.random.default_rng(number)
    size = (100, 100) if number % 11 else ((172, 80) if number % 2 else (30, 30))
    blocks = random.integers(0, 256 if number % 13 else 8, (6, 6, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)).copy()
    if number % 9 == 0:
        pixels[:] = 200
    if number % 4 == 1:
        pixels[10:30, 10:40] = (255, 0, 0)
    if number % 47 == 5:
        pixels[:] = (255, 0, 0)
    return encoded(pixels, "JPEG", quality=60 if number % 17 == 0 else 92)


def table_of_rows() -> pa.Table:
    """Rows for every verdict: repeated URLs, captions and pictures, near copies, and rows that single filters drop."""
    rows = []
    for i in range(PICTURES):
        text = f"a photograph of a {('red circle', 'blue star', 'green tree', 'dog in the snow')[i % 4]}, number {i}"
        if i % 10 == 3:
            text = f"ein Foto von einem Hund im Schnee und einem Haus, Nummer {i}"
        text = {6: "too short", 16: f"for sale, only ${i}", 26: "un chien dans la neige devant la maison"}.get(
            i % 30, text
        )
        text = {8: "the same caption everywhere", 9: f"a filthy caption of something, number {i}"}.get(i % 20, text)
        host = "blocked.example" if i % 23 == 4 else f"h{i % 5}.example"
        url, data = f"https://{host}/{i}.jpg", picture(i if i % 8 else i // 16)
        rows.append((url, text, data))
        if i % 6 == 0:
            rows.append((url, f"another caption of the photograph number {i}", data))
        if i % 15 == 0:
            rows.append((f"https://copy.example/{i}.jpg", f"a copy of the photograph number {i}", data))
    return pa.table(dict(zip(("url", "caption", "image"), (list(column) for column in zip(*rows)))))


@pytest.fixture
def furnished(tmp_path: Path, small_model: Callable[[Path], int]) -> Path:
    width = small_model(tmp_path / "model")
    random = np.random.default_rng(0)
    files = {
        "taken.txt": "domain h9.example\nurl https://h2.example/7.jpg\n",
        "blocked.txt": "blocked.example\n",
        "unsafe.txt": "filthy\n",
        "entries.txt": "red circle\nblue star\ngreen tree\nhund im schnee\ncopy of the photograph\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    np.save(tmp_path / "targets.npy", random.normal(size=(5, width)).astype(np.float32))
    np.savez(
        tmp_path / "head.npz", weight=random.normal(size=(1, width)).astype(np.float32), bias=np.zeros(1, np.float32)
    )
    mixture = Mixture(
        0.0, {"clip_score": Curve((-1.0, 1.0), (-2.0, 2.0), 0.0), "norm_sim_score": Curve((0.0, 1.0), (0.0, 1.0), 0.0)}
    )
    (tmp_path / "mixture.json").write_bytes(mixture.to_bytes({}))
    (tmp_path / "eval").mkdir()
    for number in (21, 22, 33):
        (tmp_path / f"eval/{number}.jpg").write_bytes(picture(number))
    return tmp_path


def in_process(monkeypatch: pytest.MonkeyPatch, order: Callable[[list[Any]], list[Any]]) -> None:
    """Makes `execute` do all work in this process, without Ray, on tasks and units in the given order."""

    def map_tasks(items: Sequence[Any], work: Callable[..., Any], at_once: int = 1, spent: Any = None) -> Iterator[Any]:
        for start in order(list(range(0, len(items), at_once))):
            yield from list(work(items[start : start + at_once]))

    def run_passes(passes: list[Pass], numbers: list[int], units: int, workers: Any) -> Iterator[Any]:
        for i in numbers:
            travelled = pickle.loads(pickle.dumps(passes))  # as to a worker
            travelled[i].setup()
            for report in run_pass(travelled, i, order(list(range(units)))):
                yield i, report, 1

    monkeypatch.setattr(executor, "map_tasks", map_tasks)
    monkeypatch.setattr(executor, "run_passes", run_passes)
    monkeypatch.setattr("ray.util.dask.ray_dask_get", dask.get)


def result(recipe: Path, *words: str) -> tuple[Funnel, Counter[Any], dict[tuple[str, str], Any]]:
    """Runs a recipe. Returns its funnel, the uid, step and reason of each drop, and the columns of each kept row."""
    checked = load(str(recipe), list(words), pool.columns)
    types = pool.columns(checked.pool)
    passes = make_passes(checked, {}, types)
    console = Console(quiet=True)
    with hold(Store(checked.run)) as claim:
        job = executor.Job(checked, passes, types, Progress(console), claim)
        funnel = executor.execute(job).funnel
    before = passes[:-1]
    fates: Counter[Any] = Counter()
    for unit in range(job.units):
        stored, _ = passes[0].stored(unit, ["row", "uid"])
        uids = dict(zip(stored["row"].to_pylist(), stored["uid"].to_pylist()))
        for i, p in enumerate(before):
            for drop in p.drops(passes[:i], unit).to_pylist():
                fates[uids[drop["row"]], drop["step"], drop["reason"]] += 1
    columns = list(dict.fromkeys(c for p in before for c in ("uid", *p.adds) if c not in ("unit", "row")))
    tables = [table for unit in range(job.units) for table in read_unit(before, unit, columns)]
    rows = [row for table in tables for row in table.to_pylist()]
    return funnel, fates, {(row["uid"], name): value for row in rows for name, value in row.items() if name in columns}


def test_a_result_depends_only_on_the_rows(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs all steps on small units, on one unit, and on a shuffled pool with the work in another order.

    Each filter is listed twice in a row; the second must drop nothing.
    """
    monkeypatch.chdir(furnished)
    monkeypatch.setenv("XDG_CACHE_HOME", str(furnished / "cache"))
    twice = [name for name in map(name_of, ONE_OF_EACH) if issubclass(find_step(name), Filter) and name not in REPEATED]
    steps = [step for step in ONE_OF_EACH for _ in range(1 + (name_of(step) in twice))]
    recipe = {
        "name": "all",
        "pool": {"path": "pool.parquet", "image": "image"},
        "run": "small",
        "unit_rows": 40,
        "steps": steps,
    }
    (furnished / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    rows = table_of_rows()
    pq.write_table(rows, furnished / "pool.parquet")
    pq.write_table(rows.take(np.random.default_rng(1).permutation(len(rows))), furnished / "shuffled.parquet")
    in_process(monkeypatch, lambda work: work)
    funnel, fates, kept = result(furnished / "r.yaml")
    for name in twice:
        assert funnel.lines[name].dropped, f"{name} drops no row of this pool; add one"
        assert not funnel.lines[f"{name}.2"].dropped, f"{name} drops more rows the second time"
    assert len(kept) >= 10 * 30
    _, same_fates, same_kept = result(furnished / "r.yaml", "run=large", "unit_rows=1000")
    assert same_fates == fates
    assert same_kept == kept
    in_process(monkeypatch, lambda work: work[::-1])
    _, same_fates, same_kept = result(
        furnished / "r.yaml", "run=shuffled", "unit_rows=90", "pool.path=shuffled.parquet"
    )
    assert same_fates == fates
    assert same_kept == kept


def test_every_built_in_step_is_covered() -> None:
    tried = {name_of(step) for step in ONE_OF_EACH}
    assert tried | set(ELSEWHERE) == set(built_in_steps())
