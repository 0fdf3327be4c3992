"""Checks a finished run against everything that it claims about itself.

    python -m pipeline.verify runs/demo
    python -m pipeline.verify s3://bucket/runs/400m --deep

Always checked: the SHA-256 of each record; that exactly the recorded files exist, with the recorded sizes; that the
books balance; and that each uid of the pool is in the shards or the drops exactly once. With `--deep`, or in a run of
up to 4 GiB, every file is also hashed, and the members of each tar are compared with its table and its index. Whatever
was not checked is listed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from pipeline.ledger import BooksError, Funnel
from pipeline.passes import record_name
from pipeline.stages.write_shards import FORMAT
from pipeline.storage import DamagedError, Entry, Store, is_part
from trainer.terminal import Console, guarded

FULL_BYTES = 4 << 30
"""A run of this size is hashed without `--deep` too: it takes seconds."""
BUCKETS = 4096
"""Parts that uids are divided into by hash: those whose sums differ are compared uid by uid."""
READS_AT_ONCE = 16
SUFFIXES = ("json", "txt")

T = TypeVar("T")
R = TypeVar("R")
Pass = tuple[Store, dict[str, Any]]
"""The folder of a pass, and its record."""
File = tuple[Store, str]


@dataclass
class Audit:
    """One look at a run."""

    store: Store
    console: Console
    deep: bool
    problems: list[str] = field(default_factory=list)
    """A line each, with the path of the file."""
    unseen: list[str] = field(default_factory=list)
    """What was not looked at."""

    def say(self, problem: object) -> None:
        self.problems.append(str(problem))

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Whatever goes wrong with a file is a line with its path."""
        try:
            yield
        except DamagedError as error:
            self.say(error)
        except FileNotFoundError:
            self.say(f"{path}: missing")
        except Exception as error:  # bytes that were changed can make a parser fail in any way
            what = (str(error).splitlines() or [""])[0]
            self.say(f"{path}: damaged: it cannot be read ({type(error).__name__}: {what})")

    def check(self, store: Store, entry: Entry) -> None:
        with self.reading(store.path(entry["name"])):
            store.check(entry, self.deep)

    def over(self, what: str, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Does the work for many items, some at a time: hashing and waiting both let others go on."""
        todo = iter(items)
        results: list[R] = []
        with ThreadPoolExecutor(READS_AT_ONCE) as threads:
            steps = range(0, len(items), 256)
            for _ in track(steps, what, console=self.console, transient=True, disable=not self.console.is_terminal):
                results += threads.map(work, islice(todo, 256))
        return results

    def strays(self, store: Store, folder: str, found: Iterable[str], named: Collection[str]) -> None:
        """Files in a folder that no record names. Hidden ones are none of the run's, but for those under way."""
        for name in found:
            if name not in named and (is_part(name) or not name.startswith(".")):
                self.say(f"{store.path(f'{folder}/{name}' if folder else name)}: no record names this file")


def problems(store: Store, console: Console, deep: bool = False) -> Iterator[str]:
    """Whatever in a run is not as its records say, a line each, with the path of the file; nothing if all is well."""
    yield from audit(store, console, deep).problems


def audit(store: Store, console: Console, deep: bool) -> Audit:
    """Looks at a run; with `deep`, or if it is small, at every byte."""
    found = Audit(store, console, deep)
    with found.reading(store.path("seal.json")):
        seal = store.read_record("seal.json")
        if seal is None:
            found.say(
                f"{store.path('seal.json')}: missing: the run is not finished, or this is not the folder of a run"
            )
            return found
        roots = [Store(c["pass"]) if _elsewhere(c["pass"]) else store.folder(c["pass"]) for c in seal["passes"]]
        size = sum(sum(place.sizes(folder).values()) for place, folder in _folders(store, roots))
        found.deep = deep or size <= FULL_BYTES
        if not found.deep:
            found.unseen.append(f"what is in the files, {size / 1e9:,.0f} GB: their sizes only (--deep hashes them)")
        found.strays(store, "", store.names(), {"run.json", "funnel.json", "seal.json"})
        files = {entry["name"]: entry for entry in seal["files"]}
        drops = [name for name in files if name.startswith("drops/")]
        found.strays(store, "drops", store.names("drops"), {name.partition("/")[2] for name in drops})
        found.over("tables of drops", lambda entry: found.check(store, entry), list(files.values()))
        manifest = _shards(found, files.get("shards/manifest.json"))
        passes = _passes(found, roots, seal["passes"])
        _books(found, drops, manifest)
        if not found.problems:
            _uids(found, passes, [(store, name) for name in drops], manifest)
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _folders(store: Store, roots: list[Store]) -> list[File]:
    """Where the bytes of a run are."""
    return [(store, name) for name in ("", "drops", "shards")] + [(r, n) for r in roots for n in ("units", "drops")]


# --- What is committed of passes --------------------------------------------------------------------------------------


def _passes(found: Audit, roots: list[Store], claimed: list[Entry]) -> list[Pass]:
    """Looks at the passes; returns those that there are."""
    if not any(root.names() for root in roots):
        found.unseen.append("downloads, scores and whether all rows of the pool are there: passes/ was removed")
        return []
    passes: list[Pass] = []
    for root, entry in zip(roots, claimed):
        with found.reading(root.path(entry["name"])):
            found.check(root, entry)
            if (record := root.read_record(entry["name"])) is not None:
                passes.append((root, record))
    units = next((record["units"] for _, record in passes if record["kind"] == "pool"), None)
    for root, record in passes:
        numbers = {"barrier": 0, "write": record.get("shards")}.get(record["kind"], units)
        if numbers is not None:  # else the pool's own record is damaged, which was said
            _units(found, root, record, int(numbers))
    return passes


def _elsewhere(root: str) -> bool:
    """Whether a pass is another run's, as with `reuse`."""
    return "://" in root or os.path.isabs(root)


def _units(found: Audit, root: Store, complete: dict[str, Any], units: int) -> None:
    """The records of a pass and the files that they name."""
    listed = {folder: root.sizes(folder) for folder in ("", "commits", "units", "drops", "attempts", "spool")}
    # A pass that measures is complete for each recipe that it served.
    named = {name for name in listed[""] if name.startswith("complete") and not is_part(name)}
    before = len(found.problems)

    def look(name: str) -> tuple[int, int]:
        """Rows in and kept."""
        named.add(name)
        with found.reading(root.path(name)):
            record = root.read_record(name)
            if record is None:
                raise FileNotFoundError
            if (record["pass"], record_name(record["unit"], record.get("part"))) != (complete["key"], name):
                raise DamagedError(f"{root.path(name)}: damaged: this is the record of another unit")
            if complete["kind"] == "write":  # its files are in the manifest
                return 0, 0
            for entry in (record["table"], record["heavy"]):
                if entry:
                    named.add(entry["name"])
                    found.check(root, entry)
            return record["rows_in"], record["kept"]
        return 0, 0

    if complete["kind"] == "measure":
        parts = [complete["parts"].get(str(unit), 1) for unit in range(units)]
        names = {record_name(unit, part) for unit, count in enumerate(parts) for part in range(count)}
        # What was measured for other recipes is looked at too.
        names |= {f"commits/{name}" for name in listed["commits"] if name.endswith(".json") and not is_part(name)}
    else:
        names = {record_name(unit) for unit in range(units)}
    counts = found.over(f"pass {complete['label']}", look, sorted(names))
    rows_in, kept = (sum(of) for of in zip((0, 0), *counts))
    for entry in complete.get("files", {}).values():
        named.add(entry["name"])
        found.check(root, entry)
    funnel = Funnel.from_json(complete["funnel"])
    whole = len(found.problems) == before
    if whole and complete["kind"] in ("pool", "map") and (rows_in, kept) != (funnel.rows_in, funnel.kept):
        found.say(
            f"{root.path('complete.json')}: {funnel.rows_in:,} rows in and {funnel.kept:,} kept, but the units have "
            f"{rows_in:,} and {kept:,}"
        )
    for folder, files in listed.items():
        if whole or folder != "units":  # what a damaged record names is no stray
            within = f"{folder}/" if folder else ""
            found.strays(root, folder, files, {n.removeprefix(within) for n in named if n.startswith(within)})


# --- The dataset ------------------------------------------------------------------------------------------------------


def _shards(found: Audit, entry: Entry | None) -> dict[str, Any] | None:
    """Looks at the shards; returns their manifest, if there is one that can be believed."""
    if entry is None:
        return None
    store, shards = found.store, found.store.folder("shards")
    if store.read_if_there("shards/_SUCCESS") != b"":
        found.say(f"{store.path('shards/_SUCCESS')}: missing or not empty: the shards are not finished")
    with found.reading(store.path("shards/manifest.json")):
        manifest: dict[str, Any] = json.loads(store.read_entry(entry))
        if manifest["format"] != FORMAT:
            raise DamagedError(f"{shards.path('manifest.json')}: format {manifest['format']!r}, expected {FORMAT!r}")
        files = [{"name": name, **claimed} for name, claimed in manifest["files"].items()]
        files += [{key: shard[key] for key in ("name", "bytes", "sha256")} for shard in manifest["shards"]]
        before = len(found.problems)
        found.over("shards", lambda file: found.check(shards, file), files)
        found.strays(
            store, "shards", shards.names(), {"_SUCCESS", "OWNER", "manifest.json", *(file["name"] for file in files)}
        )
        if found.deep and len(found.problems) == before:
            found.over("members of shards", lambda shard: _members(found, shards, shard), manifest["shards"])
        return manifest
    return None


def _members(found: Audit, store: Store, shard: dict[str, Any]) -> None:
    """The tar, its table and its index tell of the same samples, in the same order."""
    keys = store.read_table(shard["parquet"], ["key"])["key"].to_pylist()
    index = np.load(io.BytesIO(store.read(shard["index"])))
    with store.input(shard["name"]) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = tar.getmembers()
    names = [member.name.partition(".") for member in members]
    samples = [name[0] for name in names[::3]]
    whole = all(name[2] in SUFFIXES or i % 3 == 0 for i, name in enumerate(names)) and len(names) == 3 * len(samples)
    if not whole or samples != keys or len(keys) != shard["samples"]:
        found.say(f"{store.path(shard['name'])}: {len(members)} members for {len(keys):,} rows of {shard['parquet']}")
    elif [[m.offset_data, m.size] for m in members] != index.reshape(-1, 2).tolist():
        found.say(f"{store.path(shard['index'])}: the byte ranges are not those of the tar")


# --- The books --------------------------------------------------------------------------------------------------------


def _books(found: Audit, drops: list[str], manifest: dict[str, Any] | None) -> None:
    store, at = found.store, found.store.path("funnel.json")
    with found.reading(at):
        books = json.loads(store.read("funnel.json"))
        funnel = Funnel.from_json(books["steps"])
        try:
            funnel.balance()
        except BooksError as error:
            found.say(f"{at}: {error}")
        dropped: Counter[tuple[str, str]] = Counter()
        for name in drops:
            with found.reading(store.path(name)):
                for table in _batches(store, name, ["step", "reason"]):
                    for group in table.group_by(["step", "reason"]).aggregate([([], "count_all")]).to_pylist():
                        dropped[group["step"], group["reason"]] += group["count_all"]
        claimed = {(step, why): n for step, line in funnel.lines.items() for why, n in line.dropped.items()}
        for step, why in sorted(claimed.keys() | dropped.keys(), key=str):
            if (said := claimed.get((step, why), 0)) != (there := dropped[step, why]):
                found.say(
                    f"{store.path('drops')}: {step}: {why}: funnel.json says {said:,} rows, the drops hold {there:,}"
                )
        if books["rows_in"] != books["kept"] + dropped.total():
            found.say(f"{at}: {books['rows_in']:,} rows in, but {books['kept']:,} kept and {dropped.total():,} dropped")
        if manifest:
            samples = sum(shard["samples"] for shard in manifest["shards"])
            if not samples == manifest["samples"] == books["kept"]:
                found.say(
                    f"{store.path('shards/manifest.json')}: {samples:,} samples in shards, {manifest['samples']:,} in "
                    f"all, {books['kept']:,} by funnel.json"
                )


def _batches(store: Store, name: str, columns: list[str]) -> Iterator[pa.Table]:
    """A parquet file, some rows at a time."""
    with store.input(name) as source:
        for batch in pq.ParquetFile(source).iter_batches(65_536, columns=columns):
            yield pa.Table.from_batches([batch])


# --- Whose rows they are ----------------------------------------------------------------------------------------------


def _uids(found: Audit, passes: list[Pass], drops: list[File], manifest: dict[str, Any] | None) -> None:
    """The uids of shards and drops are those of the pool, each as often as there.

    Nobody holds them all: hashes of those that came in and of those that went out are added up in BUCKETS sums, and
    uids are compared one by one where two sums differ.
    """
    if not passes:
        return
    if manifest is None:
        found.unseen.append("whether all rows of the pool are there: the run wrote no shards")
        return
    root, pool = passes[0]
    shards = found.store.folder("shards")
    out = [*drops, *((shards, shard["parquet"]) for shard in manifest["shards"])]

    def came() -> Iterator[File]:
        for unit in range(pool["units"]):
            if (record := root.read_record(f"commits/{unit:07d}.json")) is not None:
                yield root, record["table"]["name"]

    def sums(files: Iterable[File]) -> np.ndarray:
        total = np.zeros(BUCKETS, np.uint64)
        for place, name in files:
            with found.reading(place.path(name)):
                for table in _batches(place, name, ["uid"]):
                    hashes = _hashes(table["uid"])
                    np.add.at(total, hashes % np.uint64(BUCKETS), hashes)
        return total

    differing = np.flatnonzero(sums(came()) != sums(out))[:8]
    if not len(differing):
        return

    def in_doubt(files: Iterable[File]) -> Iterator[tuple[str, str]]:
        for place, name in files:
            for table in _batches(place, name, ["uid"]):
                there = np.isin(_hashes(table["uid"]) % np.uint64(BUCKETS), differing)
                yield from ((uid, place.path(name)) for uid in table["uid"].filter(pa.array(there)).to_pylist())

    balance = Counter(uid for uid, _ in in_doubt(came()))
    where: dict[str, list[str]] = {}
    for uid, path in in_doubt(out):
        balance[uid] -= 1
        where.setdefault(uid, []).append(path)
    for uid, n in islice(((uid, n) for uid, n in balance.items() if n), 10):
        if n < 0:
            found.say(f"{' and '.join(where[uid])}: {uid} is there {-n:,} times more than in the pool")
        else:
            found.say(f"{found.store.path('drops')}: {uid} of the pool is neither here nor in the shards")


def _hashes(uids: pa.ChunkedArray) -> np.ndarray:
    """A uint64 for each uid, 32 hex digits: some 20 ns each, where a cryptographic hash takes 30 times as long."""
    halves = np.frombuffer(bytes.fromhex("".join(uids.to_pylist())), "<u8").reshape(-1, 2)
    if len(halves) != len(uids):
        raise DamagedError("a uid is not 32 hex digits")
    mixed = halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ halves[:, 1]
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return np.asarray(mixed ^ (mixed >> np.uint64(32)))


@guarded()
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
        found = audit(Store(args.run), errors, args.deep)
    except OSError as error:
        errors.print(f"error: {args.run}: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    for problem in found.problems:
        errors.print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
    for part in found.unseen:
        print(f"not looked at: {part}")
    if found.problems:
        return 1
    books = json.loads(found.store.read("funnel.json"))
    looked = "every byte is as recorded" if found.deep else "all sizes are as recorded"
    print(f"{books['rows_in']:,} rows, {books['kept']:,} kept: the books balance, {looked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
