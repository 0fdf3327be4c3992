"""Runs steps that read vectors of the whole run: `step.VectorFilter`, and the fit of `step.Fitted`.

A `VectorFilter`:

    units ──sample──▶ fit, once ──▶ units ──by group──▶ spool ──a partition of groups at a time──▶ drops, by unit

The cost for n rows of d dimensions in fp16 is about two reads and one write of n·d·2 bytes, plus one read for each pair
of a piece and a partition, both of about 256 MB. A worker holds one piece, one partition, or the largest group. For 10⁹
rows of 512 dimensions that is 1 TB, 4,000 pieces and 4,000 partitions: 16 million reads of 64 KB.

A `Fitted` step needs only the sample, which one task holds in memory. Its rows then go through an ordinary pass.
"""

from __future__ import annotations

import io
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.scheduler import spool
from pipeline.scheduler.passes import FIT, Pass, column_types, read_unit
from pipeline.schema import DROP, POSITION
from pipeline.similarity import embeddings
from pipeline.step import Step, VectorFilter, drops_table
from pipeline.storage import Entry, Store
from pipeline.text.hashing import hash64, uniform

PIECE_BYTES = 256 << 20
"""Size of a piece (vectors that a worker sorts by group) and of a partition of groups. They are smaller in a small run,
so that every core has work."""
LEAST_PIECES, LEAST_PIECE_BYTES = 64, 32 << 20
MOST_DIVISIONS = 8
"""Maximum depth of divisions of a crowded group. Deeper groups are treated as groups of equal vectors."""

RunTasks = Callable[..., Iterable[dict[str, Any]]]
"""Runs a function over items on the workers: `(items, work, at_once)`, as `workers.map_tasks` does."""


@dataclass
class Grouping:
    """Assigns vectors to groups: what `fit` returned and, for crowded groups, the groupings within them."""

    fitted: np.ndarray
    first: int
    """Number of the first group of this level; numbers are unique over all levels."""
    within: dict[int, Grouping] = field(default_factory=dict)
    chunks: dict[int, int] = field(default_factory=dict)
    """For groups of equal vectors, which no fit divides: the number of parts over which their rows are spread."""

    def save(self, store: Store, name: str) -> None:
        """Writes the tree to one file. With many groups it takes megabytes, too much to send with each task."""
        arrays: dict[str, np.ndarray] = {}

        def level(grouping: Grouping, path: str) -> None:
            arrays[path] = grouping.fitted
            arrays[f"{path}:first"] = np.array(grouping.first)
            arrays[f"{path}:within"] = np.array(list(grouping.within), np.int64)
            arrays[f"{path}:chunks"] = np.array(list(grouping.chunks.items()), np.int64).reshape(-1, 2)
            for group, deeper in grouping.within.items():
                level(deeper, f"{path}.{group}")

        level(self, "groups")
        with store.output(name) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, store: Store, name: str) -> Grouping:
        """Reads a tree written by `save`."""
        with np.load(io.BytesIO(store.read(name))) as saved:
            arrays = dict(saved)

        def level(path: str) -> Grouping:
            within = {group: level(f"{path}.{group}") for group in arrays[f"{path}:within"].tolist()}
            return cls(arrays[path], int(arrays[f"{path}:first"]), within, dict(arrays[f"{path}:chunks"].tolist()))

        return level("groups")


def fit(step: VectorFilter, sample: np.ndarray, rows: int) -> Grouping:
    """Fits groups of at most `largest_group` rows each, as estimated from the sample."""
    numbered = 0

    def level(sample: np.ndarray, rows: int, depth: int) -> Grouping:
        nonlocal numbered
        fitted = step.fit(sample, rows)
        grouping = Grouping(fitted, numbered)
        numbered += len(fitted)
        home = _by_group(step.groups(sample, fitted))[:, 0]
        for group, n in zip(*np.unique(home, return_counts=True)):
            expected = round(rows * n / len(sample))
            if expected <= step.largest_group:
                continue
            if n == len(sample) or depth == MOST_DIVISIONS:
                grouping.chunks[int(group)] = -(-expected // step.largest_group)
            else:
                grouping.within[int(group)] = level(sample[home == group], expected, depth + 1)
        return grouping

    return level(sample, rows, 0)


def assign(
    step: VectorFilter, vectors: np.ndarray, uids: pa.ChunkedArray, grouping: Grouping
) -> tuple[np.ndarray, ...]:
    """The groups of vectors, float32 (n, d), as two arrays of equal length: the index of a vector, and its group."""
    index, groups = [], []

    def level(at: np.ndarray, grouping: Grouping) -> None:
        found = _by_group(step.groups(vectors if len(at) == len(vectors) else vectors[at], grouping.fitted))
        rows, group = np.repeat(at, found.shape[1]), found.reshape(-1)
        crowded = np.isin(group, list(grouping.within))
        index.append(rows[~crowded])
        number = (grouping.first + group[~crowded].astype(np.uint64)) << np.uint64(20)
        for crowd, parts in grouping.chunks.items():
            of_crowd = group[~crowded] == crowd
            dealt = hash64(uids.take(pa.array(rows[~crowded][of_crowd])), purpose="vectors") % np.uint64(parts)
            number[of_crowd] += dealt
        groups.append(number)
        for crowd, deeper in grouping.within.items():
            if (rows_of := np.unique(rows[group == crowd])).size:
                level(rows_of, deeper)

    if len(vectors):
        level(np.arange(len(vectors)), grouping)
    return np.concatenate([np.empty(0, np.int64), *index]), np.concatenate([np.empty(0, np.uint64), *groups])


def decide(
    p: Pass, before: Sequence[Pass], units: int, rows: int, per_file: int, run_tasks: RunTasks
) -> tuple[dict[str, Entry], Counter[str]]:
    """Runs the filter of a pass.

    Returns the files of its drops, by the number of the range of `per_file` units that each covers, and the number of
    drops by reason.
    """
    (step,) = p.steps
    assert isinstance(step, VectorFilter)
    _clear(p.store)  # files of a killed run
    attempt = f"spool/{secrets.token_hex(4)}"
    types, columns = column_types(before), needed_columns(step)
    schema = pa.schema(
        [*POSITION, *((c, types[c]) for c in columns if c != step.vector), (step.vector, types[step.vector])]
    )
    row_bytes = types[step.vector].list_size * 2 + 64
    piece_bytes = min(PIECE_BYTES, max(LEAST_PIECE_BYTES, rows * row_bytes // LEAST_PIECES))
    piece_rows = max(1, piece_bytes // row_bytes)
    unit_groups = _ranges(units, max(1, piece_rows * units // max(rows, 1)))

    names = _draw(
        p, before, unit_groups, ["uid", step.vector], step.sample_rows(rows) / max(rows, 1), attempt, run_tasks
    )

    def fit_once(names: Sequence[list[str]]) -> Iterator[dict[str, Any]]:
        matrix = embeddings.matrix(_drawn(p.store, names[0])[step.vector])
        step.setup()
        if len(matrix):
            fit(step, matrix, rows).save(p.store, f"{attempt}-groups.npz")
        yield {"rows": len(matrix)}

    (record,) = run_tasks([names], fit_once)
    if not record["rows"]:  # no row has a vector
        _clear(p.store)
        return {}, Counter()
    parts = max(1, -(-rows * row_bytes // piece_bytes))

    def scatter(ranges: Sequence[range]) -> Iterator[dict[str, Any]]:
        step.setup()
        grouping = Grouping.load(p.store, f"{attempt}-groups.npz")
        for units_of_piece in ranges:
            read = (t.select(schema.names) for unit in units_of_piece for t in read_unit(before, unit, columns))
            table = pa.concat_tables([schema.empty_table(), *read])
            if not (usable := embeddings.finite(table[step.vector])).all():
                table = table.filter(pa.array(usable))
            index, group = assign(step, embeddings.matrix(table[step.vector]), table["uid"], grouping)
            if not np.array_equal(index, np.arange(len(table))):  # a row has several groups, or a group is divided
                table = table.take(pa.array(index))
            table = table.append_column("group", pa.array(group))
            part = ((group * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) % np.uint64(parts)
            name = f"{attempt}-piece-{units_of_piece.start:07d}.arrow"
            spool.write(p.store, name, table, part, parts, compression=None)
            yield {"name": name}

    pieces = sorted(record["name"] for record in run_tasks(unit_groups, scatter))
    files = -(-units // per_file)

    def judge(numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        step.setup()
        for number in numbers:
            table = spool.read(p.store, pieces, number, schema.append(pa.field("group", pa.uint64())))
            keys = [("group", "ascending"), ("uid", "ascending"), ("unit", "ascending"), ("row", "ascending")]
            table = table.take(pc.sort_indices(table.drop_columns([step.vector]), sort_keys=keys))
            dropped = [DROP.empty_table()]
            for low, high in _runs(table["group"].to_numpy()):
                members = table.slice(low, high - low)
                of_rows = members.drop_columns([step.vector, "group"])
                reason, detail = step.judge_group(of_rows, embeddings.matrix(members[step.vector]))
                gone = pc.is_valid(reason)
                dropped.append(drops_table(of_rows.filter(gone), p.label, reason.filter(gone), detail.filter(gone)))
            drops = pa.concat_tables(dropped)
            name = f"{attempt}-drops-{number:06d}.arrow"
            spool.write(p.store, name, drops, drops["unit"].to_numpy() // per_file, files)
            yield {"name": name}

    found = sorted(record["name"] for record in run_tasks(range(parts), judge))

    def store(numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        for number in numbers:
            drops = spool.read(p.store, found, number, DROP).sort_by([("unit", "ascending"), ("row", "ascending")])
            # A row of several groups may have been dropped in more than one: the first drop counts.
            position = (drops["unit"].to_numpy().astype(np.int64) << 32) + drops["row"].to_numpy()
            drops = drops.take(pa.array(np.unique(position, return_index=True)[1]))
            name = f"drops/{number:06d}-{secrets.token_hex(4)}.parquet"
            entry = p.store.write_table(name, drops) if len(drops) else None
            yield {"number": number, "entry": entry, "reasons": Counter(drops["reason"].to_pylist())}

    stored = [record for record in run_tasks(range(files), store) if record["reasons"]]
    _clear(p.store)
    reasons: Counter[str] = sum((record["reasons"] for record in stored), Counter())
    return {str(record["number"]): record["entry"] for record in stored}, reasons


def fit_step(p: Pass, before: Sequence[Pass], units: int, rows: int, run_tasks: RunTasks) -> None:
    """Draws the sample for the fitted step of a pass and writes the fitted table, unless that exists already."""
    step = p.fitted
    assert step is not None
    if p.store.exists(FIT):
        return
    _clear(p.store)  # files of a killed run
    unit_groups, share = _ranges(units, -(-units // LEAST_PIECES) or 1), step.sample_rows(rows) / max(rows, 1)
    attempt = f"spool/{secrets.token_hex(4)}"
    names = _draw(p, before, unit_groups, needed_columns(step), share, attempt, run_tasks)

    def fit_once(names: Sequence[list[str]]) -> Iterator[dict[str, Any]]:
        fitted = step.fit(_drawn(p.store, names[0]), rows)
        with p.store.output(FIT) as file, pa.ipc.new_file(file, fitted.schema) as writer:
            writer.write_table(fitted)
        yield {}

    list(run_tasks([names], fit_once))
    _clear(p.store)


def needed_columns(step: Step) -> list[str]:
    """`uid` and the columns that a step needs, except the position of the row."""
    return list(dict.fromkeys(["uid", *(c for c in step.needs if c not in POSITION.names)]))


def _draw(
    p: Pass, before: Sequence[Pass], unit_groups: Sequence[range], columns: list[str], share: float, attempt: str,
    run_tasks: RunTasks,
) -> list[str]:  # fmt: skip
    """Draws a `share` of the rows, 0 to 1, by a hash of their uids, and spools `columns` of those with usable vectors.

    Returns the names of the files.
    """
    types = column_types(before)
    schema = pa.schema([(name, types[name]) for name in columns])
    vector_columns = [name for name in columns if pa.types.is_fixed_size_list(types[name])]

    def draw(ranges: Sequence[range]) -> Iterator[dict[str, Any]]:
        for units in ranges:
            name = f"{attempt}-sample-{units.start:07d}.arrow"
            with p.store.output(name) as file, pa.ipc.new_file(file, schema) as writer:
                for unit in units:
                    (uids,) = read_unit(before, unit, ["uid"])
                    chosen = uniform(uids["uid"], purpose="vectors") < share
                    for table in read_unit(before, unit, columns, uids["row"].to_numpy()[chosen]):
                        usable = np.ones(len(table), bool)
                        for column in vector_columns:
                            usable &= embeddings.finite(table[column])
                        writer.write_table(table.filter(pa.array(usable)).select(columns))
            yield {"name": name}

    return sorted(record["name"] for record in run_tasks(unit_groups, draw))


def _drawn(store: Store, names: list[str]) -> pa.Table:
    """The rows of spooled samples, in the order of their uids."""
    tables = []
    for name in names:
        with store.input(name) as file:
            tables.append(pa.ipc.open_file(file).read_all())
    table = pa.concat_tables(tables)
    order = np.argsort(np.array(table["uid"].to_pylist(), dtype=object), kind="stable")
    return table.take(pa.array(order))


def _clear(store: Store) -> None:
    for name in store.names("spool"):
        store.remove(f"spool/{name}")


def _ranges(n: int, size: int) -> list[range]:
    return [range(low, min(n, low + size)) for low in range(0, n, size)]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields the start and end of each run of equal values."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(values)])
    yield from zip(starts.tolist(), [*starts[1:].tolist(), len(values)])


def _by_group(groups: np.ndarray) -> np.ndarray:
    """What `VectorFilter.groups` returned, as an array of shape (n, p)."""
    return groups.reshape(len(groups), -1)
