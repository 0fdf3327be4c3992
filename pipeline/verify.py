"""`python -m pipeline.verify RUN [--deep]`: checks a finished run against everything that it claims about itself.

Always looked at: the records and that each has its own SHA-256; that every file on record is there with its size, and
no other; that the books balance; and that the uids in shards and drops are those of the pool, each once. With `--deep`,
or if the run has no more than FULL_BYTES in all, every file is hashed, and the members of each tar are compared with
its table and its index. What was not looked at is said.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from pipeline.hashing import hash64
from pipeline.ledger import BooksError, Funnel
from pipeline.stages.write_shards import FORMAT
from pipeline.storage import DamagedError, Entry, Store, is_part, unsealed

FULL_BYTES = 4 << 30
"""A run of this size is hashed without `--deep` too: it takes seconds."""
BUCKETS = 4096
"""Parts that uids are divided into by hash: those whose sums differ are compared uid by uid."""
SUFFIXES = ("json", "txt")
READS_AT_ONCE = 16

T = TypeVar("T")
Lines = list[str]


@dataclass
class _Audit:
    """One look at a run: its findings, and what its records name."""

    store: Store
    console: Console
    deep: bool
    problems: Lines = field(default_factory=list)
    unseen: Lines = field(default_factory=list)
    files: list[tuple[Store, Entry]] = field(default_factory=list)
    """Everything on record, with the folder that its name is relative to."""

    def say(self, problem: object) -> None:
        self.problems.append(str(problem))

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Whatever goes wrong with a file is a line with its name."""
        try:
            yield
        except DamagedError as error:
            self.say(error)
        except FileNotFoundError:
            self.say(f"{name}: missing")
        except Exception as error:  # bytes that were changed can make any parser fail in any way
            self.say(f"{name}: damaged: it cannot be read ({type(error).__name__}: {str(error).splitlines()[:1]})")

    def over(self, what: str, work: Callable[[T], Lines], items: Sequence[T]) -> None:
        """Collects the findings of `work` from many items, some at a time: hashing and waiting both let others go on."""
        todo = iter(items)
        with ThreadPoolExecutor(READS_AT_ONCE) as threads:
            for _ in track(range(0, len(items), 256), what, console=self.console, transient=True):
                for found in threads.map(work, islice(todo, 256)):
                    self.problems += found


def problems(store: Store, console: Console, deep: bool = False) -> Iterator[str]:
    """Whatever in a run is not as its records say, a line each, with the file's path; nothing if all is well."""
    yield from _audit(store, console, deep).problems


def _audit(store: Store, console: Console, deep: bool) -> _Audit:
    audit = _Audit(store, console, deep)
    with audit.reading(store.path("seal.json")):
        data = store.read_if_there("seal.json")
        if data is None:
            audit.say(
                f"{store.path('seal.json')}: missing: the run is not finished, or this is not the folder of a run"
            )
        else:
            seal = unsealed(data, store.path("seal.json"))
            passes = _passes(audit, seal["passes"])
            shards = _shards(audit, seal["files"])
            _strays(audit, {"run.json", "funnel.json", "seal.json"}, "")
            _strays(audit, {os.path.basename(e["name"]) for e in seal["files"] if _in(e, "drops")}, "drops")
            audit.files += [(store, entry) for entry in seal["files"]]
            _contents(audit, shards)
            _books(audit, shards)
            _uids(audit, passes, [e["name"] for e in seal["files"] if _in(e, "drops")], shards)
    audit.problems = list(dict.fromkeys(audit.problems))
    return audit


def _in(entry: Entry, folder: str) -> bool:
    return str(entry["name"]).startswith(f"{folder}/")


def _strays(audit: _Audit, named: set[str], folder: str, store: Store | None = None) -> None:
    """Files that no record names. Hidden files are none of the run's, but for those under way."""
    store = store or audit.store
    for name in store.names(folder):
        if name not in named and (is_part(name) or not name.startswith(".")):
            audit.say(f"{store.path(f'{folder}/{name}' if folder else name)}: no record names this file")


# --- What is committed of passes --------------------------------------------------------------------------------------


def _passes(audit: _Audit, claimed: list[dict[str, Any]]) -> list[tuple[Store, dict[str, Any]]]:
    """The passes of the run that are there, with their records."""
    store = audit.store
    roots = [Store(c["pass"]) if "://" in c["pass"] or os.path.isabs(c["pass"]) else store.folder(c["pass"])
             for c in claimed]  # fmt: skip
    if not store.folders("passes") and not any(root.names() for root in roots):
        audit.unseen.append("passes: removed, so neither downloads nor scores, nor whether the uids are the pool's")
        return []
    found = []
    for root, entry in zip(roots, claimed):
        audit.files.append((root, {**entry, "name": "complete.json"}))
        with audit.reading(root.path("complete.json")):
            data = root.read_if_there("complete.json")
            if data is None:
                raise FileNotFoundError
            found.append((root, unsealed(data, root.path("complete.json"))))
    units = next((record["units"] for _, record in found if record["kind"] == "pool"), None)
    for root, record in found:
        _one_pass(audit, root, record, units)
    return found


def _one_pass(audit: _Audit, root: Store, complete: dict[str, Any], units: int | None) -> None:
    numbers = {"barrier": 0, "write": complete.get("shards", 0)}.get(complete["kind"], units)
    records = root.names("commits")
    if numbers is None:  # the pool's own record is damaged
        numbers = len(records)
    entries: list[Entry] = list(complete.get("files", {}).values())
    totals = Counter[str]()

    def look(unit: int) -> Lines:
        name = root.path(f"commits/{unit:07d}.json")
        try:
            record = root.read_record(f"commits/{unit:07d}.json")
        except DamagedError as error:
            return [str(error)]
        if record is None:
            return [f"{name}: missing"]
        if (record["pass"], record["unit"]) != (complete["pass"], unit):
            return [f"{name}: damaged: this is the record of another unit"]
        if complete["kind"] != "write":
            entries.extend(entry for entry in (record["table"], record["heavy"]) if entry)
            totals.update({"rows_in": record["rows_in"], "kept": record["kept"]})
        return []

    before = len(audit.problems)
    audit.over(f"records of {complete['label']}", look, range(numbers))
    funnel = Funnel.from_json(complete["funnel"])
    if complete["kind"] in ("pool", "map") and len(audit.problems) == before:
        if (totals["rows_in"], totals["kept"]) != (funnel.rows_in, funnel.kept):
            audit.say(
                f"{root.path('complete.json')}: {funnel.rows_in:,} rows in and {funnel.kept:,} kept, but its units have "
                f"{totals['rows_in']:,} and {totals['kept']:,}"
            )
    audit.files += [(root, entry) for entry in entries]
    _strays(audit, {"complete.json"}, "", root)
    _strays(audit, {f"{unit:07d}.json" for unit in range(numbers)}, "commits", root)
    for folder in ("units", "drops"):
        if len(audit.problems) == before:  # else files of the damaged records would be called strays
            _strays(audit, {os.path.basename(e["name"]) for e in entries if _in(e, folder)}, folder, root)
    for folder in ("attempts", "spool"):
        _strays(audit, set(), folder, root)


# --- The dataset ------------------------------------------------------------------------------------------------------


def _shards(audit: _Audit, sealed_files: list[Entry]) -> dict[str, Any] | None:
    """The manifest, if there is one that can be believed."""
    store = audit.store
    entry = next((entry for entry in sealed_files if entry["name"] == "shards/manifest.json"), None)
    if entry is None:
        return None
    if store.read_if_there("shards/_SUCCESS") != b"":
        audit.say(f"{store.path('shards/_SUCCESS')}: missing or not empty: the shards are not finished")
    with audit.reading(store.path("shards/manifest.json")):
        manifest: dict[str, Any] = json.loads(store.read_entry(entry))
        if manifest["format"] != FORMAT:
            raise DamagedError(
                f"{store.path('shards/manifest.json')}: format {manifest['format']!r}, expected {FORMAT!r}"
            )
        shards = store.folder("shards")
        files = [{"name": name, **claimed} for name, claimed in manifest["files"].items()]
        files += [{k: shard[k] for k in ("name", "bytes", "sha256")} for shard in manifest["shards"]]
        audit.files += [(shards, file) for file in files]
        _strays(audit, {"_SUCCESS", "OWNER", "manifest.json", *(file["name"] for file in files)}, "shards")
        return manifest
    return None


def _contents(audit: _Audit, manifest: dict[str, Any] | None) -> None:
    """The files on record, by size or by digest."""
    total = sum(entry["bytes"] for _, entry in audit.files)
    audit.deep = audit.deep or total <= FULL_BYTES

    def look(file: tuple[Store, Entry]) -> Lines:
        store, entry = file
        lines: Lines = []
        with _Audit(store, audit.console, audit.deep, lines).reading(store.path(entry["name"])):
            store.check(entry, audit.deep)
        return lines

    if not audit.deep:
        audit.unseen.append(f"the contents of {total / 1e9:,.1f} GB in {len(audit.files):,} files: sizes only")
    before = len(audit.problems)
    audit.over("files", look, audit.files)
    if manifest and audit.deep and len(audit.problems) == before:
        store = audit.store.folder("shards")
        audit.over("shards", lambda shard: list(_members(store, shard)), manifest["shards"])


def _members(store: Store, shard: dict[str, Any]) -> Iterator[str]:
    """The tar, its table and its index tell of the same samples, in the same order."""
    keys = store.read_table(shard["parquet"], ["key"])["key"].to_pylist()
    index = np.load(io.BytesIO(store.read(shard["index"])))
    with store.input(shard["name"]) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = tar.getmembers()
    names = [member.name.partition(".") for member in members]
    found = [name[0] for name in names[::3]]
    whole = all(name[2] in SUFFIXES or i % 3 == 0 for i, name in enumerate(names)) and len(names) == 3 * len(found)
    if not whole or found != keys or len(keys) != shard["samples"]:
        yield f"{store.path(shard['name'])}: {len(members)} members for {len(keys):,} rows of {shard['parquet']}"
    elif [[m.offset_data, m.size] for m in members] != index.reshape(-1, 2).tolist():
        yield f"{store.path(shard['index'])}: the byte ranges are not those of the tar"


# --- The books --------------------------------------------------------------------------------------------------------


def _books(audit: _Audit, manifest: dict[str, Any] | None) -> None:
    store, at = audit.store, audit.store.path("funnel.json")
    with audit.reading(at):
        books = json.loads(store.read("funnel.json"))
        funnel = Funnel.from_json(books["steps"])
        try:
            funnel.balance()
        except BooksError as error:
            audit.say(f"{at}: {error}")
        dropped: Counter[tuple[str, str]] = Counter()
        for name in store.names("drops"):
            with audit.reading(store.path(f"drops/{name}")):
                for table in _batches(store, f"drops/{name}", ["step", "reason"]):
                    for group in table.group_by(["step", "reason"]).aggregate([([], "count_all")]).to_pylist():
                        dropped[group["step"], group["reason"]] += group["count_all"]
        claimed = {(step, why): n for step, line in funnel.lines.items() for why, n in line.dropped.items()}
        for step, why in sorted(claimed.keys() | dropped.keys(), key=str):
            if (said := claimed.get((step, why), 0)) != (found := dropped[step, why]):
                audit.say(f"{store.path('drops')}: {step}: {why}: funnel.json says {said:,} rows, the drops hold {found:,}")
        if books["rows_in"] != books["kept"] + dropped.total():
            audit.say(f"{at}: {books['rows_in']:,} rows in, but {books['kept']:,} kept and {dropped.total():,} dropped")
        if manifest:
            samples = sum(shard["samples"] for shard in manifest["shards"])
            if not samples == manifest["samples"] == books["kept"]:
                audit.say(
                    f"{store.path('shards/manifest.json')}: {samples:,} samples in shards, {manifest['samples']:,} in "
                    f"all, {books['kept']:,} by funnel.json"
                )


def _batches(store: Store, name: str, columns: list[str]) -> Iterator[pa.Table]:
    """A parquet file, some rows at a time."""
    with store.input(name) as source:
        for batch in pq.ParquetFile(source).iter_batches(65_536, columns=columns):
            yield pa.Table.from_batches([batch])


# --- Whose rows they are ----------------------------------------------------------------------------------------------


def _uids(
    audit: _Audit, passes: list[tuple[Store, dict[str, Any]]], drops: list[str], manifest: dict[str, Any] | None
) -> None:
    """The uids of shards and drops are those of the pool, each as often as there.

    Nobody holds them all: the hashes of those that come in and of those that go out are added up in BUCKETS sums, and
    uids are compared one by one where two sums differ.
    """
    store = audit.store
    pool = [(root, entry) for root, entry in audit.files if passes and root is passes[0][0] and _in(entry, "units")]
    out = [(store, name) for name in drops]
    if manifest is not None:
        out += [(store.folder("shards"), shard["parquet"]) for shard in manifest["shards"]]
    elif store.exists("shards") or not passes:
        return
    if not passes or passes[0][1]["kind"] != "pool":
        return
    if manifest is None and any(record["kind"] == "write" for _, record in passes):
        return

    def sums(files: Iterable[tuple[Store, str]]) -> np.ndarray:
        total = np.zeros(BUCKETS, np.uint64)
        for place, name in files:
            with audit.reading(place.path(name)):
                for table in _batches(place, name, ["uid"]):
                    hashes = hash64(table["uid"], purpose="verify")
                    np.add.at(total, hashes % np.uint64(BUCKETS), hashes)
        return total

    before = len(audit.problems)
    comes = sums((root, entry["name"]) for root, entry in pool)
    goes = sums(out)
    if manifest is None:  # a run that writes no shards: only what was dropped is to be seen from outside
        return
    differing = np.flatnonzero(comes != goes)
    if not len(differing) or len(audit.problems) > before:
        return

    def counted(files: Iterable[tuple[Store, str]]) -> Iterator[tuple[str, str]]:
        for place, name in files:
            for table in _batches(place, name, ["uid"]):
                there = np.isin(hash64(table["uid"], purpose="verify") % np.uint64(BUCKETS), differing[:8])
                yield from ((uid, place.path(name)) for uid in table["uid"].filter(pa.array(there)).to_pylist())

    balance: Counter[str] = Counter(uid for uid, _ in counted((root, entry["name"]) for root, entry in pool))
    where: dict[str, str] = {}
    for uid, path in counted(out):
        balance[uid] -= 1
        where[uid] = path
    for uid, n in islice(((uid, n) for uid, n in balance.items() if n), 10):
        if n < 0:
            audit.say(f"{where[uid]}: {uid}: {-n} more rows with this uid than the pool has")
        else:
            audit.say(f"{store.path('drops')}: {uid}: a row of the pool that is neither here nor in the shards")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if all is well, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify",
        description=__doc__,
        epilog="exit status: 0 nothing is wrong with what was looked at; 1 otherwise; 2 wrong command line",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the folder of a finished run, local or remote")
    parser.add_argument("--deep", action="store_true", help="hash every file, whatever the size of the run")
    args = parser.parse_args(argv)
    errors = Console(stderr=True)
    try:
        audit = _audit(Store(args.run), errors, args.deep)
    except OSError as error:
        errors.print(f"error: {args.run}: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    for problem in audit.problems:
        errors.print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
    for part in audit.unseen:
        print(f"not looked at: {part}" + (" (--deep hashes them)" if "sizes only" in part else ""))
    if audit.problems:
        return 1
    books = json.loads(audit.store.read("funnel.json"))
    looked = "every byte is as recorded" if audit.deep else "all sizes are as recorded"
    print(f"{books['rows_in']:,} rows, {books['kept']:,} kept: the books balance, {looked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
