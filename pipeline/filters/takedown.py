from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from pipeline.step import FILE, Estimate, Filter
from pipeline.text.takedown_list import KINDS, TakedownList


@dataclass(kw_only=True)
class Takedown(Filter):
    """Drops rows that a takedown list names: by URL, domain, uid, or by the picture's SHA-256 or perceptual hash.

    The drop reason is the kind of the entry, and the detail is the entry itself. `pipeline.text.takedown_list`
    describes the file. URLs, domains and uids are known before the download and digests only after it, so a list with
    both needs two lines:

        - takedown: {file: takedown.txt, by: [uid, url, domain]}
        - download
        - takedown: {file: takedown.txt, by: [sha256, phash]}

    `winnow takedown` applies a list to finished shards.
    """

    file: str = field(metadata=FILE)
    """The list, with one entry per line: `url …`, `domain …`, `uid …`, `sha256 …`, or `phash … 4` with the number of
    bits that may differ."""
    by: list[Literal["uid", "url", "domain", "sha256", "phash"]] | None = None
    """The kinds of entries to apply. Default: all kinds in the list."""

    def __post_init__(self) -> None:
        self._digest, self._problem = "", ""
        self._kinds: tuple[str, ...] = tuple(self.by or ())
        try:
            listed = TakedownList(self.file)
            self._digest, self._kinds = listed.digest, self._kinds or tuple(listed.kinds)
        except (OSError, ValueError) as error:
            self._problem = str(error)
        self.needs = tuple(dict.fromkeys(column for kind in self._kinds for column in KINDS[kind]))  # type: ignore[misc]
        self.wants = ("captions",) if "uid" in self._kinds else ()  # type: ignore[misc]

    def estimate(self, rows: float) -> Estimate:
        return Estimate(1.0, 100_000, "nearly all are kept; rate assumed")

    def check(self) -> Iterator[tuple[str, str]]:
        if self.by is not None and (not self.by or len(set(self.by)) < len(self.by)):
            yield "by", f"must name each kind once, found {self.by}"
        if self._problem:
            yield "file", self._problem

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        dtype = types.get("phash")
        if "phash" in self._kinds and dtype is not None and not pa.types.is_integer(dtype):
            yield "file", f"has `phash` entries, but the column 'phash' holds {dtype}, expected uint64 hashes"

    def fingerprint(self) -> object:
        return self._digest

    def setup(self) -> None:
        self._listed = TakedownList(self.file)

    def judge(self, batch: pa.Table) -> pa.StringArray:
        return self._listed.find(batch, self._kinds)[0]

    def detail(self, dropped: pa.Table) -> pa.StringArray:
        return self._listed.find(dropped, self._kinds)[1]
