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

UID = np.dtype("u8,u8")
"""A uid as DataComp writes it: its upper and its lower 64 bits."""


@dataclass(kw_only=True)
class WriteSubset(Sink):
    """Writes the uids of the remaining rows as a subset file of DataComp, `subset/subset.npy`: sorted pairs of uint64.

    Needs no pictures, so a pool with scores, such as CommonPool's metadata, becomes a subset without a download.
    DataComp's resharder reads it (`--subset-file`). `subset/NNNNN.npy` hold its parts, each sorted.
    """

    folder: ClassVar[str] = "subset"

    rows_per_part: int = 1_000_000
    """Rows that a worker sorts at a time: 16 bytes each."""

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
        uids = "".join(uid for table in tables for uid in table["uid"].to_pylist())
        pairs = np.frombuffer(bytes.fromhex(uids), ">u8").astype("<u8").view(UID)
        return {"rows": len(pairs), "files": [_save(store, f"{part:05d}.npy", np.sort(pairs))]}

    def finish(self, store: Store, about: About, parts: list[dict[str, Any]]) -> list[Entry]:
        """Merges the parts: 16 bytes a row in memory."""
        pairs = [np.load(io.BytesIO(store.read(part["files"][0]["name"]))) for part in parts]
        return [_save(store, "subset.npy", np.sort(np.concatenate([np.empty(0, UID), *pairs])))]


def _save(store: Store, name: str, pairs: np.ndarray) -> Entry:
    with store.output(name) as file:
        np.save(file, pairs)
    return file.entry
