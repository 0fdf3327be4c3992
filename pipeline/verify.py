"""`python -m pipeline.verify RUN`: recounts and rehashes everything that a finished run claims about itself."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from pipeline.ledger import BooksError, Funnel
from pipeline.stages.write_shards import FORMAT
from pipeline.storage import Store

SUFFIXES = ("json", "txt")


def problems(store: Store, console: Console) -> Iterator[str]:
    """Whatever in a run is not as its books say; nothing if all is well. Reads every byte of the shards once."""
    data = store.read_if_there("funnel.json")
    if data is None:
        yield "funnel.json is missing: the run is not finished, or this is not the folder of a run"
        return
    books = json.loads(data)
    funnel = Funnel.from_json(books["steps"])
    try:
        funnel.balance()
    except BooksError as error:
        yield f"funnel.json: {error}"
    dropped: Counter[tuple[str, str]] = Counter()
    for name in store.names("drops"):
        table = store.read_table(f"drops/{name}", ["step", "reason"])
        dropped.update(zip(table["step"].to_pylist(), table["reason"].to_pylist()))
    claimed = {(step, why): n for step, line in funnel.lines.items() for why, n in line.dropped.items()}
    for step, why in sorted(claimed.keys() | dropped.keys()):
        if claimed.get((step, why), 0) != dropped[step, why]:
            said, found = claimed.get((step, why), 0), dropped[step, why]
            yield f"drops: {step}: {why}: funnel.json says {said:,} rows, the ledger holds {found:,}"
    if books["rows_in"] != books["kept"] + dropped.total():
        yield f"{books['rows_in']:,} rows in, but {books['kept']:,} kept and {dropped.total():,} dropped"
    if store.exists("shards/manifest.json"):
        yield from _shards(store.folder("shards"), books["kept"], console)


def _shards(store: Store, kept: int, console: Console) -> Iterator[str]:
    if not store.exists("_SUCCESS"):
        yield "shards/_SUCCESS is missing: the shards are not finished"
    manifest = json.loads(store.read("manifest.json"))
    if manifest["format"] != FORMAT:
        yield f"shards/manifest.json: format {manifest['format']!r}, expected {FORMAT!r}"
        return
    samples = sum(shard["samples"] for shard in manifest["shards"])
    if not samples == manifest["samples"] == kept:
        yield f"shards: {samples:,} samples in shards, {manifest['samples']:,} in all, {kept:,} by funnel.json"
    for shard in track(manifest["shards"], "shards", console=console, transient=True):
        name = shard["name"]
        if not store.exists(name):
            yield f"shards/{name} is missing"
        elif store.size(name) != shard["bytes"] or store.sha256(name) != shard["sha256"]:
            yield f"shards/{name}: size or sha256 differs from the manifest's"
        else:
            yield from _members(store, shard)


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
        yield f"shards/{shard['name']}: {len(members)} members for {len(keys):,} rows of {shard['parquet']}"
    elif [[m.offset_data, m.size] for m in members] != index.reshape(-1, 2).tolist():
        yield f"shards/{shard['index']}: the byte ranges are not those of the tar"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if all is well, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.verify", description=__doc__)
    parser.add_argument("run", help="the folder of a finished run, local or remote")
    store = Store(parser.parse_args(argv).run)
    console = Console(stderr=True)
    sound = True
    for problem in problems(store, console):
        console.print(f"error: {problem}", markup=False, highlight=False, soft_wrap=True)
        sound = False
    if not sound:
        return 1
    books = json.loads(store.read("funnel.json"))
    print(f"{books['rows_in']:,} rows, {books['kept']:,} kept: the books balance and the shards are whole")
    return 0


if __name__ == "__main__":
    sys.exit(main())
