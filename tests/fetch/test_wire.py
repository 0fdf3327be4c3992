"""Bytes on the wire: request lines as browsers send them, and malformed but unambiguous responses.

The server is a plain socket that records each request and answers with given bytes, so no HTTP library interprets them
on its side.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.fetch import client as client_module
from pipeline.fetch.client import Client, Limits
from pipeline.fetch.head import MAX_HEAD, BadHeadError, strict
from pipeline.fetch.hosts import Politeness
from pipeline.fetch.reasons import FetchError
from tests.fetch.certificates import issue
from tests.fetch.fetched import body_or_failure
from tests.fetch.server import JPEG

PATIENCE = 60.0
"""Time limit in seconds for operations that take a moment on an idle machine."""


class Wire:
    """A server on loopback: one request per connection, answered with the bytes of `answer(target)`.

    Sends the bytes in pieces of at most `pieces` bytes, if given, then closes the connection.
    """

    def __init__(self, answer: Callable[[str], bytes], pieces: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self._answer, self._pieces, self._tls = answer, pieces, tls
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.addr = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    @property
    def targets(self) -> list[str]:
        return [request.split(b"\r\n")[0].decode("latin-1")[4:-9] for request in self.requests]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._socket.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(PATIENCE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request:
                if not (part := connection.recv(65536)):
                    return
                request += part
            self.requests.append(request)
            data = self._answer(self.targets[-1])
            step = self._pieces or len(data)
            for at in range(0, len(data), step):
                connection.sendall(data[at : at + step])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # until the peer has read everything
                pass


@contextlib.contextmanager
def wire(answer: Callable[[str], bytes], pieces: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Wire]:
    server = Wire(answer, pieces, tls)
    try:
        yield server
    finally:
        server.close()


def fetch(server: Wire, *urls: str) -> list[bytes | str]:
    """The outcome of each url, in order: the body or the reason."""

    async def in_order() -> list[bytes | FetchError]:
        limits = Limits(timeout=PATIENCE, retries=0, min_rate=0, allow_addrs=(server.addr,))
        silent = Politeness(robots_txt=False, tdmrep_json=False, host_failures=0)
        async with Client(limits, lambda host: ["127.0.0.1"], silent) as client:
            return [await body_or_failure(client, url) for url in urls]

    return [r.reason if isinstance(r, FetchError) else r for r in asyncio.run(in_order())]


def plain(_: str) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(JPEG) + JPEG


# --- Requests ---------------------------------------------------------------------------------------------------------

# The part after the host in a url, and the request target that a browser sends for it.
SENT = {
    # Existing escapes are unchanged.
    "/a%28b%29%2C%27%3a%40%7E.jpg": "/a%28b%29%2C%27%3a%40%7E.jpg",
    "/http%3A%2F%2Fcdn.example%2Fa%20b.jpg": "/http%3A%2F%2Fcdn.example%2Fa%20b.jpg",
    "/i.jpg?sig=a%2Fb%3D%3d&d=%40&e=%e3%83%84&p=%2B+": "/i.jpg?sig=a%2Fb%3D%3d&d=%40&e=%e3%83%84&p=%2B+",
    "/%41%2d%5F": "/%41%2d%5F",
    "/50%-off/%zz?100%": "/50%-off/%zz?100%",
    "/%2e%2e%2e/%00": "/%2e%2e%2e/%00",
    # Valid characters are unchanged.
    "/a(b),'c':@~;=+$&!*[d]|e.jpg": "/a(b),'c':@~;=+$&!*[d]|e.jpg",
    "/?a[]=(b),c|d:@~;`{}^/?\\e": "/?a[]=(b),c|d:@~;`{}^/?\\e",
    "//a//b.jpg": "//a//b.jpg",
    "?": "/?",
    "/a?": "/a?",
    "/a??b": "/a??b",
    # Invalid characters are escaped.
    "/my photo.jpg?file=my photo.jpg": "/my%20photo.jpg?file=my%20photo.jpg",
    '/"<>`{}^.jpg': "/%22%3C%3E%60%7B%7D%5E.jpg",
    "/?\"<>'": "/?%22%3C%3E%27",
    "/ü/日本.jpg?q=ä&😀": "/%C3%BC/%E6%97%A5%E6%9C%AC.jpg?q=%C3%A4&%F0%9F%98%80",
    "/e\u0301.jpg": "/e%CC%81.jpg",
    "/a\x01\x7fb": "/a%01%7Fb",
    "/a\xa0b": "/a%C2%A0b",
    # Parts that browsers do not send.
    "/a.jpg#top": "/a.jpg",
    "/a.jpg?b#c?d": "/a.jpg?b",
    "": "/",
    "#top": "/",
    "/a/./b/../c.jpg": "/a/c.jpg",
    "/a/%2e/%2E%2e/../b": "/b",
    "/a/..": "/",
    "/..a/b..": "/..a/b..",
    "/a?b/../c": "/a?b/../c",
    "\\a\\b.jpg": "/a/b.jpg",
    "/a\tb\r\nc.jpg?\nd": "/abc.jpg?d",
    "/a.jpg  \n": "/a.jpg",
}


def test_urls_are_sent_as_browsers_send_them() -> None:
    with wire(plain) as server:
        assert fetch(server, *(f"http://{server.addr}{text}" for text in SENT)) == [JPEG] * len(SENT)
        assert dict(zip(SENT, server.targets)) == SENT


# The start of a url in place of "http://HOST:PORT/", and the Host header.
HOSTS = {
    "http://{addr}/": "{addr}",
    " \x01HTTP://{addr}/": "{addr}",
    "http:\\\\{addr}/": "{addr}",
    "http:{addr}/": "{addr}",
    "http://EXAMPLE.com:{port}/": "example.com:{port}",
    "http://ex%41mple.com:0{port}/": "example.com:{port}",
    "http://my_site.example.:{port}/": "my_site.example:{port}",  # as a certificate has it: aiohttp drops the dot
    "http://MÜLLER.example:{port}/": "xn--mller-kva.example:{port}",
    "http://日本語。ＪＰ:{port}/": "xn--wgv71a119e.jp:{port}",
    "http://faß.example:{port}/": "xn--fa-hia.example:{port}",
    "http://０x7f.1:{port}/": "{addr}",
    "http://ex\u00adam\u200bp\u2060le\ufe0f.com:{port}/": "example.com:{port}",  # characters that names ignore
    "http://💩\ufe0f.example:{port}/": "xn--ls8h.example:{port}",
    "http://r3---ü_ß.example:{port}/": "xn--r3---_-gta4u.example:{port}",
}


def test_hosts_are_sent_as_browsers_send_them() -> None:
    with wire(plain) as server:
        port = server.addr.rpartition(":")[2]
        urls = [text.format(addr=server.addr, port=port) for text in HOSTS]
        assert fetch(server, *urls) == [JPEG] * len(HOSTS)
        sent = [request.partition(b"\r\nHost: ")[2].split(b"\r\n")[0].decode() for request in server.requests]
        assert sent == [host.format(addr=server.addr, port=port) for host in HOSTS.values()]


# The bytes of a Location received at /from/here?q, and the next request target.
MOVED = {
    b"/moved%28a%29?sig=x%2Fy%40z": "/moved%28a%29?sig=x%2Fy%40z",
    b"there.jpg": "/from/there.jpg",
    b"../there.jpg?": "/there.jpg?",
    b"?r": "/from/here?r",
    b"http:there": "/from/there",
    b"HTTP://{addr}/a b.jpg?c d": "/a%20b.jpg?c%20d",
    b"//{addr}/a": "/a",
    b"\\\\{addr}\\a": "/a",
    b"/a#fragment": "/a",
    b"  /a  ": "/a",
    "/café".encode(): "/caf%C3%A9",
    "/café".encode("latin-1"): "/caf%E9",
    "/\u65e5".encode("shift-jis"): "/%93%FA",
    b"/a'b?c'd": "/a'b?c%27d",
}


@pytest.mark.parametrize("location", MOVED)
def test_locations_are_followed_as_browsers_follow_them(location: bytes) -> None:
    def answer(target: str) -> bytes:
        if target != "/from/here?q":
            return plain(target)
        return b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % location.replace(
            b"{addr}", server.addr.encode()
        )

    with wire(answer) as server:
        assert fetch(server, f"http://{server.addr}/from/here?q") == [JPEG]
        assert server.targets[1:] == [MOVED[location]]


# --- Responses --------------------------------------------------------------------------------------------------------

SIZE = b"Content-Length: %d" % len(JPEG)
CHUNK = b"%x\r\n%s\r\n" % (len(JPEG), JPEG)
CHUNKED = b"Transfer-Encoding: chunked"
RANGE, LAST = b"Content-Range: Bytes 0-%d/%d", len(JPEG) - 1


def ok(*lines: bytes, body: bytes = JPEG, status: bytes = b"HTTP/1.1 200 OK", end: bytes = b"\r\n") -> bytes:
    return end.join([status, *lines, b"", b""]) + body


# name -> (all bytes of the response, the reason or None for the picture)
ANSWERS: dict[str, tuple[bytes, str | None]] = {
    # Line ends and the status line
    "line feeds alone": (ok(SIZE, end=b"\n"), None),
    "mixed line ends": (b"HTTP/1.1 200 OK\r\n" + SIZE + b"\nX: y\r\n\n" + JPEG, None),
    "empty lines first": (b"\r\n\n" + ok(SIZE), None),
    "no reason phrase": (ok(SIZE, status=b"HTTP/1.1 200"), None),
    "no reason phrase, a blank": (ok(SIZE, status=b"HTTP/1.1 200 "), None),
    "reason phrase in latin-1": (ok(SIZE, status=b"HTTP/1.1 200 D'accord, c'est \xe9gal"), None),
    "lower case": (ok(SIZE, status=b"http/1.1 200 ok"), None),
    "two blanks": (ok(SIZE, status=b"HTTP/1.1  200  OK"), None),
    "HTTP/1.2": (ok(SIZE, status=b"HTTP/1.2 200 OK"), None),
    "HTTP/1.0 without a length": (ok(status=b"HTTP/1.0 200 OK"), None),
    "HTTP/1.0 with a length": (ok(SIZE, status=b"HTTP/1.0 200 OK"), None),
    "interim responses": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: </a>\r\n\r\n" + ok(SIZE), None),
    "ICY": (ok(SIZE, status=b"ICY 200 OK"), "bad_response"),
    "HTTP/2 as text": (ok(SIZE, status=b"HTTP/2 200"), "bad_response"),
    "HTTP/0.9": (JPEG, "bad_response"),
    "four digits": (ok(SIZE, status=b"HTTP/1.1 2000 OK"), "bad_response"),
    "no blank": (ok(SIZE, status=b"HTTP/1.1 200OK"), "bad_response"),
    "no status": (ok(SIZE, status=b"HTTP/1.1 OK"), "bad_response"),
    # Other statuses with the whole body
    "203": (ok(SIZE, status=b"HTTP/1.1 203 Non-Authoritative Information"), None),
    "206 of all bytes": (ok(SIZE, RANGE % (LAST, LAST + 1), status=b"HTTP/1.1 206 Partial Content"), None),
    "206 without the last byte": (ok(SIZE, RANGE % (LAST, LAST + 2), status=b"HTTP/1.1 206 Part"), "http_206"),
    "206 without the first byte": (
        ok(SIZE, b"Content-Range: bytes 1-%d/%d" % (LAST, LAST + 1), status=b"HTTP/1.1 206 Part"),
        "http_206",
    ),
    "206 of an unknown size": (ok(SIZE, b"Content-Range: bytes 0-%d/*" % LAST, status=b"HTTP/1.1 206 P"), "http_206"),
    "206 without a range": (ok(SIZE, status=b"HTTP/1.1 206 Partial Content"), "http_206"),
    "201": (ok(SIZE, status=b"HTTP/1.1 201 Created"), "http_201"),
    # Header lines
    "no headers": (ok(), None),
    "an empty value": (ok(SIZE, b"Content-Type:", b"X-Robots-Tag: "), None),
    "no blank after the colon": (ok(SIZE.replace(b" ", b"")), None),
    "blanks before the colon": (ok(SIZE.replace(b":", b" \t:")), None),
    "a line without a colon": (ok(b"nonsense", SIZE), None),
    "a line without a name": (ok(b": nothing", SIZE), None),
    "a name with blanks": (ok(b"X Y: z", SIZE), None),
    "bytes beyond ASCII": (ok(b"X-\xe9: \xff", "Content-Disposition: inline; filename=日.jpg".encode(), SIZE), None),
    "control characters": (ok(b"X-A: \x01\x02\x7f", SIZE), None),
    "a folded line": (ok(b"X-A: b,\r\n\tc", SIZE, b"X-D: e\r\n  f"), None),
    "a folded length": (ok(SIZE.replace(b" ", b"\r\n ")), None),
    "a folded first line": (ok(b" nothing", SIZE), None),
    "a carriage return inside": (ok(b"X-A: b\rContent-Length: 3", SIZE), "bad_response"),
    "a NUL inside": (ok(b"X-A: \0", SIZE), "bad_response"),
    "a line of 100 KB": (ok(b"Content-Security-Policy: " + b"a" * 100_000, SIZE), None),
    "2,000 lines": (ok(*[b"Set-Cookie: %d=a" % n for n in range(2000)], SIZE), None),
    "a head over the limit": (ok(b"X-A: " + b"a" * MAX_HEAD, SIZE), "bad_response"),
    "interim responses over the limit": (b"HTTP/1.1 103 Early\r\n\r\n" * 20_000 + ok(SIZE), "bad_response"),
    "a folded opt-out": (ok(SIZE, b"X-Robots-Tag: nofollow,\r\n noai"), "opted_out"),
    "an opt-out of 10 KB": (ok(SIZE, b"X-Robots-Tag: " + b"otherbot: a, " * 800 + b"winnow: noai"), "bad_response"),
    # Lengths
    "length twice": (ok(SIZE, SIZE), None),
    "length listed twice": (ok(SIZE + b", %d" % len(JPEG)), None),
    "length with zeros": (ok(SIZE.replace(b": ", b": 000")), None),
    "empty length": (ok(b"Content-Length:"), None),
    "two lengths": (ok(SIZE, b"Content-Length: 7"), "bad_response"),
    "two lengths in a list": (ok(SIZE + b", 7"), "bad_response"),
    "length with a plus": (ok(SIZE.replace(b": ", b": +")), "bad_response"),
    "negative length": (ok(b"Content-Length: -1"), "bad_response"),
    "length in words": (ok(b"Content-Length: many"), "bad_response"),
    "length with a unit": (ok(SIZE + b" bytes"), "bad_response"),
    "length of 64 bits and more": (ok(b"Content-Length: " + b"9" * 30), "bad_response"),
    "length too long": (ok(b"Content-Length: %d" % (len(JPEG) + 1)), "body_truncated"),
    "bytes behind the body": (ok(SIZE, body=JPEG + b"\r\n\r\nand more"), None),
    "bytes behind the last body": (ok(SIZE, b"Connection: close", body=JPEG + b"\0\0"), None),
    "a response behind the body": (ok(SIZE, body=JPEG + ok(b"Content-Length: 3", body=b"abc")), None),
    # Chunks
    "chunks": (ok(CHUNKED, body=CHUNK + b"0\r\n\r\n"), None),
    "chunked twice": (ok(CHUNKED, CHUNKED, body=CHUNK + b"0\r\n\r\n"), None),
    "chunked and identity": (ok(b"Transfer-Encoding: identity, Chunked", body=CHUNK + b"0\r\n\r\n"), None),
    "identity alone": (ok(b"Transfer-Encoding: identity", SIZE), None),
    "chunks with a length": (ok(b"Content-Length: 9", CHUNKED, body=CHUNK + b"0\r\n\r\n"), None),
    "chunks by HTTP/1.0": (ok(CHUNKED, status=b"HTTP/1.0 200 OK", body=CHUNK + b"0\r\n\r\n"), None),
    "chunk extensions": (ok(CHUNKED, body=CHUNK.replace(b"\r\n", b';a="b"\r\n', 1) + b"0;c\r\n\r\n"), None),
    "blanks behind a chunk's size": (ok(CHUNKED, body=CHUNK.replace(b"\r\n", b"  \r\n", 1) + b"0\r\n\r\n"), None),
    "chunk sizes with zeros": (ok(CHUNKED, body=b"000" + CHUNK + b"0000\r\n\r\n"), None),
    "trailers": (ok(CHUNKED, body=CHUNK + b"0\r\nX-A: b\r\n\r\n"), None),
    "bytes behind the chunks": (ok(CHUNKED, body=CHUNK + b"0\r\n\r\n\0garbage"), None),
    "chunks with line feeds alone": (ok(CHUNKED, body=CHUNK.replace(b"\r\n", b"\n", 1) + b"0\n\n"), "bad_response"),
    "no last chunk": (ok(CHUNKED, body=CHUNK), "body_truncated"),
    "half a chunk": (ok(CHUNKED, body=CHUNK[:-500]), "body_truncated"),
    "no chunks": (ok(CHUNKED), "bad_response"),
    "gzip in transfer": (ok(b"Transfer-Encoding: gzip, chunked", body=CHUNK + b"0\r\n\r\n"), "bad_response"),
    # Content-Encoding labels
    **{
        f"Content-Encoding: {label}": (ok(SIZE, f"Content-Encoding: {label}".encode()), None)
        for label in ("", "identity", "identity, identity", "none", "None", "UTF-8", "utf8", "binary", "aws-chunked",
                      "image/jpeg", "8bit", "raw", "null", "*")
    },
    **{
        f"Content-Encoding: {label}": (ok(SIZE, f"Content-Encoding: {label}".encode()), "content_encoding")
        for label in ("gzip", "X-Gzip", "deflate", "br", "zstd", "compress", "identity, gzip", "aws-chunked,br")
    },
    "Content-Encoding twice": (ok(SIZE, b"Content-Encoding: none", b"Content-Encoding: gzip"), "content_encoding"),
    "a wrong type": (ok(SIZE, b"Content-Type: text/html; charset=utf-8"), None),
    # Redirects
    "Location twice": (ok(b"Location: /plain", b"Location: /plain", body=b"", status=b"HTTP/1.1 302 Found"), None),
    "two Locations": (ok(b"Location: /a", b"Location: /b", body=b"", status=b"HTTP/1.1 302 Found"), "bad_response"),
    "an empty Location": (ok(b"Location:", body=b"", status=b"HTTP/1.1 302 Found"), "bad_response"),
}  # fmt: skip


@pytest.mark.parametrize("pieces", [0, 7], ids=["whole", "in pieces"])
def test_malformed_responses(pieces: int) -> None:
    names = [name for name in ANSWERS if not pieces or len(ANSWERS[name][0]) < 20_000]

    def answer(target: str) -> bytes:
        return plain(target) if target == "/plain" else ANSWERS[names[int(target.rpartition("=")[2])]][0]

    with wire(answer, pieces) as server:
        found = fetch(server, *(f"http://{server.addr}/a?n={n}" for n in range(len(names))))
    wrong = {name: result for name, result in zip(names, found) if result != (ANSWERS[name][1] or JPEG)}
    assert wrong == {}


def test_tls_may_end_without_close_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many servers close TCP without closing TLS. Truncation is then detected by the length or the decoder."""
    issue(tmp_path, {"fine": "127.0.0.1"})
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    client_module.tls_context.cache_clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "fine.pem")
    answers = {"/length": ok(SIZE), "/none": ok(), "/cut": ok(SIZE, body=JPEG[:-9]), "/chunks": ok(CHUNKED, body=CHUNK)}
    try:
        with wire(answers.__getitem__, tls=context) as server:
            found = fetch(server, *(f"https://{server.addr}{target}" for target in answers))
    finally:
        client_module.tls_context.cache_clear()
    assert found == [JPEG, JPEG, "body_truncated", "body_truncated"]


# --- Normalising a head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "spelled"),
    [
        (b"HTTP/1.1 200 OK\nX-A: b\nRetry-After: 5\n\n", b"HTTP/1.1 200 \r\nretry-after: 5\r\n\r\n"),
        (b"http/1.0 404\r\n\r\n", b"HTTP/1.0 404 \r\n\r\n"),
        (
            b"HTTP/1.1 200 OK\r\nX-Robots-Tag: a: b\r\n  c\r\nX-ROBOTS-TAG:\td\r\n\r\n",
            b"HTTP/1.1 200 \r\nx-robots-tag: a: b c\r\nx-robots-tag: d\r\n\r\n",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: Keep-Alive\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n",
        ),
        (  # unambiguous, but the connection is not reused
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 05\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 5\r\nConnection: close\r\n\r\n",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
        ),
    ],
)
def test_a_head_is_normalised(head: bytes, spelled: bytes) -> None:
    assert strict(head)[1] == spelled
    assert strict(spelled)[1] == spelled


@pytest.mark.parametrize("line", [b"Content-Length: 5 5", b"Content-Length: 0x5", b"Transfer-Encoding: br", b"\rX: a"])
def test_an_ambiguous_head_is_refused(line: bytes) -> None:
    with pytest.raises(BadHeadError):
        strict(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % line)
