"""Removes listed samples from the shards of a finished run.

    python -m pipeline.takedown runs/400m takedown.txt
    python -m pipeline.verify runs/400m --deep

The list has one entry per line: `url https://example.org/a.jpg`, `domain example.org`, `uid 8f…`, `sha256 1f…` (of the
picture as published), or `phash 00ff… 4` (with the number of bits that may differ). A line that begins with # is a
comment.

Only the shards that hold a listed sample are rewritten, without it; they become shorter, and their other samples keep
their keys. All other shards stay byte for byte the same. Manifest, indexes, card, drops, funnel and seal are updated.
The samples become drops of the last step, with the reason `taken_down`. `takedown.parquet` lists them, so that a later
command of the run does not write them again. To resume an interrupted command, run it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.progress import track

from pipeline.dataset.card import About
from pipeline.ledger import Funnel, Line
from pipeline.reader import Run, RunError, open_run
from pipeline.recipe import Recipe
from pipeline.scheduler.claim import Claim, hold
from pipeline.scheduler.passes import Pass, column_types, surviving_rows
from pipeline.scheduler.taken_down import NAME, REASON, TAKEN, read_taken
from pipeline.schema import DROP, SAMPLE
from pipeline.stages.write_shards import WriteShards
from pipeline.storage import DamagedError, Entry, Store, sealed
from pipeline.text.takedown_list import KINDS, TakedownList
from trainer.errors import InputError
from trainer.terminal import Console, entry_point

AT_ONCE = 8
"""Shards read or rewritten at a time."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Outcome:
    """What was taken down."""

    samples: pa.Table
    """The samples, with the columns of `takedown.parquet`."""
    rewritten: int
    """Number of shards that were rewritten."""
    shards: int
    """Number of all shards of the run."""


class FinishedRun:
    """The shards of a finished run, and everything that describes them. Raises RunError if the run has no shards."""

    def __init__(self, run: Run, store: Store, claim: Claim, console: Console) -> None:
        self.run, self.store, self.claim, self.console = run, store, claim, console
        self.passes: list[Pass] = run.passes
        steps = [step.load() for step in run.steps[1:]]
        sink = steps[-1] if steps else None
        if not isinstance(sink, WriteShards):
            raise RunError(f"{store.root}: its last step is not write_shards, so it has no shards")
        self.sink, self.last, self.before = sink, self.passes[-1], self.passes[:-1]
        self.folder = store.folder(sink.folder)
        self.shards: list[dict[str, Any]] = json.loads(self.folder.read("manifest.json"))["shards"]
        self.types = column_types(self.before)
        self.honours = [wish for step in steps for wish in step.honours()]
        self.has_passes = all(p.complete() is not None for p in self.before)
        """Whether `passes/` still exists. If so, its records are updated too."""

    def take_down(self, listed: TakedownList) -> Outcome:
        """Rewrites the shards that hold listed samples. Raises RunError if they lack a column that the list needs."""
        found = self._find(listed)
        taken = read_taken(self.store)
        new = pc.invert(pc.is_in(found["uid"], taken["uid"].combine_chunks()))
        taken = pa.concat_tables([taken, found.filter(new)])
        affected = set(found["part"].to_pylist())
        if not self.folder.exists("_SUCCESS"):  # an earlier command was interrupted
            affected |= set(taken["part"].to_pylist()) & set(range(len(self.shards)))
        if affected:
            self.claim.check()
            self._write(taken, sorted(affected))
        return Outcome(found, len(affected), len(self.shards))

    def _find(self, listed: TakedownList) -> pa.Table:
        kinds = listed.kinds
        names = list(dict.fromkeys([*SAMPLE.names, *(name for kind in kinds for name in KINDS[kind])]))
        for shard in self.shards[:1]:
            with self.folder.input(shard["parquet"]) as file:
                present = pq.read_schema(file).names
            for kind in kinds:
                if missing := [name for name in KINDS[kind] if name not in present]:
                    raise RunError(
                        f"{self.folder.root}: the shards have no column {missing[0]!r}, which entries of kind `{kind}` "
                        "need; remove those entries from the list"
                    )
            names += ["captions"] if "uid" in kinds and "captions" in present else []

        def search(part: int) -> pa.Table:
            rows = self.folder.read_table(self.shards[part]["parquet"], names)
            kind, entry = listed.find(rows, kinds)
            hit = kind.is_valid()
            details = pc.binary_join_element_wise(kind.filter(hit), entry.filter(hit), " ")
            columns = {name: rows[name].filter(hit) for name in SAMPLE.names}
            return pa.table({**columns, "detail": details, "part": [part] * len(details)}).cast(TAKEN)

        return pa.concat_tables([TAKEN.empty_table(), *self._each("searching shards", search, range(len(self.shards)))])

    def _write(self, taken: pa.Table, affected: list[int]) -> None:
        # The dataset is incomplete until _SUCCESS exists again. The list of samples is stored first, so that a command
        # that resumes this one can read it.
        self.folder.remove("_SUCCESS")
        if self.has_passes:
            self.last.forget()
        self.store.write_table(NAME, taken)
        ends = self._ends() if self.has_passes else np.empty(0, np.int64)
        rewritten = dict(zip(affected, self._each("writing shards", self._rewrite(taken, ends), affected)))
        lines = Funnel.from_json(json.loads(self.store.read("funnel.json"))["steps"]).lines
        line, label = lines[self.last.label], self.last.label
        left = line.dropped.get(self.sink.leftover, 0)
        records = [rewritten.get(part) or self._record(part) for part in range(len(self.shards))]
        down = line.rows_in - left - sum(record["rows"] for record in records)
        reasons = {why: n for why, n in ((self.sink.leftover, left), (REASON, down)) if n}
        funnel = Funnel({**lines, label: Line(line.rows_in, reasons, line.seconds)})
        earlier = Funnel({step: line for step, line in lines.items() if step != label})
        about = About(self.run.name, self.types, earlier, self.honours)
        self.claim.check()
        if self.has_passes:
            from pipeline.scheduler.executor import finish_sink

            finish_sink(self.last, self.before, self.sink, self.folder, ends, about, records, line.seconds)
            complete = self.last.complete()
            assert complete is not None
            documents = complete["documents"]
            drops = self._export([row[0] for record in rewritten.values() for row in record["taken"]])
        else:
            documents = self.sink.finish(self.folder, dataclasses.replace(about, funnel=funnel), records)
            drops = [self._append(taken)]
        self._seal(funnel, [*drops, *({**entry, "name": f"{self.sink.folder}/{entry['name']}"} for entry in documents)])
        self.folder.write("_SUCCESS", b"")

    def _rewrite(self, taken: pa.Table, ends: np.ndarray) -> Callable[[int], dict[str, Any]]:
        """Returns a function that removes the samples from a part and returns its new record."""
        from pipeline.scheduler.executor import rows_taken

        bounds = self.sink.plan(int(ends[-1])) if len(ends) else []

        def rewrite(part: int) -> dict[str, Any]:
            self.claim.check()
            written = self.sink.remove(self.folder, {"shard": self.shards[part]}, taken["uid"])
            if self.has_passes:
                written["taken"] = rows_taken(self.before, ends, bounds[part], bounds[part + 1], taken)
                self.last.forget(part)
                self.last.commit(part, written)
            return written

        return rewrite

    def _record(self, part: int) -> dict[str, Any]:
        """The record of a part that does not change."""
        if self.has_passes:
            record = self.last.record(part)
            if record is None:
                raise DamagedError(f"{self.last.root}: part {part} has no record; run the command of the run again")
            return record
        shard, manifest = self.shards[part], json.loads(self.folder.read("manifest.json"))
        files = [{"name": name, **manifest["files"][name]} for name in (shard["parquet"], shard["index"])]
        tar = {key: shard[key] for key in ("name", "bytes", "sha256")}
        extensions = [extension for extension in manifest["extension"].split("|") if extension]
        return {"rows": shard["samples"], "files": [tar, *files], "shard": shard, "extensions": extensions}

    def _ends(self) -> np.ndarray:
        """For each unit, the number of rows that reach the sink from all units up to and including it."""
        return np.cumsum(
            self._each("counting rows", lambda unit: len(surviving_rows(self.before, unit)), range(self.run.units))
        )

    def _export(self, units: Sequence[int]) -> list[Entry]:
        """Rewrites the files of drops that hold these units."""
        from pipeline.scheduler.executor import GROUP_ROWS, export_drops

        group = max(1, GROUP_ROWS // self.run.recipe.get("unit_rows", Recipe.unit_rows))
        numbers = sorted({unit // group for unit in units})

        def export(number: int) -> Entry:
            within = range(number * group, min(self.run.units, (number + 1) * group))
            entry: Entry = export_drops(self.store, self.passes, number, within)["entry"]
            return entry

        return self._each("writing drops", export, numbers)

    def _append(self, taken: pa.Table) -> Entry:
        """For a run without passes: writes one more file of drops, with the samples that are not in the others yet."""
        names = sorted(entry["name"] for entry in self._read_seal()["files"] if entry["name"].startswith("drops/"))
        known = [
            table.filter(pc.equal(table["reason"], REASON))["uid"].combine_chunks()
            for name in names
            for table in self.store.batches(name, ["uid", "reason"])
        ]
        new = taken.filter(pc.invert(pc.is_in(taken["uid"], pa.concat_arrays([pa.array([], pa.string()), *known]))))
        columns = {name: new[name] for name in SAMPLE.names}
        columns |= {"step": [self.last.label] * len(new), "reason": [REASON] * len(new), "detail": new["detail"]}
        columns["value"] = pa.nulls(len(new), pa.float64())
        schema = pa.schema([*SAMPLE, *(DROP.field(name) for name in ("step", "reason", "detail", "value"))])
        return self.store.write_table(f"drops/{len(names):05d}.parquet", pa.table(columns, schema))

    def _read_seal(self) -> dict[str, Any]:
        seal = self.store.read_record("seal.json")
        assert seal is not None  # the run is finished
        return seal

    def _seal(self, funnel: Funnel, entries: Sequence[Entry]) -> None:
        """Writes `funnel.json` and `seal.json`. These entries replace those of the same names in the seal."""
        books = {"name": self.run.name, "rows_in": funnel.rows_in, "kept": funnel.kept, "steps": funnel.to_json()}
        new = [self.store.write("funnel.json", json.dumps(books, indent=1).encode()), self.store.entry(NAME), *entries]
        seal = self._read_seal()
        if self.has_passes:
            complete = self.last.store.entry(self.last.complete_name)
            seal["passes"][-1] = {"pass": seal["passes"][-1]["pass"], **complete}
        files = {entry["name"]: entry for entry in [*seal["files"], *new]}
        self.store.write("seal.json", sealed({"files": list(files.values()), "passes": seal["passes"]}))

    def _each(self, what: str, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Maps a function over items in threads, with a progress bar on a terminal."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            done = threads.map(work, items)
            quiet = not self.console.is_terminal
            return list(track(done, what, len(items), console=self.console, transient=True, disable=quiet))


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.takedown",
        description=__doc__,
        epilog="exit status: 0 done, or nothing to do; 2 the list or the run cannot be used; 1 otherwise",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the folder of a finished run, local or remote")
    parser.add_argument("list", help="the list, a text file")
    args = parser.parse_args(argv)
    try:
        listed = TakedownList(args.list)
    except (OSError, ValueError) as error:
        raise InputError(error) from None
    run = open_run(args.run)
    if not run.finished:
        raise RunError(f"{args.run} is not finished; run its command again first")
    store = Store(args.run)
    with hold(store) as claim:
        finished = FinishedRun(run, store, claim, Console(stderr=True))
        done = finished.take_down(listed)
    if not done.rewritten:
        print(f"no sample in the {done.shards:,} shards is listed; nothing was changed")
        return 0
    kinds = Counter(detail.partition(" ")[0] for detail in done.samples["detail"].to_pylist())
    counts = ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common())
    print(
        f"{len(done.samples):,} samples taken down ({counts}); {done.rewritten:,} of {done.shards:,} shards rewritten"
    )
    if finished.has_passes:
        print(f"{args.run}/passes still holds their pictures; delete it if these must go too")
    print(f"to keep the listed samples out of a changed recipe, add to it: - takedown: {{file: {args.list}}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
