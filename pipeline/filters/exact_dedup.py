from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import CAPTIONS, MERGED, is_heavy, wrong_type
from pipeline.step import Estimate, KeyedFilter, drops_table
from pipeline.text.hashing import hash64
from pipeline.text.url import canonical

_MAX_MERGED = 1_000
"""Maximum number of rows merged into one. Some pictures, such as spacers, are on millions of pages."""


@dataclass(kw_only=True)
class ExactDedup(KeyedFilter):
    """Keeps one row, the one with the lowest uid, of all rows with equal values in the columns of `by`.

    Compares URLs in canonical form (`pipeline.text.url`) and other columns verbatim. Keeps rows with a null in a `by`
    column. If `by` contains `url`, the step is not a barrier: rows with equal URLs are in the same unit.

    With `captions: merge`, the kept row gets the captions of all equal rows in the column `captions`: a list of
    `caption`, `uid` and (after the step `language`) `language`, its own first and the others sorted by uid; null if
    nothing was merged. The other rows are dropped as `merged`, with the uid of the kept row as detail. So a picture is
    fetched and stored once, and `winnow train` draws one of its captions each time. Rows after the first 1,000 of a
    picture are dropped as `exact_dedup`. Put caption filters before this step: after it, they see only `caption`.
    """

    by: list[str] = field(default_factory=lambda: ["url"])
    """The columns to compare, such as `[url]`, `[url, caption]` or, after the download, `[sha256]`."""
    captions: Literal["first", "merge"] = "first"
    """What to do with the captions of dropped rows: `first` discards them, `merge` adds them to the kept row."""

    def __post_init__(self) -> None:
        merge = self.captions == "merge"
        columns = [*self.by, *(["caption"] if merge else [])]
        self.needs = tuple(dict.fromkeys(["uid", *columns]))  # type: ignore[misc]
        self.wants = ("language", "captions") if merge else ()  # type: ignore[misc]
        self.adds = {"captions": CAPTIONS} if merge else {}  # type: ignore[misc]
        self.scope = "unit" if "url" in self.by else "run"

    def estimate(self, rows: float) -> Estimate:
        return Estimate(0.97, 50_000, "keep assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.by:
            yield "by", "must name at least one column, found []"
        if len(set(self.by)) < len(self.by):
            yield "by", f"must name each column once, found {self.by}"

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        for column in self.by:
            yield from (("by", problem) for problem in wrong_type(types, column, _comparable, "text or numbers"))

    def key(self, batch: pa.Table) -> np.ndarray:
        key = np.zeros(len(batch), np.uint64)
        for column in self._compared(batch):
            text = column if pa.types.is_string(column.type) else column.cast(pa.string())
            key = key * np.uint64(0x9E3779B97F4A7C15) + hash64(pc.fill_null(text, ""))
        return key

    def keep(self, batch: pa.Table) -> pa.BooleanArray:
        keep = np.ones(len(batch), bool)
        twins = self._twins(batch)
        keep[twins.index[twins.duplicated()]] = False
        return pa.array(keep)

    def split(self, batch: pa.Table) -> tuple[pa.Table, pa.Table]:
        if self.captions == "first":
            return super().split(batch)
        twins = self._twins(batch)
        group = twins.groupby(list(twins.columns), sort=False)
        rows, nth = twins.index.to_numpy(), group.cumcount().to_numpy()
        keepers = rows[nth == 0][group.ngroup().to_numpy()]  # groups are numbered in the order of their first rows
        captions = self._captions(batch, keepers[nth < _MAX_MERGED], rows[nth < _MAX_MERGED])
        later = np.flatnonzero(nth > 0)
        later = later[np.argsort(rows[later])]
        dropped = rows[later]
        reason = pa.array(np.where(nth[later] < _MAX_MERGED, MERGED, self.name()), pa.string())
        kept_instead = batch["uid"].take(pa.array(keepers[later])).combine_chunks()
        drops = drops_table(batch.take(pa.array(dropped)), self.label, reason, kept_instead)
        keep = np.ones(len(batch), bool)
        keep[dropped] = False
        at = batch.schema.get_field_index("captions")
        batch = batch.append_column("captions", captions) if at < 0 else batch.set_column(at, "captions", captions)
        return batch.filter(pa.array(keep)), drops

    def _captions(self, batch: pa.Table, keepers: np.ndarray, rows: np.ndarray) -> pa.Array:
        """The column `captions`: the captions of each row, followed by those of the rows merged into it.

        `keepers` is the row that each of `rows` is merged into. The rows of a keeper begin with the keeper itself.
        """
        have = batch["captions"].to_pylist() if "captions" in batch.column_names else [None] * len(batch)
        language = batch["language"] if "language" in batch.column_names else pa.nulls(len(batch), pa.string())
        columns = [column.take(pa.array(rows)).to_pylist() for column in (batch["caption"], batch["uid"], language)]
        merged: dict[int, list[dict[str, str | None]]] = {}
        for keeper, row, *values in zip(keepers.tolist(), rows.tolist(), *columns):
            own = [dict(zip(("caption", "uid", "language"), values))]
            merged.setdefault(keeper, []).extend(have[row] or own)
        for keeper, captions in merged.items():
            have[keeper] = captions
        return pa.array(have, CAPTIONS)

    def _twins(self, batch: pa.Table) -> pd.DataFrame:
        """The compared values of rows with duplicates, sorted by uid. The index is the row's place in the batch."""
        compared = pd.concat([c.to_pandas(types_mapper=pd.ArrowDtype) for c in self._compared(batch)], axis=1)
        shared = (compared.duplicated(keep=False) & compared.notna().all(axis=1)).to_numpy()
        # Only duplicate rows need sorting, and they are few.
        twins = compared[shared].set_axis(range(compared.shape[1]), axis=1)
        order = batch.select(["uid", "unit", "row"]).filter(pa.array(shared)).to_pandas()
        return twins.iloc[np.lexsort((order["row"], order["unit"], order["uid"].astype(str)))]

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        """The values that the row shares with the kept one."""
        shared = [column.cast(pa.string()) for column in self._compared(dropped)]
        return pc.binary_join_element_wise(*shared, " ").combine_chunks()

    def _compared(self, batch: pa.Table) -> list[pa.ChunkedArray]:
        return [_canonical(batch[column]) if column == "url" else batch[column] for column in self.by]


def _comparable(dtype: pa.DataType) -> bool:
    return not (pa.types.is_nested(dtype) or is_heavy(dtype))


def _canonical(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([[None if url is None else canonical(url) for url in urls.to_pylist()]], pa.string())
