"""Shuffles the rows of the pool into units. This is the only full shuffle of a run, and it moves text, not images.

A hash of a row's canonical URL determines its unit. So rows with equal URLs share a unit, every unit is a uniform
sample of the pool, and the rows of a host are spread evenly over all units. `scatter` sorts each piece of the pool by
partition (a range of adjacent units). `gather` collects a partition from all pieces and commits its units. Pieces and
partitions are sized for the memory of a task, independently of the pool's files. Each pair of a piece and a partition
costs one read. Rows are ordered by the same hash, so the order of the run does not depend on the number of units.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.pool import Split, read
from pipeline.recipe import PoolSpec
from pipeline.scheduler import spool
from pipeline.scheduler.passes import HEAVY_ROWS, PoolPass, check_unit, commit, new_attempt
from pipeline.schema import SAMPLE, is_heavy
from pipeline.step import drops_table
from pipeline.storage import DamagedError, Entry, sealed
from pipeline.text.hashing import hash64, uid_pairs
from pipeline.text.url import canonical

SPOOL_ROWS = 1_000_000
SPOOL_BYTES = 1 << 30
"""Uncompressed bytes of a piece that are in memory at a time. Arrow string arrays are limited to 2 GB."""
PARTITION_ROWS = 1_000_000
PARTITION_BYTES = 1 << 30
UNIT_BYTES = 1 << 28
"""Approximate limits of a partition and a unit, for pools with inline pictures."""
LEAST_UNITS, LEAST_UNIT_ROWS = 8, 500
LEAST_SPOOLS, LEAST_SPOOL_ROWS = 64, 50_000


def unit_count(rows: int, unit_rows: int, size: int = 0) -> int:
    """Number of units for a pool of `size` bytes. Each has `unit_rows` rows; fewer if rows are large, or if the pool is
    small, so that every core has work."""
    heavy = min(rows, size // UNIT_BYTES)
    return max(1, math.ceil(rows / unit_rows), heavy, min(LEAST_UNITS, rows // LEAST_UNIT_ROWS))


def partition_count(rows: int, units: int, size: int = 0) -> int:
    """Number of partitions for a pool of `size` bytes, at most one per unit."""
    return max(1, min(units, max(math.ceil(rows / PARTITION_ROWS), size // PARTITION_BYTES)))


def pieces(rows: Sequence[int]) -> list[int]:
    """Groups splits with these numbers of rows into pieces; returns the index of the first split of each. Pieces have
    about SPOOL_ROWS rows, fewer in a small pool, so that every core has work."""
    enough = min(SPOOL_ROWS, max(LEAST_SPOOL_ROWS, sum(rows) // LEAST_SPOOLS))
    starts, held = [], enough
    for number, size in enumerate(rows):
        if held >= enough:
            starts.append(number)
            held = 0
        held += size
    return starts


def scatter(
    p: PoolPass, piece: int, first: int, splits: Sequence[Split], spec: PoolSpec, types: dict[str, pa.DataType],
    units: int, parts: int,
) -> None:  # fmt: skip
    """Reads the splits of one piece, numbered from `first`, and writes their rows to spool files by partition.

    A record lists the files. There is more than one only if a split exceeds the size of a piece.
    """
    record_name = f"spool/{piece:06d}.json"
    if p.store.exists(record_name):
        return
    entries: list[Entry] = []
    held: list[pa.Table] = []

    def spill() -> None:
        table = pa.concat_tables(held)
        held.clear()
        part = _scale(table["place"].to_numpy(), units) * parts // units
        name = f"spool/{piece:06d}-{len(entries):04d}-{secrets.token_hex(4)}.arrow"
        entries.append(spool.write(p.store, name, table, part, parts))

    for number, split in enumerate(splits, first):
        position = 0
        for batch in read(spec, split, types):
            place = hash64([canonical(url) for url in batch["url"].to_pylist()]).copy()
            # Spread rows without a URL over all units by their position in the pool.
            blank = np.flatnonzero(batch["url"].to_numpy() == "")
            place[blank] = hash64([f"{number} {position + i}" for i in blank.tolist()])
            position += len(batch)
            held.append(batch.append_column("place", pa.array(place)))
            if sum(map(len, held)) >= 2 * SPOOL_ROWS or sum(table.nbytes for table in held) >= SPOOL_BYTES:
                spill()
    if held:
        spill()
    p.store.create(record_name, sealed({"files": entries}))


def mend(p: PoolPass) -> None:
    """Removes damaged spool records of an interrupted command, so that their pieces are scattered again.

    Of spool files, only the sizes are checked, because these files exist only during ingestion.
    """
    sizes = p.store.sizes("spool")
    for name in sizes:
        if name.endswith(".json"):
            try:
                record = p.store.read_record(f"spool/{name}") or {}
                if any(sizes.get(entry["name"].partition("/")[2]) != entry["bytes"] for entry in record["files"]):
                    raise DamagedError(name)
            except DamagedError:
                p.store.remove(f"spool/{name}")
    try:
        p.store.read_record("plan.json")
    except DamagedError:
        p.store.remove("plan.json")


def gather(
    p: PoolPass, part: int, pieces: int, types: dict[str, pa.DataType], units: int, parts: int
) -> Iterator[dict[str, Any]]:
    """Collects partition `part` from all pieces and commits its units. Yields their records."""
    first, last = -(-part * units // parts), -(-(part + 1) * units // parts)
    known = {unit: _known(p, unit) for unit in range(first, last)}
    if all(known.values()):
        yield from (record for record in known.values() if record)
        return
    schema = pa.schema([*SAMPLE, *types.items(), ("drop_reason", pa.string()), ("place", pa.uint64())])

    with ThreadPoolExecutor(spool.READS_AT_ONCE) as threads:
        records = list(threads.map(lambda piece: p.store.read_record(f"spool/{piece:06d}.json"), range(pieces)))
    names = [entry["name"] for record in records if record for entry in record["files"]]
    table = spool.read(p.store, names, part, schema)
    place = table["place"].to_numpy()
    unit_of = _scale(place, units)
    # Order by hash, uid, then position in the pool, so that the order depends only on the pool.
    uid = uid_pairs(table["uid"].to_pylist())
    order = np.lexsort((np.arange(len(table)), uid["f1"], uid["f0"], place))
    table, unit_of = table.take(pa.array(order)), unit_of[order]
    bounds = np.searchsorted(unit_of, np.arange(first, last + 1))
    for unit, low, high in zip(range(first, last), bounds, bounds[1:]):
        yield known[unit] or _commit_unit(p, unit, table.slice(low, high - low))


def _known(p: PoolPass, unit: int) -> dict[str, Any] | None:
    """The record of a unit committed by an interrupted command. Withdraws a damaged unit."""
    try:
        record = p.record(unit)
        if record is not None:
            check_unit(p, unit, digest=True)
        return record
    except DamagedError:
        p.forget(unit)
        return None


def _commit_unit(p: PoolPass, unit: int, table: pa.Table) -> dict[str, Any]:
    """Commits a unit of the pool. Of usable rows with the same uid, only the first is kept."""
    reasons: list[str | None] = table["drop_reason"].to_pylist()
    seen: set[str] = set()
    for i, uid in enumerate(table["uid"].to_pylist()):
        if reasons[i] is None:
            if uid in seen:
                reasons[i] = "duplicate_uid"
            seen.add(uid)
    rows = np.arange(len(table), dtype=np.int32)
    stored = table.drop_columns(["drop_reason", "place"]).add_column(0, "row", pa.array(rows))
    gone = pa.array([reason is not None for reason in reasons], pa.bool_())
    dropped = stored.filter(gone).append_column("unit", pa.array(np.full(len(table), unit, np.int32)).filter(gone))
    drops = drops_table(dropped, p.label, pa.array(reasons, pa.string()).filter(gone))
    attempt, heavy = new_attempt(unit), [c for c, dtype in p.adds.items() if is_heavy(dtype)]
    if not heavy:
        return commit(p, unit, attempt, len(table), stored, None, drops, {})
    with p.store.output(f"{attempt}.arrow") as file, pa.ipc.new_file(file, stored.select(heavy).schema) as writer:
        writer.write_table(stored.select(heavy), max_chunksize=HEAVY_ROWS)
    light = stored.drop_columns(heavy).append_column("heavy_at", pa.array(rows))
    return commit(p, unit, attempt, len(table), light, file.entry, drops, {})


def _scale(place: np.ndarray, n: int) -> np.ndarray:
    """floor(place · n / 2^64) without overflow, for n < 2^31."""
    high, low = place >> np.uint64(32), place & np.uint64(0xFFFFFFFF)
    return ((high * np.uint64(n) + ((low * np.uint64(n)) >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)
