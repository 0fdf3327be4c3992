"""Each step alone, in each of its modes: its result does not depend on the order of rows, the unit size or the number
of workers, applying it twice equals applying it once, and it refuses columns that it cannot use. `test_every_step` runs
all steps together.

A new step is covered automatically if it needs no options, otherwise by a line in OPTIONS.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from pipeline.fetch.decoder import phash
from pipeline.recipe import built_in_steps, find_step
from pipeline.schema import RESERVED
from pipeline.similarity import embeddings
from pipeline.step import Filter, Fitted, Sink, Stage, Step, VectorFilter, split_marked, to_pandas
from tests.images import encoded
from tests.tables import make_batch, sample_uid

ROWS, WIDTH = 72, 8
VECTOR = pa.list_(pa.float16(), WIDTH)
VECTORS = {"vector": "v"}

# Options of the steps that need some, one entry per mode of the step. `@` is the folder of `files`.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "balance": [
        {"entries": "@/words.txt", "max_per_entry": 3},
        {"column": "entries", "max_per_entry": 3, "by": "language"},
        {"min_count": 2, "max_per_entry": 3},
    ],
    "caption_entries": [{"entries": "@/words.txt"}],
    "caption_frequency": [{"max_count": 2}],
    "decontaminate": [
        {"sets": {"eval": "@/eval"}, "vectors": {"more": "@/t.npy"}, "vector": "v"},
        {"sets": {"eval": "@/eval"}, "column": "other"},
    ],
    "exact_dedup": [
        {}, {"captions": "merge"}, {"by": ["sha256"]}, {"by": ["other"]},
        {"by": ["sha256"], "captions": "merge"}, {"by": ["caption"]},
    ],
    "image_cluster": [{"target": "@/t.npy", "clusters": 6, **VECTORS}],
    "image_safety": [{"scorer": "tests.plugins:Redness", "max_score": 0.5}],
    "learned_score": [{"mixture": "@/mixture.json"}],
    "linear_head": [{"head": "@/head.npz", "column": "s", **VECTORS}],
    "match_entries": [{"entries": "@/words.txt"}, {"entries": {"en": "@/words.txt", "de": "@/words.txt"}}],
    "near_dedup": [{"keep": "caption"}, {"column": "other"}],
    "neg_clip_loss": [{"image_vector": "v", "text_vector": "t", "batch_size": 16, "draws": 2}],
    "norm_sim": [{"target": "@/t.npy", **VECTORS}, {"target": "@/t.npy", "p": "2", **VECTORS}],
    "placeholder": [{"max_count": 2}, {"max_count": 2, "by": "phash"}],
    "sample": [{"fraction": 0.4}],
    "semantic_dedup": [{"clusters": 1, **VECTORS}, {"clusters": 1, "keep_highest": "clip_score", **VECTORS}],
    "takedown": [{"file": "@/takedown.txt"}],
    "text_overlap": [{"engine": "tests.plugins:RedBox"}],
    "text_reliance": [{"max_drop": 0.1}],
    "text_safety": [{"scorer": "tests.plugins:Shouting"}, {"words": "@/words.txt"}],
    "threshold": [
        {"column": "clip_score", "min": 0.3}, {"column": "clip_score", "max": 0.3},
        {"column": "clip_score", "top_fraction": 0.3},
    ],
}  # fmt: skip
ELSEWHERE = {"clip_score", "download", "read_shards"}
"""Need a model, the web and shards: tests/stages/test_clip_score.py, test_download.py and test_read_shards.py."""
NOT_TWICE = {"top_fraction": "a share of what is left", "target": "clusters that are fitted to what is left"}
"""Options with which a second application may drop more rows, and why."""
CASES = [
    (name, options)
    for name in built_in_steps()
    if name not in ELSEWHERE and not issubclass(find_step(name), Sink)
    for options in OPTIONS.get(name, [{}])
]
EACH = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name} {options}" for name, options in CASES])
TEXTS = [
    "A brown dog runs across a field of grass", "a brown DOG, running", "Ein brauner Hund rennt über eine Wiese.",
    "IMG_2187.jpg", "一只棕色的狗跑过草地", "แมวดำนั่งอยู่บนหลังคา cat", "red", "click to enlarge", "two cats and a red car",
    "A CAT IN CAPITALS ON A ROOF", None, "",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "words.txt").write_text("cat\ndog\nbrown dog\nred\nHund\n狗\nแมว\n")
    (folder / "takedown.txt").write_text("domain host3.example.org\nphash 00000000000000ff 4\n")
    np.save(folder / "t.npy", np.eye(WIDTH, dtype=np.float32)[:2])
    np.savez(folder / "head.npz", weight=np.linspace(-1, 1, WIDTH)[None], bias=np.zeros(1))
    (folder / "eval").mkdir()
    Image.fromarray(noise(5)).save(folder / "eval/5.png")
    columns = {
        "clip_score": {"knots": [0.1, 0.5], "values": [-1, 1], "missing": 0.3},
        "v": {"weight": [0.5] * WIDTH, "missing": -0.2},
    }
    about = {"format": "winnow.score_mixture/1", "about": {}, "bias": 0.1, "columns": columns}
    (folder / "mixture.json").write_text(json.dumps(about))
    return folder


def noise(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    """Rows with the columns that steps read: equal values, similar values, and some nulls in each column."""
    rng = np.random.default_rng(0)
    pictures = [*(encoded(noise(i)) for i in range(9)), b"GIF89a", None]
    directions = rng.normal(size=(20, WIDTH))

    def cyclic(values: list[Any], i: int, every: int) -> Any:
        return None if i % every == every - 1 else values[i % len(values)]

    made = []
    for i in range(ROWS):
        file_type, caption = "svg" if i % 30 == 29 else "jpg", TEXTS[i * 5 % len(TEXTS)]
        url = f"https://host{i % 10}.example.org/{i % 30}.{file_type}"
        made.append(
            {
                "unit": i % 3, "row": i // 3, "uid": sample_uid(f"{url}{i}", caption or ""), "url": url,
                "caption": caption, "image": pictures[i % len(pictures)],
                "original_width": cyclic([100, 400, 1300], i, 17), "original_height": cyclic([90, 300, 301], i, 19),
                "original_bytes": cyclic([400, 9000], i, 7), "sha256": cyclic([f"{k:064x}" for k in range(25)], i, 11),
                "phash": cyclic([0xFF, 0xFE, 1 << 40, 3 << 50, 0xF0F0 << 20, phash(noise(5))], i, 13),
                "clip_score": float(np.nan) if i % 23 == 22 else cyclic([k / 40 for k in range(20)], i, 29),
                "masked_clip_score": 0.2, "dark_score": cyclic([0.1, 0.9], i, 31), "light_score": 0.5,
                "blurry_score": cyclic([0.5, 0.1, 0.9], i, 37), "low_information_score": 0.7,
                "language": cyclic(["en", "en", "de", "th"], i, 9),
                "entries": [["cat"], ["cat", "dog"], [], ["red"]][i % 4],
            }
        )  # fmt: skip
    batch = make_batch(made)
    for name, spread in (("v", 0.01), ("t", 0.3)):
        vectors = [(directions[i % 20] + spread * rng.normal(size=WIDTH)).astype(np.float16) for i in range(ROWS)]
        vectors[32][3] = np.nan
        values = [None if i % 15 == 14 else v for i, v in enumerate(vectors)]
        batch = batch.append_column(name, pa.array(values, VECTOR))
    hashes = [cyclic([phash(noise(5)), 1 << 40, 3 << 50, 5 << 30], i, 21) for i in range(ROWS)]
    batch = batch.append_column("other", pa.array(hashes, pa.uint64()))
    return batch.sort_by([("unit", "ascending"), ("row", "ascending")])


def made(name: str, options: dict[str, Any], files: Path) -> Step:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return value.replace("@", str(files)) if isinstance(value, str) else value

    try:
        step = find_step(name)(**filled(options))
    except TypeError as error:
        pytest.fail(f"{error}: give {name} a line in OPTIONS")
    assert not list(step.check())
    return step


Fates = dict[tuple[int, int], tuple[str | None, Any]]
"""By unit and row: the reason of the drop, or None and the values that the step added."""


def fates(step: Step, batches: list[pa.Table]) -> Fates:
    """The fate of each row if the step receives these batches, distributed over two workers."""
    batches = [batch.drop_columns([c for c in step.adds if c in batch.column_names]) for batch in batches]
    everything = pa.concat_tables(batches)
    if isinstance(step, VectorFilter):
        return dict(_of_groups(step, everything))
    if isinstance(step, Filter) and step.scope == "run":
        return dict(_of_run(step, everything, min(4, len(batches))))
    if isinstance(step, Fitted):
        usable = np.ones(len(everything), bool)
        for name in step.needs:
            if pa.types.is_fixed_size_list(everything.schema.field(name).type):
                usable &= embeddings.finite(everything[name])
        step.use(step.fit(everything.filter(pa.array(usable)).sort_by("uid"), len(everything)))
    workers = [step, pickle.loads(pickle.dumps(step))]
    for worker in workers:
        worker.setup()
    found: Fates = {}
    parts = [everything] if isinstance(step, Filter) and step.scope == "unit" else batches
    for i, batch in enumerate(parts):
        found |= _of_batch(workers[i % 2], batch)
    return found


def _of_batch(step: Any, batch: pa.Table) -> Fates:
    if isinstance(step, Stage):
        outputs = [split_marked(step, out) for out in step.stream([batch])]
    else:
        outputs = [step.split(batch)]
    found: Fates = {}
    for kept, drops in outputs:
        added = [kept[name].to_pylist() for name in step.adds]
        for unit, row, *values in zip(kept["unit"].to_pylist(), kept["row"].to_pylist(), *added):
            found[unit, row] = (None, repr(values))
        for drop in drops.to_pylist():
            found[drop["unit"], drop["row"]] = (drop["reason"], repr((drop["detail"], drop["value"])))
    return found


def _of_run(step: Filter, rows: pa.Table, partitions: int) -> Iterator[tuple[tuple[int, int], tuple[str | None, Any]]]:
    columns = dict.fromkeys(["unit", "row", "uid", *step.needs, *(c for c in step.wants if c in rows.column_names)])
    frame = to_pandas(rows.select(list(columns)))
    with dask.config.set(scheduler="synchronous"):
        drops = step.decide(dd.from_pandas(frame, npartitions=partitions, sort=False)).compute()
    table = pa.Table.from_pandas(drops, preserve_index=False).to_pylist()
    dropped = {(line["unit"], line["row"]): line for line in table}
    assert len(dropped) == len(table), "no row may be dropped twice"
    for at in zip(rows["unit"].to_pylist(), rows["row"].to_pylist()):
        line = dropped.get(at, {"reason": None, "detail": None, "value": None})
        rest = {name: line.get(name) for name in ("detail", "value", *step.adds)}
        yield at, (line["reason"], repr(rest))


def _of_groups(step: VectorFilter, rows: pa.Table) -> Iterator[tuple[tuple[int, int], tuple[str | None, Any]]]:
    usable = pa.array(embeddings.finite(rows[step.vector]))
    for row in rows.filter(pc.invert(usable)).to_pylist():
        yield (row["unit"], row["row"]), (None, None)
    rows = rows.filter(usable).sort_by("uid")
    matrix = embeddings.matrix(rows[step.vector])
    group = step.groups(matrix, step.fit(matrix, len(rows)))
    for number in np.unique(group):
        members = group == number
        group_rows = rows.filter(pa.array(members))
        reason, detail = step.judge_group(group_rows.drop_columns([step.vector]), matrix[members])
        columns = group_rows["unit"], group_rows["row"], reason, detail
        for unit, row, why, text in zip(*(column.to_pylist() for column in columns)):
            yield (unit, row), (why, text)


def cut(rows: pa.Table, size: int) -> list[pa.Table]:
    return [rows.slice(low, size) for low in range(0, len(rows), size)]


@EACH
def test_results_do_not_depend_on_order_unit_size_or_worker(
    name: str, options: dict[str, Any], files: Path, rows: pa.Table
) -> None:
    step = made(name, options, files)
    whole = fates(step, [rows])
    assert len(whole) == ROWS, "every row is kept once or dropped once"
    assert len({repr(fate) for fate in whole.values()}) > 1, "these rows show no difference; change them"
    shuffled = rows.take(pa.array(np.random.default_rng(1).permutation(ROWS)))
    for other in (cut(rows, 7), cut(rows, 24), [shuffled], cut(shuffled, 5)):
        assert fates(made(name, options, files), other) == whole


@EACH
def test_a_second_run_drops_nothing_more(name: str, options: dict[str, Any], files: Path, rows: pa.Table) -> None:
    first = fates(made(name, options, files), [rows])
    if NOT_TWICE.keys() & options.keys() and name in ("threshold", "image_cluster"):
        pytest.skip(f"keeps {' or '.join(NOT_TWICE[key] for key in options if key in NOT_TWICE)}")
    places = zip(rows["unit"].to_pylist(), rows["row"].to_pylist())
    left = rows.filter(pa.array([first[at][0] is None for at in places]))
    again = fates(made(name, options, files), [left])
    assert {at: why for at, (why, _) in again.items() if why is not None} == {}
    step = made(name, options, files)
    if isinstance(step, Stage) and not isinstance(step, Fitted):
        assert again == {at: fate for at, fate in first.items() if fate[0] is None}


NUMBERS = (pa.string(), pa.list_(pa.float32()), pa.list_(pa.string()), pa.struct([("a", pa.int8())]), pa.bool_())


@EACH
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_a_column_of_another_type_is_refused_or_can_be_used(
    name: str, options: dict[str, Any], dtype: pa.DataType, files: Path, rows: pa.Table
) -> None:
    step = made(name, options, files)
    for column in step.needs:
        if column in RESERVED or rows.schema.field(column).type == dtype:
            continue  # Winnow's own columns are always of one type
        types = {field.name: field.type for field in rows.schema} | {column: dtype}
        problems = list(step.check_columns(types))
        if problems:
            assert any(column in problem and str(dtype) in problem for _, problem in problems), problems
            continue
        values = {pa.string(): "a", pa.bool_(): True}.get(dtype, [] if pa.types.is_list(dtype) else {"a": 1})
        at = rows.column_names.index(column)
        fates(made(name, options, files), [rows.set_column(at, column, pa.array([values] * ROWS, dtype))])
