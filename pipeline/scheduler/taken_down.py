"""`takedown.parquet` in the folder of a run: the samples that were taken out of its finished shards.

`winnow takedown` adds to it. Later commands that write the shards leave these samples out, so a repair or a changed
recipe does not bring them back.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import SAMPLE
from pipeline.step import drops_table
from pipeline.storage import Store

NAME = "takedown.parquet"
REASON = "taken_down"
"""The reason with which the sink drops these samples."""
TAKEN = pa.schema([*SAMPLE, ("detail", pa.string()), ("part", pa.int32())])
"""The sample, the list entry that matched it (`domain example.org`), and the part of the sink that it was in."""


def read_taken(store: Store) -> pa.Table:
    """The samples taken out of the run in the folder `store`, with the columns of TAKEN; empty if there is no file."""
    return store.read_table(NAME).cast(TAKEN) if store.exists(NAME) else TAKEN.empty_table()


def taken_rows(rows: pa.Table, taken: pa.Table) -> list[list[Any]]:
    """The rows (`unit, row, uid`) that were taken out, as `[unit, row, detail]`, for the record of a part."""
    at = pc.index_in(rows["uid"], taken["uid"].combine_chunks())
    there = at.is_valid()
    details = taken["detail"].take(at.drop_null())
    found = zip(rows["unit"].filter(there).to_pylist(), rows["row"].filter(there).to_pylist(), details.to_pylist())
    return [list(row) for row in found]


def taken_drops(rows: list[list[Any]], label: str) -> pa.Table:
    """The drops (`schema.DROP`) of rows in the format of `taken_rows`."""
    units, numbers, details = zip(*rows) if rows else ((), (), ())
    table = pa.table({"unit": pa.array(units, pa.int32()), "row": pa.array(numbers, pa.int32())})
    return drops_table(table, label, REASON, pa.array(details, pa.string()))
