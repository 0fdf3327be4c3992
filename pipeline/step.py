"""The one abstraction: a step maps an Arrow table to an Arrow table.

A *stage* measures and adds columns. A *filter* decides and drops rows. Both are small dataclasses whose fields are
the keys of their recipe line. Nothing here knows about Ray: a step can be tried on a table in a notebook with `apply`.
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
"""Metadata of an option that names a file or a folder, or maps names to such: `field(metadata=FILE)`. A relative path
starts at the working directory of the command. Workers have other ones, so a step travels with absolute paths."""
JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Path component of the temporary copy that `ray job submit --working-dir` unpacks on each node."""


class HaltError(Exception):
    """Raised by a step that cannot continue for a reason other than its rows, such as a lost network. The run stops
    with this message, and the attempts at the units in progress do not count."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to do with a typical web pool, for `--plan`."""

    keep: float
    """Share of the rows that go on, 0 to 1."""
    rate: float
    """Rows a second on one core, or on one GPU for a step that runs on GPUs."""
    basis: str
    """Where the two come from; "assumed" where nobody has published or measured it."""
    stored: float = 0.0
    """Bytes written to the run for each row that goes on."""
    fetched: float = 0.0
    """Bytes from the network for each row that comes in."""


@dataclass(kw_only=True)
class Step:
    """A line of a recipe. Subclasses are dataclasses: each field is a YAML key with a type and a default.

    `needs` and `adds` may depend on the options: then `__post_init__` sets them on the instance.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Columns read; checked before anything starts."""
    wants: ClassVar[tuple[str, ...]] = ()
    """Further columns that are read if the pool or a step above has them. A step may also add such a column: then it
    replaces the values."""
    adds: ClassVar[dict[str, pa.DataType]] = {}
    """Columns written, with their types."""
    version: ClassVar[int] = 1
    """Bump it when the same inputs would give other outputs: stored results of the old version are then not reused."""
    expensive: ClassVar[bool] = False
    """True if results are expensive: bytes from the web, hours of GPU. They are then stored by row, under a key of what
    determines their value, and reused when other lines of the recipe change. A recipe that would orphan them is
    refused."""
    repeatable: ClassVar[bool] = True
    """False if the same inputs may give other outputs another time, as with bytes from the web. Results that were
    committed and are lost are then reported instead of being recomputed."""
    resource: ClassVar[Resource] = "cpu"
    """What a worker of this step occupies: "gpu" is a GPU if the cluster has one, else CPU cores."""

    @classmethod
    def name(cls) -> str:
        """The YAML name: `AspectRatio` is `aspect_ratio`, in `aspect_ratio.py`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @property
    def label(self) -> str:
        """The name of this line in ledgers and funnels; the recipe numbers repeated steps (`exact_dedup.2`)."""
        return self.__dict__.get("_label") or self.name()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | self._paths()

    def files(self) -> list[str]:
        """The local files and folders that the options name, by the paths at which workers open them."""
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

        `types` are the columns available above the step. Those of a pool that cannot be read from here are missing.
        """
        yield from ()

    def fingerprint(self) -> object:
        """What determines the output besides the options, such as the digest of a file that one names; JSON-able."""
        return None

    def honours(self) -> Iterator[str]:
        """Opt-out mechanisms that this step obeys, for the dataset's card: `robots.txt (RFC 9309)`."""
        yield from ()

    def notes(self) -> Iterator[str]:
        """What this step leaves undone with these options, printed by `--plan` and at the start of a run."""
        yield from ()

    def estimate(self, rows: float) -> Estimate:
        """What `--plan` assumes of this step with these options, given the number of rows that reach it."""
        return Estimate(1.0, 10_000, "custom step without an estimate")

    def shared(self) -> tuple[type, tuple[Any, ...]] | None:
        """Class and arguments of one object that all workers of this step share, or None.

        The object lives in a process of its own; `connect` gives each worker access to it.
        """
        return None

    def connect(self, shared: Any) -> None:
        """Called on each worker before `setup`. Methods of `shared` are coroutines that run on the shared object."""

    def setup(self) -> None:
        """Runs once per worker, before the first batch: the place to load a model."""


def _absolute(value: Any) -> Any:
    """The value of an option with absolute paths in place of relative ones that exist.

    A path within the copy of a job's working directory stays relative: each node has a copy of its own, in which its
    workers run.
    """
    if isinstance(value, dict):
        return {key: _absolute(path) for key, path in value.items()}
    if not isinstance(value, str) or not os.path.exists(value):
        return value
    path = os.path.abspath(value)
    return value if JOB_FOLDER in f"{path}/" else path


class Stage(Step):
    """Measures: returns the same rows with more columns.

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
    """Decides which rows go on. Dropped rows are counted, and stored with the reason.

    `scope` says what a decision depends on: the row alone; the rows of its unit, where rows with the same URL always
    meet; or all rows of the run. A filter of scope "run" is a barrier: it decides when every unit has reached it.
    """

    scope: Scope = "row"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        for column in self.needs if self.scope == "run" else ():
            if column in types and is_heavy(types[column]):
                cure = "a whole-run filter reads no pixels, and vectors only as a VectorFilter"
                yield "needs", f"the column {column!r} holds pixels or vectors ({types[column]}); {cure}"

    def split(self, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Splits a batch into the rows that go on, and the drops (`schema.DROP`).

        Override it for a filter that `adds` columns to the rows that it keeps. In a whole-run filter they are null for
        the rows that it leaves as they are.
        """
        reason = self.judge(batch)
        kept = pc.is_null(reason)
        if pc.all(kept, min_count=0).as_py():
            return batch, DROP.empty_table()
        dropped, reason = batch.filter(pc.invert(kept)), reason.filter(pc.invert(kept))
        drops = drops_table(dropped, self.label, reason, self.detail(dropped), self.value(dropped))
        return batch.filter(kept), drops

    reason: ClassVar[str | None] = None
    """The reason of drops that `keep` decides; the step's name if None."""

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        """True keeps a row; null counts as false. With scope "unit", `batch` is a whole unit."""
        raise TypeError(f"{type(self).__name__} must define keep() or judge()")

    def judge(self, batch: pa.Table) -> pa.StringArray:
        """Null for each row that is kept, else the reason why it is dropped. Define it if there are several reasons."""
        kept = pc.fill_null(self.keep(batch), False)
        return pc.if_else(kept, pa.scalar(None, pa.string()), self.reason or self.name())

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        """Free text about each dropped row for people to read, or null."""
        return pa.nulls(len(dropped), pa.string())

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        """The number that decided about each dropped row, or null."""
        return pa.nulls(len(dropped), pa.float64())

    def decide(self, frame: dd.DataFrame) -> dd.DataFrame:
        """For scope "run": returns the drops (`unit, row, reason, detail, value`) among all rows of the run.

        If the filter `adds` columns, the result has them too, and lines without a reason for the rows that get values.

        `frame` is a lazy Dask frame with `unit, row, uid` and the needed columns. Compute only small aggregates on the
        driver; everything that grows with the pool must stay in the graph.
        """
        raise TypeError(f"{type(self).__name__} must define decide() for scope 'run'")

    def figures(self, frame: dd.DataFrame, drops: dd.DataFrame) -> dd.DataFrame | None:
        """For scope "run": a small table about the decision for the funnel (`Line.figures`) and its readers, or None.

        `frame` and `drops` are the argument and the result of `decide`, and what both compute is computed once. All
        values must be text, numbers or null.
        """
        return None


class Sink(Step):
    """Writes the rows that are left; the last step of a recipe. An output format is one file.

    The rows, in the order of the run's units, are cut into parts. Workers write the parts in any order, and a part
    possibly twice, so equal rows must give equal bytes. Then `finish` writes what describes all parts.

    All files go into the run's folder `folder` and must be named by the entries that `write` and `finish` return.
    `verify` checks those; other files in the folder are removed.
    """

    folder: ClassVar[str] = "shards"
    leftover: ClassVar[str] = "last_part_short"
    """Reason of the drop for rows behind the last part."""

    def plan(self, rows: int) -> list[int]:
        """Bounds of the parts, starting with 0: part i holds the rows bounds[i] to bounds[i + 1] − 1.

        Rows from the last bound on are dropped with the reason `leftover`.
        """
        raise TypeError(f"{type(self).__name__} must define plan()")

    def reads(self, types: Mapping[str, pa.DataType]) -> list[str]:
        """The columns of the rows that `write` gets, among those of `types`. By default all, pixels and vectors too."""
        return list(types)

    def write(
        self, store: Store, part: int, tables: Iterator[pa.Table], types: dict[str, pa.DataType]
    ) -> dict[str, Any]:
        """Writes one part into the folder `store`. `tables` hold its rows with the columns that `reads`
        returned, of the types in `types`.

        Returns a JSON-able record with at least `rows`, the number written, and `files`, the `Entry` of each file.
        """
        raise TypeError(f"{type(self).__name__} must define write()")

    def remove(self, store: Store, record: dict[str, Any], uids: pa.ChunkedArray) -> dict[str, Any]:
        """Takes the samples with these uids out of a part that was written, and returns its record as it is now.

        Called with a part as `write` left it, or as an interrupted call of this method did. What is left of other
        samples must not change. Optional: without it, nothing can be taken down from a finished run.
        """
        raise TypeError(f"{self.name()} cannot take samples out of what it wrote")

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
        # In the order of positions, so that no decision depends on the order of the shuffle.
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

    Vectors pass neither through Dask nor through the object store. First, a uniform sample of all vectors is taken, and
    `fit` makes something small of it, such as centroids. `groups` then assigns each vector to one or more groups, and
    `judge_group` decides one group at a time, with its vectors as one matrix. Groups are spread over the workers. A
    group that the sample shows to exceed `largest_group` rows is divided by a `fit` of its own.

    The result must depend on the rows alone: `fit` and `judge_group` get rows in the order of their uids. Rows without
    a vector, or with a NaN or infinity in it, are kept.
    """

    scope = "run"
    vector: str
    """The column of vectors; among `needs` too."""
    largest_group: ClassVar[int] = 131_072
    """Rows whose vectors a worker holds at a time: 268 MB of float32 at 512 dimensions."""

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        yield from embeddings.check_vectors(types, vector=self.vector)

    def sample_rows(self, rows: int) -> int:
        """About how many of the run's vectors to sample for `fit`."""
        return 65_536

    def fit(self, sample: np.ndarray, rows: int) -> np.ndarray:
        """Returns what `groups` needs, an array with one row for each possible group.

        `sample` is float32 of shape (m, d), `rows` the number of rows that it was drawn from.
        """
        raise TypeError(f"{type(self).__name__} must define fit()")

    def groups(self, vectors: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        """The group of each vector: integers below `len(fitted)`, of shape (n,), or (n, p) for p groups each."""
        raise TypeError(f"{type(self).__name__} must define groups()")

    def judge_group(self, rows: pa.Table, vectors: np.ndarray) -> tuple[pa.StringArray, pa.StringArray]:
        """Reason and detail for each row of a group; a null reason keeps the row.

        `rows` has `unit, row, uid` and the needed columns, `vectors` is float32 of shape (n, d). A row in several
        groups is dropped if any of them drops it.
        """
        raise TypeError(f"{type(self).__name__} must define judge_group()")


class Fitted(Step):
    """For a stage or a row-wise filter that depends on all rows only through something fitted to a sample of them.

    Mix it in: `class MyScore(Fitted, Stage)`. When every unit has reached the step, a uniform sample of the rows is
    drawn, with their vectors, and `fit` makes a table of it: centroids, or vectors to compare with. Each worker gets
    that table by `use`, before `setup`, memory-mapped where the run's storage is local. From there on the step is
    row-wise. Neither the sample nor the table passes through pandas or the object store.

    The sample depends on the uids of the rows alone, and so must `fit`. Not for `expensive` steps: their results must
    not depend on the filters above them, as this sample does.
    """

    def sample_rows(self, rows: int) -> int:
        """About how many of the `rows` that reach the step to sample. The number drawn differs by its square root."""
        return 65_536

    def fit(self, sample: pa.Table, rows: int) -> pa.Table:
        """Makes what each worker needs. Runs once, on a worker, without `setup`.

        `sample` has `uid` and the needed columns, in the order of the uids. It lacks rows without a vector, or with a
        NaN or infinity in it, and may be empty. `rows` is the number of rows that it was drawn from.
        """
        raise TypeError(f"{type(self).__name__} must define fit()")

    def use(self, fitted: pa.Table) -> None:
        """Called on each worker, before `setup`, with the result of `fit`."""
        raise TypeError(f"{type(self).__name__} must define use()")


class SizeFilter(Filter):
    """Compares the two sides of pictures, which `columns` names: width, then height."""

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
    """The drops that `decide` returns, as pandas: `unit, row, reason, detail, value`, and the columns that the filter
    adds; empty without an argument.

    All but `unit`, `row` and `reason` may be missing from `drops`.
    """
    table = DROP.empty_table() if drops is None else drops
    types = {"detail": DROP.field("detail").type, "value": DROP.field("value").type, **(adds or {})}
    for name, dtype in types.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), dtype))
    return to_pandas(table.select(["unit", "row", "reason", *types]), nested_only=True)


def to_pandas(table: pa.Table, nested_only: bool = False):  # type: ignore[no-untyped-def]
    """Converts with types that hold nulls and lists, so that a null among 64-bit hashes does not turn them into floats.

    `nested_only` leaves text and numbers to pandas.
    """
    import pandas as pd

    def dtype(of: pa.DataType) -> Any:
        if pa.types.is_nested(of):
            return pd.ArrowDtype(of)
        if nested_only:
            return None
        if pa.types.is_string(of):
            return pd.StringDtype("pyarrow")
        return pd.ArrowDtype(of) if pa.types.is_integer(of) else None

    return table.to_pandas(types_mapper=dtype)


def apply(step: Stage | Filter, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Runs one step over one batch: the rows that go on, and the drops (`schema.DROP`)."""
    if isinstance(step, Stage):
        return split_marked(step, step.process(batch))
    return step.split(batch)


def split_marked(step: Stage, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Splits the output of a stage into the rows that go on, and the drops of those it marked."""
    if "drop_reason" not in batch.column_names:
        return batch, DROP.empty_table()
    marked = pc.is_valid(batch["drop_reason"])
    dropped = batch.filter(marked)
    said = {name: dropped[name] for name in ("drop_detail", "drop_value") if name in batch.column_names}
    drops = drops_table(dropped, step.label, dropped["drop_reason"], said.get("drop_detail"), said.get("drop_value"))
    return batch.filter(pc.invert(marked)).drop_columns(["drop_reason", *said]), drops


def drops_table(
    rows: pa.Table, label: str, reason: pa.Array | str, detail: pa.Array | None = None, value: pa.Array | None = None
) -> pa.Table:
    """The drops (`schema.DROP`) of all rows of a table, with one reason for all or one for each."""
    n = len(rows)
    reasons = pa.array([reason] * n, pa.string()) if isinstance(reason, str) else reason
    details = pa.nulls(n, pa.string()) if detail is None else detail
    values = pa.nulls(n, pa.float64()) if value is None else value.cast(pa.float64())
    columns = [rows["unit"], rows["row"], pa.array([label] * n, pa.string()), reasons, details, values]
    return pa.table(columns, schema=DROP)
