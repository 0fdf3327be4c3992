"""Table tests for whole-run filters: the verdicts must depend neither on partitions nor on their order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa

from pipeline.step import Filter
from tests.tables import make_batch


def _nullable(dtype: pa.DataType) -> Any:
    # Arrow-backed, as in a run: a null must not turn integers into floats.
    if pa.types.is_string(dtype):
        return pd.StringDtype("pyarrow")
    return pd.ArrowDtype(dtype) if pa.types.is_integer(dtype) or pa.types.is_list(dtype) else None


def decide(step: Filter, batch: pa.Table) -> list[tuple[str, str | None] | None]:
    """For each row of `batch`, None if kept, else reason and detail. The step gets only the columns in `needs`."""
    problems = list(step.check())
    assert not problems, problems
    assert step.scope == "run"
    columns = dict.fromkeys(["unit", "row", "uid", *step.needs])
    frame = batch.select(list(columns)).to_pandas(types_mapper=_nullable)
    outcomes = []
    for partitions, shuffle in [(1, None), (3, 0), (8, 1)]:
        rows = frame if shuffle is None else frame.sample(frac=1, random_state=shuffle)
        with dask.config.set(scheduler="synchronous"):
            pool = dd.from_pandas(rows.reset_index(drop=True), npartitions=partitions, sort=False)
            drops = step.decide(pool).compute()
        assert list(drops.columns) == ["unit", "row", "reason", "detail", "value"]
        assert not drops.duplicated(["unit", "row"]).any(), "no row may be dropped twice"
        details = [None if pd.isna(detail) else detail for detail in drops["detail"]]
        found = dict(zip(zip(drops["unit"], drops["row"]), zip(drops["reason"], details)))
        places = list(zip(batch["unit"].to_pylist(), batch["row"].to_pylist()))
        assert set(found) <= set(places)
        outcomes.append([found.get(place) for place in places])
    assert outcomes[0] == outcomes[1] == outcomes[2], "partitions or the order of rows changed a verdict"
    return outcomes[0]


def figures(step: Filter, batch: pa.Table) -> list[dict[str, Any]]:
    """What the step says of its decision about `batch`, as the line of a funnel has it."""
    columns = dict.fromkeys(["unit", "row", "uid", *step.needs])
    frame = batch.select(list(columns)).to_pandas(types_mapper=_nullable)
    found = []
    for partitions in (1, 3):
        with dask.config.set(scheduler="synchronous"):
            pool = dd.from_pandas(frame, npartitions=partitions, sort=False)
            table = step.figures(pool, step.decide(pool))
            assert table is not None
            found.append(json.loads(table.compute().to_json(orient="records")))
    assert found[0] == found[1], "partitions changed the figures"
    return list(found[0])


def check_barrier(step: Filter, rows: Sequence[Mapping[str, Any]], expected: Sequence[str | None]) -> None:
    """`expected[i]` is None if row i should be kept, else the reason of its drop."""
    found = [drop and drop[0] for drop in decide(step, make_batch(rows))]
    wrong = [f"{row}: expected {e}, found {f}" for row, e, f in zip(rows, expected, found, strict=True) if e != f]
    assert not wrong, "\n".join(wrong)
