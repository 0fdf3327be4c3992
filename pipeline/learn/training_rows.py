"""Draws the rows that `learn` fits a mixture to: reads the target file, and finds its rows in a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.similarity import embeddings
from pipeline.text.hashing import hash64
from trainer.errors import InputError

if TYPE_CHECKING:
    from pipeline.reader import Run

ROWS, FOLDS, SEED = 25_000, 5, 0
MIN_PER_CLASS = 20
"""Fewest rows of each class; fewer give intervals too wide to be useful."""
TABLES = 256
"""Tables held before they are joined. The tables of all units of a large run would take more memory than their rows."""


@dataclass(frozen=True)
class Target:
    """What the mixture is fitted to predict."""

    kind: str
    """`labels`, `positives` or `losses`."""
    path: Path
    uids: pa.Array
    """The distinct uids in the file."""
    good: np.ndarray
    """Whether the row of each uid is good: bool (uids,)."""

    @property
    def unlabelled(self) -> bool:
        """Whether the other class is all rows that are not in the file."""
        return self.kind == "positives"


@dataclass(frozen=True)
class Sample:
    """The training rows, in an order that depends only on the rows."""

    table: pa.Table
    good: np.ndarray
    """bool (n,)"""
    folds: np.ndarray
    """The fold of the cross-fit that each row is left out of: int64 (n,)."""
    found: tuple[int, int]
    """How many bad (or unlabelled) and good rows the run has. The table has at most `rows` of each."""
    gone: int
    """Rows of the file that the run dropped before the step that was read."""

    @property
    def weights(self) -> np.ndarray:
        """How many rows of the run each training row represents: float64 (n,)."""
        each = [n / max(int((self.good == good).sum()), 1) for good, n in enumerate(self.found)]
        return np.where(self.good, each[1], each[0])


def read_target(kind: str, path: Path) -> Target:
    """Reads a file of `labels`, `positives` or `losses`. Raises InputError if it cannot be used."""
    value = {"labels": "label", "losses": "loss"}.get(kind)
    wanted = ["uid", *([value] if value else [])]
    try:
        with path.open("rb") as file:
            if path.suffix == ".parquet":
                table = pq.read_table(file)
            else:
                options = pyarrow.csv.ConvertOptions(column_types={"uid": pa.string()})
                table = pyarrow.csv.read_csv(file, convert_options=options)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a CSV or Parquet table: {str(error).splitlines()[0][:200]}") from None
    if absent := [name for name in wanted if name not in table.column_names]:
        found = ", ".join(table.column_names) or "none"
        raise InputError(f"{path}: no column {absent[0]!r}; expected {', '.join(wanted)}, found {found}")
    try:
        uids = table["uid"].cast(pa.string()).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputError(f"{path}: 'uid' holds {table['uid'].type}, expected text") from None
    if not len(uids) or uids.null_count:
        raise InputError(f"{path}: {'no rows' if not len(uids) else 'a row without a uid'}; expected one uid per row")
    good = np.ones(len(uids), bool)
    if value:
        try:
            numbers = pc.fill_null(_number(table[value]), math.nan).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(f"{path}: {value!r} holds {table[value].type}, expected numbers") from None
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise InputError(f"{path}: row {row + 1}: {value!r} is empty, NaN or infinite; leave such rows out")
        if kind == "labels" and not np.isin(numbers, (0, 1)).all():
            odd = numbers[~np.isin(numbers, (0, 1))][0]
            raise InputError(f"{path}: 'label' must be 0 or 1, or true or false, found {odd:g}")
        good = numbers == 1 if kind == "labels" else numbers <= np.median(numbers)
    encoded = pc.dictionary_encode(uids)
    sums = np.bincount(encoded.indices.to_numpy(), good)
    counts = np.bincount(encoded.indices.to_numpy())
    if (both := np.flatnonzero((sums > 0) & (sums < counts))).size:
        raise InputError(f"{path}: {encoded.dictionary[int(both[0])]} is both good and bad; give each uid once")
    target = Target(kind, path, encoded.dictionary, sums > 0)
    if not target.unlabelled and len(np.unique(target.good)) < 2:
        which = "good" if target.good[0] else "bad"
        cure = "name some of both, or give the good ones by --positives" if kind == "labels" else "they must differ"
        raise InputError(f"{path}: all {len(uids):,} rows are {which}; {cure}")
    return target


def _number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return (column.cast(pa.uint8()) if pa.types.is_boolean(column.type) else column).cast(pa.float64())


def choose_columns(
    run: Run, columns: Sequence[str] | None, vectors: Sequence[str], after: str | None
) -> tuple[list[str], str]:
    """Returns the columns to mix, and the step after which to read them: by default the first that has them all.

    Raises InputError or RunError.
    """
    from pipeline.models.score_mixture import is_scalar, is_vector

    types = run.columns(after)
    if columns is None:
        columns = [name for name, dtype in types.items() if pa.types.is_floating(dtype)]
        if not columns and not vectors:
            raise InputError(f"no column of scores is stored after {after or run.steps[-1].label}; give --columns")
    names = list(dict.fromkeys([*columns, *vectors]))
    if after is None:
        # As early as possible, because later cuts remove rows that the mixture should learn to separate.
        after = next((s.label for s in run.steps if set(names) <= run.columns(s.label).keys()), run.steps[-1].label)
    types = run.columns(after)
    for option, given, fits, expected in (
        ("--columns", columns, is_scalar, "numbers"),
        ("--vectors", vectors, is_vector, "vectors, a fixed-size list of floats"),
    ):
        for name in given:
            if name in types and not fits(types[name]):
                raise InputError(f"{option}: the column {name!r} holds {types[name]}, expected {expected}")
    return names, after


def draw(
    run: Run,
    target: Target,
    columns: Sequence[str],
    after: str,
    rows: int = ROWS,
    folds: int = FOLDS,
    seed: int = SEED,
    done: Callable[[int], None] = lambda unit: None,
) -> Sample:
    """Reads the run once and draws the training rows: of each class, the `rows` with the lowest hashes of their uids.

    Holds at most twice as many rows at a time. `done` is called with the number of each unit read. Raises InputError if
    a class has too few rows, or if the file has uids that are not in the run.
    """
    classes = (_Lowest(rows), _Lowest(rows))
    met = np.zeros(len(target.uids), bool)
    for table in run.scan(["uid", *columns], after=after):
        at = pc.index_in(table["uid"], value_set=target.uids)
        named = np.array(at.is_valid())
        places = pc.fill_null(at, 0).to_numpy()
        met[places[named]] = True
        good = named & target.good[places]
        for of_class, chosen in ((classes[0], ~good if target.unlabelled else named & ~good), (classes[1], good)):
            part = table.filter(pa.array(chosen))
            of_class.add(part, hash64(part["uid"], seed=seed, purpose="learn"))
        if len(table) and table["unit"][-1].is_valid:
            done(table["unit"][-1].as_py())
    gone = _dropped(run, target, met, after)
    found = (classes[0].seen, classes[1].seen)
    for n, name in zip(found, ("unlabelled" if target.unlabelled else "bad", "good")):
        if n < MIN_PER_CLASS:
            cure = f"; {gone:,} of the rows named were dropped before it" if gone else ""
            raise InputError(
                f"{target.path}: {n:,} {name} rows reach {after}, expected at least {MIN_PER_CLASS}: name more{cure}"
            )
    tables = [of_class.table() for of_class in classes]
    table = pa.concat_tables(tables)
    good = np.repeat([False, True], [len(t) for t in tables])
    # The result must not depend on the order of the units, nor on that of rows with the same uid.
    values = [_sortable(table[name]) for name in columns]
    order = np.lexsort([*values, table["uid"].to_numpy(zero_copy_only=False).astype(str)])
    table, good = table.take(pa.array(order)), good[order]
    fold = hash64(table["uid"], seed=seed, purpose="fold") % np.uint64(folds)
    return Sample(table, good, fold.astype(np.int64), found, gone)


class _Lowest:
    """Keeps the rows with the lowest hashes. Of rows with equal hashes, either all are kept or none."""

    def __init__(self, limit: int) -> None:
        self.seen, self._limit, self._cut = 0, limit, 2**64 - 1
        self._held: list[tuple[pa.Table, np.ndarray]] = []

    def add(self, table: pa.Table, hashes: np.ndarray) -> None:
        self.seen += len(table)
        part = _below(table, hashes, self._cut)
        if not len(part[0]):
            return
        self._held.append(part)
        if sum(len(h) for _, h in self._held) > 2 * self._limit or len(self._held) > TABLES:
            self._prune()

    def _prune(self) -> None:
        table = pa.concat_tables([t for t, _ in self._held])
        hashes = np.concatenate([h for _, h in self._held])
        if len(hashes) > self._limit:
            self._cut = int(np.partition(hashes, self._limit - 1)[self._limit - 1])
        table, hashes = _below(table, hashes, self._cut)
        self._held = [(table.combine_chunks(), hashes)]

    def table(self) -> pa.Table:
        self._prune()
        return self._held[0][0]


def _below(table: pa.Table, hashes: np.ndarray, cut: int) -> tuple[pa.Table, np.ndarray]:
    kept = hashes <= np.uint64(cut)
    return table.filter(pa.array(kept)), hashes[kept]


def _sortable(column: pa.ChunkedArray) -> np.ndarray:
    """One number for each value, equal for equal values: float64 (n,)."""
    from pipeline.models.score_mixture import is_vector, scalars

    if not is_vector(column.type):
        return scalars(column)
    found = np.full(len(column), np.nan)
    valid = pc.is_valid(column).to_numpy()
    vectors = embeddings.matrix(column.drop_null())
    found[valid] = np.einsum("nd,d->n", vectors.astype(np.float64), np.arange(1, vectors.shape[1] + 1))
    return found


def _dropped(run: Run, target: Target, met: np.ndarray, after: str) -> int:
    """How many rows of the file the run dropped before `after`. Raises InputError if some are not in this run."""
    from pipeline.reader import RunError

    if met.all():
        return 0
    missing = target.uids.filter(pa.array(~met))
    known = np.zeros(len(missing), bool)
    try:
        for table in run.scan("uid", after="pool"):
            at = pc.index_in(table["uid"], value_set=missing).drop_null()
            known[at.to_numpy()] = True
    except RunError:  # a run whose passes were removed has no rows of the pool to look in
        return len(missing)
    if not known.all():
        first = missing[int(np.flatnonzero(~known)[0])]
        raise InputError(
            f"{target.path}: {int((~known).sum()):,} of {len(target.uids):,} uids are not in this run, the first "
            f"{first}; take uids from its tables, as by `open_run(RUN).scan('uid')`"
        )
    return len(missing)
