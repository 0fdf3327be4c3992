"""Cuts in memory decide as the step `threshold` does, and what is counted is what a plain scan would count."""

from __future__ import annotations

import json
import math
import sys

import dask.dataframe as dd
import numpy as np
import pyarrow as pa
import pytest

from pipeline.condition import Condition
from pipeline.filters.threshold import Threshold
from pipeline.models.score_mixture import is_scalar
from pipeline.step import apply
from pipeline.studio.cuts import BINS, Rows, View, score_columns

N = 3000


def made(n: int = N, seed: int = 0) -> tuple[Rows, pa.Table]:
    """Rows with scores of every awkward kind: many ties, nulls, infinities, one value for all."""
    rng = np.random.default_rng(seed)
    scores = {
        "score": rng.normal(size=n).astype(np.float32).astype(float),
        "ties": rng.integers(5, size=n).astype(float),
        "holes": np.where(rng.random(n) < 0.3, math.nan, rng.random(n)),
        "infinite": np.where(rng.random(n) < 0.01, math.inf, np.where(rng.random(n) < 0.01, -math.inf, rng.random(n))),
        "same": np.full(n, 3.0),
    }
    uids = [f"{value:032x}" for value in rng.integers(1 << 60, size=n).tolist()]
    uids[10] = uids[11]  # a pool may repeat them
    position = {"unit": pa.array(np.arange(n) // 1000, pa.int32()), "row": pa.array(np.arange(n) % 1000, pa.int32())}
    texts = pa.table(
        {
            "uid": uids,
            "url": [f"http://host{i % 7}.example/{i}" if i % 100 else None for i in range(n)],
            "caption": [
                f"{('A Red circle', 'a blue star', 'both: red, circle; blue star')[i % 3]} {i}" for i in range(n)
            ],
        }
    )
    chunked = pa.concat_tables([texts.slice(low, 700) for low in range(0, n, 700)])
    language = pa.chunked_array([pa.array([("en", "de", None)[i % 3] for i in range(n)])])
    place = np.stack([position["unit"].to_numpy(), position["row"].to_numpy()], axis=1)
    rows = Rows(place, chunked, scores, language, ("red circle", "blue star", "never"))
    columns = {name: pa.array(values, from_pandas=True) for name, values in scores.items()}
    return rows, pa.table({**position, "uid": uids, **columns})


def threshold(table: pa.Table, cut: Condition) -> pa.Table:
    """What the step keeps."""
    step = Threshold(**cut.line()["threshold"])
    if step.scope == "row":
        return apply(step, table)[0]
    frame = table.select(["unit", "row", "uid", cut.column]).to_pandas()
    drops = step.decide(dd.from_pandas(frame, npartitions=3)).compute()
    dropped = set(zip(drops["unit"], drops["row"]))
    kept = [(unit, row) not in dropped for unit, row in zip(table["unit"].to_pylist(), table["row"].to_pylist())]
    return table.filter(pa.array(kept, pa.bool_()))


CUTS = [
    [Condition("score", "min", 0.1)],
    [Condition("score", "min", float(np.float32(0.1)))],
    [Condition("holes", "min", 0.0)],
    [Condition("infinite", "min", -math.inf)],
    [Condition("score", "top_fraction", 0.07)],
    [Condition("ties", "top_fraction", 0.5)],
    [Condition("same", "top_fraction", 0.001)],
    [Condition("same", "top_fraction", 1.0)],
    [Condition("holes", "top_fraction", 0.3)],
    [
        Condition("holes", "min", 0.2), Condition("ties", "top_fraction", 0.33),
        Condition("score", "top_fraction", 0.9), Condition("infinite", "min", 0.1),
    ],
    [Condition("score", "min", 99.0), Condition("ties", "top_fraction", 0.5)],
]  # fmt: skip


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_cuts_keep_what_the_steps_keep(cuts: list[Condition]) -> None:
    rows, table = made()
    applied = rows.apply(tuple(cuts))
    for cut, after in zip(cuts, applied.after):
        table = threshold(table, cut)
        assert after == len(table)
    kept = np.flatnonzero(applied.without(None, rows.n))
    assert rows.place[kept].tolist() == list(map(list, zip(table["unit"].to_pylist(), table["row"].to_pylist())))


def test_a_summary_counts_what_a_scan_counts() -> None:
    rows, _ = made()
    cuts = (Condition("score", "min", 0.2), Condition("holes", "top_fraction", 0.5))
    view = View(language="en", text="RED")
    found = rows.summary(cuts, view, ["score", "ties", "same"])
    applied = rows.apply(cuts)
    kept = applied.keeps[0] & applied.keeps[1]
    captions = rows.texts["caption"].to_pylist()
    seen = np.array([i % 3 == 0 and "red" in captions[i].lower() for i in range(N)])
    assert (found["rows"], found["kept"]) == (N, int(kept.sum()))
    assert (found["seen"], found["seen_kept"]) == (int(seen.sum()), int((seen & kept).sum()))
    assert [cut["alone"] for cut in found["cuts"]] == [
        int((applied.keeps[1] & ~applied.keeps[0]).sum()), int((applied.keeps[0] & ~applied.keeps[1]).sum()),
    ]  # fmt: skip
    for name, rest in (("score", applied.keeps[1]), ("ties", kept), ("same", kept)):
        drawn = found["columns"][name]
        assert (sum(drawn["all"]), sum(drawn["kept"])) == (int(seen.sum()), int((seen & rest).sum()))
        low, high = rows.ranges[name]
        inner = np.linspace(low, high, BINS + 1)[1:-1]
        by_hand = np.bincount(np.searchsorted(inner, rows.scores[name][seen & rest], side="right"), minlength=BINS)
        assert drawn["kept"] == by_hand.tolist()
    assert found["languages"] == [{"name": "en", "seen": int(seen.sum()), "kept": int((seen & kept).sum())}]
    hosts = {line["name"]: line["seen"] for line in found["hosts"]}
    assert hosts == {
        f"host{h}.example": sum(seen[i] and i % 7 == h and i % 100 > 0 for i in range(N)) for h in range(7)
    }
    assert [line["name"] for line in found["concepts"]] == ["red circle"]


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (View(), lambda i: True),
        (View(language="de"), lambda i: i % 3 == 1),
        (View(language="fr"), lambda i: False),
        (View(host="host3.example"), lambda i: i % 7 == 3 and i % 100 > 0),
        (View(concept="red circle"), lambda i: i % 3 != 1),
        (View(concept="never"), lambda i: False),
        (View(concept="blue star", text="both"), lambda i: i % 3 == 2),
        (View(text=".*"), lambda i: False),
    ],
    ids=lambda given: str(given) if isinstance(given, View) else "",  # the text of a lambda is its address
)
def test_views(view: View, expected) -> None:  # type: ignore[no-untyped-def]
    rows, _ = made()
    assert rows.seen(view).tolist() == [expected(i) for i in range(N)]


@pytest.mark.parametrize(
    "cut",
    [Condition("score", "min", 0.3), Condition("ties", "top_fraction", 0.5), Condition("ties", "min", 2.0)],
    ids=str,
)
def test_the_rows_on_both_sides_are_the_nearest(cut: Condition) -> None:
    rows, _ = made()
    other = Condition("holes", "min", 0.5)
    above, below = rows.sides((other, cut), 1, View(language="en"), 9)
    applied, values = rows.apply((other, cut)), rows.scores[cut.column]
    shown = applied.keeps[0] & rows.seen(View(language="en"))
    assert shown[above].all()
    assert shown[below].all()
    assert applied.keeps[1][above].all()
    assert not applied.keeps[1][below].any()
    assert values[above].tolist() == sorted(values[shown & applied.keeps[1]])[:9]
    assert values[below].tolist() == sorted(values[shown & ~applied.keeps[1]], reverse=True)[:9]


def test_a_cut_that_keeps_nothing_has_one_side() -> None:
    rows, _ = made()
    cuts = (Condition("score", "min", 99.0), Condition("ties", "top_fraction", 0.5))
    assert len(rows.sides(cuts, 0, View(), 5)[0]) == 0
    assert len(rows.sides(cuts, 0, View(), 5)[1]) == 0, "the other cut keeps none of them"
    assert rows.summary(cuts, View(), [])["cuts"][1]["at"] is None
    assert len(rows.sample(cuts, View(), True, 5)) == 0
    assert len(rows.sample(cuts, View(), False, 5)) == 5


def test_infinities_are_numbers_in_json() -> None:
    rows, _ = made()
    high = (Condition("infinite", "top_fraction", 0.001),)
    summary = rows.summary(high, View(), list(rows.scores))
    assert summary["cuts"][0]["at"] == sys.float_info.max
    above, _ = rows.sides(high, 0, View(), 3)
    shown = rows.describe(above, high)
    assert [row["scores"]["infinite"] for row in shown] == [sys.float_info.max] * 3
    json.dumps([summary, shown], allow_nan=False)


def test_no_rows() -> None:
    texts = pa.table({name: pa.chunked_array([], pa.string()) for name in ("uid", "url", "caption")})
    rows = Rows(np.empty((0, 2), np.int32), texts, {})
    found = rows.summary((), View(text="x"), [])
    assert (found["rows"], found["kept"], found["hosts"]) == (0, 0, [])


def test_a_column_without_values_is_not_a_score() -> None:
    types = {"row": pa.int32(), "uid": pa.string(), "a": pa.float32(), "b": pa.decimal128(5, 2), "empty": pa.null()}
    assert score_columns(types) == ["a", "b"]
    assert not is_scalar(pa.null())
