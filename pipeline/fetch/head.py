"""Parses the head of a response as leniently as browsers and curl do, and rewrites it strictly for aiohttp.

aiohttp's parser rejects many heads that are malformed but unambiguous, and its limits are per line. So this module
collects each head, up to MAX_HEAD bytes, and rewrites it: it normalises unambiguous parts, drops unused headers, and
refuses ambiguous heads. docs/fetching.md lists each case and why it is safe.

A client is the last reader of a response, so response smuggling can only affect the next response on the same
connection. A connection with a doubtful response is therefore not reused.
"""

from __future__ import annotations

import re

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import BadHttpMessage

MAX_HEAD = 256 * 1024
"""Largest head of a response in bytes, including interim responses. Chrome has the same limit, curl 300 KB, Firefox
384 KB. Image servers send 0.3 to 2 KB, or tens of KB with a long Content-Security-Policy."""

_READ = frozenset(
    b"connection content-encoding content-length content-range content-usage location retry-after tdm-policy "
    b"tdm-reservation transfer-encoding x-robots-tag".split()
)
"""The headers used by this package."""

_STATUS = re.compile(rb"HTTP/1\.([0-9])[ \t]+([0-9]{3})(?:[ \t].*)?", re.IGNORECASE)
_END = re.compile(rb"\n\r?\n")
_BLANK = re.compile(rb"[\r\n]*")
_LINE = re.compile(rb"\r?\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_LENGTH = re.compile(rb"[0-9]{1,19}")


class BadHeadError(ValueError):
    """A head that is invalid or ambiguous."""


def strict(head: bytes) -> tuple[int, bytes]:
    """Parses a status line, header lines and an empty line. Returns the status and the head in the form of RFC 9112.

    Raises BadHeadError.
    """
    first, *lines = _LINE.split(_FOLD.sub(b" ", head).strip(b"\r\n"))
    status = _STATUS.fullmatch(first)
    if status is None:
        raise BadHeadError(f"not a status line of HTTP/1: {first[:80].decode('latin-1')}")
    doubtful = False
    read: dict[bytes, list[bytes]] = {}
    for line in lines:
        if b"\r" in line or b"\0" in line:
            raise BadHeadError("carriage return or NUL inside a header line")
        name, colon, value = line.partition(b":")
        bare = name.strip(b" \t").lower()
        if colon and bare in _READ:
            doubtful |= len(bare) < len(name)
            read.setdefault(bare, []).append(value.strip(b" \t"))
    codings = _items(read.pop(b"transfer-encoding", [])) - {b"identity"}
    lengths = read.pop(b"content-length", [])
    named = _items(lengths)
    connection = _items(read.pop(b"connection", []))
    framing = b""
    if codings:
        if codings != {b"chunked"}:
            raise BadHeadError(f"transfer coding {b', '.join(sorted(codings)).decode('latin-1')}")
        framing = b"Transfer-Encoding: chunked\r\n"
        doubtful |= bool(lengths) or status[1] == b"0"
    elif named:
        if not all(map(_LENGTH.fullmatch, named)) or len(set(map(int, named))) > 1:
            raise BadHeadError(f"Content-Length {b', '.join(sorted(named)).decode('latin-1')}")
        framing = b"Content-Length: %d\r\n" % int(named.pop())
        doubtful |= len(lengths) > 1
    if doubtful or b"close" in connection:
        framing += b"Connection: close\r\n"
    elif b"keep-alive" in connection:
        framing += b"Connection: keep-alive\r\n"
    kept = b"".join(b"%s: %s\r\n" % (name, value) for name, values in read.items() for value in values)
    version = b"0" if status[1] == b"0" else b"1"
    return int(status[2]), b"HTTP/1.%s %s \r\n%s%s\r\n" % (version, status[2], framing, kept)


def _items(values: list[bytes]) -> set[bytes]:
    """The distinct items of comma-separated lists, in lower case."""
    return {item.strip(b" \t") for value in values for item in value.lower().split(b",")} - {b""}


class LenientResponse(ResponseHandler):
    """aiohttp's response protocol, with `strict` applied to each head before the parser sees it."""

    _head: bytearray | None = None
    """The partial head; None while a body is read, and before the first request."""
    _seen = 0
    """Bytes of this response's heads so far."""
    _sought = 0
    """Bytes of `_head` already searched for its end."""

    def set_response_params(self, **options: object) -> None:
        self._head, self._seen, self._sought = bytearray(), 0, 0
        super().set_response_params(**options)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        if self._head is None:
            self._body_received(data)
            return
        self._head += data
        try:
            while self._head is not None and (end := self._end_of_head()):
                status, head = strict(bytes(self._head[:end]))
                del self._head[:end]
                self._seen, self._sought = self._seen + end, 0
                if not 100 <= status < 200 or status == 101:
                    rest, self._head = bytes(self._head), None
                    super().data_received(head)
                    if rest:
                        self._body_received(rest)
        except BadHeadError as error:
            self._head = None
            self.set_exception(BadHttpMessage(str(error)))
            if self.transport is not None:
                self.transport.close()

    def _end_of_head(self) -> int:
        """Length of the first head in `_head`; 0 if it is incomplete."""
        assert self._head is not None
        if self._sought == 0 and (blank := _BLANK.match(self._head)):
            self._seen += blank.end()
            del self._head[: blank.end()]
        if not b"HTTP/".startswith(self._head[:5].upper()):
            raise BadHeadError(f"not HTTP: {self._head[:20].decode('latin-1')}")
        end = _END.search(self._head, max(0, self._sought - 2))
        self._sought = len(self._head)
        if self._seen + (end.end() if end else len(self._head)) > MAX_HEAD:
            raise BadHeadError(f"a head of more than {MAX_HEAD} bytes")
        return end.end() if end else 0

    def _body_received(self, data: bytes) -> None:
        payload = self._payload
        if data and self._parser is not None and (payload is None or payload.is_eof()):
            # Data after the end of the body. It is not the next response: no further request was sent.
            self._should_close = True
            if self.transport is not None:
                self.transport.close()
            return
        super().data_received(data)
        error = self.exception()
        if error is not None and payload is not None and not payload.is_eof():
            failure = aiohttp.ClientPayloadError(str(error))
            failure.__cause__ = error
            payload.set_exception(failure)
