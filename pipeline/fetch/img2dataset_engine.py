"""Runs img2dataset's own downloader and returns our columns: reproduces its behaviour exactly, and is a test oracle.

It runs in its own process, because it replaces the standard streams for every image, which breaks other threads, and so
that a decoder crash costs only its row. Results come back one by one through a pipe.

img2dataset does the fetching here, so our safety and politeness do NOT apply. It follows redirects to private
addresses, has no deadline per row and no limit on body size, ignores robots.txt, has no per-host limits, and identifies
itself as Firefox. We only withhold urls other than http and https from it (`file://` would read the local disk). Use it
only where no private service is reachable.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.child import start_child
from pipeline.fetch.decoder import Picture, checked_box, phash, sniff
from pipeline.fetch.deny import DenyList
from pipeline.fetch.reasons import FetchError
from pipeline.fetch.sandbox import EXTERNAL_SIGNALS

GROUP_ROWS = 256
PATIENCE = 120
"""Seconds without a finished row, beyond what `timeout` and `retries` allow, after which it counts as hung."""
RESIZER_OPTIONS = (
    "image_size",
    "resize_mode",
    "resize_only_if_bigger",
    "encode_format",
    "encode_quality",
    "skip_reencode",
    "min_image_size",
    "max_image_area",
    "max_aspect_ratio",
)
DOWNLOADER_OPTIONS = ("timeout", "retries", "extract_exif", "user_agent_token", "disallowed_header_directives")
OUR_OPTIONS = (
    "concurrency",
    "bbox_col",
    "compute_phash",
    "compute_hash",
    "verify_hash",
    "hash_mismatch",
    "deny_hashes",
)
Result = tuple[int, "Picture | FetchError"]

# img2dataset has no closed list of errors. These patterns are searched in its messages, most of which are urllib's and
# OpenCV's; the first match decides.
_MESSAGES: tuple[tuple[str, str], ...] = (
    (r"infinite loop", "redirect_loop"),
    (r"HTTP Error (\d{3})", "http_"),
    (r"disallowed by X-Robots-Tag", "opted_out"),
    (r"hash mismatch", "hash_mismatch"),
    (r"unknown url type", "bad_scheme"),
    (r"no host given|nonnumeric port|control characters|codec can't encode|idna|label (empty|too long)", "bad_url"),
    (r"Errno -3\b|Temporary failure in name resolution", "dns_unavailable"),
    (r"Errno -[25]\b|Name or service not known|No address associated", "dns"),
    (r"CERTIFICATE|SSL|TLS", "tls"),
    (r"timed out|Errno 110\b", "deadline"),
    (r"Connection reset|Remote end closed|Errno 104\b", "reset"),
    (r"Connection refused|unreachable|No route|Errno (101|111|113)\b", "connect"),
    (r"IncompleteRead", "body_truncated"),
    (r"got more than \d+ (headers|bytes)", "bad_response"),
    (r"image too small", "too_small"),
    (r"image area too large|CV_IO_MAX_IMAGE", "too_large"),
    (r"aspect ratio too large", "aspect_ratio"),
)


def failure(status: str | None, message: str | None) -> FetchError:
    """Maps `status` and `error_message` of img2dataset's tables to our reason."""
    detail = f"img2dataset: {message or status or 'no message'}"
    for pattern, reason in _MESSAGES:
        if found := re.search(pattern, message or ""):
            return FetchError(reason + found[1] if reason == "http_" else reason, detail)
    return FetchError("decode_error" if status == "failed_to_resize" else "unexpected", detail)


def download(table: pa.Table, options: Mapping[str, Any]) -> Iterator[list[Result]]:
    """Runs img2dataset over the rows of a table. Yields groups of (position in the table, picture or failure).

    Yields each row exactly once, in order of completion. `options` are those of `pipeline.stages.download`.
    RESIZER_OPTIONS and DOWNLOADER_OPTIONS have img2dataset's meanings (`timeout` limits a single network wait, not the
    row), OUR_OPTIONS have ours, and all others have no effect. Raises RuntimeError if img2dataset cannot run.
    """
    results = _results(table, options)
    while group := list(islice(results, GROUP_ROWS)):
        yield group


def _results(table: pa.Table, options: Mapping[str, Any]) -> Iterator[Result]:
    raw = table["url"].cast(pa.large_binary()).to_pylist()
    urls = [None if url is None else url.decode("utf-8", "replace") for url in raw]
    columns: dict[str, list[Any]] = {"url": urls}
    if options["bbox_col"]:
        columns["boxes"] = table[options["bbox_col"]].to_pylist()
    if options["verify_hash"]:
        columns["claim"] = table[options["verify_hash"][0]].to_pylist()
    job = {name: options[name] for name in (*RESIZER_OPTIONS, *DOWNLOADER_OPTIONS, *OUR_OPTIONS)}
    accepted: list[int] = []
    for row, url in enumerate(urls):
        scheme = (url or "").strip().partition(":")[0].lower()
        if scheme not in ("http", "https"):
            yield row, FetchError("bad_scheme" if url and ":" in url else "bad_url", url or "")
            continue
        try:
            for box in (columns["boxes"][row] or ()) if "boxes" in columns else ():
                checked_box(box)
            accepted.append(row)
        except FetchError as error:
            yield row, error
    todo = [accepted] if accepted else []
    while todo:
        rows = todo.pop()
        left = set(rows)
        child = _Child({**job, "columns": {name: [column[row] for row in rows] for name, column in columns.items()}})
        with contextlib.closing(child):
            for position, result in child:
                if rows[position] in left:
                    left.remove(rows[position])
                    yield rows[position], result
        rest = sorted(left)
        if child.stalled:
            yield from ((row, FetchError("deadline", "img2dataset made no progress on any row")) for row in rest)
        elif not child.died:
            yield from ((row, FetchError("unexpected", "img2dataset lost the row")) for row in rest)
        elif len(rest) == 1:
            reason = "decoder_killed" if child.killed else "decoder_crash"
            yield rest[0], FetchError(reason, "img2dataset died on this row")
        elif rest:  # bisect to find the row that crashes it
            todo += [rest[: len(rest) // 2], rest[len(rest) // 2 :]]


class _Child:
    """One img2dataset process. Iterates over (position, result), then sets `died`, `killed` or `stalled`."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.died = self.killed = self.stalled = False
        # Its threads wait `timeout` for each byte, so slow servers can block all of them forever.
        self._patience = PATIENCE + job["timeout"] * (job["retries"] + 1)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._results, writer = Pipe(duplex=False)
        with writer:
            self._process = start_child(
                __name__,
                str(writer.fileno()),
                env={"NO_ALBUMENTATIONS_UPDATE": "1"},  # disables its online version check
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[writer.fileno()],
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:  # if it died, __iter__ reports why
            stdin.write(json.dumps(job).encode())

    def __iter__(self) -> Iterator[tuple[int, Picture | FetchError]]:
        try:
            while self._results.poll(self._patience):
                fields = json.loads(self._results.recv_bytes())
                image = self._results.recv_bytes()
                yield fields.pop("position"), _result(fields, image)
            self.stalled = True
            self._process.kill()
        except (EOFError, OSError):  # OSError: it died in the middle of a message
            status = self._process.wait()
            self.died, self.killed = status < 0, -status in EXTERNAL_SIGNALS
            if status > 0:
                self._errors.seek(0)
                stderr = self._errors.read().decode(errors="replace").strip().splitlines()
                raise RuntimeError(f"engine: img2dataset failed to run: {stderr[-1] if stderr else status}") from None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._results.close()
        self._errors.close()


def _result(fields: dict[str, Any], image: bytes) -> Picture | FetchError:
    if "reason" in fields:
        return FetchError(fields["reason"], fields["detail"])
    status, message = fields.pop("status"), fields.pop("error_message")
    return Picture(image=image, **fields) if status == "success" else failure(status, message)


# --- In the child -----------------------------------------------------------------------------------------------------


class _Resizer:
    """img2dataset's resizer, preceded by our check of denied hashes. Keeps the body for the writer, which runs next in
    the same thread and needs more about the body than img2dataset passes on."""

    def __init__(self, resizer: Any, denied: DenyList | None) -> None:
        self._resizer, self.denied = resizer, denied
        self.body = b""
        self.refused: str | None = None

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> Any:
        self.body = stream.getvalue()
        self.refused = self.denied.find(self.body) if self.denied else None
        if self.refused:
            return None, None, None, None, None, "denied hash"
        return self._resizer(stream, boxes)


class _Writer:
    """An img2dataset sample writer that sends each row to the parent."""

    def __init__(self, results: Connection, resizer: _Resizer, job: dict[str, Any], *_: object) -> None:
        self._results, self._resizer, self._job = results, resizer, job

    def write(self, image: bytes | None, key: str, _: object, meta: dict[str, Any]) -> None:
        position, resizer = int(key), self._resizer
        fields: dict[str, Any] = {"status": meta["status"], "error_message": meta["error_message"]}
        denied, resizer.refused = resizer.refused, None
        bits = None
        if image is not None and not denied:
            if self._job["compute_phash"] or (resizer.denied and resizer.denied.holds_pictures):
                bits = _phash(image)
            denied = resizer.denied.find_picture(bits) if resizer.denied else None
        if denied:
            fields, image = {"reason": "denied_hash", "detail": denied}, None
        elif image is not None:
            claims = self._job["columns"].get("claim")
            fields |= self._measured(bits, meta) | self._hashes(claims[position] if claims else None)
        fields["position"] = position
        try:
            self._results.send_bytes(json.dumps(fields).encode())
            self._results.send_bytes(image or b"")
        except OSError:  # the parent is gone; img2dataset would continue
            os._exit(0)

    def _measured(self, bits: int | None, meta: dict[str, Any]) -> dict[str, Any]:
        body = self._resizer.body
        kind = sniff(body)
        animated = False
        if kind:
            with contextlib.suppress(Exception), Image.open(io.BytesIO(body), formats=[kind]) as source:
                animated = bool(getattr(source, "is_animated", False))
        names = ("width", "height", "original_width", "original_height", "sha256", "exif")
        return {name: meta.get(name) for name in names} | {
            "phash": bits if self._job["compute_phash"] else None,
            "animated": animated,
            "original_bytes": len(body),
            "original_format": kind.lower() if kind else None,
        }

    def _hashes(self, claim: str | None) -> dict[str, Any]:
        body, kind = self._resizer.body, self._job["compute_hash"]
        fields: dict[str, Any] = {"hash": hashlib.new(kind, body).hexdigest() if kind else None}
        if claim is not None:
            kind = self._job["verify_hash"][1]
            fields["hash_matches"] = hashlib.new(kind, body).hexdigest() == claim.strip().lower()
            if not fields["hash_matches"] and self._job["hash_mismatch"] == "reject":
                fields |= {"reason": "hash_mismatch", "detail": f"{kind} is not {claim}"}
        return fields

    def close(self) -> None:
        pass


def _phash(image: bytes) -> int | None:
    with Image.open(io.BytesIO(image)) as picture:
        return phash(np.asarray(picture.convert("RGB")))


def _main(argv: Sequence[str]) -> None:
    from img2dataset.blurrer import BoundingBoxBlurrer
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer

    job = json.load(sys.stdin)
    results = Connection(int(argv[0]), readable=False)
    columns = {name: column for name, column in job["columns"].items() if name != "claim"}
    blurrer = BoundingBoxBlurrer() if "boxes" in columns else None
    resizer = _Resizer(
        Resizer(**{name: job[name] for name in RESIZER_OPTIONS}, blurrer=blurrer),
        DenyList(job["deny_hashes"]) if job["deny_hashes"] else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.arrow"
        table = pa.table(columns)
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
        Downloader(
            sample_writer_class=functools.partial(_Writer, results, resizer, job),
            resizer=resizer,
            thread_count=job["concurrency"],
            save_caption=False,
            output_folder=folder,
            column_list=list(columns),
            number_sample_per_shard=max(2, len(table)),
            oom_shard_count=5,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format=job["encode_format"],
            blurring_bbox_col="boxes" if blurrer else None,
            **{name: job[name] for name in DOWNLOADER_OPTIONS},
        ).download_shard((0, path))


if __name__ == "__main__":
    _main(sys.argv[1:])
