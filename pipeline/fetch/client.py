"""Fetches bodies over HTTP from hosts that may be slow, broken, private or hostile.

Built on aiohttp, whose 0.15 ms of CPU an image (0.3 without keep-alive) is small beside the 3 ms of decoding it;
libcurl would save a tenth of a millisecond and cost callbacks in C. It was chosen because its socket factory sees every
address that is dialled, IP literals included, so nothing gets around the guard.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import random
import re
import socket
import ssl
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import NamedTuple

import aiohttp
from yarl import URL

from pipeline.fetch.budget import Budget, Lease
from pipeline.fetch.guard import Guard, parse_url
from pipeline.fetch.head import LenientResponse
from pipeline.fetch.hosts import Exchange, Host, Hosts, Manners
from pipeline.fetch.opt_out import Reservations, disallowed_directive, preference, reservations, reserves_mining
from pipeline.fetch.outage import Outage
from pipeline.fetch.reasons import FetchError, one_line
from pipeline.fetch.resolver import Lookup, Resolver, system_lookup
from pipeline.fetch.robots import MAX_BYTES, Robots, parse

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

# A body that needs more first reserves it, all at once, from the bytes shared by all rows: no two rows can then wait
# for each other's last bytes. Nine of ten web images fit into the free part.
FREE_BYTES = 256 * 1024
# The rate is judged over whole windows, so that a pause of a busy server is not taken for its rate.
RATE_WINDOW = 3.0
BACKOFF = 0.25
# Transient, but not worth a second attempt in this run: the row's time is up, or the answer would come from a cache.
_NOT_AT_ONCE = frozenset({"deadline", "too_slow", "dns_unavailable", "robots_unavailable", "host_down", "host_busy"})

ROBOTS_SECONDS = 5.0
"""Total time for a host's robots.txt and tdmrep.json, or `timeout` if that is less. The clocks of the rows that wait
for them stand still."""
ROBOTS_TTL = 24 * 3600.0
"""The longest that a copy may be used (RFC 9309, 2.4)."""
ROBOTS_RETRY_TTL = 30.0
# A host that does not answer for robots.txt would not answer for the row either, so the row fails at once.
_NO_ANSWER = frozenset({"dns", "dns_unavailable", "addr_denied", "connect", "unreachable", "tls", "reset", "deadline"})
# A redirect that leads nowhere is no file (RFC 9309, 2.3.1.2).
_NO_FILE = frozenset({"too_many_redirects", "redirect_loop", "bad_url", "bad_scheme"})

TDMREP = "/.well-known/tdmrep.json"
# Of what publishers say, this many statements are kept with a picture.
STATEMENTS = 20
_STATEMENT_HEADERS = ("X-Robots-Tag", "Content-Usage", "tdm-reservation", "tdm-policy")

Answer = Callable[[aiohttp.ClientResponse, "Errand"], Awaitable["bytes | str"]]
"""Makes of a response the body, or where a redirect leads."""


class Fetched(NamedTuple):
    body: bytes
    usage: str | None
    """What the publisher said about the use of the picture, on any hop: one statement a line, "Content-Usage:
    train-ai=y" or "robots.txt Content-Usage: search=n"; None where nothing was said."""


@dataclass
class Errand:
    """What requests are made for: the picture of a row, or a file that speaks for a host."""

    clock: Clock
    lease: Lease
    answer: Answer
    said: list[str] = field(default_factory=list)

    def note(self, statement: str) -> None:
        statement = one_line(statement)
        if statement not in self.said and len(self.said) < STATEMENTS:
            self.said.append(statement)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """See the options of the same names in `pipeline.stages.download`."""

    timeout: float = 10.0
    retries: int = 2
    max_bytes: int = 20_000_000
    min_rate: int = 1000
    bytes_in_flight: int = 128_000_000
    per_host: int = 8
    user_agent_token: str = "winnow"
    user_agent_contact: str = ""
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noml", "noindex", "noimageindex")
    allow_addrs: tuple[str, ...] = ()


@functools.cache
def tls_context() -> ssl.SSLContext:
    """One for the process: loading the certificate authorities takes tens of milliseconds."""
    return ssl.create_default_context()


def user_agent(token: str, contact: str) -> str:
    return f"Mozilla/5.0 (compatible; {token}; +{contact})" if contact else f"Mozilla/5.0 (compatible; {token})"


class Client:
    """Use as `async with Client(limits) as client: async with client.fetch(url, begin) as fetched: ...`."""

    def __init__(
        self,
        limits: Limits,
        lookup: Lookup | None = None,
        manners: Manners = Manners(),  # noqa: B008 (frozen)
        board: Exchange | None = None,
    ):
        """`lookup` gives the addresses of a host name, and may block; the system's resolver by default.

        `board` shares the limits per host with other clients (`pipeline.fetch.hosts.Board`).
        """
        self.limits = limits
        self.manners = manners
        self._guard = Guard(limits.allow_addrs)
        self._resolver = Resolver(self._guard, lookup or system_lookup)
        self._bytes = Budget(limits.bytes_in_flight)
        self._outage = Outage()
        self._hosts = Hosts(limits.per_host, manners, board)
        self._asking: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Client:
        # Keep-alive pays only where more requests follow; else thousands of idle sockets would pile up.
        self._kept, self._closed = self._open_session(force_close=False), self._open_session(force_close=True)
        self._hosts.open()
        return self

    def _open_session(self, *, force_close: bool) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0,  # rows and hosts have limits of their own
            ssl=tls_context(),
            resolver=self._resolver,
            use_dns_cache=False,
            force_close=force_close,
            socket_factory=self._open_socket,
        )
        # aiohttp has no public place for this; tests/fetch/test_wire.py fails where it moves.
        connector._factory = functools.partial(LenientResponse, loop=asyncio.get_running_loop())  # type: ignore[assignment]
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            trust_env=False,
            auto_decompress=False,
            headers={
                "User-Agent": user_agent(self.limits.user_agent_token, self.limits.user_agent_contact),
                "Accept": "image/jpeg,image/png,image/webp,image/gif;q=0.9,*/*;q=0.1",
                "Accept-Encoding": "identity",
            },
        )
        session._retry_connection = False  # see `_get`
        return session

    async def __aexit__(self, *exc: object) -> None:
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        await self._hosts.close()
        await self._kept.close()
        await self._closed.close()
        await self._resolver.close()

    def _open_socket(self, info: tuple[int, int, int, str, tuple]) -> socket.socket:
        family, kind, protocol, _, address = info
        self._guard.check(address[0], address[1])
        return socket.socket(family, kind, protocol)

    @asynccontextmanager
    async def fetch(self, url: str | None, begin: Callable[[], Awaitable[None]]) -> AsyncIterator[Fetched]:
        """What is behind `url`. Raises FetchError, and OutageError when the row is not to blame.

        `begin` is awaited once, when the row's first host has room for it: the caller's own limit on rows at work.
        The bytes count as in flight until the block is left.
        """
        lease = Lease(self._bytes)
        try:
            yield await self._row(parse_url(url), begin, lease)
        finally:
            lease.give_back()

    async def _row(self, url: URL, begin: Callable[[], Awaitable[None]], lease: Lease) -> Fetched:
        arrived = time.monotonic()
        # A row waits here while its host is busy, without taking one of the places among the rows at work: one slow
        # host with a thousand rows holds up none of the others.
        with self._hosts.row(url) as host:
            try:
                async with host.entrance:
                    host.breaker.refuse()
                    longest = self.manners.host_wait
                    if longest and time.monotonic() - arrived > longest:
                        raise FetchError("host_busy", f"{longest:.0f} s in the queue of {host.name}")
                    await begin()
                    errand = Errand(Clock(self.limits.timeout), lease, self._picture)
                    body = await self._persist(url, errand)
                    return Fetched(body, "\n".join(errand.said) or None)
            except FetchError as failure:
                self._outage.failed(host.name, failure)
                raise

    async def _persist(self, url: URL, errand: Errand) -> bytes:
        """Asks again after transient failures for as long as the clock allows."""
        earlier: FetchError | None = None
        for attempt in range(self.limits.retries + 1):
            try:
                return await self._follow(url, errand)
            except FetchError as failure:
                errand.lease.give_back()
                if failure.reason == "host_down" and earlier:
                    raise earlier from None  # other rows found the host down meanwhile; report this row's own failure
                pause = max(failure.retry_after or 0.0, BACKOFF * 2**attempt * random.uniform(1, 1.5))
                hopeless = not failure.transient or failure.reason in _NOT_AT_ONCE
                if hopeless or attempt == self.limits.retries or pause >= errand.clock.left:
                    raise
                earlier = failure
            with errand.clock:
                await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _follow(self, url: URL, errand: Errand) -> bytes:
        errand.said.clear()
        seen = {url}
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._hop(url, errand)
            if isinstance(found, bytes):
                return found
            url = parse_url(found, base=url)
            if url in seen:
                raise FetchError("redirect_loop", str(url))
            seen.add(url)
        raise FetchError("too_many_redirects", f"redirect {MAX_REDIRECTS + 1} leads to {url}")

    async def _hop(self, url: URL, errand: Errand) -> bytes | str:
        """One request: the body, or where a redirect leads."""
        host = self._hosts.find(url)
        host.breaker.refuse()
        if errand.answer == self._picture:
            await self._check_host(url, host, errand)
        # The clock stands still while we wait for our own limits: that time is not the host's.
        await host.begin()
        try:
            host.breaker.admit()
            if (pause := host.resumes - time.monotonic()) > 0:
                if pause >= errand.clock.left:
                    detail = f"Skipped: the host asked us to wait {pause:.0f} s (Retry-After)"
                    raise FetchError(host.refusal, detail, retry_after=pause)
                with errand.clock:
                    await asyncio.sleep(pause)
            return await self._exchange(url, host, errand)
        finally:
            host.end()

    async def _exchange(self, url: URL, host: Host, errand: Errand) -> bytes | str:
        clock = errand.clock
        left = clock.left
        try:
            with clock:
                response = await self._get(url, keep=host.busy or errand.answer == self._file)
                self._outage.alive()
                try:
                    found = await errand.answer(response, errand)
                finally:
                    response.release()  # closes the connection where a part of the body is still to come
            host.note(None)
            return found
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = _translate(error)
        except FetchError as caught:
            failure = caught
        # A row that came with little time left says nothing about this host.
        if failure.reason != "deadline" or left > clock.seconds / 2:
            host.note(failure)
        if failure.retry_after and failure.reason in ("http_429", "http_503"):
            host.asks_to_wait(failure.retry_after, failure.reason)
        raise failure

    async def _get(self, url: URL, *, keep: bool) -> aiohttp.ClientResponse:
        if keep:
            try:
                return await self._kept.get(url, allow_redirects=False)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                pass  # a kept connection, most likely, that the server closed as we took it up
        return await self._closed.get(url, allow_redirects=False)

    async def _picture(self, response: aiohttp.ClientResponse, errand: Errand) -> bytes | str:
        headers, limits, manners = response.headers, self.limits, self.manners
        for name in _STATEMENT_HEADERS:
            for value in headers.getall(name, ()):
                errand.note(f"{name}: {value}")
        tags = headers.getall("X-Robots-Tag", ())
        if directive := disallowed_directive(tags, limits.user_agent_token, limits.disallowed_header_directives):
            raise FetchError("opted_out", f"X-Robots-Tag: {directive}")
        usage = ", ".join(headers.getall("Content-Usage", ()))
        if preference(usage, manners.content_usage) is False:
            raise FetchError("opted_out", f"Content-Usage: {usage}")
        if manners.tdm_reservation and reserves_mining(headers.getall("tdm-reservation", ())):
            raise FetchError("opted_out", "tdm-reservation: 1")
        if response.status in _REDIRECTS:
            return _location(response)
        if response.status != 200:
            raise FetchError(f"http_{response.status:03d}", retry_after=_retry_after(response))
        return await self._body(response, errand.clock, errand.lease)

    async def _body(self, response: aiohttp.ClientResponse, clock: Clock, lease: Lease) -> bytes:
        if compression := _compression(response):
            # Asked for as it is, an image comes compressed from one server in thousands; a bomb comes that way too.
            raise FetchError("content_encoding", compression)
        length, cap = response.content_length, self.limits.max_bytes
        if length is not None and length > cap:
            raise FetchError("body_too_large", f"{length} bytes announced, at most {cap}")
        if length is not None and length > FREE_BYTES:
            with clock.stopped():
                await lease.take(length)
        body = bytearray()
        pace = Pace(self.limits.min_rate, response)
        try:
            while chunk := await response.content.readany():
                body += chunk
                pace.received += len(chunk)
                if len(body) > cap:
                    raise FetchError("body_too_large", f"more than {cap} bytes")
                if len(body) > FREE_BYTES and not lease.size:
                    pace.stop()
                    with clock.stopped():
                        await lease.take(cap)
                    pace = Pace(self.limits.min_rate, response)
        except BaseException as error:
            received = len(body)
            # The traceback keeps this frame for as long as anyone keeps the exception, the lease gone long before.
            body.clear()
            if pace.too_slow and isinstance(error, aiohttp.ClientError):
                raise FetchError("too_slow", f"after {received} bytes") from None
            raise
        finally:
            pace.stop()
        if not body:
            raise FetchError("empty_body")
        lease.keep(len(body))
        return bytes(body)

    async def _check_host(self, url: URL, host: Host, errand: Errand) -> None:
        """Raises FetchError where the host's files forbid the url or its use, or its robots.txt could not be had."""
        if not (self.manners.robots_txt or self.manners.tdmrep_json):
            return
        if host.robots is None or host.words_expire < time.monotonic():
            if host.asking is None:
                host.asking = asyncio.create_task(self._ask_host(url, host))
                self._asking.add(host.asking)
                host.asking.add_done_callback(self._asking.discard)
            # Shielded: the others wait for the answer too.
            await asyncio.shield(host.asking)
        robots = host.robots
        assert robots is not None
        if isinstance(robots, FetchError):
            raise FetchError(robots.reason, robots.detail)
        target = url.raw_path_qs
        if not robots.allows(target):
            raise FetchError("robots_disallowed", f"{host.name}/robots.txt")
        for usage in robots.usage(target):
            errand.note(f"robots.txt Content-Usage: {usage}")
            if preference(usage, self.manners.content_usage) is False:
                raise FetchError("opted_out", f"robots.txt Content-Usage: {usage}")
        reserved = host.reservations.reserved(target)
        if reserved is not None:
            errand.note(f"tdmrep.json tdm-reservation: {reserved:d}")
        if reserved:
            raise FetchError("opted_out", "tdmrep.json tdm-reservation: 1")

    async def _ask_host(self, url: URL, host: Host) -> None:
        """Fetches the files that speak for the host: robots.txt and, if that is there and allows it, tdmrep.json.

        A host without a robots.txt is not asked for tdmrep.json: most such hosts hold one picture of a pool, and the
        request would cost them half as much again.
        """
        clock = Clock(min(self.limits.timeout, ROBOTS_SECONDS))
        robots: Robots | FetchError = Robots()
        found = Reservations()
        try:
            if self.manners.robots_txt:
                robots = await self._ask_robots(url, host, clock)
            if isinstance(robots, Robots) and self._asks_for_tdmrep(robots):
                # Without the file, for whatever reason, nothing is reserved by it (TDMRep, "TDM File on the Origin
                # Server"), so it is asked for once.
                with contextlib.suppress(FetchError):
                    errand = Errand(clock, Lease(self._bytes), self._file)
                    found = reservations(await self._follow(url.with_path(TDMREP), errand))
        finally:
            host.asking = None
        self._hosts.remember(host, robots, found, ROBOTS_TTL if isinstance(robots, Robots) else ROBOTS_RETRY_TTL)

    def _asks_for_tdmrep(self, robots: Robots) -> bool:
        return self.manners.tdmrep_json and (robots.found or not self.manners.robots_txt) and robots.allows(TDMREP)

    async def _ask_robots(self, url: URL, host: Host, clock: Clock) -> Robots | FetchError:
        """The rules, or a failure that forbids all requests to the host (RFC 9309, 2.3.1)."""
        try:
            text = await self._persist(url.with_path("/robots.txt"), Errand(clock, Lease(self._bytes), self._file))
            robots = parse(text, self.limits.user_agent_token)
            host.gap = max(host.gap, robots.crawl_delay)
            return robots
        except FetchError as failure:
            status = failure.reason.removeprefix("http_")
            denied = status.isdigit() and (int(status) >= 500 or int(status) == 429)
            if failure.reason in _NO_ANSWER:
                return FetchError(failure.reason, f"robots.txt: {failure.detail}".removesuffix(": "))
            if denied or not (status.isdigit() or failure.reason in _NO_FILE):
                return FetchError("robots_unavailable", f"{failure.reason} {failure.detail}")
            return Robots()

    async def _file(self, response: aiohttp.ClientResponse, errand: Errand) -> bytes | str:
        # Opt-out headers do not matter here: many sites keep their robots.txt out of search indexes.
        if response.status in _REDIRECTS:
            return _location(response)
        if not 200 <= response.status < 300:
            raise FetchError(f"http_{response.status:03d}", retry_after=_retry_after(response))
        text = bytearray()
        while len(text) <= MAX_BYTES and (chunk := await response.content.readany()):
            text += chunk
        compression = _compression(response)
        if not compression:
            return bytes(text)
        try:
            if compression not in ("gzip", "x-gzip"):
                raise zlib.error
            return zlib.decompressobj(wbits=31).decompress(text, MAX_BYTES + 1)
        except zlib.error:
            raise FetchError("content_encoding", compression) from None


class Clock:
    """A row's time budget. It runs inside `with clock:` only; when it is used up, the block raises FetchError."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.left = seconds

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._struck = False
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._start()

    def _start(self) -> None:
        self._started = self._loop.time()
        self._alarm = self._loop.call_at(self._started + max(self.left, 0.0), self._strike)

    def _stop(self) -> None:
        self._alarm.cancel()
        self.left -= self._loop.time() - self._started

    def _strike(self) -> None:
        self._struck = True
        self._task.cancel()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside `with clock:`, a wait that is not the row's own."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()
        if self._struck:
            if sys.version_info >= (3, 11):
                self._task.uncancel()
            raise FetchError("deadline") from None


class Pace:
    """Closes a response whose body comes in at less than `min_rate` bytes/s over a whole window."""

    def __init__(self, min_rate: int, response: aiohttp.ClientResponse):
        self.received = 0
        self.too_slow = False
        self._needed = min_rate * RATE_WINDOW
        self._response = response
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(RATE_WINDOW, self._judge)

    def _judge(self) -> None:
        if self.received < self._needed:
            self.too_slow = True
            self._response.close()
        else:
            self.received = 0
            self._timer = self._loop.call_later(RATE_WINDOW, self._judge)

    def stop(self) -> None:
        self._timer.cancel()


# IANA's registry of content codings, without identity, and what compression is called that is not registered.
_COMPRESSIONS = frozenset(
    "aes128gcm br brotli bzip bzip2 compress dcb dcz deflate exi gzip lz4 lzma pack200-gzip sdch snappy xz zlib zstd "
    "x-brotli x-bzip x-bzip2 x-compress x-deflate x-gzip x-lzma x-xz x-zstd".split()
)


def _compression(response: aiohttp.ClientResponse) -> str:
    """The first label of Content-Encoding that names a compression, else "".

    Any other label (none, utf-8, binary, aws-chunked, a media type) is a mistake of the server. Browsers ignore it, and
    the first bytes of the body tell what it is.
    """
    labels = ",".join(response.headers.getall("Content-Encoding", ())).lower().split(",")
    return next((label for label in map(str.strip, labels) if label in _COMPRESSIONS), "")


def _location(response: aiohttp.ClientResponse) -> str:
    locations = {location for location in response.headers.getall("Location", ()) if location}
    if len(locations) != 1:
        raise FetchError("bad_response", f"status {response.status} with {len(locations)} different Locations")
    # Bytes beyond ASCII go back as they came, escaped, as browsers and curl do it: the server knows in which encoding.
    raw = locations.pop().encode("utf-8", "surrogateescape")
    return _BEYOND_ASCII.sub(lambda byte: b"%%%02X" % byte[0][0], raw).decode("ascii")


_BEYOND_ASCII = re.compile(rb"[\x80-\xff]")
_SECONDS = re.compile(r"\d{1,9}")


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds to wait, from either form of the header (RFC 9110, 10.2.3); None if it has neither form."""
    text = response.headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL})


def _translate(error: Exception) -> FetchError:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError, ssl.CertificateError)):
        return FetchError("tls", str(error))
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("bad_url", str(error))
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = "unreachable" if error.errno in _UNREACHABLE else "connect"
        return FetchError(reason, error.strerror or str(error.os_error))
    if isinstance(error, aiohttp.ClientResponseError):
        return FetchError("bad_response", error.message)
    if isinstance(error, aiohttp.ClientPayloadError):
        # Both mean an unfinished body, but garbage between chunks will be garbage again.
        unfinished = "Not enough data" in text or not isinstance(
            error.__cause__, aiohttp.http_exceptions.HttpProcessingError
        )
        return FetchError("body_truncated" if unfinished else "bad_response", str(error))
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)):
        return FetchError("reset", text)
    return FetchError("bad_response", text)
