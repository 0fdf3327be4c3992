"""The candidates of a study: all rows that survived a step of the run, with the columns that the cuts read.

The run is scanned once, and the columns are spooled to files of numbers in the study's folder. All cuts are then
computed from memory-mapped files, one block of rows at a time, so memory does not grow with the rows. Repeating a study
with other cuts scans the run again only for new columns. Ray and Dask do not pay off here: Ray takes as long to start
as two cores take to scan six columns of ten million rows (`benchmarks/study.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.filters.threshold import comparable
from pipeline.reader import Run
from pipeline.schema import POSITION
from pipeline.study.study_plan import StudyError
from pipeline.text.hashing import hash64
from trainer import atomic
from trainer.terminal import progress

BLOCK = 1 << 17
"""Rows processed at a time. A multiple of 64, so that bits fill whole words; 50 cuts of a block fit in a cache."""


@dataclass(frozen=True)
class Candidates:
    """The candidates, ordered by unit and row. A candidate's place is its number in this order."""

    run: Run
    after: str
    folder: Path
    counts: np.ndarray
    """Candidates in each unit, int64."""
    types: dict[str, str]
    """The numpy types of the columns: float32, or float64 where float32 would round."""
    maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """The files mapped so far."""
    hashing: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held while uid hashes are read and stored."""

    def __len__(self) -> int:
        return int(self.counts.sum())

    def column(self, name: str) -> np.ndarray:
        """The values of a numeric column, NaN for a row without one; memory-mapped."""
        return self._mapped(_file(name), self.types[name])

    @property
    def rows(self) -> np.ndarray:
        """The `row` of each candidate, int32."""
        return self._mapped("row", "int32")

    @property
    def blocks(self) -> Iterator[slice]:
        """The places of all candidates, BLOCK at a time."""
        for start in range(0, len(self), BLOCK):
            yield slice(start, min(start + BLOCK, len(self)))

    @property
    def units(self) -> Iterator[tuple[int, slice]]:
        """Each unit with the places of its candidates."""
        ends = np.cumsum(self.counts).tolist()
        for unit, (end, count) in enumerate(zip(ends, self.counts.tolist())):
            yield unit, slice(end - count, end)

    def uid_hashes(self, places: np.ndarray) -> np.ndarray:
        """The hashes by which `threshold` breaks ties, for candidates at ascending places; uint64.

        They are cached in a sparse file, where 0 means not yet computed, so only units with ties are read, and once.
        """
        with self.hashing:
            if (name := "uid-hashes") not in self.maps:
                path = self.folder / name
                if not path.exists():
                    with path.open("wb") as file:
                        file.truncate(8 * len(self))
                self.maps[name] = np.asarray(np.memmap(path, np.uint64, "r+"))
            hashes = self.maps[name]
            missing = places[hashes[places] == 0]
            starts = np.cumsum(self.counts) - self.counts
            unit = np.searchsorted(starts, missing, side="right") - 1
            for number in np.unique(unit).tolist():
                mine = missing[unit == number]
                (table,) = self.run.scan(["uid"], after=self.after, units=[number])
                hashes[mine] = hash64(table["uid"].take(pa.array(mine - starts[number])), purpose="threshold")
            return np.asarray(hashes[places])

    def spooled(
        self, name: str, dtype: Any, columns: Sequence[str], values: Callable[[pa.Table], np.ndarray]
    ) -> np.ndarray:
        """A value for each candidate, computed from columns of the run on first use and kept in the folder; mapped."""
        path = self.folder / name
        if not path.exists():
            tables = self.run.scan(columns, after=self.after)
            with atomic.replacing(path) as file:
                for table in progress(tables, len(self.counts), f"units: {name}"):
                    file.write(values(table).astype(dtype).data)
        return self._mapped(name, dtype)

    def _mapped(self, name: str, dtype: Any) -> np.ndarray:
        if name not in self.maps:
            path = self.folder / name
            # A plain array, because slicing a memmap object takes ten times as long.
            self.maps[name] = np.asarray(np.memmap(path, dtype, "r")) if len(self) else np.empty(0, dtype)
        return self.maps[name]


def open_candidates(run: Run, after: str, columns: Sequence[str], folder: Path) -> Candidates:
    """Spools those of the candidates' columns that are not yet in the folder.

    Raises StudyError for a column that cannot be cut, RunError for an unknown step or column.
    """
    types = run.columns(after)
    kinds = {}
    for name in columns:
        if name in POSITION.names:
            raise StudyError(f"cuts: {name!r} is the place of a row, expected a column that a step adds")
        if name in types and not comparable(types[name]):
            raise StudyError(f"cuts: the column {name!r} must hold numbers, found {types[name]}")
        narrow = name in types and types[name] in (pa.float16(), pa.float32())
        kinds[name] = "float32" if narrow else "float64"
    identity = hashlib.sha256(json.dumps([run.fingerprint, after]).encode()).hexdigest()
    described = folder / "candidates.json"
    known = json.loads(described.read_text()) if described.exists() else {}
    if known.get("of") != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        known = {"of": identity, "columns": {}}
    missing = [name for name in columns if known["columns"].get(name) != kinds[name]]
    if missing or "counts" not in known:
        counts: list[int] = []
        files = {name: (folder / f"{_file(name)}.part").open("wb") for name in missing}
        files["row"] = (folder / "row.part").open("wb")
        try:
            for table in progress(run.scan(missing, after=after), run.units, "units scanned"):
                counts.append(len(table))
                table["row"].to_numpy().tofile(files["row"])
                for name in missing:
                    values = table[name].cast(pa.type_for_alias(kinds[name]), safe=False)
                    full = pc.fill_null(values, float("nan")) if values.null_count else values
                    full.to_numpy().tofile(files[name])
        finally:
            for file in files.values():
                file.close()
        for name in [*map(_file, missing), "row"]:
            (folder / f"{name}.part").replace(folder / name)
        known = {**known, "counts": counts, "columns": {**known["columns"], **{name: kinds[name] for name in missing}}}
        with atomic.replacing(described) as record:  # last: its existence means that the other files are complete
            record.write(json.dumps(known).encode())
    return Candidates(run, after, folder, np.array(known["counts"], np.int64), known["columns"])


def _file(column: str) -> str:
    return f"column-{quote(column, safe='')}"
