from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.dataset.card import About
from pipeline.step import Estimate, Sink
from pipeline.storage import Entry, Store
from pipeline.text.hashing import uid_pairs


@dataclass(kw_only=True)
class WriteSubset(Sink):
    """Writes the uids of the remaining rows as a subset file of DataComp, `subset/subset.npy`: sorted pairs of uint64.

    Needs no pictures, so a pool that has scores, such as CommonPool's metadata, can be filtered without a download.
    DataComp's resharder reads the file (`--subset-file`). `subset/NNNNN.npy` are its parts, each sorted.
    """

    folder: ClassVar[str] = "subset"

    rows_per_part: int = 1_000_000
    """Rows that a worker sorts at a time, with 16 bytes of memory each."""

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 1_000_000, "rate assumed", stored=32)

    def check(self) -> Iterator[tuple[str, str]]:
        if self.rows_per_part < 1:
            yield "rows_per_part", f"must be at least 1, found {self.rows_per_part}"

    def plan(self, rows: int) -> list[int]:
        return [*range(0, rows, self.rows_per_part), rows]

    def reads(self, types: Mapping[str, pa.DataType]) -> list[str]:
        return ["uid"]

    def write(
        self, store: Store, part: int, tables: Iterator[pa.Table], types: dict[str, pa.DataType]
    ) -> dict[str, Any]:
        pairs = uid_pairs(uid for table in tables for uid in table["uid"].to_pylist())
        return {"rows": len(pairs), "files": [_save(store, f"{part:05d}.npy", np.sort(pairs))]}

    def finish(self, store: Store, about: About, parts: list[dict[str, Any]]) -> list[Entry]:
        """Merges the parts, with 16 bytes of memory per row."""
        pairs = [np.load(io.BytesIO(store.read(part["files"][0]["name"]))) for part in parts]
        return [_save(store, "subset.npy", np.sort(np.concatenate([uid_pairs([]), *pairs])))]


def _save(store: Store, name: str, pairs: np.ndarray) -> Entry:
    with store.output(name) as file:
        np.save(file, pairs)
    return file.entry
