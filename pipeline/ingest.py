"""From pool files to units: the one shuffle of a run, and it moves text, never images.

A row's unit is a hash of its canonical URL. Equal URLs therefore meet in one unit, every unit is a uniform sample of
the pool, and the rows of one host are spread evenly over all units. `scatter` sorts each piece of the pool by
partition, a range of neighbouring units; `gather` collects a partition from all pieces and commits its units. Rows are
ordered by that same hash, so the order of the whole run does not depend on how many units there are.
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.hashing import hash64
from pipeline.passes import Pass, commit, new_attempt
from pipeline.pool import Split, read
from pipeline.recipe import PoolSpec
from pipeline.schema import SAMPLE
from pipeline.step import drops_table
from pipeline.url import canonical

SPOOL_ROWS = 1_000_000
PARTITION_ROWS = 1_000_000
LEAST_UNITS, LEAST_UNIT_ROWS = 8, 500


def unit_count(rows: int, unit_rows: int) -> int:
    """How many units a pool is cut into: of `unit_rows` rows, smaller in a small pool so that every core has work."""
    return max(1, math.ceil(rows / unit_rows), min(LEAST_UNITS, rows // LEAST_UNIT_ROWS))


def partition_count(rows: int, units: int) -> int:
    return max(1, min(units, rows // PARTITION_ROWS))


def scatter(
    p: Pass, number: int, split: Split, spec: PoolSpec, types: dict[str, pa.DataType], units: int, parts: int
) -> None:
    """Reads one split and stores its rows by partition, a parquet row group each; the record names the files."""
    record_name = f"spool/{number:06d}.json"
    if p.store.exists(record_name):
        return
    names: list[str] = []
    held: list[pa.Table] = []
    position = 0

    def spill() -> None:
        table = pa.concat_tables(held)
        held.clear()
        part = _scale(table["place"].to_numpy(), units) * parts // units
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(parts + 1))
        table = table.take(pa.array(order))
        name = f"spool/{number:06d}-{len(names):04d}-{secrets.token_hex(4)}.parquet"
        with p.store.output(name) as file, pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
            for low, high in itertools.pairwise(bounds):
                writer.write_table(table.slice(low, high - low), row_group_size=max(1, high - low))
        names.append(name)

    rows = 0
    for batch in read(spec, split, types):
        place = hash64([canonical(url) for url in batch["url"].to_pylist()]).copy()
        # Rows without a URL would all meet in one unit; their place in the pool spreads them.
        blank = np.flatnonzero(batch["url"].to_numpy() == "")
        place[blank] = hash64([f"{number} {position + i}" for i in blank.tolist()])
        position += len(batch)
        held.append(batch.append_column("place", pa.array(place)))
        rows += len(batch)
        if rows >= SPOOL_ROWS:
            spill()
            rows = 0
    if held:
        spill()
    p.store.create(record_name, json.dumps({"files": names}).encode())


def gather(
    p: Pass, part: int, splits: int, types: dict[str, pa.DataType], units: int, parts: int
) -> Iterator[dict[str, Any]]:
    """Collects one partition from all splits and commits the units in it; yields their records."""
    first, last = -(-part * units // parts), -(-(part + 1) * units // parts)
    known = {unit: p.record(unit) for unit in range(first, last)}
    if all(known.values()):
        yield from (record for record in known.values() if record)
        return
    schema = pa.schema([*SAMPLE, *types.items(), ("drop_reason", pa.string()), ("place", pa.uint64())])
    tables = [schema.empty_table()]
    for number in range(splits):
        for name in json.loads(p.store.read(f"spool/{number:06d}.json"))["files"]:
            with p.store.input(name) as file:
                tables.append(pq.ParquetFile(file).read_row_group(part).select(schema.names))
    table = pa.concat_tables(tables)
    place = table["place"].to_numpy()
    unit_of = _scale(place, units)
    # By hash, then uid, then place in the pool: an order that nothing but the pool decides.
    order = np.lexsort((np.arange(len(table)), table["uid"].to_numpy(), place))
    table, unit_of = table.take(pa.array(order)), unit_of[order]
    bounds = np.searchsorted(unit_of, np.arange(first, last + 1))
    for unit, low, high in zip(range(first, last), bounds, bounds[1:]):
        yield known[unit] or _commit_unit(p, unit, table.slice(low, high - low))


def _commit_unit(p: Pass, unit: int, table: pa.Table) -> dict[str, Any]:
    reason = table["drop_reason"].to_numpy(zero_copy_only=False).copy()
    usable = np.array([r is None for r in reason], bool)
    seen: set[str] = set()
    for i, (uid, good) in enumerate(zip(table["uid"].to_pylist(), usable)):
        if good and uid in seen:
            reason[i] = "duplicate_uid"
        elif good:
            seen.add(uid)
    rows = np.arange(len(table), dtype=np.int32)
    stored = table.drop_columns(["drop_reason", "place"]).add_column(0, "row", pa.array(rows))
    gone = pa.array([r is not None for r in reason], pa.bool_())
    dropped = stored.filter(gone).append_column("unit", pa.array(np.full(len(table), unit, np.int32)).filter(gone))
    drops = drops_table(dropped, p.label, pa.array(reason, pa.string()).filter(gone))
    return commit(p, unit, new_attempt(unit), len(table), stored, None, drops, {})


def _scale(place: np.ndarray, n: int) -> np.ndarray:
    """floor(place · n / 2^64) without overflow, for n < 2^31."""
    high, low = place >> np.uint64(32), place & np.uint64(0xFFFFFFFF)
    return ((high * np.uint64(n) + ((low * np.uint64(n)) >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)
