"""The download stage: from urls to small, clean images."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import ClassVar

import cv2
import pyarrow as pa

from pipeline.fetch.client import Client, Limits, tls_context
from pipeline.fetch.decoder import EncodeFormat, Picture, ResizeMode, Rules, decode
from pipeline.fetch.guard import parse_addr
from pipeline.fetch.overlap import Begin, Finished, Overlap, Work
from pipeline.fetch.reasons import FetchError
from pipeline.step import Stage

GROUP_ROWS = 256
# Rows that the event loop knows, most of them waiting for their host: 12 MB at most, and enough to see a unit's hosts
# far ahead of the slow ones.
ADMITTED_ROWS = 4096
_SPEED = {"speed": True}  # options that change how fast rows come, and nothing about them


@dataclass(kw_only=True)
class Download(Stage):
    """Fetches each url, checks, decodes, resizes and re-encodes the image; names and meanings are img2dataset's.

    Adds the encoded `image` and its measurements. `original_width` and `original_height` are those of the upright
    image; `sha256` is of the bytes as fetched; `phash` is imagehash.phash, 64 bits with the first bit of its hex string
    highest, of the picture as decoded (JPEGs at a reduced scale). A row without an image is dropped for one of the
    reasons of `pipeline.fetch.reasons`.
    """

    needs: ClassVar[tuple[str, ...]] = ("url",)
    adds: ClassVar[dict[str, pa.DataType]] = {
        "image": pa.binary(),
        "width": pa.int32(),
        "height": pa.int32(),
        "original_width": pa.int32(),
        "original_height": pa.int32(),
        "original_bytes": pa.int64(),
        "original_format": pa.string(),
        "sha256": pa.string(),
        "phash": pa.uint64(),
        "exif": pa.string(),
    }
    commits: ClassVar[bool] = True

    image_size: int = 256
    """Pixels of the side that `resize_mode` sets."""
    resize_mode: ResizeMode = "keep_ratio_largest"
    """`keep_ratio_largest`: longest side; `keep_ratio`: shortest side; `center_crop`: shortest side, then a square;
    `border`: longest side, then a white square; `no`."""
    resize_only_if_bigger: bool = True
    """Leave smaller images as they are (neither cropped nor padded)."""
    encode_format: EncodeFormat = "jpg"
    """jpg, png or webp."""
    encode_quality: int = 95
    """0 to 100 for jpg and webp; the compression level, 0 to 9, for png."""
    min_image_size: int = 0
    """Pixels of the shorter side."""
    max_image_area: float = 36_000_000
    """Pixels, of the original and of the result."""
    max_aspect_ratio: float = float("inf")
    """Longer side / shorter side."""
    extract_exif: bool = True
    """Fill `exif` with the tags as a JSON object of strings."""

    timeout: float = 10.0
    """Seconds for a row in all: redirects, retries and back-off; waiting for a place at a busy host is not counted."""
    retries: int = 2
    """Further attempts after a transient failure, as long as `timeout` lasts."""
    max_bytes: int = 20_000_000
    """The largest body, in bytes."""
    min_rate: int = 1000
    """Bytes per second under which a body, over 3 seconds, is given up."""
    user_agent_token: str = "winnow"
    """The name we go by, in the User-Agent and when X-Robots-Tag addresses us."""
    user_agent_contact: str = ""
    """A url or mail address for the publishers, sent along."""
    disallowed_header_directives: list[str] = field(
        default_factory=lambda: ["noai", "noimageai", "noindex", "noimageindex"]
    )
    """Directives of X-Robots-Tag that mean hands off."""
    allow_addrs: list[str] = field(default_factory=list)
    """Addresses that may be dialled though they are not public, each with its port: "127.0.0.1:8765"."""

    concurrency: int = field(default=256, metadata=_SPEED)
    """Rows at work at once, from the first request to the finished image."""
    per_host: int = field(default=8, metadata=_SPEED)
    """Requests at once to one host."""
    bytes_in_flight: int = field(default=128_000_000, metadata=_SPEED)
    """Bytes of large bodies that may be held at once; bodies under 256 KiB are not counted."""
    decode_threads: int = field(default=0, metadata=_SPEED)
    """Threads that decode and encode; 0: one for each CPU that the process may use."""

    def check(self) -> Iterator[tuple[str, str]]:
        for key in ("image_size", "max_bytes", "concurrency", "per_host", "bytes_in_flight", "timeout"):
            if getattr(self, key) <= 0:
                yield key, f"{getattr(self, key)} must be above 0"
        for key in ("retries", "min_rate", "min_image_size", "decode_threads"):
            if getattr(self, key) < 0:
                yield key, f"{getattr(self, key)} must be 0 or more"
        if self.max_aspect_ratio < 1:
            yield "max_aspect_ratio", f"{self.max_aspect_ratio} is longer side / shorter side and must be 1 or more"
        if self.max_image_area < 1:
            yield "max_image_area", f"{self.max_image_area} must be 1 or more"
        highest = 9 if self.encode_format == "png" else 100
        if not 0 <= self.encode_quality <= highest:
            yield "encode_quality", f"{self.encode_quality} must be 0 to {highest} for {self.encode_format}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.user_agent_token):
            yield "user_agent_token", f"{self.user_agent_token!r} must be letters, digits, - and _"
        if not self.user_agent_contact.isprintable() or not self.user_agent_contact.isascii():
            yield "user_agent_contact", f"{self.user_agent_contact!r} must be printable ASCII"
        for addr in self.allow_addrs:
            try:
                parse_addr(addr)
            except ValueError as error:
                yield "allow_addrs", str(error)

    def setup(self) -> None:
        tls_context()
        # One image, one thread: the images are what runs in parallel.
        cv2.setNumThreads(1)

    def process(self, batch: pa.Table) -> pa.Table:
        done = [*self.stream([batch]), self._finish(batch.slice(0, 0), [])]
        return pa.concat_tables(done).sort_by([("unit", "ascending"), ("row", "ascending")])

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Finished rows in order of completion, at most 256 a table, dropped ones marked; requests overlap batches."""
        overlap = Overlap(
            self._open,
            column="url",
            concurrency=self.concurrency,
            admitted=max(ADMITTED_ROWS, 2 * self.concurrency),
            group=GROUP_ROWS,
        )
        for finished in overlap(batches):
            yield self._table(finished)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Work[Picture | FetchError]]:
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        options["disallowed_header_directives"] = tuple(d.strip().lower() for d in self.disallowed_header_directives)
        options["allow_addrs"] = tuple(self.allow_addrs)
        limits = Limits(**{f.name: options[f.name] for f in fields(Limits)})
        rules = Rules(**{f.name: options[f.name] for f in fields(Rules)})
        decoders = ThreadPoolExecutor(self.decode_threads or usable_cpus(), thread_name_prefix="decode")
        try:
            async with Client(limits) as client:
                yield partial(picture, client, decoders, rules)
        finally:
            decoders.shutdown(cancel_futures=True)

    def _table(self, finished: list[Finished[Picture | FetchError]]) -> pa.Table:
        """Rows in order within each source table, the tables one after the other."""
        sources: dict[int, list[Finished[Picture | FetchError]]] = {}
        for row in finished:
            sources.setdefault(id(row[0]), []).append(row)
        parts = []
        for rows in sources.values():
            source = rows[0][0].take([index for _, index, _ in rows])
            parts.append(self._finish(source, [result for _, _, result in rows]))
        return pa.concat_tables(parts)

    def _finish(self, source: pa.Table, results: list[Picture | FetchError]) -> pa.Table:
        """`source` with the columns of `adds`, and `drop_reason` and `drop_detail`, from one result a row."""
        names = [*self.adds, "drop_reason", "drop_detail"]
        table = source.drop_columns([name for name in names if name in source.column_names])
        measured = [vars(r) if isinstance(r, Picture) else {} for r in results]
        for name, dtype in self.adds.items():
            table = table.append_column(name, pa.array([m.get(name) for m in measured], dtype))
        failures = [r if isinstance(r, FetchError) else None for r in results]
        table = table.append_column("drop_reason", pa.array([f and f.reason for f in failures], pa.string()))
        return table.append_column("drop_detail", pa.array([(f and f.detail) or None for f in failures], pa.string()))


async def picture(
    client: Client, decoders: Executor, rules: Rules, url: str | None, begin: Begin
) -> Picture | FetchError:
    """One row, from url to picture. Whatever happens to it ends in a reason."""
    try:
        async with client.fetch(url, begin) as body:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(decoders, decode, body, rules)
    except FetchError as failure:
        return failure
    except BrokenExecutor as error:
        return FetchError("decoder_crash", str(error))
    except Exception as error:
        return FetchError("unexpected", f"{type(error).__name__}: {error}")


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
