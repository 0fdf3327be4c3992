"""Compares two finished runs: the rows that a changed recipe gained and lost, and which step decided.

    python -m pipeline.diff runs/before runs/after
    python -m pipeline.diff runs/before runs/after --json | jq .lost_by
    python -m pipeline.diff runs/before runs/after --html diff.html

A row is gained if only the second run kept it, and lost if only the first did. Runs of the same pool are compared row
by row, one unit at a time. Runs of different pools are compared by uid: rows with the same uid count once. For this,
both runs are first partitioned by a hash of the uid into temporary files of about 500,000 rows each.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.progress import track
from rich.table import Table

from pipeline.reader import Run, open_run
from pipeline.report.histogram import Tally
from pipeline.run import differences
from pipeline.scheduler import spool
from pipeline.schema import SAMPLE
from pipeline.storage import Store
from pipeline.studio.concepts import find_entries, matches
from pipeline.text.hashing import hash64
from pipeline.text.url import hosts
from trainer.terminal import Console, entry_point

PARTITION_ROWS = 500_000
"""Rows of a run whose uids, URLs and captions are in memory at a time if the pools differ: about 200 MB."""
VALUES = 200_000
"""Distinct hosts, languages or concepts counted; beyond that, the rarest half is forgotten."""
SAMPLES = 12
"""Most rows shown for each step that decided, on each side: those with the lowest hashes of their uids."""
SHOWN, SHOWN_HTML = 12, 25
"""Most rows of each table of values on the terminal, and on the page."""
ABSENT = "(not in the pool)"
"""Shown as the step of a row that is not in the pool of the other run."""

KEPT = pa.schema([("key", pa.string()), *SAMPLE, ("language", pa.string())])
DROPPED = pa.schema([(name, pa.string()) for name in ("key", "step", "reason", "detail")])


class Row(NamedTuple):
    """A row that was gained or lost, with the step, reason and detail of its drop in the other run."""

    uid: str
    url: str
    caption: str
    step: str
    reason: str | None
    detail: str | None


@dataclass
class Side:
    """The rows that only one of the runs kept."""

    rows: int = 0
    decided: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    """Rows by the step and reason of their drop in the other run."""
    hosts: Tally = field(default_factory=lambda: Tally(VALUES))
    languages: Tally = field(default_factory=lambda: Tally(VALUES))
    concepts: Tally = field(default_factory=lambda: Tally(VALUES))
    _samples: dict[str, list[tuple[int, Row]]] = field(default_factory=dict)

    @property
    def samples(self) -> list[Row]:
        """At most SAMPLES rows for each step, independent of the order in which rows were added."""
        return [row for step in sorted(self._samples) for _, row in sorted(self._samples[step], reverse=True)]

    def add(self, rows: pa.Table, dropped: pa.Table, entries: tuple[str, ...]) -> None:
        """Adds rows (KEPT) that the other run did not keep, given what it dropped (DROPPED)."""
        at = pc.index_in(rows["key"], dropped["key"])
        drops = dropped.take(at.combine_chunks() if isinstance(at, pa.ChunkedArray) else at)
        drops = drops.set_column(1, "step", pc.fill_null(drops["step"], ABSENT))
        self.rows += len(rows)
        for group in drops.group_by(["step", "reason"]).aggregate([([], "count_all")]).to_pylist():
            self.decided[group["step"], group["reason"]] += group["count_all"]
        self.hosts.add(hosts(rows["url"]))
        self.languages.add(rows["language"])
        if entries:
            self.concepts.add(pa.array(entries, pa.string()).take(pa.array(matches(rows["caption"], entries)[1])))
        order = hash64(rows["uid"], purpose="diff")
        steps = drops["step"].to_numpy(zero_copy_only=False)
        for step in np.unique(steps.astype(str)):
            held = self._samples.setdefault(step, [])
            of_step = np.flatnonzero(steps == step)
            for i in of_step[np.argsort(order[of_step], kind="stable")[:SAMPLES]].tolist():
                texts, drop = rows.slice(i, 1).to_pylist()[0], drops.slice(i, 1).to_pylist()[0]
                row = Row(texts["uid"], texts["url"], texts["caption"], step, drop["reason"], drop["detail"])
                heapq.heappush(held, (-int(order[i]), row))
                if len(held) > SAMPLES:
                    heapq.heappop(held)


@dataclass
class Diff:
    """What the run `b` gained and lost compared with the run `a`."""

    same_pool: bool
    kept: tuple[int, int] = (0, 0)
    """Rows that `a` kept, and that `b` kept."""
    gained: Side = field(default_factory=Side)
    lost: Side = field(default_factory=Side)

    @property
    def both(self) -> int:
        """Rows that both runs kept."""
        return self.kept[0] - self.lost.rows


def compare(a: Run, b: Run, console: Console | None = None) -> Diff:
    """Compares two finished runs by set algebra on the rows that they kept and dropped.

    Time is linear in the rows. Memory holds a few units of each run if they have the same pool, otherwise a partition
    of PARTITION_ROWS rows of each, and up to VALUES hosts, languages and concepts.

    Raises RunError if one of the runs is not finished.
    """
    for run in (a, b):
        _ = run.funnel  # raises RunError if the run is not finished
    same = a.pool_key == b.pool_key and a.has_passes and b.has_passes
    diff, entries = Diff(same), find_entries(b) or find_entries(a)
    console = console or Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="winnow-diff-") as folder:
        blocks = _units(a, b) if same else _partitions(a, b, Store(folder))
        total = a.units if same else _partition_count(a, b)
        hidden = not console.is_terminal
        for kept_a, dropped_a, kept_b, dropped_b in track(
            blocks, "rows", total, console=console, transient=True, disable=hidden
        ):
            diff.kept = diff.kept[0] + len(kept_a), diff.kept[1] + len(kept_b)
            diff.gained.add(_without(kept_b, kept_a), dropped_a, entries)
            diff.lost.add(_without(kept_a, kept_b), dropped_b, entries)
    return diff


Block = tuple[pa.Table, pa.Table, pa.Table, pa.Table]
"""The rows that `a` kept, that `a` dropped, that `b` kept and that `b` dropped."""


def _units(a: Run, b: Run) -> Iterator[Block]:
    """Yields the rows of each unit of two runs of the same pool. The key of a row is its number."""
    yield from zip(_kept(a, "row"), _dropped(a, "row"), _kept(b, "row"), _dropped(b, "row"), strict=True)


def _partitions(a: Run, b: Run, store: Store) -> Iterator[Block]:
    """Yields the rows of two runs, one class of uid hashes at a time. The key of a row is its uid."""
    parts = _partition_count(a, b)
    streams = {
        f"{name}-{what}": stream
        for name, run in (("a", a), ("b", b))
        for what, stream in (("kept", _kept(run, "uid")), ("dropped", _dropped(run, "uid")))
    }
    files = [list(_spooled(stream, store, name, parts)) for name, stream in streams.items()]
    for part in range(parts):
        a_kept, a_dropped, b_kept, b_dropped = (
            _distinct(spool.read(store, names, part, schema))
            for names, schema in zip(files, (KEPT, DROPPED, KEPT, DROPPED))
        )
        yield a_kept, a_dropped, b_kept, b_dropped


def _partition_count(a: Run, b: Run) -> int:
    return max(1, math.ceil(max(a.rows_in, b.rows_in) / PARTITION_ROWS))


def _spooled(stream: Iterator[pa.Table], store: Store, name: str, parts: int) -> Iterator[str]:
    """Partitions a stream of tables by hash of the key, in files of PARTITION_ROWS rows or more. Yields the files."""
    waiting: list[pa.Table] = []
    for table in chain(stream, [None]):
        waiting += [] if table is None else [table]
        if waiting and (table is None or sum(map(len, waiting)) >= PARTITION_ROWS):
            rows = pa.concat_tables(waiting)
            file = f"{name}-{len(store.names()):05d}.arrow"
            spool.write(store, file, rows, (hash64(rows["key"]) % np.uint64(parts)).astype(np.int64), parts)
            yield file
            waiting = []


def _kept(run: Run, key: str) -> Iterator[pa.Table]:
    """Yields the rows that a run kept (KEPT): a table for each unit, or for each shard if its passes were removed."""
    columns = [*SAMPLE.names, *(["language"] if run.columns().get("language") == pa.string() else [])]
    for table in run.scan(columns):
        language = table["language"] if "language" in columns else pa.nulls(len(table), pa.string())
        texts = [table[name] for name in SAMPLE.names]
        yield pa.table([table[key].cast(pa.string()), *texts, language], schema=KEPT)


def _dropped(run: Run, key: str) -> Iterator[pa.Table]:
    """Yields the rows that a run dropped (DROPPED): a table for each unit if the run has its passes."""
    for table in run.drops():
        yield pa.table([table[key].cast(pa.string()), *(table[name] for name in DROPPED.names[1:])], schema=DROPPED)


def _distinct(table: pa.Table) -> pa.Table:
    """The first row of each key."""
    first = pc.index_in(table["key"], table["key"])
    return table.filter(pc.equal(first, pa.array(np.arange(len(table), dtype=np.int32))))


def _without(rows: pa.Table, others: pa.Table) -> pa.Table:
    """The rows whose key is not in `others`."""
    return rows.filter(pc.invert(pc.is_in(rows["key"], others["key"])))


# --- Output -----------------------------------------------------------------------------------------------------------


def to_json(diff: Diff, a: Run, b: Run) -> dict[str, Any]:
    """The comparison as plain data."""

    def decided(side: Side) -> list[dict[str, Any]]:
        ranked = sorted(side.decided.items(), key=lambda item: (-item[1], item[0][0], item[0][1] or ""))
        return [{"step": step, "reason": reason, "rows": rows} for (step, reason), rows in ranked]

    def values(name: str) -> list[dict[str, Any]]:
        return [{"value": v, "gained": g, "lost": n} for v, g, n in _values(diff, name)]

    return {
        "runs": [
            {"path": run.path, "name": run.name, "rows_in": run.rows_in, "kept": kept}
            for run, kept in zip((a, b), diff.kept)
        ],
        "same_pool": diff.same_pool,
        "recipe": differences(a.recipe, b.recipe),
        "both": diff.both,
        "gained": diff.gained.rows,
        "lost": diff.lost.rows,
        "gained_by": decided(diff.gained),
        "lost_by": decided(diff.lost),
        **{name: values(name) for name in ("languages", "hosts", "concepts")},
        "samples": {
            "gained": [row._asdict() for row in diff.gained.samples],
            "lost": [row._asdict() for row in diff.lost.samples],
        },
    }


def _values(diff: Diff, name: str) -> list[tuple[str, int, int]]:
    """The values of a tally, with the rows gained and lost, by descending sum of both."""
    gained, lost = getattr(diff.gained, name).counts, getattr(diff.lost, name).counts
    found = [(value, gained[value], lost[value]) for value in {**gained, **lost}]
    return sorted(found, key=lambda line: (-line[1] - line[2], line[0]))


def to_html(found: dict[str, Any], a: Run, b: Run) -> bytes:
    """Renders what `to_json` returns as a page, with pictures of the samples."""
    from pipeline import page

    thumbnails, sides = page.Thumbnails(), []
    for name, kept_by, other, letter in (("gained", b, a, "A"), ("lost", a, b, "B")):
        rows = found["samples"][name]
        encoded = _pictures(kept_by, [row["uid"] for row in rows])
        pictures: dict[str, list[page.Picture]] = {}
        for row in rows:
            notes = [row["detail"] or row["reason"] or "", *hosts(pa.array([row["url"]], pa.string())).to_pylist()]
            picture = page.Picture(thumbnails(encoded.get(row["uid"])), row["caption"], [n for n in notes if n])
            pictures.setdefault(row["step"], []).append(picture)
        decided = [(by["step"], by["reason"], by["rows"]) for by in found[f"{name}_by"]]
        sides.append(
            {
                "name": name,
                "decided": page.Table(
                    [f"step of {letter}", "reason", "rows"], decided, f"{name.capitalize()}: what {letter} dropped"
                ),
                "lead": f"Rows that {kept_by.path} kept, by the step of {other.path} that dropped them.",
                "pictures": list(pictures.items()),
            }
        )
    tables = [
        page.Table(
            [name[:-1], "gained", "lost"],
            [(v["value"], v["gained"], v["lost"]) for v in found[name][:SHOWN_HTML]],
            name.capitalize() + (f": {SHOWN_HTML} of {len(found[name]):,}" if len(found[name]) > SHOWN_HTML else ""),
        )
        for name in ("languages", "hosts", "concepts")
        if found[name]
    ]
    title = f"Diff of {a.name} and {b.name}"
    return page.render("diff.html", title=title, found=found, sides=sides, tables=tables, samples=SAMPLES)


def _pictures(run: Run, uids: list[str]) -> dict[str, bytes]:
    """The pictures of rows that a run kept, by uid; empty for a run without pictures."""
    return run.pictures(uids) if any("image" in step.adds for step in run.steps) else {}


def show(console: Console, found: dict[str, Any]) -> None:
    """Prints what `to_json` returns."""
    for letter, run in zip("AB", found["runs"]):
        console.say(f"{letter}: {run['path']}: {run['rows_in']:,} rows in, {run['kept']:,} kept")
    console.say("the same pool" if found["same_pool"] else "different pools, compared by uid")
    for change in found["recipe"]:
        console.say(f"  {change}")
    console.say(f"{found['both']:,} kept by both, {found['gained']:,} gained, {found['lost']:,} lost")
    for side, run in (("gained", "A"), ("lost", "B")):
        if found[side]:
            table = _table(f"{side}: the step of {run} that dropped them", "reason", "rows")
            for by in found[f"{side}_by"]:
                table.add_row(by["step"], by["reason"] or "", f"{by['rows']:,}")
            console.print(table)
    for name in ("languages", "hosts", "concepts"):
        if found[name]:
            table = _table(name, "gained", "lost")
            for value in found[name][:SHOWN]:
                table.add_row(value["value"], f"{value['gained']:,}", f"{value['lost']:,}")
            console.print(table)
            if len(found[name]) > SHOWN:
                console.say(f"and {len(found[name]) - SHOWN:,} more")


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, overflow="ellipsis", no_wrap=True, max_width=60)
    for column in columns:
        table.add_column(column, justify="left" if column == "reason" else "right", no_wrap=True)
    return table


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.diff",
        description=__doc__,
        epilog="exit status: 0 compared, whatever the difference; 2 no finished run, or a wrong command line; "
        "1 a damaged run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="RUN_A", help="the folder or address of a finished run")
    parser.add_argument("b", metavar="RUN_B", help="the run to compare with it")
    parser.add_argument("--json", action="store_true", help="print the comparison as one JSON object")
    parser.add_argument("--html", metavar="FILE", help="also write a page with pictures of both sides")
    args = parser.parse_args(argv)
    a, b = open_run(args.a), open_run(args.b)
    found = to_json(compare(a, b, Console(stderr=True)), a, b)
    if args.html:
        Path(args.html).write_bytes(to_html(found, a, b))
    if args.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        show(Console(), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
