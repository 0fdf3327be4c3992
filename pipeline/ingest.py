"""From pool files to units: the one shuffle of a run, and it moves text, never images.

A row's unit is a hash of its canonical URL. Equal URLs therefore meet in one unit, every unit is a uniform sample of
the pool, and the rows of one host are spread evenly over all units. `scatter` sorts each piece of the pool by
partition, a range of neighbouring units; `gather` collects a partition from all pieces and commits its units. Pieces
and partitions are as large as a task can hold, whatever the files of the pool: a pair of them is a read. Rows are
ordered by that same hash, so the order of the whole run does not depend on how many units there are.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import spool
from pipeline.hashing import hash64
from pipeline.passes import Pass, check_unit, commit, new_attempt
from pipeline.pool import Split, read
from pipeline.recipe import PoolSpec
from pipeline.schema import SAMPLE
from pipeline.step import drops_table
from pipeline.storage import DamagedError, Entry, sealed
from pipeline.url import canonical

SPOOL_ROWS = 1_000_000
SPOOL_BYTES = 1 << 30
"""What a piece may hold at a time, uncompressed: Arrow's texts end at two gigabytes."""
PARTITION_ROWS = 1_000_000
LEAST_UNITS, LEAST_UNIT_ROWS = 8, 500
LEAST_SPOOLS, LEAST_SPOOL_ROWS = 64, 50_000


def unit_count(rows: int, unit_rows: int) -> int:
    """How many units a pool is cut into: of `unit_rows` rows, smaller in a small pool so that every core has work."""
    return max(1, math.ceil(rows / unit_rows), min(LEAST_UNITS, rows // LEAST_UNIT_ROWS))


def partition_count(rows: int, units: int) -> int:
    return max(1, min(units, math.ceil(rows / PARTITION_ROWS)))


def pieces(rows: Sequence[int]) -> list[int]:
    """Where each piece begins in a list of splits with so many rows each: pieces of SPOOL_ROWS, smaller in a small pool
    so that every core has work."""
    enough = min(SPOOL_ROWS, max(LEAST_SPOOL_ROWS, sum(rows) // LEAST_SPOOLS))
    starts, held = [], enough
    for number, size in enumerate(rows):
        if held >= enough:
            starts.append(number)
            held = 0
        held += size
    return starts


def scatter(
    p: Pass, piece: int, first: int, splits: Sequence[Split], spec: PoolSpec, types: dict[str, pa.DataType],
    units: int, parts: int,
) -> None:  # fmt: skip
    """Reads the splits of one piece, numbered from `first`, and stores their rows by partition, a record batch each.

    The record names the files: more than one only where a single split is larger than a piece should be.
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
            # Rows without a URL would all meet in one unit; their place in the pool spreads them.
            blank = np.flatnonzero(batch["url"].to_numpy() == "")
            place[blank] = hash64([f"{number} {position + i}" for i in blank.tolist()])
            position += len(batch)
            held.append(batch.append_column("place", pa.array(place)))
            if sum(map(len, held)) >= 2 * SPOOL_ROWS or sum(table.nbytes for table in held) >= SPOOL_BYTES:
                spill()
    if held:
        spill()
    p.store.create(record_name, sealed({"files": entries}))


def mend(p: Pass) -> None:
    """Takes back what an interrupted command has spooled and is damaged, so that it is scattered again.

    Of spool files, which live for the time of an ingestion, only the size is looked at.
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
    p: Pass, part: int, pieces: int, types: dict[str, pa.DataType], units: int, parts: int
) -> Iterator[dict[str, Any]]:
    """Collects one partition from all pieces and commits the units in it; yields their records."""
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
    # By hash, then uid, then place in the pool: an order that nothing but the pool decides.
    uid = np.frombuffer(bytes.fromhex("".join(table["uid"].to_pylist())), ">u8").reshape(-1, 2)
    order = np.lexsort((np.arange(len(table)), uid[:, 1], uid[:, 0], place))
    table, unit_of = table.take(pa.array(order)), unit_of[order]
    bounds = np.searchsorted(unit_of, np.arange(first, last + 1))
    for unit, low, high in zip(range(first, last), bounds, bounds[1:]):
        yield known[unit] or _commit_unit(p, unit, table.slice(low, high - low))


def _known(p: Pass, unit: int) -> dict[str, Any] | None:
    """The record of a unit that an interrupted command has committed; one that is damaged is taken back."""
    try:
        if p.record(unit) is not None:
            check_unit(p, unit, digest=True)
        return p.record(unit)
    except DamagedError:
        p.forget(unit)
        return None


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
