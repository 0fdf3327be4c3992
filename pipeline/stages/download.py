"""The download stage: fetches urls and turns the responses into small, clean images."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import pyarrow as pa

from pipeline.fetch import img2dataset_engine, quality
from pipeline.fetch.client import Client, Limits, tls_context
from pipeline.fetch.concurrent_rows import Begin, ConcurrentRows, Work, as_drop, table_of, with_columns
from pipeline.fetch.decoder import MAX_SIDE, DecodeMode, Decoder, EncodeFormat, HashType, Picture, ResizeMode, Rules
from pipeline.fetch.deny import DenyList
from pipeline.fetch.guard import parse_addr
from pipeline.fetch.hosts import Exchange, HostLimiter, Politeness
from pipeline.fetch.outage import OutageError
from pipeline.fetch.reasons import FetchError
from pipeline.fetch.sandbox import Sandbox, SandboxError, set_malloc
from pipeline.models import plugin
from pipeline.schema import INLINE, PICTURE, carried, holds_boxes
from pipeline.step import FILE, Estimate, Stage
from pipeline.text.hashing import file_digest

GROUP_ROWS = 256
# Rows held by the event loop, most of them waiting for their host. They take at most 12 MB, and are enough to look far
# past the slow hosts of a unit.
ADMITTED_ROWS = 4096
_SPEED = {"speed": True}  # marks options that affect only speed, not results

BOUNDS: dict[str, tuple[float, float]] = {
    "timeout": (0.01, 86_400),
    "retries": (0, 1_000),
    "concurrency": (1, 100_000),
    "per_host": (1, 100_000),
    "decode_processes": (1, 1_000),
    "decode_timeout": (0.01, 86_400),
    "decode_memory": (1, 1 << 40),
}
"""Ranges of the options for which a mistyped number would overload the machine or disable a limit."""


@dataclass(kw_only=True)
class Download(Stage):
    """Fetches each url, then checks, decodes, resizes and re-encodes the image. Names and meanings are img2dataset's.

    Adds the encoded `image` and its measurements. `original_width` and `original_height` are the size of the upright
    image before resizing. `animated` is true if more frames follow the one taken. `sha256` is the hash of the bytes as
    fetched. `phash` is imagehash.phash of the picture as encoded, 64 bits, most significant bit first; null for a flat
    picture, which has no structure to hash. `usage` holds the publisher's statements about use of the picture, one per
    line ("Content-Usage: search=n"), or null if there are none. A row without an image is dropped for one of the
    reasons in `pipeline.fetch.reasons`.
    """

    needs: ClassVar[tuple[str, ...]] = ("url",)
    adds: ClassVar[dict[str, pa.DataType]] = {**PICTURE, "usage": pa.string()}
    version: ClassVar[int] = 4
    expensive: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False

    engine: Literal["winnow", "img2dataset"] = "winnow"
    """`img2dataset` runs its own downloader, without our safety and politeness: docs/fetching.md."""
    image_size: int = 256
    """Length in pixels of the side chosen by `resize_mode`."""
    resize_mode: ResizeMode = "keep_ratio_largest"
    """`keep_ratio_largest`: longest side; `keep_ratio`: shortest side; `center_crop`: shortest side, then a square;
    `border`: longest side, then a white square; `no`."""
    resize_only_if_bigger: bool = True
    """Leave smaller images unchanged (neither cropped nor padded)."""
    encode_format: EncodeFormat = "jpg"
    """jpg, png or webp."""
    encode_quality: int = 95
    """0 to 100 for jpg and webp; compression level 0 to 9 for png."""
    skip_reencode: bool = False
    """Keep the original bytes, including metadata and any data after the picture, if nothing needs to change."""
    decode: DecodeMode = "scaled"
    """How to decode a JPEG that will shrink: `exact` in full; `scaled` at the smallest scale of at least 1.5 times the
    target; `fast` at the smallest scale that covers the target. Trade-offs: docs/fetching.md."""
    inline: bool = False
    """Use the pictures in the pool (`pool.image`), by the same rules as fetched ones. Rows without one are fetched."""
    bbox_col: str | None = None
    """A column of boxes to blur, such as faces: lists of [x_min, y_min, x_max, y_max] in the upright image, 0 to 1.
    Boxes may reach beyond the border, from −1 to 2. A row with any other box, such as one in pixels, is dropped
    (`bad_box`), because it would be stored unblurred. null means no boxes."""
    blur_detector: str | None = None
    """Import path of a detector, `my_package.my_module:MyClass`; the boxes that it finds are blurred too. It is called
    without arguments in each decoder process and returns a callable from (height, width, 3) uint8 RGB to boxes as in
    `bbox_col`. It sees the picture before resizing, at the size at which `decode` reads it. Raise `decode_memory` and
    `decode_timeout` by what it needs. A picture is dropped if the detector fails (`decode_error`) or finds an invalid
    box (`bad_box`)."""
    min_image_size: int = 0
    """Minimum shorter side, in pixels."""
    max_image_area: float = 36_000_000
    """Maximum number of pixels, of the original and of the result."""
    max_aspect_ratio: float = float("inf")
    """Maximum of longer side / shorter side."""
    extract_exif: bool = True
    """Fill `exif` with the tags as a JSON object of strings."""
    compute_phash: bool = True
    """Fill `phash`, used by `near_dedup` and `placeholder`. Without it, decoding takes 10% less CPU time."""
    image_quality: bool = False
    """Add `dark_score`, `light_score`, `blurry_score` and `low_information_score`, for the filter `image_quality`.
    Takes 0.3 ms of CPU time per picture."""
    compute_hash: HashType | None = None
    """A further hash of the bytes as fetched, in a column named after it. `sha256` is always computed."""
    verify_hash: list[str] | None = None
    """`[column, md5 | sha1 | sha256 | sha512]`: the column with the expected hash of the bytes, in hex. Rows with null
    are not checked."""
    hash_mismatch: Literal["reject", "flag"] = "reject"
    """On a hash mismatch: drop the row, or keep it and record the result in the column `hash_matches`."""
    deny_hashes: str | None = field(default=None, metadata=FILE)
    """A file of md5, sha1 or sha256 digests or pHashes in hex, one per line. Bodies with a listed digest are dropped
    before decoding. Pictures within 4 bits of a listed pHash are dropped after decoding."""

    timeout: float = 10.0
    """Total seconds for a row, including redirects, retries and back-off, but not the wait for a busy host."""
    retries: int = 2
    """Further attempts after a transient failure, within `timeout`."""
    max_bytes: int = 20_000_000
    """Maximum size of a body, in bytes."""
    min_rate: int = 1000
    """Minimum transfer rate in bytes/s, averaged over 3 s. Slower bodies are abandoned."""
    user_agent_token: str = "winnow"
    """The crawler's name in the User-Agent, robots.txt and X-Robots-Tag."""
    user_agent_contact: str = ""
    """A URL or email address for publishers, sent in the User-Agent."""
    disallowed_header_directives: list[str] = field(
        default_factory=lambda: ["noai", "noimageai", "noml", "noindex", "noimageindex"]
    )
    """X-Robots-Tag directives treated as opt-outs."""
    robots_txt: bool = True
    """Obey robots.txt (RFC 9309)."""
    content_usage: list[str] = field(default_factory=lambda: ["train-ai", "all"])
    """Obey Content-Usage (IETF aipref) in headers and robots.txt. The first of these categories for which the publisher
    states a preference decides. `[]` ignores Content-Usage."""
    tdm_reservation: bool = True
    """Obey the header `tdm-reservation: 1` (TDMRep)."""
    tdmrep_json: bool = True
    """Obey `/.well-known/tdmrep.json` (TDMRep): one more request to each host that has a robots.txt."""
    host_failures: int = 10
    """Consecutive failures after which a host is skipped for a while (`host_down`). 0 disables this."""
    host_wait: float = 600.0
    """Seconds that a row waits for a busy host before it is dropped as `host_busy`. 0 waits forever."""
    allow_addrs: list[str] = field(default_factory=list)
    """Non-public addresses that may be dialled, each with a port: "127.0.0.1:8765"."""

    concurrency: int = field(default=256, metadata=_SPEED)
    """Concurrent rows per worker, from the first request to the finished image."""
    per_host: int = field(default=8, metadata=_SPEED)
    """Concurrent requests per host, over all workers."""
    per_host_rate: float = field(default=0.0, metadata=_SPEED)
    """Maximum requests per second and host, over all workers. 0 is unlimited. Crawl-delay applies too, up to 10 s."""
    bytes_in_flight: int = field(default=64_000_000, metadata=_SPEED)
    """Maximum total bytes of bodies in memory. Bodies under 256 KiB are not counted."""
    decode_processes: int = field(default=1, metadata=_SPEED)
    """Decoder processes per worker. The executor starts one worker per CPU."""
    decode_timeout: float = 10.0
    """CPU seconds allowed to decode and encode one image."""
    decode_memory: int = 200_000_000
    """Bytes of memory allowed to decode and encode one image. Enough for the default `max_image_area` in most formats,
    for 33 megapixels of a progressive JPEG in full colour, for 29 of a WebP, and for 12 of a WebP with transparency,
    metadata or frames."""

    limiter: ClassVar[Exchange | None] = None
    """Shares per-host limits between workers. Set on the instance if several workers run."""

    def __post_init__(self) -> None:
        # A pool column is carried under another name if its name clashes with one of ours.
        self._boxes = carried(self.bbox_col) if self.bbox_col else None
        self._claim = carried(self.verify_hash[0]) if self.verify_hash else None
        further = (self._boxes, self._claim, INLINE if self.inline else None)
        self.needs = ("url", *filter(None, further))  # type: ignore[misc]
        self.adds = dict(type(self).adds)  # type: ignore[misc]
        if not self.compute_phash:
            del self.adds["phash"]
        if self.image_quality:
            self.adds.update(quality.SCORES)
        if self.compute_hash:
            self.adds[self.compute_hash] = pa.string()
        if self.verify_hash and self.hash_mismatch == "flag":
            self.adds["hash_matches"] = pa.bool_()

    def estimate(self, rows: float) -> Estimate:
        basis = "keep assumed (link rot); stored: LAION-400M at 256 px is 10 TB; 110 KB fetched assumed"
        return Estimate(0.75, 120, basis, stored=25_000, fetched=110_000)

    def check(self) -> Iterator[tuple[str, str]]:
        for key in ("image_size", "max_bytes", "bytes_in_flight"):
            if getattr(self, key) <= 0:
                yield key, f"{getattr(self, key)} must be above 0"
        for key, (low, high) in BOUNDS.items():
            if not low <= getattr(self, key) <= high:
                yield key, f"{getattr(self, key)} must be {low:,} to {high:,}"
        if self.image_size > (widest := MAX_SIDE[self.encode_format]):
            yield "image_size", f"{self.image_size} must be at most {widest:,}, the widest {self.encode_format}"
        for key in ("min_rate", "min_image_size", "per_host_rate", "host_wait", "host_failures"):
            if getattr(self, key) < 0:
                yield key, f"{getattr(self, key)} must be 0 or more"
        if self.max_aspect_ratio < 1:
            yield "max_aspect_ratio", f"{self.max_aspect_ratio} must be 1 or more (longer side / shorter side)"
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
                yield "content_usage", f"{category!r} must be a lower-case category such as train-ai"
        if self.blur_detector is not None and (found := plugin.problem(self.blur_detector)) is not None:
            yield "blur_detector", found
        for key in ("inline", "image_quality", "blur_detector"):
            if getattr(self, key) and self.engine != "winnow":
                yield key, f"not supported by the engine {self.engine}; leave `engine` out"
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
            yield "verify_hash", f"the column {self._claim!r} must hold digests in hex, found type {claim}"
        if boxes is not None and not holds_boxes(boxes):
            yield "bbox_col", f"the column {self._boxes!r} must hold lists of boxes, found type {boxes}"

    def fingerprint(self) -> object:
        return file_digest(self.deny_hashes) if self.deny_hashes else None

    def honours(self) -> Iterator[str]:
        if self.disallowed_header_directives:
            yield f"X-Robots-Tag ({', '.join(self.disallowed_header_directives)})"
        if self.engine == "img2dataset":  # does not support the others
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
        return HostLimiter, (self.per_host,)

    def connect(self, shared: Any) -> None:
        self.limiter = shared  # type: ignore[misc]

    def setup(self) -> None:
        tls_context()
        # By default, glibc raises the mmap threshold with each large block it frees, until bodies come from a heap that
        # never shrinks: 50% more memory than the bodies in flight. With the default trim threshold, pages of bodies are
        # constantly returned to the kernel and mapped again: 10% of the fetching time.
        set_malloc(mmap_threshold=1 << 20, trim_threshold=16 << 20)

    def process(self, batch: pa.Table) -> pa.Table:
        done = [*self.stream([batch]), with_columns(batch.slice(0, 0), [], self.adds)]
        return pa.concat_tables(done).sort_by([("unit", "ascending"), ("row", "ascending")])

    def stream(self, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yields finished rows in order of completion, at most 256 per table, with dropped rows marked. The requests of
        consecutive batches overlap."""
        if self.engine == "img2dataset":
            options = {f.name: getattr(self, f.name) for f in fields(self)} | {"bbox_col": self._boxes}
            if self.verify_hash:
                options["verify_hash"] = [self._claim, self.verify_hash[1]]
            for batch in batches:
                for group in img2dataset_engine.download(batch, options):
                    yield table_of([(batch, row, self._columns(result)) for row, result in group], self.adds)
            return
        for finished in self._rows_at_work(batches):
            yield table_of(finished, self.adds)

    @cached_property
    def _rows_at_work(self) -> ConcurrentRows[dict[str, Any]]:
        return ConcurrentRows(
            copy(self)._open,  # a copy: a reference to self would keep the thread alive forever
            # `url` stands in for columns that are not used.
            columns=["url", self._claim or "url", self._boxes or "url", INLINE if self.inline else "url"],
            concurrency=self.concurrency,
            # Rows with inline pictures are large.
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
        politeness = Politeness(**{f.name: options[f.name] for f in fields(Politeness)})
        rules = Rules(**{f.name: options[f.name] for f in fields(Rules)})
        decoders = Sandbox(
            Decoder(rules),
            processes=self.decode_processes,
            seconds=self.decode_timeout,
            memory=self.decode_memory,
        )
        async with decoders, Client(limits, politeness=politeness, limiter=self.limiter) as client:

            async def work(values: tuple[Any, ...], begin: Begin) -> dict[str, Any]:
                url, claim, boxes, body = values
                extra = (claim if self.verify_hash else None, boxes or () if self.bbox_col else ())
                try:
                    if self.inline and body is not None:
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
        if self.compute_hash:
            columns[self.compute_hash] = result.hash
        return columns
