"""Shuffles rows between units through files.

A spool file is an Arrow IPC file with one record batch per partition. Each source of rows writes one file; reading a
partition reads one batch of every file. A shuffle costs one read per pair of file and partition. Rows never pass
through the driver or Ray's object store.
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
    """Writes the rows of a table grouped by their partition `part`, 0 to `parts` − 1. Returns the file's entry.

    Set `compression` to None for vectors, which do not compress.
    """
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

    with ThreadPoolExecutor(READS_AT_ONCE) as threads:  # hides the latency of a remote store
        return pa.concat_tables([schema.empty_table(), *threads.map(batch, names)])
