"""A custom sink: another output format. In a recipe, with examples/ on PYTHONPATH: `- steps.write_jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.dataset.card import About
from pipeline.step import Sink
from pipeline.storage import Entry, Store


@dataclass(kw_only=True)
class WriteJsonl(Sink):
    """Writes `uid, url, caption` as JSON lines, `rows_per_file` a file, for tools that fetch pictures themselves."""

    needs = ("caption",)
    folder = "jsonl"

    rows_per_file: int = 100_000
    """Lines in a file; the last file may have fewer."""

    def plan(self, rows: int) -> list[int]:
        return [*range(0, rows, self.rows_per_file), rows] if rows else [0]

    def write(
        self, store: Store, part: int, tables: Iterator[pa.Table], types: dict[str, pa.DataType]
    ) -> dict[str, Any]:
        lines = [json.dumps(row) for table in tables for row in table.select(["uid", "url", "caption"]).to_pylist()]
        entry = store.write(f"{part:05d}.jsonl", ("\n".join(lines) + "\n").encode())
        return {"rows": len(lines), "files": [entry]}

    def finish(self, store: Store, about: About, parts: list[dict[str, Any]]) -> list[Entry]:
        files = {entry["name"]: part["rows"] for part in parts for entry in part["files"]}
        return [store.write("index.json", json.dumps({"name": about.name, "rows": files}, indent=1).encode())]
