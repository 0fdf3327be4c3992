"""The one abstraction: a step maps an Arrow table to an Arrow table.

A *stage* measures and adds columns. A *filter* decides and drops rows. Both are small dataclasses whose fields are
the keys of their recipe line. Nothing here knows about Ray: a step can be tried on a table in a notebook with `apply`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.hashing import hash64
from pipeline.schema import DROP, is_heavy

if TYPE_CHECKING:
    import dask.dataframe as dd

    from pipeline.card import About
    from pipeline.storage import Entry, Store

Scope = Literal["row", "unit", "run"]
Resource = Literal["cpu", "gpu"]


class HaltError(Exception):
    """Raised by a step that cannot go on through no fault of its rows (no network, say). The run stops with this
    message, and the attempts at the units in progress do not count."""


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
    adds: ClassVar[dict[str, pa.DataType]] = {}
    """Columns written, with their types."""
    version: ClassVar[int] = 1
    """Bump it when the same inputs would give other outputs: stored results of the old version are then not reused."""
    commits: ClassVar[bool] = False
    """True where a result is dear (bytes from the web, hours of GPU): the pass ends here, so that a change to any
    later step reuses what is stored, and a recipe that would orphan it is refused."""
    repeatable: ClassVar[bool] = True
    """False where the same inputs may give other outputs another time, as with bytes from the web: what was committed
    and is lost is then not made again behind the user's back."""
    resource: ClassVar[Resource] = "cpu"
    """What a worker of this step occupies. "gpu" means a GPU where the cluster has one, else CPU cores."""

    @classmethod
    def name(cls) -> str:
        """The YAML name: `AspectRatio` is `aspect_ratio`, in `aspect_ratio.py`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @property
    def label(self) -> str:
        """The name of this line in ledgers and funnels; the recipe numbers repeated steps (`exact_dedup.2`)."""
        return self.__dict__.get("_label") or self.name()

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields `(key, problem)` for every unusable option, before anything starts."""
        yield from ()

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        """Yields `(key, problem)` for every needed column whose type is of no use to the step, before anything starts.

        `types` are the columns above the step; a pool that cannot be looked at from here has none.
        """
        yield from ()

    def fingerprint(self) -> object:
        """What besides the options determines the output (the contents of a file named by one, say); JSON-able."""
        return None

    def honours(self) -> Iterator[str]:
        """The wishes of publishers that this step heeds, for the dataset's card: `robots.txt (RFC 9309)`."""
        yield from ()

    def estimate(self, rows: float) -> Estimate:
        """What `--plan` assumes of this step, with these options, for so many rows."""
        return Estimate(1.0, 10_000, "a step of your own: nothing known")

    def shared(self) -> tuple[type, tuple[Any, ...]] | None:
        """Class and arguments of one object that all workers of this step share; None if there is none.

        It lives in a process of its own. `connect` hands each worker its side of it.
        """
        return None

    def connect(self, shared: Any) -> None:
        """Called on a worker before `setup`: the methods of `shared` are coroutines that run on the shared object."""

    def setup(self) -> None:
        """Runs once per worker, before the first batch: the place to load a model."""


class Stage(Step):
    """Measures: gives back the same rows with more columns.

    A row that cannot be measured is dropped by filling the columns `drop_reason` (null: keep) and, if there is more to
    say, `drop_detail` (text) and `drop_value` (the number that decided).
    """

    def process(self, batch: pa.Table) -> pa.Table:
        raise TypeError(f"{type(self).__name__} must define process() or stream()")

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Maps a stream of batches; override it to overlap work across batches (fetching, batching for a GPU).

        Rows may be regrouped and reordered, across units too: `unit` and `row` say which they are.
        """
        for batch in batches:
            yield self.process(batch)


class Filter(Step):
    """Decides: rows for which `keep` is false are dropped and counted.

    `scope` says what a decision looks at: one row; the other rows of its unit (rows with one URL always share a unit);
    or the whole run, which makes the step a barrier: every unit must have come this far before it can decide.
    """

    scope: Scope = "row"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        for column in self.needs if self.scope == "run" else ():
            if column in types and is_heavy(types[column]):
                cure = "a whole-run filter reads no pixels, and vectors only as a VectorFilter"
                yield "needs", f"the column {column!r} holds pixels or vectors ({types[column]}); {cure}"

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        """True keeps. With scope "unit", `batch` is a whole unit. A null counts as false."""
        raise TypeError(f"{type(self).__name__} must define keep()")

    def reason(self, dropped: pa.Table) -> pa.StringArray:
        """Why each of these dropped rows went; the step's name unless there is more to tell."""
        return pa.array([self.name()] * len(dropped), pa.string())

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        """Free text about each dropped row (the number that fell short, say), null where there is none."""
        return pa.nulls(len(dropped), pa.string())

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        """The number that decided about each dropped row, null where none did."""
        return pa.nulls(len(dropped), pa.float64())

    def decide(self, frame: dd.DataFrame) -> dd.DataFrame:
        """For scope "run": the drops (`unit, row, reason, detail, value`) among all rows of the run.

        `frame` is a lazy Dask frame with `unit, row, uid` and the needed columns. Only small aggregates may be computed
        here on the driver; whatever grows with the pool stays in the graph.
        """
        raise TypeError(f"{type(self).__name__} must define decide() for scope 'run'")


class Sink(Step):
    """Writes what is left, as the last step of a recipe: an output format is one file.

    The rows of the run, in the order of its units, are cut into parts. Workers write parts in any order and possibly
    twice, so equal rows must give equal bytes; `finish` then describes them all. Everything goes into the folder
    `folder` of the run, and every file must be named by the entries that `write` and `finish` return: other files in
    the folder are removed, and those named are checked by `verify`.
    """

    folder: ClassVar[str] = "shards"
    leftover: ClassVar[str] = "last_part_short"
    """The reason of a drop for rows behind the last part."""

    def plan(self, rows: int) -> list[int]:
        """The bounds of the parts, from 0: part i holds the rows from bounds[i] to bounds[i + 1]. Rows behind the last
        bound are dropped as `leftover`."""
        raise TypeError(f"{type(self).__name__} must define plan()")

    def write(
        self, store: Store, part: int, tables: Iterator[pa.Table], types: dict[str, pa.DataType]
    ) -> dict[str, Any]:
        """Writes one part into the folder `store`, from tables with the columns of `types`, some rows at a time.

        Returns a JSON-able record with `rows` (how many were written) and `files` (the `Entry` of each file).
        """
        raise TypeError(f"{type(self).__name__} must define write()")

    def finish(self, store: Store, about: About, parts: list[dict[str, Any]]) -> list[Entry]:
        """Writes what describes all parts together, given their records in order; returns the entries of these files,
        the one that readers start from first."""
        return []


class KeyedFilter(Filter):
    """A filter that decides within groups of rows that share a key: rows meet by hash, and `keep` sees whole groups."""

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
        return keyed.map_partitions(self._drops, meta=drops_frame())

    def _drops(self, part):  # type: ignore[no-untyped-def]
        # In the order of positions, so that no trace of the shuffle's order can reach a decision.
        part = part.sort_values(["unit", "row"])
        table = pa.Table.from_pandas(part.drop(columns="_key"), preserve_index=False)
        _, drops = apply(self, table)
        return drops_frame(drops)


class VectorFilter(Filter):
    """A whole-run filter that compares vectors: embeddings, in a fixed-size list column of floats.

    Vectors pass neither through Dask nor through the object store. A uniform sample of them is taken in every unit;
    `fit` makes something small of all samples together (centroids, say); `groups` says in which groups a row meets
    others; and `judge_group` decides one group at a time, with its vectors as one matrix. Groups are spread over the
    workers. A group that the sample shows to be larger than `largest_group` rows is divided by a `fit` of its own.

    The result must be a function of the rows alone: every method gets rows in the order of their uids. Rows without a
    vector, or with a value in it that is not finite, are not judged and go on.
    """

    scope = "run"
    vector: str
    """The column of vectors; among `needs` too."""
    largest_group: ClassVar[int] = 131_072
    """Rows whose vectors a worker holds at a time: 268 MB of float32 at 512 dimensions."""

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        of = types.get(self.vector)
        if of is not None and not (pa.types.is_fixed_size_list(of) and pa.types.is_floating(of.value_type)):
            yield "vector", f"the column {self.vector!r} holds {of}, expected vectors: a fixed-size list of floats"

    def sample_rows(self, rows: int) -> int:
        """How many of the run's vectors `fit` wants to see, about."""
        return 65_536

    def fit(self, sample: np.ndarray, rows: int) -> np.ndarray:
        """Whatever `groups` needs, with a row for each group that there can be: from a sample, float32 of shape
        (m, d), of so many rows."""
        raise TypeError(f"{type(self).__name__} must define fit()")

    def groups(self, vectors: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        """The group of each vector, int64 of shape (n,) with values below `len(fitted)`; or of shape (n, p), for rows
        that shall meet the rows of several groups."""
        raise TypeError(f"{type(self).__name__} must define groups()")

    def judge_group(self, rows: pa.Table, vectors: np.ndarray) -> tuple[pa.StringArray, pa.StringArray]:
        """Reason and detail for each row of a group; a null reason keeps the row. `rows` has `unit, row, uid` and the
        needed columns, `vectors` is float32 of shape (n, d). A row of several groups is dropped if any drops it."""
        raise TypeError(f"{type(self).__name__} must define judge_group()")


class FrequencyFilter(KeyedFilter):
    """Drops what too many rows of the run share: all rows of such a value, none stays behind to stand for them.

    A null is shared by none.
    """

    scope = "run"
    column: str
    max_count: int

    def check(self) -> Iterator[tuple[str, str]]:
        if self.max_count < 1:
            yield "max_count", f"must be at least 1, found {self.max_count}"

    def compared(self, batch: pa.Table) -> pa.Array | pa.ChunkedArray:
        """What rows may share."""
        return batch[self.column]

    def key(self, batch: pa.Table) -> np.ndarray:
        return hash64(pc.fill_null(self.compared(batch).cast(pa.string()), "").to_pylist())

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        return pa.array(self._rows_sharing(batch) <= self.max_count)

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        # Rows that share a value are dropped together, so they are all here to be counted.
        return pa.array([f"shared by {n} rows" for n in self._rows_sharing(dropped).tolist()], pa.string())

    def value(self, dropped: pa.Table) -> pa.DoubleArray:
        return pa.array(self._rows_sharing(dropped), pa.float64())

    def _rows_sharing(self, batch: pa.Table) -> np.ndarray:
        values = self.compared(batch)
        codes = pc.dictionary_encode(values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values)
        counts = np.bincount(codes.indices.drop_null().to_numpy(), minlength=len(codes.dictionary) or 1)
        shared = counts[pc.fill_null(codes.indices, 0).to_numpy(zero_copy_only=False)]
        return np.where(codes.indices.is_valid(), shared, 0)


def drops_frame(drops: pa.Table | None = None):  # type: ignore[no-untyped-def]
    """`unit, row, reason, detail, value` as pandas: what `decide` hands back; empty without an argument.

    `detail` and `value` may be left out.
    """
    table = DROP.empty_table() if drops is None else drops
    for name in ("detail", "value"):
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), DROP.field(name).type))
    return table.select(["unit", "row", "reason", "detail", "value"]).to_pandas()


def apply(step: Stage | Filter, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Runs one step over one batch: the rows that go on, and the drops (`schema.DROP`)."""
    if isinstance(step, Stage):
        return split_marked(step, step.process(batch))
    mask = pc.fill_null(step.keep(batch), False)
    if pc.all(mask, min_count=0).as_py():
        return batch, DROP.empty_table()
    dropped = batch.filter(pc.invert(mask))
    drops = drops_table(dropped, step.label, step.reason(dropped), step.detail(dropped), step.value(dropped))
    return batch.filter(mask), drops


def split_marked(step: Stage, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Takes the rows that a stage marked out of its output: the rows that go on, and the drops."""
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
    """The drops (`schema.DROP`) of the rows of a table with `unit, row`, for one reason or for a reason each."""
    n = len(rows)
    reasons = pa.array([reason] * n, pa.string()) if isinstance(reason, str) else reason
    details = pa.nulls(n, pa.string()) if detail is None else detail
    values = pa.nulls(n, pa.float64()) if value is None else value.cast(pa.float64())
    columns = [rows["unit"], rows["row"], pa.array([label] * n, pa.string()), reasons, details, values]
    return pa.table(columns, schema=DROP)
