"""The read API: `open_run(path)` opens a run, in a folder or an object store, to read its rows, drops and pictures.

Only the run itself is read: `run.json` describes its passes (`describe`), so neither the modules of its steps nor the
pool are needed. Nothing is written, Ray is not started, and a run can be read while a command works on it.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ledger import Funnel
from pipeline.recipe import Recipe
from pipeline.scheduler.passes import (
    HEAVY_ROWS,
    KINDS,
    BarrierPass,
    MeasurePass,
    Pass,
    PoolPass,
    SinkPass,
    UnitPass,
    byte_ranges,
    column_types,
    read_unit,
    surviving_rows,
)
from pipeline.schema import DROP, INLINE, POSITION, SAMPLE, is_heavy
from pipeline.step import Step
from pipeline.storage import Entry, Store
from trainer.errors import InputError, store_cure
from trainer.spelling import did_you_mean
from trainer.terminal import masked

UNITS_AHEAD = 8
"""Units whose light columns are read concurrently from an object store, where each request is slow."""

LOCAL_AHEAD = 2
"""Units read concurrently from a local folder: one is read while another is decoded. More would contend for Python's
lock: 8 cost twice the CPU time on 10 million rows."""

DROPS = pa.schema([*POSITION, *SAMPLE, *(field for field in DROP if field.name not in POSITION.names)])
"""The columns of `Run.drops`."""

T = TypeVar("T")
R = TypeVar("R")


class RunError(InputError):
    """What was requested does not exist: a run, a finished run, a step, a column, or passes that were removed. The
    message names the path and the cure."""


@dataclass(frozen=True)
class RunStep:
    """A line of the recipe, as `run.json` describes it. The first one is the pool itself."""

    label: str
    """Its name in funnel and drops: `exact_dedup.2` for the second of its kind."""
    step: str
    """The import path of its class; `pool` for the pool."""
    version: int
    options: dict[str, Any]
    """All options, including defaults; secrets are masked."""
    needs: tuple[str, ...]
    """The columns that it reads."""
    adds: Mapping[str, Any]
    """The columns that it adds, with the names of their Arrow types."""
    repeatable: bool
    """Whether the same inputs always give the same results; False for a step that reads the web."""

    def load(self) -> Step:
        """The step itself, with these options. Raises RunError if its module cannot be imported or has changed."""
        module, _, name = self.step.rpartition(".")
        try:
            step: Step = getattr(importlib.import_module(module), name)(**self.options)
        except Exception as error:  # a user's module can raise anything
            cure = "put its folder on PYTHONPATH, at the version that the run was made with"
            raise RunError(f"the step {self.label} ({self.step}) cannot be loaded: {error}; {cure}") from None
        step.__dict__["_label"] = self.label
        return step


def describe(passes: Sequence[Pass], recipe: Recipe) -> list[dict[str, Any]]:
    """Describes the passes of a run as plain data for `run.json`, from which `open_run` restores them.

    `root` is relative to the run's folder, or absolute for a pass of the run that is reused. `schema` is the Arrow
    schema of the columns that a pass adds: an encapsulated IPC message in base64. `adds` of a step is only for people.
    """

    def as_run_step(step: Step) -> RunStep:
        options = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
        name = f"{type(step).__module__}.{type(step).__qualname__}"
        return RunStep(step.label, name, step.version, options, tuple(step.needs), dict(step.adds), step.repeatable)

    pool = RunStep("pool", "pool", 1, dataclasses.asdict(recipe.pool), (), passes[0].adds, True)
    described = [
        {
            "kind": p.kind,
            "label": p.label,
            "key": p.key,
            "chain": p.rows_key,
            "root": p.root.removeprefix(f"{recipe.run}/"),
            "steps": [dataclasses.asdict(step) for step in (map(as_run_step, p.steps) if p.steps else [pool])],
            "schema": base64.b64encode(pa.schema(list(p.adds.items())).serialize()).decode(),
        }
        for p in passes
    ]
    return cast("list[dict[str, Any]]", masked(json.loads(json.dumps(described, default=str, skipkeys=True))))


def _restore(described: dict[str, Any], store: Store) -> Pass:
    """Restores a pass from its description by `describe`."""
    steps = [RunStep(**{**step, "needs": tuple(step["needs"])}) for step in described["steps"]]
    root = described["root"]
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(described["schema"])))
    kind = KINDS[described["kind"]]
    return kind(
        described["key"],
        described["label"],
        cast("list[Step]", steps),  # a pass that is only read needs only the labels of its steps
        {field.name: field.type for field in schema},
        root if "://" in root or os.path.isabs(root) else store.path(root),
        **({"chain": described["chain"]} if kind is MeasurePass else {}),
    )


def open_run(path: str | os.PathLike[str]) -> Run:
    """Opens the run in a folder, or at an address that fsspec supports (`s3://bucket/run`), for reading.

    Reads two small files, `run.json` and `seal.json`. Raises RunError if there is no run.
    """
    store = Store(os.fspath(path))
    try:
        data = store.read_if_there("run.json")
    except NotADirectoryError:
        data = None
    except Exception as error:  # an unreachable store can raise anything
        cure = store_cure(store.root, error)
        raise RunError(f"{store.root} cannot be read: {type(error).__name__}: {error}{cure}") from None
    if data is None:
        raise RunError(f"{store.root} is not the folder of a run: there is no {store.path('run.json')}")
    return Run(store, data)


class Run:
    """A run that is open for reading. Created by `open_run`.

    `unit` and `row` identify a row permanently. Rows are read in the order of these two, which is also the order of the
    shards. Steps are named by their labels. A Run is cheap to pickle: to read units in parallel on a cluster, give each
    task some `units` of `scan` or `drops`.

    Every method raises RunError if what it needs does not exist, and `storage.DamagedError` if a file does not match
    its record.
    """

    name: str
    """The name of the recipe."""
    recipe: dict[str, Any]
    """The recipe as plain data, as it was given; secrets are masked."""
    steps: list[RunStep]
    """The pool and the steps, in the order of the recipe."""
    fingerprint: str
    """Changes with the recipe and with the results of a finished run."""
    finished: bool
    """Whether the last command completed: the books balance, and drops and shards match `recipe`."""

    def __init__(self, store: Store, data: bytes) -> None:
        """`data`: the contents of `run.json`."""
        self._store = store
        at = store.path("run.json")
        try:
            claim = json.loads(data)
            self.name, self.recipe = claim["name"], claim["recipe"]
            described = claim["passes"]
            if described and "schema" not in described[0]:
                raise RunError(
                    f"{at}: written by an earlier version, which did not describe its passes. Run its command again: "
                    "this rewrites the file and reuses all measurements that are still valid"
                )
            self._passes = [_restore(p, store) for p in described]
            self.steps = [cast(RunStep, step) for p in self._passes for step in p.steps]
            if not self._passes or not isinstance(self._passes[0], PoolPass):
                raise ValueError
        except RunError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowInvalid):
            raise RunError(f"{at}: not the description of a run of Winnow") from None
        seal = store.read_record("seal.json")
        self._files: dict[str, Entry] = {entry["name"]: entry for entry in seal["files"]} if seal else {}
        sealed = self._files.get("run.json", {}).get("sha256")
        self.fingerprint = hashlib.sha256(data + json.dumps(seal, sort_keys=True).encode()).hexdigest()
        self.finished = sealed == hashlib.sha256(data).hexdigest()
        # For each step: the number of its pass, and the labels of the later steps in that pass.
        self._places = {
            label: (index, p.labels[i + 1 :])
            for index, p in enumerate(self._passes)
            for i, label in enumerate(p.labels)
        }

    def __repr__(self) -> str:
        return f"<Run {self.name!r} in {self._store.root}: {', '.join(self._places)}>"

    @property
    def passes(self) -> list[Pass]:
        """The passes, for commands that write to the run. Their steps are descriptions (`RunStep`)."""
        return self._passes

    @property
    def path(self) -> str:
        """The absolute path of its folder, or its address."""
        return self._store.root

    @property
    def pool_key(self) -> str:
        """Identifies the contents of the pool: in runs with the same key, `unit` and `row` name the same rows."""
        return self._passes[0].key

    @property
    def has_passes(self) -> bool:
        """Whether the results of all passes still exist. Without them, `unit` and `row` of all rows are null."""
        return self._missing(len(self._passes) - 1) is None

    # --- The books ----------------------------------------------------------------------------------------------------

    @cached_property
    def funnel(self) -> Funnel:
        """For each step: rows in, rows dropped by reason, and seconds. Raises RunError if the run is not finished."""
        self._must_be_finished("the funnel")
        return Funnel.from_json(json.loads(self._store.read_entry(self._files["funnel.json"]))["steps"])

    @property
    def rows_in(self) -> int:
        """The rows of the pool."""
        return self.funnel.rows_in

    @property
    def kept(self) -> int:
        """The rows that the last step kept."""
        return self.funnel.kept

    @cached_property
    def units(self) -> int:
        """The number of units of the pool. They are numbered from 0."""
        complete = self._passes[0].complete()
        if complete is None:
            self._raise_missing(0)
        return int(complete["units"])

    def spread_units(self, most: int) -> list[int]:
        """The numbers of up to `most` units, spread evenly over the pool. Each unit is a uniform sample of the pool."""
        return [int(unit) for unit in np.linspace(0, self.units - 1, min(self.units, most))]

    # --- Rows that survived -------------------------------------------------------------------------------------------

    def columns(self, after: str | None = None) -> dict[str, pa.DataType]:
        """The columns that `scan` can read after a step (default: the last), with their Arrow types.

        Columns are stored at the end of a pass: if steps share a pass, their columns can be read after the last of
        them. Without `passes/`, these are the columns of `shards/*.parquet`.
        """
        label = self._label(after)
        return self._shard_columns() if self._reads_shards(label) else self._types(label)

    def scan(
        self, columns: str | Iterable[str] = (), after: str | None = None, units: Iterable[int] | None = None
    ) -> Iterator[pa.Table]:
        """Yields the rows that survived a step (default: the last), as tables of `unit, row` and `columns`.

        Yields one table per unit, in order, even if it has no rows; `units` selects some units. If the columns include
        pixels or vectors (`image`, `embedding`), a unit is split into tables of up to 256 rows. Memory: the light
        columns of UNITS_AHEAD units, or one such table.

        Without `passes/`, only the rows after the last step can be read. They come from `shards/*.parquet`, in the same
        order, one table per shard, and `unit` and `row` are null.
        """
        label = self._label(after)
        from_shards = self._reads_shards(label)
        types = self._shard_columns() if from_shards else self._types(label)
        wanted = self._wanted(columns, types, f" after {label}")
        heavy = any(is_heavy(types[name]) for name in wanted)
        if from_shards:
            return self._scan_shards(pa.schema([*POSITION, *((name, types[name]) for name in wanted)]), heavy)
        numbers = self._numbers(units)
        index, later = self._places[label]
        before = self._passes[: index if later else index + 1]

        def read(unit: int) -> Iterator[pa.Table]:
            rows = self._surviving(index, later, unit)
            if heavy and not len(rows):
                yield pa.schema([*POSITION, *((name, types[name]) for name in wanted)]).empty_table()
            else:
                yield from read_unit(before, unit, wanted, rows)

        return chain.from_iterable(map(read, numbers)) if heavy else self._ahead(lambda unit: next(read(unit)), numbers)

    def _surviving(self, index: int, later: Sequence[str], unit: int) -> np.ndarray:
        """The rows of a unit that survived a pass, or only its steps before `later`, the labels of its last steps."""
        passes = self._passes[: index + 1]
        rows = surviving_rows([p for p, drops in zip(passes, self._dropping) if drops], unit)
        if later:
            drops = self._passes[index].drops(self._passes[:index], unit)
            after = drops.filter(pc.is_in(drops["step"], pa.array(later)))
            rows = np.union1d(rows, after["row"].to_numpy())
        return rows

    @cached_property
    def _dropping(self) -> list[bool]:
        """For each pass, whether its tables are needed to find the surviving rows. Most scores drop no rows."""

        def is_needed(p: Pass) -> bool:
            # The tables of other passes have every row that reached them, so no earlier pass needs to be read.
            complete = p.complete() if isinstance(p, MeasurePass | BarrierPass) else None
            return complete is None or any(line["dropped"] for line in complete["funnel"])

        return list(map(is_needed, self._passes))

    def _ahead(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yields the result for each item, in order. Threads work on the next few items meanwhile."""
        ahead = LOCAL_AHEAD if self._store.local else UNITS_AHEAD
        due: deque[Future[R]] = deque()
        with ThreadPoolExecutor(ahead) as threads:
            try:
                for item in items:
                    due.append(threads.submit(work, item))
                    if len(due) == ahead:
                        yield due.popleft().result()
                while due:
                    yield due.popleft().result()
            finally:
                for future in due:
                    future.cancel()

    # --- Rows that were dropped ---------------------------------------------------------------------------------------

    def drops(
        self, step: str | None = None, reason: str | None = None, units: Iterable[int] | None = None
    ) -> Iterator[pa.Table]:
        """Yields the dropped rows, as tables of `unit, row, uid, url, caption, step, reason, detail, value`. `step` and
        `reason` select the rows of one step or one reason.

        Yields one table per unit, in order, even if it has no rows; `units` selects some units. Memory: UNITS_AHEAD
        such tables. With `step`, only the results of its pass and of the pool are read.

        Without `passes/`, the rows come from `drops/*.parquet`, in the same order, up to 65,536 per table, and `unit`
        and `row` are null.
        """
        index = None if step is None else self._places[self._label(step)][0]
        due = range(len(self._passes)) if index is None else [index]
        if (missing := self._missing(due[-1])) is not None:
            if not self.finished:
                self._raise_missing(missing)
            return self._read_drops(step, reason)

        def read(unit: int) -> pa.Table:
            names = [name for name in DROP.names if name != "unit"]
            ledgers = [self._passes[i].drops(self._passes[:i], unit).select(names) for i in due]
            drops = _chosen(pa.concat_tables(ledgers), step, reason).sort_by("row")
            (texts,) = read_unit(self._passes[:1], unit, SAMPLE.names, drops["row"].to_numpy())
            columns = {name: (texts if name in texts.column_names else drops)[name] for name in DROPS.names}
            return pa.table(columns, schema=DROPS)

        return self._ahead(read, self._numbers(units))

    # --- Single rows --------------------------------------------------------------------------------------------------

    def take(self, unit: int, rows: Sequence[int] | np.ndarray, columns: str | Iterable[str]) -> pa.Table:
        """Reads some rows of a unit, dropped or not: `unit, row` and `columns`, in the order of `rows`.

        A value is null if the row was dropped before the step that adds it, or could not be measured. A row that a
        later step dropped still has its picture. Memory: these rows. Reads one table for each pass that added one of
        the columns. Pixels and vectors also need a file of the unit, of some hundred MB, which is hashed once per
        process and copied first if it is remote; so request all rows of a unit together.
        """
        types = column_types(self._passes)
        wanted = self._wanted(columns, types)
        (unit,) = self._numbers([unit])
        numbers = np.asarray(rows, np.int64).reshape(-1)
        record = self._passes[0].record(unit)
        size = int(record["rows_in"]) if record else 0
        if len(odd := numbers[(numbers < 0) | (numbers >= size)]):
            raise RunError(f"{self._store.root}: unit {unit} has the rows 0 to {size - 1:,}, not {odd[0]:,}")
        found = {"unit": pa.array(np.full(len(numbers), unit, np.int32)), "row": pa.array(numbers.astype(np.int32))}
        for i, p in enumerate(self._passes):
            added = [name for name in wanted if name in p.adds]
            if not added:
                continue
            if p.complete() is None:
                self._raise_missing(i)
            assert isinstance(p, UnitPass | BarrierPass)
            valued = np.intersect1d(numbers, p.valued(unit)).astype(np.int32)
            empty = pa.schema([*POSITION, *((name, types[name]) for name in added)]).empty_table()
            table = pa.concat_tables([empty, *read_unit([p], unit, added, valued)])
            at = pa.array(np.searchsorted(valued, numbers), mask=~np.isin(numbers, valued))
            for name in added:
                values = table[name].take(at)
                # A whole-run filter gives values to some rows; the others keep those of an earlier step.
                found[name] = pc.coalesce(values, found[name]) if name in found else values
        return pa.table({name: found[name] for name in [*POSITION.names, *wanted]})

    def pictures(self, uids: Iterable[str]) -> dict[str, bytes]:
        """The encoded pictures of samples, by uid. A uid is left out if it is unknown or its row has no picture.

        Cost: reads the uids of `shards/*.parquet` until all are found, then the bytes of each picture in its tar. For
        uids that are not in the shards, reads the tables of the pool, some 200 bytes per row, and calls `take`. If unit
        and row are known, `take` is cheaper. Memory: the pictures, and the uids of one shard.
        """
        wanted = set(uids)
        if not any("image" in p.adds for p in self._passes):
            raise RunError(f"{self._store.root}: no step of the run adds pictures")
        found: dict[str, bytes] = {}
        shards = self._store.folder("shards")
        manifest = self._manifest() if self._writes_shards and self.finished else {"shards": []}
        for shard in manifest["shards"] if wanted else []:
            held = shards.read_table(_named(manifest, shard["parquet"]), ["uid"])["uid"]
            at = np.flatnonzero(pc.is_in(held, pa.array(wanted, pa.string())).to_numpy())
            if not len(at):
                continue
            index = np.load(io.BytesIO(shards.read_entry(_named(manifest, shard["index"]))))
            with shards.input(shard["name"], random_access=True) as tar:
                for uid, (offset, size) in zip(held.take(pa.array(at)).to_pylist(), index[at, :2].tolist()):
                    tar.seek(offset)
                    found[uid] = tar.read(size)
            wanted -= set(found)
            if not wanted:
                break
        if not wanted or (self.finished and self._passes[0].complete() is None):
            return found
        for unit, held in self._ahead(lambda unit: (unit, self._uids(unit)), range(self.units)):
            at = np.flatnonzero(pc.is_in(held, pa.array(wanted, pa.string())).to_numpy())
            if len(at):
                images = self.take(unit, at, ["image"])["image"].to_pylist()
                pairs = zip(held.take(pa.array(at)).to_pylist(), images)
                found |= {uid: image for uid, image in pairs if image is not None}
                wanted -= set(found)
            if not wanted:
                break
        return found

    def picture_ranges(self, unit: int, rows: Sequence[int] | np.ndarray) -> tuple[list[Entry], np.ndarray]:
        """Locates the encoded pictures of some rows of a unit, for readers that need no copy of them.

        Returns the files, as entries whose `name` is a full path or address, and an int64 array (n, 3) in the order of
        `rows`: the number of the file, and the offset and size of the picture in bytes; the size is 0 if there is none.
        Each file is hashed once per process, and copied first if it is remote.
        """
        numbers = np.asarray(rows, np.int64).reshape(-1)
        index = next((i for i, p in enumerate(self._passes) if "image" in p.adds), None)
        if index is None:
            raise RunError(f"{self._store.root}: no step of the run adds pictures")
        p = self._passes[index]
        if p.complete() is None:
            self._raise_missing(index)
        assert isinstance(p, UnitPass)
        files, ranges = byte_ranges(p, unit, "image", numbers)
        entries = [{**entry, "name": store.path(entry["name"])} if entry else {} for store, entry in files]
        return entries, ranges

    def _uids(self, unit: int) -> pa.ChunkedArray:
        """The uids of all rows of a unit, indexed by row."""
        pool = self._passes[0]
        assert isinstance(pool, PoolPass)
        (table,) = read_unit([pool], unit, ["uid"], pool.valued(unit))
        return table["uid"]

    # --- Names, columns and passes ------------------------------------------------------------------------------------

    def _label(self, label: str | None) -> str:
        """Returns the label of a step, by default the last. Raises RunError if there is no such step."""
        if label is None:
            return next(reversed(self._places))
        if label not in self._places:
            known = did_you_mean(label, self._places) or f"; the steps are {', '.join(self._places)}"
            raise RunError(f"{self._store.root}: no step {label!r}{known}")
        return label

    def _types(self, label: str) -> dict[str, pa.DataType]:
        """The columns that exist after a step."""
        index, later = self._places[label]
        return column_types(self._passes[: index if later else index + 1])

    def _wanted(self, columns: str | Iterable[str], types: Mapping[str, pa.DataType], where: str = "") -> list[str]:
        """The names of these columns without `unit` and `row`. Raises RunError if one is not in `types`."""
        names = dict.fromkeys([columns] if isinstance(columns, str) else columns)
        wanted = [name for name in names if name not in POSITION.names]
        for name in wanted:
            if name not in types:
                raise RunError(f"{self._store.root}: no column {name!r}{where}{self._hint(name, types)}")
        return wanted

    def _hint(self, name: str, types: Iterable[str]) -> str:
        """For a column that is not among these: where it can be read, or the nearest name."""
        for p in self._passes:
            if name in p.adds:
                return f"; it can be read after {p.labels[-1]}"
        return did_you_mean(name, types) or f"; the columns are {', '.join(types)}"

    def _numbers(self, units: Iterable[int] | None) -> Iterable[int]:
        if units is None:
            return range(self.units)
        numbers = list(units)
        if odd := [unit for unit in numbers if not 0 <= unit < self.units]:
            raise RunError(f"{self._store.root}: no unit {odd[0]}; they are numbered 0 to {self.units - 1:,}")
        return numbers

    @property
    def _writes_shards(self) -> bool:
        return isinstance(self._passes[-1], SinkPass)

    def _missing(self, index: int) -> int | None:
        """The number of the first pass up to this one whose results are missing; None if all exist."""
        return next((i for i, p in enumerate(self._passes[: index + 1]) if p.complete() is None), None)

    def _reads_shards(self, label: str) -> bool:
        """Whether the rows after a step must come from the shards because passes are missing. Raises RunError if the
        shards do not have these rows."""
        missing = self._missing(self._places[label][0])
        if missing is None:
            return False
        if not (self.finished and self._writes_shards and label == self._label(None)):
            self._raise_missing(missing)
        return True

    def _raise_missing(self, index: int) -> NoReturn:
        """Raises RunError: the results of a pass are missing."""
        p = self._passes[index]
        self._must_be_finished(f"what {p.label} and the steps after it have stored")
        usable = "drops() and scan() after the last step" if self._writes_shards else "drops()"
        raise RunError(
            f"{p.root}: missing or not complete. Without the results of its passes, only {usable} can read a run"
        )

    def _must_be_finished(self, what: str) -> None:
        if not self.finished:
            raise RunError(f"{self._store.root} is not finished, so {what} cannot be read yet; run its command again")

    # --- Runs without passes ------------------------------------------------------------------------------------------

    def _read_drops(self, step: str | None, reason: str | None) -> Iterator[pa.Table]:
        for name in sorted(name for name in self._files if name.startswith("drops/")):
            self._store.check(self._files[name], digest=False)
            for table in self._store.batches(name):
                chosen = _chosen(table, step, reason)
                nulls = {name: pa.nulls(len(chosen), DROPS.field(name).type) for name in POSITION.names}
                columns = nulls | {name: chosen[name] for name in chosen.column_names}
                yield pa.table({name: columns[name] for name in DROPS.names}, schema=DROPS)

    def _manifest(self) -> dict[str, Any]:
        entry = self._files["shards/manifest.json"]
        manifest: dict[str, Any] = json.loads(self._store.read_entry(entry))
        return manifest

    def _shard_columns(self) -> dict[str, pa.DataType]:
        shards = self._store.folder("shards")
        for shard in self._manifest()["shards"][:1]:
            with shards.input(shard["parquet"], random_access=True) as file:
                return {field.name: field.type for field in pq.read_schema(file) if field.name != "key"}
        return {k: v for k, v in self._types(self._label(None)).items() if k not in ("image", INLINE, "key")}

    def _scan_shards(self, schema: pa.Schema, heavy: bool) -> Iterator[pa.Table]:
        shards, manifest = self._store.folder("shards"), self._manifest()
        names = schema.names[2:]
        for shard in manifest["shards"]:
            table = shards.read_table(_named(manifest, shard["parquet"]), ["uid", *names])
            for part in table.to_batches(HEAVY_ROWS) if heavy else [table]:
                nulls = {name: pa.nulls(len(part), pa.int32()) for name in POSITION.names}
                yield pa.table(nulls | {name: part[name] for name in names}, schema=schema)


def _named(manifest: dict[str, Any], name: str) -> Entry:
    return {"name": name, **manifest["files"][name]}


def _chosen(drops: pa.Table, step: str | None, reason: str | None) -> pa.Table:
    for name, value in (("step", step), ("reason", reason)):
        if value is not None:
            drops = drops.filter(pc.equal(drops[name], value))
    return drops
