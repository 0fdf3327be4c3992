"""Rows on their way to where they meet: the one way in which rows of different units change places.

A spool file is an Arrow IPC file with one record batch for each partition. Whoever holds rows writes one; whoever
wants a partition reads that batch of every file. So a shuffle costs one read for each pair of a file and a partition,
and neither the driver nor the object store holds a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from pipeline.storage import Entry, Store

READS_AT_ONCE = 8


def write(
    store: Store, name: str, table: pa.Table, part: np.ndarray, parts: int, compression: str | None = "zstd"
) -> Entry:
    """Writes the rows of a table, each to its partition `part`, from 0 to `parts` − 1; returns the file's entry.
    Vectors gain nothing from `compression`."""
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(parts + 1))
    table = table.take(pa.array(order))
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with store.output(name) as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        for low, high in itertools.pairwise(bounds):
            columns = [column.combine_chunks() for column in table.slice(low, high - low).columns]
            writer.write_batch(pa.record_batch(columns, table.schema))
    return file.entry


def read(store: Store, names: Iterable[str], part: int, schema: pa.Schema) -> pa.Table:
    """The rows of one partition from all spool files, in the order of `names`."""

    def batch(name: str) -> pa.Table:
        with store.input(name, random_access=True) as file:
            return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(part)]).select(schema.names)

    with ThreadPoolExecutor(READS_AT_ONCE) as threads:  # a remote store takes its time for each
        return pa.concat_tables([schema.empty_table(), *threads.map(batch, names)])
