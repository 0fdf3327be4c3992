"""The read API: `open_run(path)` reads what a run knows of its rows, from a folder or an object store.

Everything comes from the run itself: `run.json` describes its passes (`describe`), so neither the recipe's steps nor
the pool are needed. Nothing is written, no Ray is started, and a run may be read while a command works on it.
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
    read_unit,
    surviving_rows,
)
from pipeline.schema import DROP, INLINE, POSITION, SAMPLE, is_heavy
from pipeline.step import Step
from pipeline.storage import Entry, Store
from trainer.errors import store_cure
from trainer.spelling import did_you_mean
from trainer.terminal import masked

UNITS_AHEAD = 8
"""Units of an object store, which answers late, whose light columns are read side by side; of a folder LOCAL_AHEAD."""

LOCAL_AHEAD = 2
"""One is read while another is decoded. More wait for Python's lock: 8 cost twice the CPU time on 10 million rows."""

DROPS = pa.schema([*POSITION, *SAMPLE, *(field for field in DROP if field.name not in POSITION.names)])
"""The columns of `Run.drops`."""

T = TypeVar("T")
R = TypeVar("R")


class RunError(ValueError):
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
    """All options, those left at their default included; secrets are masked."""
    needs: tuple[str, ...]
    """The columns that it reads."""
    adds: Mapping[str, Any]
    """The columns that it adds, with the names of their Arrow types."""
    repeatable: bool
    """Whether the same inputs give the same results again; false for what comes from the web."""

    def load(self) -> Step:
        """The step itself, with these options. RunError if its module cannot be imported, or has changed."""
        module, _, name = self.step.rpartition(".")
        try:
            step: Step = getattr(importlib.import_module(module), name)(**self.options)
        except Exception as error:  # a module of the user's can raise anything
            cure = "put its folder on PYTHONPATH, at the version that the run was made with"
            raise RunError(f"the step {self.label} ({self.step}) cannot be loaded: {error}; {cure}") from None
        step.__dict__["_label"] = self.label
        return step


def describe(passes: Sequence[Pass], recipe: Recipe) -> list[dict[str, Any]]:
    """What `run.json` says of the passes of a run: plain data from which `open_run` reads them.

    `root` is relative to the run's folder, or absolute for a pass of the run that is reused. `schema` is the Arrow
    schema of the columns that a pass adds, an encapsulated IPC message in base64; `adds` of a step is for people.
    """

    def step(of: Step) -> RunStep:
        options = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
        name = f"{type(of).__module__}.{type(of).__qualname__}"
        return RunStep(of.label, name, of.version, options, tuple(of.needs), dict(of.adds), of.repeatable)

    pool = RunStep("pool", "pool", 1, dataclasses.asdict(recipe.pool), (), passes[0].adds, True)
    described = [
        {
            "kind": p.kind,
            "label": p.label,
            "key": p.key,
            "chain": p.rows_key,
            "root": p.root.removeprefix(f"{recipe.run}/"),
            "steps": [dataclasses.asdict(of) for of in (map(step, p.steps) if p.steps else [pool])],
            "schema": base64.b64encode(pa.schema(list(p.adds.items())).serialize()).decode(),
        }
        for p in passes
    ]
    return cast("list[dict[str, Any]]", masked(json.loads(json.dumps(described, default=str, skipkeys=True))))


def _restore(described: dict[str, Any], store: Store) -> Pass:
    """The pass that `describe` has described."""
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


def described_passes(store: Store) -> list[Pass]:
    """The passes of the run in a folder, for reading. RunError if there is no run."""
    return open_run(store.root)._passes


def open_run(path: str | os.PathLike[str]) -> Run:
    """Opens a run to read it: a folder, or an address that fsspec knows (`s3://bucket/run`).

    Reads two small files, `run.json` and `seal.json`. RunError if there is no run.
    """
    store = Store(os.fspath(path))
    try:
        data = store.read_if_there("run.json")
    except NotADirectoryError:
        data = None
    except Exception as error:  # whatever a store out of reach raises
        cure = store_cure(store.root, error)
        raise RunError(f"{store.root} cannot be read: {type(error).__name__}: {error}{cure}") from None
    if data is None:
        raise RunError(f"{store.root} is not the folder of a run: there is no {store.path('run.json')}")
    return Run(store, data)


class Run:
    """A run, as `open_run` opens it.

    A row is identified by its `unit` and `row`, permanently. Reads are in the order of these two, which is that of the
    shards. Steps are named by their labels. Small enough to be pickled: read units side by side on a cluster with the
    `units` of `scan` and `drops`.

    Every method raises RunError for what is not there, and `storage.DamagedError` for a file that is not as recorded.
    """

    name: str
    """The recipe's."""
    recipe: dict[str, Any]
    """The recipe as plain data, as it was given; secrets are masked."""
    steps: list[RunStep]
    """The pool and the steps, in the order of the recipe."""
    fingerprint: str
    """Changes with the recipe and with the results of a finished run."""
    finished: bool
    """Whether the last command came to its end: the books balance, and drops and shards are those of `recipe`."""

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
                    f"{at}: written by an earlier version, which did not describe its passes. Give the command of the "
                    "run again: it rewrites this file, and measures nothing again where the results are the same"
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
        # Where each step is: the number of its pass, and the labels of the steps of that pass that come after it.
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
        """Names the contents of the pool: in runs with the same key, `unit` and `row` name the same rows."""
        return self._passes[0].key

    @property
    def has_passes(self) -> bool:
        """Whether the results of all its passes are there; without them, rows have neither `unit` nor `row`."""
        return self._missing(len(self._passes) - 1) is None

    # --- The books ----------------------------------------------------------------------------------------------------

    @cached_property
    def funnel(self) -> Funnel:
        """For each step the rows that came in, the rows dropped by reason, and the seconds that it took. RunError for
        a run that is not finished."""
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
        """How many units the pool was cut into; they are numbered from 0."""
        complete = self._passes[0].complete()
        if complete is None:
            self._gone(0)
        return int(complete["units"])

    def spread_units(self, most: int) -> list[int]:
        """At most so many units, spread evenly over the pool. Each is a uniform sample of it."""
        return [int(unit) for unit in np.linspace(0, self.units - 1, min(self.units, most))]

    # --- Rows that survived -------------------------------------------------------------------------------------------

    def columns(self, after: str | None = None) -> dict[str, pa.DataType]:
        """The columns that `scan` can read after a step (none: the last), with their Arrow types.

        What a step adds is stored when its pass is done: where steps share a pass, their columns can be read after the
        last of them. Without `passes/`, these are the columns of `shards/*.parquet`.
        """
        label = self._label(after)
        return self._shard_columns() if self._reads_shards(label) else self._types(label)

    def scan(
        self, columns: str | Iterable[str] = (), after: str | None = None, units: Iterable[int] | None = None
    ) -> Iterator[pa.Table]:
        """The rows that survived a step (none: the last), as tables of `unit, row` and these columns.

        A table for each unit, in order, without rows where none survived; of these units only, if they are given. With
        pixels or vectors among the columns (`image`, `embedding`): several tables a unit, of 256 rows at most. Memory:
        the light columns of UNITS_AHEAD units, or one such table.

        Without `passes/`, only the rows after the last step can be read, from `shards/*.parquet`: in the same order, a
        table a shard, `unit` and `row` null.
        """
        label = self._label(after)
        wanted = list(dict.fromkeys([columns] if isinstance(columns, str) else columns))
        from_shards = self._reads_shards(label)
        types = self._shard_columns() if from_shards else self._types(label)
        wanted = [name for name in wanted if name not in POSITION.names]
        for name in wanted:
            if name not in types:
                raise RunError(f"{self._store.root}: no column {name!r} after {label}{self._hint(name, types)}")
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
        """The rows of a unit that survived a pass up to the step before `later`, the labels of its further steps."""
        passes = self._passes[: index + 1]
        rows = surviving_rows([p for p, drops in zip(passes, self._dropping) if drops], unit)
        if later:
            drops = self._passes[index].drops(self._passes[:index], unit)
            after = drops.filter(pc.is_in(drops["step"], pa.array(later)))
            rows = np.union1d(rows, after["row"].to_numpy())
        return rows

    @cached_property
    def _dropping(self) -> list[bool]:
        """For each pass, whether its tables must be read to know which rows survived: not those of scores, which drop
        none."""

        def decides(p: Pass) -> bool:
            # A pass over units knows all rows that came in, so nothing before it need be read.
            complete = p.complete() if isinstance(p, MeasurePass | BarrierPass) else None
            return complete is None or any(line["dropped"] for line in complete["funnel"])

        return list(map(decides, self._passes))

    def _ahead(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The results for items, in their order, some of them worked on ahead."""
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
        """The rows that were dropped, by one step or for one reason if these are given: `unit, row, uid, url, caption,
        step, reason, detail, value`.

        A table for each unit, in order, without rows where none was dropped; of these units only, if they are given.
        Memory: UNITS_AHEAD such tables. With a step, only the results of its pass and of the pool are read.

        Without `passes/`, they come from `drops/*.parquet`: in the same order, some 65,536 rows a table, `unit` and
        `row` null. The `step` may then be any that the files name.
        """
        index = None if step is None else self._places[self._label(step)][0]
        due = range(len(self._passes)) if index is None else [index]
        if (missing := self._missing(due[-1])) is not None:
            if not self.finished:
                self._gone(missing)
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
        """Some rows of a unit, dropped or not: `unit, row` and these columns, in the order of `rows`.

        A value is null where the row has none: it was dropped before, or could not be measured. A row that a later step
        dropped still has its picture. Memory: these rows. Reads a table for each pass that added one of the columns;
        for pixels and vectors also their file of the unit, some hundred MB: hashed once in the life of a process, and
        copied first if it is remote. So ask for the rows of a unit together.
        """
        wanted = [columns] if isinstance(columns, str) else list(dict.fromkeys(columns))
        wanted = [name for name in wanted if name not in POSITION.names]
        types = {name: dtype for p in self._passes for name, dtype in p.adds.items()}
        for name in wanted:
            if name not in types:
                raise RunError(f"{self._store.root}: no column {name!r}{self._hint(name, types)}")
        (unit,) = self._numbers([unit])
        numbers = np.asarray(rows, np.int64).reshape(-1)
        record = self._passes[0].record(unit)
        size = int(record["rows_in"]) if record else 0
        if len(odd := numbers[(numbers < 0) | (numbers >= size)]):
            raise RunError(f"{self._store.root}: unit {unit} has the rows 0 to {size - 1:,}, not {odd[0]:,}")
        found = {"unit": pa.array(np.full(len(numbers), unit, np.int32)), "row": pa.array(numbers.astype(np.int32))}
        for i, p in enumerate(self._passes):
            mine = [name for name in wanted if name in p.adds]
            if not mine:
                continue
            if p.complete() is None:
                self._gone(i)
            assert isinstance(p, UnitPass | BarrierPass)
            there = np.intersect1d(numbers, p.valued(unit)).astype(np.int32)
            empty = pa.schema([*POSITION, *((name, types[name]) for name in mine)]).empty_table()
            table = pa.concat_tables([empty, *read_unit([p], unit, mine, there)])
            at = pa.array(np.searchsorted(there, numbers), mask=~np.isin(numbers, there))
            for name in mine:
                values = table[name].take(at)
                # A whole-run filter gives values to some rows; the others keep those of an earlier step.
                found[name] = pc.coalesce(values, found[name]) if name in found else values
        return pa.table({name: found[name] for name in [*POSITION.names, *wanted]})

    def pictures(self, uids: Iterable[str]) -> dict[str, bytes]:
        """The pictures of these samples, encoded, by uid; a uid is left out if it is unknown or its row has none.

        Cost: reads the uids of `shards/*.parquet` until all are found, then of a sample its bytes in the tar. For those
        that are not in the shards, reads the tables of the pool, some 200 bytes a row, and `take`s each. To get the
        pictures of rows whose unit and row are known, `take` is cheaper. Memory: the pictures, and one shard's uids.
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
        everything = self._ahead(lambda unit: (unit, self._uids(unit)), range(self.units))
        for unit, held in everything:
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
        """Where the encoded pictures of some rows of a unit lie, for readers that want them without a copy.

        Returns the files, as entries whose `name` is a full path or address, and an int64 array (n, 3) in the order of
        `rows`: the number of the file, the offset and the size in bytes of the picture, 0 if the row has none. Each
        file is hashed once in the life of a process, and copied first if it is remote.
        """
        numbers = np.asarray(rows, np.int64).reshape(-1)
        index = next((i for i, p in enumerate(self._passes) if "image" in p.adds), None)
        if index is None:
            raise RunError(f"{self._store.root}: no step of the run adds pictures")
        p = self._passes[index]
        if p.complete() is None:
            self._gone(index)
        assert isinstance(p, UnitPass)
        files, ranges = byte_ranges(p, unit, "image", numbers)
        entries = [{**entry, "name": store.path(entry["name"])} if entry else {} for store, entry in files]
        return entries, ranges

    def _uids(self, unit: int) -> pa.ChunkedArray:
        """Of all rows of a unit; the place is the row."""
        pool = self._passes[0]
        assert isinstance(pool, PoolPass)
        (table,) = read_unit([pool], unit, ["uid"], pool.valued(unit))
        return table["uid"]

    # --- What there is ------------------------------------------------------------------------------------------------

    def _label(self, label: str | None) -> str:
        """The label of a step; the last one's for None."""
        if label is None:
            return next(reversed(self._places))
        if label not in self._places:
            known = did_you_mean(label, self._places) or f"; the steps are {', '.join(self._places)}"
            raise RunError(f"{self._store.root}: no step {label!r}{known}")
        return label

    def _types(self, label: str) -> dict[str, pa.DataType]:
        index, later = self._places[label]
        return {k: v for p in self._passes[: index if later else index + 1] for k, v in p.adds.items()}

    def _hint(self, name: str, types: Iterable[str]) -> str:
        """Where a column that is not among these can be read, or what else was meant."""
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
        """The first missing pass of those up to this one."""
        return next((i for i, p in enumerate(self._passes[: index + 1]) if p.complete() is None), None)

    def _reads_shards(self, label: str) -> bool:
        """Whether the rows after a step must come from the shards, since passes are gone; RunError if those cannot
        help."""
        missing = self._missing(self._places[label][0])
        if missing is None:
            return False
        if not (self.finished and self._writes_shards and label == self._label(None)):
            self._gone(missing)
        return True

    def _gone(self, index: int) -> NoReturn:
        """Raises RunError: a pass is not there."""
        p = self._passes[index]
        self._must_be_finished(f"what {p.label} and the steps after it have stored")
        left = "drops() and scan() after the last step" if self._writes_shards else "drops()"
        raise RunError(
            f"{p.root}: missing or not complete. Without the results of its passes, a run can be read by {left} alone"
        )

    def _must_be_finished(self, what: str) -> None:
        if not self.finished:
            raise RunError(
                f"{self._store.root} is not finished, so {what} cannot be read yet; give the command of the run again"
            )

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
