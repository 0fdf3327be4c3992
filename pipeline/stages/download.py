"""The download stage: from urls to small, clean images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pyarrow as pa

from pipeline.fetch import img2dataset_engine
from pipeline.fetch.client import Client, Limits, tls_context
from pipeline.fetch.decoder import DecodeMode, Decoder, EncodeFormat, HashType, Picture, ResizeMode, Rules
from pipeline.fetch.deny import DenyList
from pipeline.fetch.guard import parse_addr
from pipeline.fetch.hosts import Board, Exchange, Manners
from pipeline.fetch.outage import OutageError
from pipeline.fetch.overlap import Begin, Overlap, Work, as_drop, table_of, with_columns
from pipeline.fetch.reasons import FetchError
from pipeline.fetch.sandbox import Sandbox, SandboxError, set_malloc
from pipeline.schema import INLINE, PICTURE, carried
from pipeline.step import Estimate, Stage

GROUP_ROWS = 256
# Rows that the event loop knows, most of them waiting for their host: 12 MB at most, and enough to see a unit's hosts
# far ahead of the slow ones.
ADMITTED_ROWS = 4096
_SPEED = {"speed": True}  # options that change how fast rows come, and nothing about them


@dataclass(kw_only=True)
class Download(Stage):
    """Fetches each url, checks, decodes, resizes and re-encodes the image; names and meanings are img2dataset's.

    Adds the encoded `image` and its measurements. `original_width` and `original_height` are those of the upright
    image; `animated` tells that more frames follow the one that was taken; `sha256` is of the bytes as fetched;
    `phash` is imagehash.phash, 64 bits with the first bit of its hex string highest, of the picture as it was encoded.
    `usage` is what the publisher said about the use of the picture, one statement a line ("Content-Usage: search=n"),
    null where nothing was said.
    A row without an image is dropped for one of the reasons of `pipeline.fetch.reasons`.
    """

    needs: ClassVar[tuple[str, ...]] = ("url",)
    adds: ClassVar[dict[str, pa.DataType]] = {**PICTURE, "usage": pa.string()}
    version: ClassVar[int] = 2
    commits: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False

    engine: Literal["winnow", "img2dataset"] = "winnow"
    """`img2dataset`: its own downloader, for exactly what it does, without our safety and manners: docs/fetching.md."""
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
    skip_reencode: bool = False
    """Keep the bytes as they came where nothing had to change: metadata, and whatever hides behind the picture, too."""
    decode: DecodeMode = "scaled"
    """How a JPEG that shrinks is decoded: `exact` in full; `scaled` at the smallest scale that leaves 1.5 times the
    target or more; `fast` at the smallest that covers it. What each costs and saves: docs/fetching.md."""
    inline: bool = False
    """Take the pictures that came with the pool (`pool.image`), by the same rules as fetched ones; a row without one is
    fetched by its url."""
    bbox_col: str | None = None
    """A column of boxes to blur, faces say: lists of [x_min, y_min, x_max, y_max] from 0 to 1 of the upright image."""
    min_image_size: int = 0
    """Pixels of the shorter side."""
    max_image_area: float = 36_000_000
    """Pixels, of the original and of the result."""
    max_aspect_ratio: float = float("inf")
    """Longer side / shorter side."""
    extract_exif: bool = True
    """Fill `exif` with the tags as a JSON object of strings."""
    compute_phash: bool = True
    """Fill `phash`, which `near_dedup` and `placeholder` can look at; without, decoding takes a tenth less CPU time."""
    compute_hash: HashType | None = None
    """A further hash of the bytes as fetched, in a column of its name; `sha256` is always there."""
    verify_hash: list[str] | None = None
    """`[column, md5 | sha1 | sha256 | sha512]`: the column holds the hash, in hex, that the bytes should have; a row
    with a null there is not checked."""
    hash_mismatch: Literal["reject", "flag"] = "reject"
    """If the bytes differ: drop the row, or keep it and record that in the column `hash_matches`."""
    deny_hashes: str | None = None
    """A file of md5, sha1 or sha256 digests in hex, one a line. Bodies with one of them are dropped before they are
    decoded or stored."""

    timeout: float = 10.0
    """Seconds for a row in all: redirects, retries and back-off; waiting for a place at a busy host is not counted."""
    retries: int = 2
    """Further attempts after a transient failure, as long as `timeout` lasts."""
    max_bytes: int = 20_000_000
    """The largest body, in bytes."""
    min_rate: int = 1000
    """Bytes per second under which a body, over 3 seconds, is given up."""
    user_agent_token: str = "winnow"
    """The name of this crawler, in the User-Agent, robots.txt and X-Robots-Tag."""
    user_agent_contact: str = ""
    """A URL or mail address for publishers, sent with the User-Agent."""
    disallowed_header_directives: list[str] = field(
        default_factory=lambda: ["noai", "noimageai", "noml", "noindex", "noimageindex"]
    )
    """X-Robots-Tag directives treated as opt-outs."""
    robots_txt: bool = True
    """Obey robots.txt (RFC 9309)."""
    content_usage: list[str] = field(default_factory=lambda: ["train-ai", "all"])
    """Obey Content-Usage, the header and the rule of robots.txt (IETF aipref): of these categories, the first with a
    stated preference decides. `[]`: ignore it."""
    tdm_reservation: bool = True
    """Obey the header `tdm-reservation: 1` (TDMRep)."""
    tdmrep_json: bool = True
    """Obey `/.well-known/tdmrep.json` (TDMRep): one more request to each host that has a robots.txt."""
    host_failures: int = 10
    """Consecutive failures after which a host is skipped for a while (`host_down`); 0: never."""
    host_wait: float = 600.0
    """Seconds that a row waits for its turn at a busy host before it ends as `host_busy`; 0: for ever."""
    allow_addrs: list[str] = field(default_factory=list)
    """Addresses that may be dialled though they are not public, each with its port: "127.0.0.1:8765"."""

    concurrency: int = field(default=256, metadata=_SPEED)
    """Rows at work at once, from the first request to the finished image."""
    per_host: int = field(default=8, metadata=_SPEED)
    """Requests at once to one host, over all workers."""
    per_host_rate: float = field(default=0.0, metadata=_SPEED)
    """Requests a second to one host at most, over all workers; 0: any. Crawl-delay counts too, up to 10 s."""
    bytes_in_flight: int = field(default=64_000_000, metadata=_SPEED)
    """Bytes of large bodies that may be held at once; bodies under 256 KiB are not counted."""
    decode_processes: int = field(default=1, metadata=_SPEED)
    """Processes of each worker that decode and encode; the executor starts a worker for each CPU."""
    decode_timeout: float = 10.0
    """Seconds of CPU time that one image may take to decode and encode."""
    decode_memory: int = 200_000_000
    """Bytes of memory that one image may take to decode and encode: enough for `max_image_area`'s default in most
    formats, for 33 megapixels of a progressive JPEG in full colour, for 29 of a WebP, and for 12 of a WebP with
    transparency, metadata or frames."""

    board: ClassVar[Exchange | None] = None
    """Where workers agree on each host's share; set on the instance by who runs several."""

    def __post_init__(self) -> None:
        # The pool's own columns: those called as one of ours are carried under another name.
        self._boxes = carried(self.bbox_col) if self.bbox_col else None
        self._claim = carried(self.verify_hash[0]) if self.verify_hash else None
        further = (self._boxes, self._claim, INLINE if self.inline else None)
        self.needs = ("url", *filter(None, further))  # type: ignore[misc]
        self.adds = dict(type(self).adds)  # type: ignore[misc]
        if not self.compute_phash:
            del self.adds["phash"]
        if self.compute_hash:
            self.adds[self.compute_hash] = pa.string()
        if self.verify_hash and self.hash_mismatch == "flag":
            self.adds["hash_matches"] = pa.bool_()

    def estimate(self, rows: float) -> Estimate:
        basis = "keep assumed (link rot); stored: LAION-400M at 256 px is 10 TB; 110 KB fetched assumed"
        return Estimate(0.75, 120, basis, stored=25_000, fetched=110_000)

    def check(self) -> Iterator[tuple[str, str]]:
        for key in ("image_size", "max_bytes", "concurrency", "per_host", "bytes_in_flight", "timeout",
                    "decode_processes", "decode_timeout", "decode_memory"):  # fmt: skip
            if getattr(self, key) <= 0:
                yield key, f"{getattr(self, key)} must be above 0"
        for key in ("retries", "min_rate", "min_image_size", "per_host_rate", "host_wait", "host_failures"):
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
        for category in self.content_usage:
            if not re.fullmatch(r"[a-z*][a-z0-9_.*-]*", category):
                yield "content_usage", f"{category!r} is not a category like train-ai, in lower case"
        if self.inline and self.engine != "winnow":
            yield "inline", f"the engine {self.engine} only fetches; leave `engine` out"
        if self.verify_hash is not None and (
            len(self.verify_hash) != 2 or self.verify_hash[1] not in get_args(HashType)
        ):
            yield "verify_hash", f"{self.verify_hash} must be [column, {' | '.join(get_args(HashType))}]"
        if self.deny_hashes:
            try:
                DenyList(self.deny_hashes)
            except (OSError, ValueError) as error:
                yield "deny_hashes", str(error)
        for addr in self.allow_addrs:
            try:
                parse_addr(addr)
            except ValueError as error:
                yield "allow_addrs", str(error)

    def check_columns(self, types: Mapping[str, pa.DataType]) -> Iterator[tuple[str, str]]:
        claim, boxes = types.get(self._claim or ""), types.get(self._boxes or "")
        if claim is not None and not pa.types.is_string(claim):
            yield "verify_hash", f"the column {self._claim!r} must hold digests in hex, but is of the type {claim}"
        if boxes is not None and not pa.types.is_nested(boxes):
            yield "bbox_col", f"the column {self._boxes!r} must hold lists of boxes, but is of the type {boxes}"

    def fingerprint(self) -> object:
        return hashlib.sha256(Path(self.deny_hashes).read_bytes()).hexdigest() if self.deny_hashes else None

    def honours(self) -> Iterator[str]:
        if self.disallowed_header_directives:
            yield f"X-Robots-Tag ({', '.join(self.disallowed_header_directives)})"
        if self.engine == "img2dataset":  # which knows nothing of the others
            return
        if self.robots_txt:
            yield "robots.txt (RFC 9309)"
        if self.content_usage:
            yield f"Content-Usage ({', '.join(self.content_usage)}; IETF aipref)"
        if self.tdm_reservation:
            yield "the header tdm-reservation (TDMRep)"
        if self.tdmrep_json:
            yield "/.well-known/tdmrep.json (TDMRep)"

    def shared(self) -> tuple[type, tuple[Any, ...]]:
        return Board, (self.per_host,)

    def connect(self, shared: Any) -> None:
        self.board = shared  # type: ignore[misc]

    def setup(self) -> None:
        tls_context()
        # glibc raises the first threshold with each large block it frees, until whole bodies come from a heap that
        # never shrinks: half as much memory again as the bodies in flight. At the second one's default, pages of
        # bodies go back to the system and are fetched anew all the time: a tenth of the time of fetching.
        set_malloc(mmap_threshold=1 << 20, trim_threshold=16 << 20)

    def process(self, batch: pa.Table) -> pa.Table:
        done = [*self.stream([batch]), with_columns(batch.slice(0, 0), [], self.adds)]
        return pa.concat_tables(done).sort_by([("unit", "ascending"), ("row", "ascending")])

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Finished rows in order of completion, at most 256 a table, dropped ones marked; requests overlap batches."""
        if self.engine == "img2dataset":
            options = {f.name: getattr(self, f.name) for f in fields(self)} | {"bbox_col": self._boxes}
            if self.verify_hash:
                options["verify_hash"] = [self._claim, self.verify_hash[1]]
            for batch in batches:
                for group in img2dataset_engine.download(batch, options):
                    yield table_of([(batch, row, self._columns(result)) for row, result in group], self.adds)
            return
        for finished in self._overlap(batches):
            yield table_of(finished, self.adds)

    @cached_property
    def _overlap(self) -> Overlap[dict[str, Any]]:
        return Overlap(
            copy(self)._open,  # of a copy, or the thread would keep its own end from coming
            columns=["url", self._claim or "url", self._boxes or "url", INLINE if self.inline else "url"],
            concurrency=self.concurrency,
            # Rows that bring their pictures along are large.
            admitted=2 * self.concurrency if self.inline else max(ADMITTED_ROWS, 2 * self.concurrency),
            group=GROUP_ROWS,
        )

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Work[dict[str, Any]]]:
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        options["disallowed_header_directives"] = tuple(d.strip().lower() for d in self.disallowed_header_directives)
        options["content_usage"] = tuple(self.content_usage)
        options["allow_addrs"] = tuple(self.allow_addrs)
        options["verify_hash"] = self.verify_hash[1] if self.verify_hash else None
        options["deny_hashes"] = DenyList(self.deny_hashes) if self.deny_hashes else None
        limits = Limits(**{f.name: options[f.name] for f in fields(Limits)})
        manners = Manners(**{f.name: options[f.name] for f in fields(Manners)})
        rules = Rules(**{f.name: options[f.name] for f in fields(Rules)})
        decoders = Sandbox(
            Decoder(rules),
            processes=self.decode_processes,
            seconds=self.decode_timeout,
            memory=self.decode_memory,
        )
        async with decoders, Client(limits, manners=manners, board=self.board) as client:

            async def work(values: tuple[Any, ...], begin: Begin) -> dict[str, Any]:
                url, claim, boxes, body = values
                extra = (claim if self.verify_hash else None, boxes or () if self.bbox_col else ())
                try:
                    if self.inline and body is not None:  # a picture that came with the pool
                        if len(body) > self.max_bytes:
                            raise FetchError("body_too_large", f"{len(body):,} bytes")
                        await begin()
                        return self._columns(await decoders(body, *extra)) | {"usage": None}
                    async with client.fetch(url, begin) as fetched:
                        return self._columns(await decoders(fetched.body, *extra)) | {"usage": fetched.usage}
                except FetchError as failure:
                    return as_drop(failure)
                except (OutageError, SandboxError):  # not the row's fault
                    raise
                except Exception as error:
                    return as_drop(FetchError("unexpected", f"{type(error).__name__}: {error}"))

            yield work

    def _columns(self, result: Picture | FetchError) -> dict[str, Any]:
        if isinstance(result, FetchError):
            return as_drop(result)
        columns = dict(vars(result))
        if self.compute_hash and self.compute_hash != "sha256":
            columns[self.compute_hash] = result.hash
        return columns
