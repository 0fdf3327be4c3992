"""The one abstraction: a step maps an Arrow table to an Arrow table.

A *stage* measures and adds columns. A *filter* decides and drops rows. A *sink* writes the remaining rows. Each is a
small dataclass; its fields are the options of its recipe line. This module does not depend on Ray: `apply` runs a step
on a table, for example in a notebook.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import DROP, POSITION, is_heavy
from pipeline.similarity import embeddings
from pipeline.text.hashing import hash64

if TYPE_CHECKING:
    import dask.dataframe as dd

    from pipeline.dataset.card import About
    from pipeline.storage import Entry, Store

Scope = Literal["row", "unit", "run"]
Resource = Literal["cpu", "gpu"]

FILE = {"file": True}
"""Marks an option whose value is the path of a file or folder, or maps names to paths: `field(metadata=FILE)`. A
relative path starts at the working directory of the command. Workers run elsewhere, so pickling a step makes these
paths absolute."""
JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Path component of the temporary copy that `ray job submit --working-dir` unpacks on each node."""


class HaltError(Exception):
    """Raised by a step that cannot continue for a reason other than its rows, such as a lost network. The run stops
    with this message, and the units in progress are not charged with a failed attempt."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to do with a typical web pool, for `--plan`."""

    keep: float
    """Share of the rows that are kept, 0 to 1."""
    rate: float
    """Rows per second on one core, or on one GPU for a step that runs on GPUs."""
    basis: str
    """Source of `keep` and `rate`; "assumed" if a number is neither published nor measured."""
    stored: float = 0.0
    """Bytes written to the run per row kept."""
    fetched: float = 0.0
    """Bytes fetched from the network per input row."""


@dataclass(kw_only=True)
class Step:
    """A line of a recipe. Subclasses are dataclasses: each field is a YAML key with a type and a default.

    If `needs` or `adds` depend on the options, `__post_init__` sets them on the instance.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Columns that the step reads. Missing ones are reported before anything starts."""
    wants: ClassVar[tuple[str, ...]] = ()
    """Optional columns, read if the pool or an earlier step provides them. A step that also `adds` such a column
    replaces its values."""
    adds: ClassVar[dict[str, pa.DataType]] = {}
    """Columns written, with their types."""
    version: ClassVar[int] = 1
    """Increase it when the same inputs would give different outputs. Stored results of another version are not
    reused."""
    expensive: ClassVar[bool] = False
    """True if results are expensive to compute again, such as downloads or hours of GPU time. They are stored per row,
    under a key of everything that determines their value, and reused when other lines of the recipe change. A recipe
    that would orphan them is rejected."""
    repeatable: ClassVar[bool] = True
    """False if the same inputs may give different outputs next time, as downloads do. Committed results that are lost
    are then reported instead of recomputed."""
    resource: ClassVar[Resource] = "cpu"
    """What a worker occupies: "gpu" is a GPU if the cluster has one, else CPU cores."""

    @classmethod
    def name(cls) -> str:
        """The name in recipes: `AspectRatio` is `aspect_ratio`, and its file is `aspect_ratio.py`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @property
    def label(self) -> str:
        """The name of this line in ledgers and funnels; the recipe numbers repeated steps (`exact_dedup.2`)."""
        return self.__dict__.get("_label") or self.name()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | self._paths()

    def files(self) -> list[str]:
        """The local files and folders that the options name, as the paths that workers open."""
        values = self._paths().values()
        paths = [path for value in values for path in (value.values() if isinstance(value, dict) else [value])]
        return [path for path in paths if isinstance(path, str) and os.path.exists(path)]

    def _paths(self) -> dict[str, Any]:
        """The options that name files, with absolute paths."""
        return {f.name: _absolute(getattr(self, f.name)) for f in fields(self) if f.metadata.get("file")}

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields `(key, problem)` for every unusable option, before anything starts."""
        yield from ()

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        """Yields `(key, problem)` for every needed column whose type the step cannot use, before anything starts.

        `types` has the columns that reach the step. It lacks those of a pool that cannot be read on this machine.
        """
        yield from ()

    def fingerprint(self) -> object:
        """What determines the output besides the options, such as the digest of a file; must be JSON-able."""
        return None

    def honours(self) -> Iterator[str]:
        """Yields the opt-out mechanisms that this step obeys, such as `robots.txt (RFC 9309)`, for the dataset card."""
        yield from ()

    def notes(self) -> Iterator[str]:
        """Yields warnings about what the step will not do with these options, for `--plan` and the start of a run."""
        yield from ()

    def estimate(self, rows: float) -> Estimate:
        """What `--plan` assumes about this step, given the number of rows that reach it."""
        return Estimate(1.0, 10_000, "custom step without an estimate")

    def shared(self) -> tuple[type, tuple[Any, ...]] | None:
        """Class and arguments of one object that all workers of this step share, or None.

        The object lives in a process of its own; `connect` gives each worker access to it.
        """
        return None

    def connect(self, shared: Any) -> None:
        """Called on each worker before `setup`. Methods of `shared` are coroutines that run in the object's process."""

    def setup(self) -> None:
        """Runs once per worker, before the first batch: the place to load a model."""


def _absolute(value: Any) -> Any:
    """Makes the paths in an option's value absolute if they exist.

    A path inside a job's copy of the working directory stays relative: each node has its own copy, and its workers run
    in it.
    """
    if isinstance(value, dict):
        return {key: _absolute(path) for key, path in value.items()}
    if not isinstance(value, str) or not os.path.exists(value):
        return value
    path = os.path.abspath(value)
    return value if JOB_FOLDER in f"{path}/" else path


class Stage(Step):
    """A step that measures: it returns the same rows with more columns.

    To drop a row that cannot be measured, fill the column `drop_reason` (null keeps the row) and optionally
    `drop_detail` (text) and `drop_value` (the number that decided).
    """

    def process(self, batch: pa.Table) -> pa.Table:
        raise TypeError(f"{type(self).__name__} must define process() or stream()")

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Maps a stream of batches. Override it to overlap work across batches: fetching, batching for a GPU.

        Rows may be regrouped and reordered, also across units; `unit` and `row` identify them.
        """
        for batch in batches:
            yield self.process(batch)


class Filter(Step):
    """A step that decides which rows are kept. Dropped rows are counted, and stored with the reason.

    `scope` is what a decision depends on: "row", the row alone; "unit", the rows of its unit, which holds all rows with
    the same URL; or "run", all rows of the run. A filter of scope "run" is a barrier: it decides once every unit has
    reached it.
    """

    scope: Scope = "row"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        for column in self.needs if self.scope == "run" else ():
            if column in types and is_heavy(types[column]):
                cure = "a whole-run filter cannot read these; use a VectorFilter for vectors"
                yield "needs", f"the column {column!r} holds pixels or vectors ({types[column]}); {cure}"

    def split(self, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Splits a batch into the rows that are kept, and the drops (`schema.DROP`).

        Override it in a filter that `adds` columns to the rows that it keeps. If its scope is "run", null in these
        columns leaves a row unchanged.
        """
        reason = self.judge(batch)
        kept = pc.is_null(reason)
        if pc.all(kept, min_count=0).as_py():
            return batch, DROP.empty_table()
        dropped, reason = batch.filter(pc.invert(kept)), reason.filter(pc.invert(kept))
        drops = drops_table(dropped, self.label, reason, self.detail(dropped), self.value(dropped))
        return batch.filter(kept), drops

    reason: ClassVar[str | None] = None
    """Drop reason of the rows that `keep` rejects; None means the step's name."""

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        """True keeps a row; null counts as false. With scope "unit", `batch` is a whole unit."""
        raise TypeError(f"{type(self).__name__} must define keep() or judge()")

    def judge(self, batch: pa.Table) -> pa.StringArray:
        """The drop reason of each row, or null to keep it. Define it instead of `keep` if there are several reasons."""
        kept = pc.fill_null(self.keep(batch), False)
        return pc.if_else(kept, pa.scalar(None, pa.string()), self.reason or self.name())

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        """Free text for people about each dropped row, or null."""
        return pa.nulls(len(dropped), pa.string())

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        """The number that decided each drop, or null."""
        return pa.nulls(len(dropped), pa.float64())

    def decide(self, frame: dd.DataFrame) -> dd.DataFrame:
        """For scope "run": returns the drops (`unit, row, reason, detail, value`) among all rows of the run.

        If the filter `adds` columns, the result has them too, and a line with a null reason for each kept row that gets
        values.

        `frame` is a lazy Dask frame with `unit, row, uid` and the needed columns. Compute only small aggregates on the
        driver; everything that grows with the pool must stay in the graph.
        """
        raise TypeError(f"{type(self).__name__} must define decide() for scope 'run'")

    def figures(self, frame: dd.DataFrame, drops: dd.DataFrame) -> dd.DataFrame | None:
        """For scope "run": a small table that describes the decision, stored in the funnel (`Line.figures`), or None.

        `frame` and `drops` are the argument and the result of `decide`; what both methods compute is computed once. All
        values must be text, numbers or null.
        """
        return None


class Sink(Step):
    """The last step of a recipe: writes the remaining rows. Each output format is one subclass.

    The rows, in the order of the run's units, are divided into parts. Workers write the parts in any order and may
    write one twice, so equal rows must give equal bytes. Then `finish` writes the files that describe all parts.

    All files go into the folder `folder` of the run. `write` and `finish` return an `Entry` for each file that they
    write. `verify` checks these files; others in the folder are removed.
    """

    folder: ClassVar[str] = "shards"
    leftover: ClassVar[str] = "last_part_short"
    """Drop reason of the rows after the last part."""

    def plan(self, rows: int) -> list[int]:
        """Bounds of the parts, starting with 0: part i holds the rows bounds[i] to bounds[i + 1] − 1.

        Rows from the last bound on are dropped with the reason `leftover`.
        """
        raise TypeError(f"{type(self).__name__} must define plan()")

    def reads(self, types: Mapping[str, pa.DataType]) -> list[str]:
        """The columns among `types` that `write` needs. By default all, including pixels and vectors."""
        return list(types)

    def write(
        self, store: Store, part: int, tables: Iterator[pa.Table], types: dict[str, pa.DataType]
    ) -> dict[str, Any]:
        """Writes one part into the folder `store`. `tables` hold its rows, with the columns that `reads` returned, of
        the types in `types`.

        Returns a JSON-able record with at least `rows`, the number written, and `files`, the `Entry` of each file.
        """
        raise TypeError(f"{type(self).__name__} must define write()")

    def remove(self, store: Store, record: dict[str, Any], uids: pa.ChunkedArray) -> dict[str, Any]:
        """Removes the samples with these uids from a written part, and returns its new record.

        The part is as `write` left it, or as an interrupted call of this method did. Other samples must not change.
        Optional: without it, `winnow takedown` cannot remove samples from a finished run.
        """
        raise TypeError(f"{self.name()} cannot remove samples from a finished run")

    def finish(self, store: Store, about: About, parts: list[dict[str, Any]]) -> list[Entry]:
        """Writes the files that describe all parts, given their records in order, and returns their entries.

        The first entry is the file that readers start from.
        """
        return []


class KeyedFilter(Filter):
    """A filter that decides within groups of rows that share a key; `keep` sees whole groups."""

    def key(self, batch: pa.Table) -> np.ndarray:
        """The group of each row, as uint64."""
        raise TypeError(f"{type(self).__name__} must define key()")

    def decide(self, frame: dd.DataFrame) -> dd.DataFrame:
        def with_key(part):  # type: ignore[no-untyped-def]
            table = pa.Table.from_pandas(part, preserve_index=False)
            return part.assign(_key=self.key(table))

        keyed = frame.map_partitions(with_key, meta=with_key(frame._meta))
        if keyed.npartitions > 1:
            keyed = keyed.shuffle(on="_key", shuffle_method="tasks")
        return keyed.map_partitions(self._drops, meta=drops_frame(adds=self.adds))

    def _drops(self, part):  # type: ignore[no-untyped-def]
        # Sorted by position, so that no decision depends on the order of the shuffle.
        part = part.sort_values(["unit", "row"])
        table = pa.Table.from_pandas(part.drop(columns="_key"), preserve_index=False)
        table = table.replace_schema_metadata(None)  # pandas cannot read back its own names of nested types
        kept, drops = apply(self, table)
        if not self.adds:
            return drops_frame(drops)
        given = reduce(pc.or_, (pc.is_valid(kept[name]) for name in self.adds))
        values = kept.filter(given).select([*POSITION.names, *self.adds])
        return drops_frame(pa.concat_tables([drops, values], promote_options="default"), self.adds)


class VectorFilter(Filter):
    """A whole-run filter that compares vectors, such as embeddings: a fixed-size list column of floats.

    `fit` reduces a uniform sample of all vectors to something small, such as centroids. `groups` then assigns each
    vector to one or more groups, and `judge_group` decides one group at a time, given its vectors as one matrix. Groups
    are distributed over the workers. If the sample shows that a group exceeds `largest_group` rows, another `fit`
    divides it. Vectors pass neither through Dask nor through Ray's object store.

    The result must depend on the rows alone: `fit` and `judge_group` get rows sorted by uid. Rows without a vector, or
    with a NaN or infinity in it, are kept.
    """

    scope = "run"
    vector: str
    """The column of vectors. It must also be in `needs`."""
    largest_group: ClassVar[int] = 131_072
    """Maximum number of rows whose vectors a worker holds at a time: 268 MB of float32 at 512 dimensions."""

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        yield from embeddings.check_vectors(types, vector=self.vector)

    def sample_rows(self, rows: int) -> int:
        """The approximate number of the run's vectors to sample for `fit`."""
        return 65_536

    def fit(self, sample: np.ndarray, rows: int) -> np.ndarray:
        """Returns what `groups` needs, an array with one row for each possible group.

        `sample` is float32 of shape (m, d), drawn from `rows` rows.
        """
        raise TypeError(f"{type(self).__name__} must define fit()")

    def groups(self, vectors: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        """The group of each vector: integers below `len(fitted)`, of shape (n,), or (n, p) for p groups each."""
        raise TypeError(f"{type(self).__name__} must define groups()")

    def judge_group(self, rows: pa.Table, vectors: np.ndarray) -> tuple[pa.StringArray, pa.StringArray]:
        """The reason and detail of each row of a group; a null reason keeps the row.

        `rows` has `unit, row, uid` and the needed columns, `vectors` is float32 of shape (n, d). A row in several
        groups is dropped if any of them drops it.
        """
        raise TypeError(f"{type(self).__name__} must define judge_group()")


class Fitted(Step):
    """Mixin for a stage or a row-wise filter that depends on other rows only through something fitted to a sample.

    Use it as `class MyScore(Fitted, Stage)`. Once every unit has reached the step, a uniform sample of the rows is
    drawn, with their vectors, and `fit` turns it into a table, such as centroids or vectors to compare with. Each
    worker gets the table through `use`, before `setup`, memory-mapped if the run's storage is local. From then on the
    step works row by row. Neither the sample nor the table passes through pandas or Ray's object store.

    The sample depends only on the uids of the rows, and `fit` must depend only on the sample. Not for `expensive`
    steps: their results must not depend on earlier filters, as this sample does.
    """

    def sample_rows(self, rows: int) -> int:
        """The approximate number to sample of the `rows` that reach the step. The number drawn varies by about its
        square root."""
        return 65_536

    def fit(self, sample: pa.Table, rows: int) -> pa.Table:
        """Returns the table that each worker needs. Runs once, on a worker, without `setup`.

        `sample` has `uid` and the needed columns, sorted by uid. It has no rows without a vector, or with a NaN or
        infinity in one, and may be empty. It was drawn from `rows` rows.
        """
        raise TypeError(f"{type(self).__name__} must define fit()")

    def use(self, fitted: pa.Table) -> None:
        """Called on each worker, before `setup`, with the result of `fit`."""
        raise TypeError(f"{type(self).__name__} must define use()")


class SizeFilter(Filter):
    """A filter by the size of pictures. `columns` names the columns of width and height."""

    columns: list[str]

    def __post_init__(self) -> None:
        self.needs = tuple(self.columns)  # type: ignore[misc]

    def check(self) -> Iterator[tuple[str, str]]:
        if len(self.columns) != 2:
            yield "columns", f"must name two columns, width and height, found {self.columns}"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        for name in self.columns:
            if name in types and not (pa.types.is_integer(types[name]) or pa.types.is_floating(types[name])):
                yield "columns", f"the column {name!r} holds {types[name]}, expected pixels"


class FrequencyFilter(KeyedFilter):
    """Drops all rows whose value is shared by more than `max_count` rows of the run. Rows with a null are kept."""

    scope = "run"
    column: str
    max_count: int

    def check(self) -> Iterator[tuple[str, str]]:
        if self.max_count < 1:
            yield "max_count", f"must be at least 1, found {self.max_count}"

    def compared(self, batch: pa.Table) -> pa.Array | pa.ChunkedArray:
        """The values to count."""
        return batch[self.column]

    def key(self, batch: pa.Table) -> np.ndarray:
        return hash64(pc.fill_null(self.compared(batch).cast(pa.string()), "").to_pylist())

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pa.array(self._rows_sharing(batch) <= self.max_count)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        # Rows that share a value are dropped together, so counting the dropped ones is enough.
        return pa.array([f"shared by {n} rows" for n in self._rows_sharing(dropped).tolist()], pa.string())

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        return pa.array(self._rows_sharing(dropped), pa.float64())

    def _rows_sharing(self, batch: pa.Table) -> np.ndarray:
        values = self.compared(batch)
        codes = pc.dictionary_encode(values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values)
        counts = np.bincount(codes.indices.drop_null().to_numpy(), minlength=len(codes.dictionary) or 1)
        shared = counts[pc.fill_null(codes.indices, 0).to_numpy(zero_copy_only=False)]
        return np.where(codes.indices.is_valid(), shared, 0)


def drops_frame(drops: pa.Table | None = None, adds: Mapping[str, pa.DataType] | None = None):  # type: ignore[no-untyped-def]
    """Converts drops to the frame that `decide` returns: `unit, row, reason, detail, value` and the columns in `adds`.

    Without `drops`, the frame is empty. Columns other than `unit`, `row` and `reason` may be missing from `drops`.
    """
    table = DROP.empty_table() if drops is None else drops
    types = {"detail": DROP.field("detail").type, "value": DROP.field("value").type, **(adds or {})}
    for name, dtype in types.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), dtype))
    return to_pandas(table.select(["unit", "row", "reason", *types]), nested_only=True)


def to_pandas(table: pa.Table, nested_only: bool = False):  # type: ignore[no-untyped-def]
    """Converts to pandas types that support nulls and lists: a null among 64-bit hashes must not make them floats.

    `nested_only` leaves text and numbers to pandas.
    """
    import pandas as pd

    def pandas_type(dtype: pa.DataType) -> Any:
        if pa.types.is_nested(dtype):
            return pd.ArrowDtype(dtype)
        if nested_only:
            return None
        if pa.types.is_string(dtype):
            return pd.StringDtype("pyarrow")
        return pd.ArrowDtype(dtype) if pa.types.is_integer(dtype) else None

    return table.to_pandas(types_mapper=pandas_type)


def check_column_name(column: str, example: str) -> Iterator[tuple[str, str]]:
    """Yields `(key, problem)` if the option `column` is not a valid name of a column to add."""
    if not column.isidentifier():
        yield "column", f"{column!r} is not a valid column name; expected one such as {example!r}"


def apply(step: Stage | Filter, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Runs one step on one batch. Returns the rows that are kept, and the drops (`schema.DROP`)."""
    if isinstance(step, Stage):
        return split_marked(step, step.process(batch))
    return step.split(batch)


def split_marked(step: Stage, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Splits the output of a stage into the rows that are kept, and the drops of those with a `drop_reason`."""
    if "drop_reason" not in batch.column_names:
        return batch, DROP.empty_table()
    marked = pc.is_valid(batch["drop_reason"])
    dropped = batch.filter(marked)
    given = {name: dropped[name] for name in ("drop_detail", "drop_value") if name in batch.column_names}
    drops = drops_table(dropped, step.label, dropped["drop_reason"], given.get("drop_detail"), given.get("drop_value"))
    return batch.filter(pc.invert(marked)).drop_columns(["drop_reason", *given]), drops


def drops_table(
    rows: pa.Table, label: str, reason: pa.Array | str, detail: pa.Array | None = None, value: pa.Array | None = None
) -> pa.Table:
    """The drops (`schema.DROP`) of all rows of a table. `reason` is one for all rows, or an array of one for each."""
    n = len(rows)
    reasons = pa.array([reason] * n, pa.string()) if isinstance(reason, str) else reason
    details = pa.nulls(n, pa.string()) if detail is None else detail
    values = pa.nulls(n, pa.float64()) if value is None else value.cast(pa.float64())
    columns = [rows["unit"], rows["row"], pa.array([label] * n, pa.string()), reasons, details, values]
    return pa.table(columns, schema=DROP)
