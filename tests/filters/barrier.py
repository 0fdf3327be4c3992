"""Table tests for filters over a whole run, whose verdicts must not depend on partitions or on the order of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa

from pipeline.step import Filter
from tests.tables import make_batch


def _nullable(dtype: pa.DataType) -> Any:
    # Arrow-backed as in a run, because a null must not turn integers into floats.
    if pa.types.is_string(dtype):
        return pd.StringDtype("pyarrow")
    return pd.ArrowDtype(dtype) if pa.types.is_integer(dtype) or pa.types.is_list(dtype) else None


def needed(step: Filter, batch: pa.Table) -> pd.DataFrame:
    """The columns that the step gets in a run."""
    columns = dict.fromkeys(["unit", "row", "uid", *step.needs])
    return batch.select(list(columns)).to_pandas(types_mapper=_nullable)


def partitionings(frame: pd.DataFrame) -> Iterator[dd.DataFrame]:
    """Yields the rows in one partition, then twice shuffled in more, with dask's synchronous scheduler."""
    for partitions, shuffle in [(1, None), (3, 0), (8, 1)]:
        rows = frame if shuffle is None else frame.sample(frac=1, random_state=shuffle)
        with dask.config.set(scheduler="synchronous"):
            yield dd.from_pandas(rows.reset_index(drop=True), npartitions=partitions, sort=False)


def decide(step: Filter, batch: pa.Table) -> list[tuple[str, str | None] | None]:
    """For each row of `batch`, None if kept, else reason and detail. The step gets only the columns in `needs`."""
    problems = list(step.check())
    assert not problems, problems
    assert step.scope == "run"
    places = list(zip(batch["unit"].to_pylist(), batch["row"].to_pylist()))
    outcomes = []
    for pool in partitionings(needed(step, batch)):
        drops = step.decide(pool).compute()
        assert list(drops.columns) == ["unit", "row", "reason", "detail", "value"]
        assert not drops.duplicated(["unit", "row"]).any(), "no row may be dropped twice"
        details = [None if pd.isna(detail) else detail for detail in drops["detail"]]
        verdicts = dict(zip(zip(drops["unit"], drops["row"]), zip(drops["reason"], details)))
        assert set(verdicts) <= set(places)
        outcomes.append([verdicts.get(place) for place in places])
    assert outcomes[0] == outcomes[1] == outcomes[2], "partitions or the order of rows changed a verdict"
    return outcomes[0]


def figures(step: Filter, batch: pa.Table) -> list[dict[str, Any]]:
    """The figures about the step's decision, as they appear in its line of a funnel."""
    outcomes = []
    for pool in partitionings(needed(step, batch)):
        table = step.figures(pool, step.decide(pool))
        assert table is not None
        outcomes.append(json.loads(table.compute().to_json(orient="records")))
    assert outcomes[0] == outcomes[1] == outcomes[2], "partitions or the order of rows changed the figures"
    return list(outcomes[0])


def check_barrier(step: Filter, rows: Sequence[Mapping[str, Any]], expected: Sequence[str | None]) -> None:
    """`expected[i]` is None if row i should be kept, else the reason of its drop."""
    found = [drop and drop[0] for drop in decide(step, make_batch(rows))]
    wrong = [f"{row}: expected {e}, found {f}" for row, e, f in zip(rows, expected, found, strict=True) if e != f]
    assert not wrong, "\n".join(wrong)
