"""A web of misbehaving hosts, one behaviour per host with 15 rows each, all fetched in one run.

The server runs in its own process, so the measurements cover only the fetcher.
"""

from __future__ import annotations

import gc
import gzip
import io
import multiprocessing
import socket
import ssl
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from PIL import Image

from pipeline.fetch import client as client_module
from pipeline.fetch import resolver as resolver_module
from pipeline.fetch.reasons import find
from pipeline.stages.download import Download
from tests.conftest import HUNG
from tests.fetch import process_tree
from tests.fetch.certificates import issue
from tests.fetch.hostile_images import chunk, encoded, gif, jpeg_claiming, png, webp_canvas, webp_lossless
from tests.fetch.server import (
    JPEG,
    Answer,
    Server,
    answer,
    cut,
    first_then,
    flood,
    jpeg,
    raw,
    redirect,
    reset,
    silence,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc")

ROWS = 15
TIMEOUT = 10.0
MAX_BYTES = 2_000_000
# Time for 300 rows of small pictures on an idle machine, including the start of the decoder. All times of this
# test are multiplied by the machine's current slowdown.
IDLE_SECONDS = 2.0
# Failures that trip the breaker of their host.
NO_ANSWER = {"connect", "reset", "tls", "deadline", "too_slow"}
# Slots for rows that must not wait for slow ones.
QUICK = 64

OK = answer(body=JPEG)
HEAD = b"HTTP/1.1 200 OK\r\n"
LENGTH = f"Content-Length: {len(JPEG)}\r\n".encode()
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE_CHUNK = f"{len(JPEG):x}\r\n".encode() + JPEG + b"\r\n0\r\n\r\n"
NOW = datetime.now(timezone.utc)


def tagged(*values: str) -> Answer:
    """The image with one X-Robots-Tag header per value."""
    lines = "".join(f"X-Robots-Tag: {value}\r\n" for value in values).encode()
    return raw(HEAD + lines + LENGTH + b"\r\n" + JPEG)


def busy(retry_after: str) -> Answer:
    return answer("429 Too Many Requests", Retry_After=retry_after)


def moved(location: bytes) -> Answer:
    """A redirect whose Location has exactly these bytes."""
    return raw(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n")


def for_host(right: Answer) -> Answer:
    """Answers only if the Host header names the dialled host."""

    async def reply(server: Server, writer: Any, headers: dict[str, str]) -> None:
        address = writer.get_extra_info("sockname")[0]
        wrong = answer("421 Misdirected Request")
        await (right if headers.get("host") == f"{address}:{server.port}" else wrong)(server, writer, headers)

    return reply


@dataclass
class Behaviour:
    answer: Answer | None
    """None if the path answers 404 or the host is a special one."""
    reasons: Collection[str | None]
    """The acceptable reasons; None stands for a kept row."""
    url: str = "http://{host}:{port}/{name}?{row}"
    slow: bool = False
    """True if its rows take seconds."""
    tls: str = ""
    """The certificate that the host presents, if any."""
    listens: str = "yes"
    """"no": connections are refused; "mute": they are established but never served."""


def slow(answer: Answer | None, *reasons: str | None, **options: Any) -> Behaviour:
    return Behaviour(answer, reasons, slow=True, **options)


def body(data: bytes, reason: str | None, **headers: str) -> Behaviour:
    return Behaviour(answer(body=data, **headers), [reason])


def one(answer: Answer | None, *reasons: str | None, **options: Any) -> Behaviour:
    return Behaviour(answer, reasons, **options)


# A host that occurs only in a redirect, and one that must not be dialled, on a port allowed at other addresses.
STALLING = "127.1.254.1"
NEIGHBOUR = "127.1.255.1"
TLS = "https://{host}:{port}/ok?{row}"
TABLE: dict[str, Behaviour] = {
    # Connections
    "refused": one(None, "connect", listens="no"),
    "mute": slow(None, "deadline", listens="mute"),
    "closed_at_once": one(reset, "reset"),
    "reset_before_the_answer": one(cut(b""), "reset"),
    "reset_in_headers": one(cut(HEAD + b"Content-Ty"), "reset"),
    "reset_in_body": one(cut(HEAD + LENGTH + b"\r\n" + JPEG[:500]), "body_truncated", "reset"),
    "silent": slow(silence, "deadline"),
    # TLS
    "tls_fine": one(None, None, url=TLS, tls="fine"),
    "tls_self_signed": one(None, "tls", url=TLS, tls="self_signed"),
    "tls_wrong_host": one(None, "tls", url=TLS, tls="wrong_host"),
    "tls_expired": one(None, "tls", url=TLS, tls="expired"),
    "tls_not_spoken": one(None, "tls", url=TLS),
    "tls_stalls": slow(None, "deadline", url=TLS, listens="mute"),
    "tls_unasked": one(None, "reset", "bad_response", url="http://{host}:{port}/ok", tls="fine"),
    # Names
    "name_fine": one(None, None, url="http://fine.example:{port}/ok?{row}"),
    "name_missing": one(None, "dns", url="http://missing.example/{row}"),
    "name_unanswered": one(None, "dns_unavailable", url="http://unanswered.example/{row}"),
    "name_asked_forever": slow(None, "deadline", url="http://forever.example/{row}"),
    "name_of_private_address": one(None, "addr_denied", url="http://private.example:{canary}/{row}"),
    "name_with_one_good_address": one(None, None, url="http://mixed.example:{port}/ok?{row}"),
    "name_that_rebinds": one(redirect("/ok"), None, url="http://rebinding.example:{port}/{name}?{row}"),
    "name_that_moves_to_canary": one(
        redirect("http://moving.example:{server.canary}/"), "addr_denied", url="http://moving.example:{port}/{name}?{row}"
    ),
    # Statuses
    "404": one(answer("404 Not Found", b"gone"), "http_404"),
    "410": one(answer("410 Gone"), "http_410"),
    "451": one(answer("451 Unavailable For Legal Reasons", b"no"), "http_451"),
    "999": one(answer("999 Request denied"), "http_999"),
    "500": one(answer("500 Oops", b"sorry"), "http_500"),
    "503_then_fine": one(first_then(answer("503 Busy"), OK), None),
    "429_seconds": one(first_then(busy("1"), OK), None),
    "429_date": one(busy(format_datetime(NOW + timedelta(hours=2), usegmt=True)), "http_429"),
    "429_past_date": one(first_then(busy(format_datetime(NOW - timedelta(hours=2), usegmt=True)), OK), None),
    "429_absurd_seconds": one(busy("999999999"), "http_429"),
    "429_absurd_number": one(busy("9" * 5000), "http_429"),
    "429_absurd_date": one(busy("Fri, 31 Dec 9999 23:59:59 GMT"), "http_429"),
    "429_nonsense": one(busy("whenever -- \x01"), "http_429", "bad_response"),
    "503_for_an_hour": one(answer("503 Busy", Retry_After="3600"), "http_503"),
    "204": one(answer("204 No Content", length=""), "http_204"),
    "206": one(answer("206 Partial Content", JPEG), "http_206"),
    "304": one(answer("304 Not Modified", length=""), "http_304"),
    "300": one(answer("300 Multiple Choices", Location="/ok"), "http_300"),
    "100_then_fine": one(raw(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + LENGTH + b"\r\n" + JPEG), None),
    "103_then_fine": one(raw(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HEAD + LENGTH + b"\r\n" + JPEG), None),
    "103_without_end": slow(flood(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", pause=0.05), "deadline", "bad_response"),
    "101": one(raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"), "http_101"),
    # Redirects
    "redirect_to_itself": one(redirect("/redirect_to_itself"), "redirect_loop"),
    "redirect_loop": one(redirect("/redirect_back"), "redirect_loop"),
    "redirect_chain": one(redirect("/chain1"), "too_many_redirects"),
    "redirect_to_fine": one(redirect("/ok"), None),
    "redirect_to_canary": one(redirect("http://127.0.0.1:{server.canary}/"), "addr_denied"),
    "redirect_to_canary_by_name": one(redirect("http://private.example:{server.canary}/"), "addr_denied"),
    "redirect_to_canary_in_hex": one(redirect("http://0x7f000001:{server.canary}/"), "addr_denied", "bad_url", "dns"),
    "redirect_to_canary_mapped": one(redirect("http://[::ffff:127.0.0.1]:{server.canary}/"), "addr_denied"),
    "redirect_to_canary_v6": one(redirect("http://[::1]:{server.canary}/"), "addr_denied"),
    "redirect_to_canary_tls": one(redirect("https://127.0.0.1:{server.canary}/"), "addr_denied"),
    "redirect_to_neighbour": one(redirect(f"http://{NEIGHBOUR}:{{server.port}}/"), "addr_denied"),
    "redirect_to_private": one(redirect("http://10.0.0.1/a.jpg"), "addr_denied"),
    "redirect_to_metadata": one(redirect("http://169.254.169.254/latest/meta-data/"), "addr_denied"),
    "redirect_to_file": one(redirect("file:///etc/passwd"), "bad_scheme"),
    "redirect_to_ftp": one(redirect("ftp://127.0.0.1:{server.canary}/a.jpg"), "bad_scheme"),
    "redirect_to_gopher": one(redirect("gopher://127.0.0.1:{server.canary}/_INFO"), "bad_scheme"),
    "redirect_to_data": one(redirect("data:image/png;base64,iVBORw0KGgo="), "bad_scheme"),
    "redirect_to_stalling_host": slow(redirect(f"http://{STALLING}:{{server.port}}/"), "deadline"),
    "redirect_with_password": one(redirect("http://a:b@127.0.0.1:{server.port}/ok"), "bad_url"),
    "redirect_nowhere": one(answer("302 Found"), "bad_response"),
    "redirect_far": one(redirect("/" + "a" * 8100), "bad_url"),
    "redirect_without_scheme": one(redirect("//127.0.0.1:{server.port}/ok"), None),
    "redirect_without_slashes": one(redirect("www.example.com/ok"), "http_404"),
    "redirect_in_utf8": one(moved("/café".encode()), None),
    "redirect_in_latin1": one(moved("/café".encode("latin-1")), None),
    "redirect_splitting": one(redirect("/ok%0d%0aX-Injected:%20yes"), "http_404"),
    "redirect_with_carriage_return": one(moved(b"/ok\rX-Injected: yes"), "bad_response", "bad_url"),
    "redirect_with_zero_byte": one(moved(b"/ok\x00"), "bad_response", "bad_url"),
    # Opting out
    "noai": one(tagged("noai"), "opted_out"),
    "noindex_in_a_list": one(tagged("nofollow, NoIndex"), "opted_out"),
    "noai_for_us": one(tagged("winnow: noai"), "opted_out"),
    "noai_for_another": one(tagged("otherbot: noai, noindex"), None),
    "noai_in_the_second_header": one(tagged("otherbot: nofollow", "noimageai"), "opted_out"),
    "noai_on_a_redirect": one(redirect("/ok", X_Robots_Tag="noai"), "opted_out"),
    "noai_after_a_redirect": one(redirect("/noai"), "opted_out"),
    "noai_many_times": one(tagged(*["otherbot: noai"] * 50), None),
    # Headers
    "headers_without_end": one(flood(HEAD, b"X-A: b\r\n" * 100), "bad_response"),
    "header_without_end": one(flood(HEAD + b"X-A: ", b"b" * 1000), "bad_response"),
    "headers_100_000": one(raw(HEAD + b"X-A: b\r\n" * 100_000 + LENGTH + b"\r\n" + JPEG), "bad_response"),
    "headers_one_byte_a_second": slow(flood(b"", b"H", pause=1.0), "deadline", "bad_response"),
    "status_line_huge": one(raw(b"HTTP/1.1 200 " + b"O" * 300_000 + b"\r\n" + LENGTH + b"\r\n" + JPEG), "bad_response"),
    "header_with_zero_byte": one(raw(HEAD + b"X-A: \x00\r\n" + LENGTH + b"\r\n" + JPEG), "bad_response"),
    "header_without_colon": one(raw(HEAD + b"nonsense\r\n" + LENGTH + b"\r\n" + JPEG), None),
    "header_injection": one(raw(HEAD + b"X-A: b\rContent-Length: 3\r\n" + LENGTH + b"\r\n" + JPEG), "bad_response"),
    "http_1_0": one(raw(b"HTTP/1.0 200 OK\r\n\r\n" + JPEG), None),
    "http_0_9": one(raw(JPEG), "bad_response"),
    "http_9": one(raw(b"HTTP/9.9 200 OK\r\n" + LENGTH + b"\r\n" + JPEG), "bad_response", None),
    "not_http": one(raw(b"220 mail.example ESMTP\r\n"), "bad_response"),
    "shoutcast": one(raw(b"ICY 200 OK\r\n\r\n" + JPEG), "bad_response"),
    "status_of_four_digits": one(raw(b"HTTP/1.1 2000 OK\r\n" + LENGTH + b"\r\n" + JPEG), "bad_response"),
    "cookies": one(first_then(answer("503 Busy", Set_Cookie="id=1; Path=/"), OK), None),
    "cookies_on_a_redirect": one(redirect("/ok", Set_Cookie="id=2; Path=/; Domain=127.0.0.1"), None),
    "right_host": one(for_host(OK), None),
    "misdirected": one(answer("421 Misdirected Request"), "http_421"),
    "html_type": one(answer(body=JPEG, Content_Type="text/html"), None),
    # Bodies in transit
    "no_length": one(raw(HEAD + b"\r\n" + JPEG), None),
    "no_length_no_end": slow(flood(HEAD + b"\r\n" + JPEG, b"", pause=0.2), "too_slow"),
    "length_too_small": one(answer(body=JPEG, length="300", close=True), "decode_error"),
    "length_short_of_a_newline": one(answer(body=JPEG + b"\r\n", length=str(len(JPEG))), None),
    "length_repeated": one(raw(HEAD + LENGTH + LENGTH + b"\r\n" + JPEG), None),
    "length_too_large": one(answer(body=JPEG, length=str(len(JPEG) + 1), close=True), "body_truncated"),
    "length_too_large_and_open": slow(answer(body=JPEG, length=str(len(JPEG) + 1)), "too_slow"),
    "length_negative": one(answer(body=JPEG, length="-1"), "bad_response"),
    "length_in_words": one(answer(body=JPEG, length="many"), "bad_response"),
    "length_beyond_64_bits": one(answer(body=JPEG, length="9" * 40), "bad_response", "body_too_large"),
    "length_beyond_the_cap": one(answer(body=JPEG, length="99999999999"), "body_too_large"),
    "length_twice": one(raw(HEAD + LENGTH + b"Content-Length: 7\r\n\r\n" + JPEG), "bad_response"),
    "length_and_chunked": one(raw(HEAD + LENGTH + CHUNKED[len(HEAD):] + WHOLE_CHUNK), None),
    "chunked": one(raw(CHUNKED + WHOLE_CHUNK), None),
    "chunked_garbage": one(raw(CHUNKED + b"5\r\nhello\r\nzz\r\nabc\r\n"), "bad_response"),
    "chunked_negative": one(raw(CHUNKED + b"-5\r\nhello\r\n"), "bad_response"),
    "chunked_beyond_64_bits": one(raw(CHUNKED + b"f" * 40 + b"\r\nhello"), "bad_response"),
    "chunked_cut": one(raw(CHUNKED + b"fff\r\nabc"), "body_truncated"),
    "chunk_extension_without_end": slow(flood(CHUNKED + b"5;", b"a" * 1000, pause=0.05), "too_slow", "bad_response"),
    "trailers_without_end": slow(
        flood(CHUNKED + b"1\r\n\xff\r\n0\r\n", b"X-A: b\r\n" * 100, pause=0.05), "too_slow", "bad_response"
    ),
    "endless": one(flood(HEAD + b"\r\n", JPEG + bytes(60_000)), "body_too_large"),
    "endless_chunked": one(flood(CHUNKED, b"10000\r\n" + bytes(65536) + b"\r\n"), "body_too_large"),
    "one_byte_a_second": slow(flood(HEAD + LENGTH + b"\r\n", b"\xff", pause=1.0), "too_slow"),
    "stalls_in_body": slow(flood(HEAD + LENGTH + b"\r\n" + JPEG[:300], b"", pause=0.2), "too_slow"),
    "empty": body(b"", "empty_body"),
    "gzip_bomb": body(gzip.compress(bytes(50_000_000), 9), "content_encoding", Content_Encoding="gzip"),
    "brotli_bomb": body(bytes(range(256)), "content_encoding", Content_Encoding="br"),
    "deflate": body(JPEG, "content_encoding", Content_Encoding="identity, deflate"),
    "gzip_as_transfer": one(
        raw(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + WHOLE_CHUNK), "bad_response", None
    ),
    # Not images
    "html": body(b"<!doctype html><title>Not found</title>", "not_an_image", Content_Type="image/jpeg"),
    "svg": body(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "not_an_image"),
    "eps": body(b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file", "not_an_image"),
    "tiff": body(encoded("TIFF"), "not_an_image"),
    "pdf": body(encoded("PDF"), "not_an_image"),
    "mp4": body(b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41", "not_an_image"),
    "html_then_jpeg": body(b"<html>" + JPEG, "not_an_image"),
    # Images with false headers
    "png_bomb": body(png(100_000, 100_000), "too_large"),
    "png_bomb_of_one_bit": body(png(30_000, 30_000, bytes(30_000 * 3751), bits=1, colour=0), "too_large"),
    "png_pixel_bomb": body(png(16, 16, bytes(50_000_000)), None),
    "png_text_bomb": body(
        png(2, 2, bytes(14), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9))), None
    ),
    "gif_bomb": body(gif((65535, 65535), (65535, 65535)), "too_large"),
    "gif_frame_bomb": body(gif((16, 16), (65535, 65535)), "too_large"),
    "webp_bomb": body(webp_canvas(16_383, 16_383), "too_large"),
    "webp_lossless_bomb": body(webp_lossless(16_384, 16_384), "too_large"),
    "jpeg_bomb": body(jpeg_claiming(65_535, 65_535), "too_large"),
    "jpeg_progressive_bomb": body(jpeg_claiming(65_535, 65_535, progressive=True), "too_large"),
    "1_x_65535": body(png(1, 65_535, bytes(4 * 65_535)), "aspect_ratio"),
    "0_x_0": body(png(0, 0), "decode_error"),
    "truncated_jpeg": body(JPEG[: len(JPEG) // 2], "decode_error"),
    "truncated_png": body(encoded("PNG")[:-2000], "decode_error"),
    "truncated_gif": body(encoded("GIF")[:-2000], "decode_error"),
    "truncated_webp": body(encoded("WEBP")[:-100], "decode_error"),
    "corrupt_png": body(encoded("PNG").replace(b"IDAT", b"IDAT\xff", 1), "decode_error"),
    "magic_alone": body(b"\xff\xd8\xff", "decode_error"),
    # Polyglots
    "gif_and_script": body(encoded("GIF") + b"/*;*/=1;alert(1)", None),
    "jpeg_and_zip": body(JPEG + b"PK\x05\x06" + bytes(18), None),
    "jpeg_and_php": body(JPEG[:2] + b"\xff\xfe\x00\x19<?php phpinfo(); ?> " + JPEG[2:], None),
    "jpeg_and_html": body(JPEG + b"<script>alert(1)</script>", None),
    # Control
    "ok": body(JPEG, None),
    "large": body(jpeg(900, 700), None),
}  # fmt: skip
PATHS: dict[str, Answer] = {
    "redirect_back": redirect("/redirect_loop"),
    **{f"chain{n}": redirect(f"/chain{n + 1}") for n in range(1, 7)},
    "chain7": OK,
    "caf%C3%A9": OK,
    "caf%E9": OK,
}
HOSTS = {name: f"127.1.{i // 100}.{i % 100 + 1}" for i, name in enumerate(TABLE)}
# The answers of the resolver for each name, in turn; the last one repeats.
NAMES = {
    "fine.example": [[HOSTS["name_fine"]]],
    "private.example": [["127.0.0.1", "10.0.0.1", "::1"]],
    "mixed.example": [["127.0.0.1", "192.168.1.1", HOSTS["name_with_one_good_address"]]],
    "rebinding.example": [[HOSTS["name_that_rebinds"]], [NEIGHBOUR]],
    "moving.example": [[HOSTS["name_that_moves_to_canary"]], ["127.0.0.1"]],
}


class Seen(NamedTuple):
    """The server's final report."""

    canary_hits: int
    cookies: list[str]
    headers: set[str]
    hits: Counter[str]


def serve(pipe: Connection, folder: Path) -> None:
    """The server's process. Sends its port and the canary's, and its report when told to end."""

    def context(kind: str) -> ssl.SSLContext | None:
        if not kind:
            return None
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(folder / f"{kind}.pem")
        return made

    answers = {name: b.answer for name, b in TABLE.items() if b.answer} | PATHS
    hosts = {HOSTS[name]: context(b.tls) for name, b in TABLE.items() if b.listens == "yes"}
    server = Server(answers, hosts, [NEIGHBOUR])
    # The kernel completes connections that are never accepted.
    mute = [STALLING, *(HOSTS[name] for name, b in TABLE.items() if b.listens == "mute")]
    listening = [socket.create_server((host, server.port), backlog=ROWS * 4) for host in mute]
    pipe.send((server.port, server.canary))
    pipe.recv()
    headers = {name for request in server.requests.values() for name in request}
    pipe.send(Seen(server.canary_hits, server.cookies, headers, server.hits))
    for sock in listening:
        sock.close()
    server.close()


class Outcome(NamedTuple):
    rows: int
    table: pa.Table
    deadlines: float
    """Duration of the run / longest allowed duration of a row."""
    grown: int
    """Peak memory growth in bytes."""
    threads: list[str]
    sockets: int
    children: list[int]
    """Processes that remain from the run."""
    seen: Seen


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("certificates")
    kinds = {"fine": "tls_fine", "wrong_host": "tls_fine", "expired": "tls_expired", "self_signed": "tls_self_signed"}
    issue(folder, {kind: HOSTS[host] for kind, host in kinds.items()})
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, folder), daemon=True)
    process.start()
    assert ours.poll(HUNG), "the server did not start"
    port, canary = ours.recv()
    forever = threading.Event()
    asked: Counter[str] = Counter()

    def lookup(host: str) -> list[str]:
        if host == "forever.example":
            forever.wait(600)
        if host in NAMES:
            asked[host] += 1
            return NAMES[host][min(asked[host], len(NAMES[host])) - 1]
        raise socket.gaierror(socket.EAI_AGAIN if host == "unanswered.example" else socket.EAI_NONAME, "no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
        patch.setattr(client_module, "system_lookup", lookup)
        client_module.tls_context.cache_clear()
        try:
            yield fetch_all(port, canary, forever, ours, process.pid or 0, patch)
        finally:
            forever.set()
            client_module.tls_context.cache_clear()
            process.terminate()
            process.join()


def stage_for(port: int, timeout: float) -> Download:
    stage = Download(
        timeout=timeout,
        concurrency=QUICK + ROWS * sum(b.slow for b in TABLE.values()),
        per_host=ROWS,
        max_bytes=MAX_BYTES,
        max_aspect_ratio=1000,
        allow_addrs=[f"{host}:{port}" for host in ("127.0.0.1", STALLING, *HOSTS.values())],
    )
    assert list(stage.check()) == []
    stage.setup()
    return stage


def slowness(port: int) -> float:
    """The current slowdown compared with an idle machine, at least 1."""
    started = time.monotonic()
    list(stage_for(port, timeout=600).stream([unit([f"http://{HOSTS['ok']}:{port}/ok"] * 300)]))
    return max(1.0, (time.monotonic() - started) / IDLE_SECONDS)


def fetch_all(
    port: int, canary: int, forever: threading.Event, pipe: Connection, server: int, patch: pytest.MonkeyPatch
) -> Outcome:
    # Slow rows come first: all of them run concurrently, so the run takes about one deadline.
    names = sorted(TABLE, key=lambda name: not TABLE[name].slow)
    urls = [
        TABLE[name].url.format(host=HOSTS[name], port=port, canary=canary, name=name, row=row)
        for slow in (True, False)
        for row in range(ROWS)
        for name in names
        if TABLE[name].slow is slow
    ]
    stretch = slowness(port)
    for module, name in (
        (client_module, "ROBOTS_SECONDS"),
        (client_module, "RATE_WINDOW"),
        (resolver_module, "DNS_SECONDS"),
    ):
        patch.setattr(module, name, getattr(module, name) * stretch)
    stage = stage_for(port, TIMEOUT * stretch)
    # All slow rows run at once. A row may wait for its host's robots.txt before its timeout starts.
    deadline = client_module.ROBOTS_SECONDS + stage.timeout
    units = (unit(urls[at : at + 500], number) for number, at in enumerate(range(0, len(urls), 500)))
    threads, sockets, children = set(threading.enumerate()), process_tree.sockets(), process_tree.family()
    # Warm up the worker: modules that it loads once are not growth.
    warm = stage.stream(unit([f"http://{HOSTS['ok']}:{port}/ok"] * 300, n) for n in range(2))
    next(warm)
    before = process_tree.memory(without=[server])
    list(warm)
    with process_tree.peak_memory(without=[server], every=0.1) as peak:
        started = time.monotonic()
        out = pa.concat_tables(stage.stream(units))
        seconds = time.monotonic() - started
    forever.set()
    del warm, stage  # close its resources
    gc.collect()
    ended = time.monotonic() + 5
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < ended:
        time.sleep(0.02)
    pipe.send("that is all")
    return Outcome(
        rows=len(urls),
        table=out,
        deadlines=seconds / deadline,
        grown=peak[0] - before,
        threads=[thread.name for thread in left],
        sockets=process_tree.sockets() - sockets,
        children=sorted(set(process_tree.family()) - set(children)),
        seen=pipe.recv(),
    )


def unit(urls: list[str], number: int = 0) -> pa.Table:
    columns = {"unit": [number] * len(urls), "row": list(range(len(urls)))}
    return pa.table({**{name: pa.array(v, pa.int32()) for name, v in columns.items()}, "url": pa.array(urls)})


def behaviour(url: str) -> str:
    """The behaviour at this url."""
    host = url.split("/")[2].partition(":")[0]
    return next(name for name, b in TABLE.items() if HOSTS[name] == host or f"://{host}" in b.url)


def test_there_are_enough_hostile_behaviours() -> None:
    assert len(TABLE) >= 40
    assert all(reason is None or find(reason) for b in TABLE.values() for reason in b.reasons)


def test_every_row_has_one_outcome_as_expected(outcome: Outcome) -> None:
    at = list(zip(outcome.table["unit"].to_pylist(), outcome.table["row"].to_pylist()))
    assert len(at) == len(set(at)) == outcome.rows == ROWS * len(TABLE)
    found: dict[str, Counter[str | None]] = {name: Counter() for name in TABLE}
    details: dict[str, set[str | None]] = {name: set() for name in TABLE}
    columns = (outcome.table[name].to_pylist() for name in ("url", "drop_reason", "drop_detail"))
    for url, reason, detail in zip(*columns):
        found[behaviour(url)][reason] += 1
        details[behaviour(url)].add(detail)
    wrong = {}
    for name, b in TABLE.items():
        right = set(b.reasons)
        given_up = {"host_down"} if right <= NO_ANSWER else set()
        ends = found[name].keys()
        if not ends <= right | given_up or not ends & right or found[name].total() != ROWS:
            wrong[name] = (dict(found[name]), details[name])
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def test_no_denied_address_was_reached(outcome: Outcome) -> None:
    assert outcome.seen.canary_hits == 0


def test_the_run_takes_no_longer_than_its_slowest_row(outcome: Outcome) -> None:
    # Sequentially, they would take hundreds of seconds.
    assert outcome.deadlines <= 3


@pytest.mark.skipif(not process_tree.CAN_MEASURE, reason="needs /proc/self/smaps_rollup")
def test_memory_does_not_grow(outcome: Outcome) -> None:
    assert outcome.grown < 200_000_000


def test_no_resources_leak(outcome: Outcome) -> None:
    assert (outcome.threads, outcome.sockets, outcome.children) == ([], 0, [])


def test_no_cookies_are_returned_to_the_server(outcome: Outcome) -> None:
    assert outcome.seen.cookies == []
    assert not outcome.seen.headers & {"cookie", "referer", "authorization", "x-injected"}
    assert outcome.seen.hits["cookies"] == 2 * ROWS


def test_kept_images_are_clean(outcome: Outcome) -> None:
    kept = outcome.table.filter(pa.compute.is_null(outcome.table["drop_reason"]))
    images = set(kept["image"].to_pylist())
    for image in images:
        assert Image.open(io.BytesIO(image)).format == "JPEG"
        for payload in (b"<?php", b"<script", b"alert(1)", b"PK\x05\x06"):
            assert payload not in image
    assert 4 <= len(images) <= 10  # the same pictures again and again
