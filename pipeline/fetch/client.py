"""Fetches bodies over HTTP from hosts that may be slow, broken, private or hostile.

Built on aiohttp because its socket factory sees the address of every connection, including IP literals, so nothing
bypasses the guard. It takes 0.15 ms of CPU per image (0.3 without keep-alive); decoding takes 3 ms. libcurl would save
0.1 ms but needs callbacks in C.
"""

from __future__ import annotations

import asyncio
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
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import NamedTuple

import aiohttp
from yarl import URL

from pipeline.fetch.budget import Budget, Lease
from pipeline.fetch.guard import Guard, parse_url
from pipeline.fetch.head import LenientResponse
from pipeline.fetch.hosts import Exchange, Host, Hosts, Politeness
from pipeline.fetch.opt_out import Reservations, disallowed_directive, preference, reservations, reserves_mining
from pipeline.fetch.outage import Outage
from pipeline.fetch.reasons import FetchError, one_line
from pipeline.fetch.resolver import Lookup, Resolver, system_lookup
from pipeline.fetch.robots import MAX_BYTES, Robots, parse

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

# A larger body first reserves all of its bytes, in one step, from the budget shared by all rows, so rows cannot
# deadlock. 90% of web images are smaller.
FREE_BYTES = 256 * 1024
# Seconds over which the rate is averaged, so that a short stall of a busy server does not count as a slow transfer.
RATE_WINDOW = 3.0
BACKOFF = 0.25
# Transient, but not retried within the row: its time is up, or the same answer would come from a cache.
_RETRIED_LATER = frozenset({"deadline", "too_slow", "dns_unavailable", "robots_unavailable", "host_down", "host_busy"})

ROBOTS_SECONDS = 5.0
"""Time limit for a host's robots.txt and tdmrep.json together, or `timeout` if that is less. The clocks of rows waiting
for them are stopped."""
ROBOTS_TTL = 24 * 3600.0
"""Seconds for which a cached copy is used (RFC 9309, 2.4)."""
ROBOTS_RETRY_TTL = 30.0
"""Seconds after which an unavailable robots.txt is requested again."""
# If robots.txt fails with one of these reasons, so would the row: it fails immediately with the same reason.
_NO_ANSWER = frozenset({"dns", "dns_unavailable", "addr_denied", "connect", "unreachable", "tls", "reset", "deadline"})
# A redirect that leads nowhere counts as no file (RFC 9309, 2.3.1.2).
_NO_FILE = frozenset({"too_many_redirects", "redirect_loop", "bad_url", "bad_scheme"})

TDMREP = "/.well-known/tdmrep.json"
# Most publisher statements kept with a picture.
STATEMENTS = 20
_STATEMENT_HEADERS = ("X-Robots-Tag", "Content-Usage", "tdm-reservation", "tdm-policy")

Handler = Callable[[aiohttp.ClientResponse, "FetchContext"], Awaitable["bytes | str"]]
"""Reads a response. Returns the body (bytes) or the target of a redirect (str)."""


class Fetched(NamedTuple):
    body: bytes
    usage: str | None
    """The publisher's statements about use of the picture, from all hops, one per line: "Content-Usage: train-ai=y" or
    "robots.txt Content-Usage: search=n". None if there are none."""


@dataclass
class FetchContext:
    """State shared by the requests (redirects and retries) for one picture, robots.txt or tdmrep.json."""

    clock: Clock
    lease: Lease
    handler: Handler
    statements: list[str] = field(default_factory=list)

    def note(self, statement: str) -> None:
        statement = one_line(statement)
        if statement not in self.statements and len(self.statements) < STATEMENTS:
            self.statements.append(statement)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """See the options of the same names in `pipeline.stages.download`."""

    timeout: float = 10.0
    retries: int = 2
    max_bytes: int = 20_000_000
    min_rate: int = 1000
    bytes_in_flight: int = 64_000_000
    per_host: int = 8
    user_agent_token: str = "winnow"
    user_agent_contact: str = ""
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noml", "noindex", "noimageindex")
    allow_addrs: tuple[str, ...] = ()


@functools.cache
def tls_context() -> ssl.SSLContext:
    """One context per process: loading the certificate authorities takes tens of milliseconds."""
    return ssl.create_default_context()


def user_agent(token: str, contact: str) -> str:
    return f"Mozilla/5.0 (compatible; {token}; +{contact})" if contact else f"Mozilla/5.0 (compatible; {token})"


class Client:
    """Use as `async with Client(limits) as client: async with client.fetch(url, begin) as fetched: ...`."""

    def __init__(
        self,
        limits: Limits,
        lookup: Lookup | None = None,
        politeness: Politeness = Politeness(),  # noqa: B008 (frozen)
        limiter: Exchange | None = None,
    ):
        """`lookup` returns the addresses of a host name and may block; the default is the system resolver.

        `limiter` shares per-host limits with other clients (`pipeline.fetch.hosts.HostLimiter`).
        """
        self.limits = limits
        self.politeness = politeness
        self._guard = Guard(limits.allow_addrs)
        self._resolver = Resolver(self._guard, lookup or system_lookup)
        self._bytes = Budget(limits.bytes_in_flight)
        self._outage = Outage()
        self._hosts = Hosts(limits.per_host, politeness, limiter)
        self._rules_tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Client:
        # Connections are kept alive only if more requests to the host follow. Otherwise thousands of idle sockets would
        # pile up.
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
        # aiohttp has no public API for this. tests/fetch/test_wire.py fails if the attribute moves.
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
        for task in self._rules_tasks:
            task.cancel()
        await asyncio.gather(*self._rules_tasks, return_exceptions=True)
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
        """Fetches `url`. Raises FetchError, or OutageError if the local network is down.

        `begin` is awaited once, when the row's first host has room for it, and applies the caller's own limit on
        concurrent rows. The body counts as bytes in flight until the block exits.
        """
        lease = Lease(self._bytes)
        try:
            yield await self._row(parse_url(url), begin, lease)
        finally:
            lease.give_back()

    async def _row(self, url: URL, begin: Callable[[], Awaitable[None]], lease: Lease) -> Fetched:
        arrived = time.monotonic()
        # A row waits for a busy host before it counts as running, so a slow host with a thousand rows does not block
        # others.
        with self._hosts.row(url) as host:
            try:
                async with host.entrance:
                    host.breaker.refuse()
                    longest = self.politeness.host_wait
                    if longest and time.monotonic() - arrived > longest:
                        raise FetchError("host_busy", f"waited {longest:.0f} s for {host.name}")
                    await begin()
                    context = FetchContext(Clock(self.limits.timeout), lease, self._read_picture)
                    body = await self._with_retries(url, context)
                    return Fetched(body, "\n".join(context.statements) or None)
            except FetchError as failure:
                self._outage.failed(host.name, failure)
                raise

    async def _with_retries(self, url: URL, context: FetchContext) -> bytes:
        """Retries after transient failures while the clock allows."""
        earlier: FetchError | None = None
        for attempt in range(self.limits.retries + 1):
            try:
                return await self._follow_redirects(url, context)
            except FetchError as failure:
                context.lease.give_back()
                if failure.reason == "host_down" and earlier:
                    raise earlier from None  # other rows tripped the breaker meanwhile; report this row's own failure
                pause = max(failure.retry_after or 0.0, BACKOFF * 2**attempt * random.uniform(1, 1.5))
                final = not failure.transient or failure.reason in _RETRIED_LATER
                if final or attempt == self.limits.retries or pause >= context.clock.left:
                    raise
                earlier = failure
            with context.clock:
                await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _follow_redirects(self, url: URL, context: FetchContext) -> bytes:
        context.statements.clear()
        seen = {url}
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._request(url, context)
            if isinstance(found, bytes):
                return found
            url = parse_url(found, base=url)
            if url in seen:
                raise FetchError("redirect_loop", str(url))
            seen.add(url)
        raise FetchError("too_many_redirects", f"redirect {MAX_REDIRECTS + 1} leads to {url}")

    async def _request(self, url: URL, context: FetchContext) -> bytes | str:
        """Sends one request. Returns the body or the target of a redirect."""
        host = self._hosts.find(url)
        host.breaker.refuse()
        if context.handler == self._read_picture:
            await self._check_host(url, host, context)
        # The clock is stopped: time spent waiting for our own limits is not charged to the row.
        await host.begin()
        try:
            host.breaker.admit()
            if (pause := host.resumes - time.monotonic()) > 0:
                if pause >= context.clock.left:
                    detail = f"Skipped: the host asked us to wait {pause:.0f} s (Retry-After)"
                    raise FetchError(host.refusal, detail, retry_after=pause)
                with context.clock:
                    await asyncio.sleep(pause)
            return await self._exchange(url, host, context)
        finally:
            host.end()

    async def _exchange(self, url: URL, host: Host, context: FetchContext) -> bytes | str:
        clock = context.clock
        left = clock.left
        try:
            with clock:
                response = await self._get(url, keep=host.busy or context.handler == self._read_rules_file)
                self._outage.host_answered()
                try:
                    found = await context.handler(response, context)
                finally:
                    response.release()  # closes the connection if part of the body is unread
            host.note(None)
            return found
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = _translate(error)
        except FetchError as caught:
            failure = caught
        # A deadline of a row that arrived with little time left is not this host's failure.
        if failure.reason != "deadline" or left > clock.seconds / 2:
            host.note(failure)
        if failure.retry_after and failure.reason in ("http_429", "http_503"):
            host.apply_retry_after(failure.retry_after, failure.reason)
        raise failure

    async def _get(self, url: URL, *, keep: bool) -> aiohttp.ClientResponse:
        if keep:
            try:
                return await self._kept.get(url, allow_redirects=False)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                pass  # most likely, the server closed a kept-alive connection just as we reused it
        return await self._closed.get(url, allow_redirects=False)

    async def _read_picture(self, response: aiohttp.ClientResponse, context: FetchContext) -> bytes | str:
        headers, limits, politeness = response.headers, self.limits, self.politeness
        for name in _STATEMENT_HEADERS:
            for value in headers.getall(name, ()):
                context.note(f"{name}: {value}")
        tags = headers.getall("X-Robots-Tag", ())
        if directive := disallowed_directive(tags, limits.user_agent_token, limits.disallowed_header_directives):
            raise FetchError("opted_out", f"X-Robots-Tag: {directive}")
        usage = ", ".join(headers.getall("Content-Usage", ()))
        if preference(usage, politeness.content_usage) is False:
            raise FetchError("opted_out", f"Content-Usage: {usage}")
        if politeness.tdm_reservation and reserves_mining(headers.getall("tdm-reservation", ())):
            raise FetchError("opted_out", "tdm-reservation: 1")
        if response.status in _REDIRECTS:
            return _location(response)
        if not _is_whole(response):
            raise FetchError(f"http_{response.status:03d}", retry_after=_retry_after(response))
        return await self._body(response, context.clock, context.lease)

    async def _body(self, response: aiohttp.ClientResponse, clock: Clock, lease: Lease) -> bytes:
        if compressions := _compressions(response):
            # We requested identity encoding. One server in thousands compresses anyway, and so do decompression bombs.
            raise FetchError("content_encoding", ", ".join(compressions))
        length, cap = response.content_length, self.limits.max_bytes
        if length is not None and length > cap:
            raise FetchError("body_too_large", f"Content-Length {length}, limit {cap} bytes")
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
            # The exception's traceback keeps this frame alive, and with it the body, after the lease is returned.
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

    async def _check_host(self, url: URL, host: Host, context: FetchContext) -> None:
        """Raises FetchError if robots.txt or tdmrep.json forbids the url, or if robots.txt is unavailable."""
        if not (self.politeness.robots_txt or self.politeness.tdmrep_json):
            return
        if host.robots is None or host.rules_expire < time.monotonic():
            if host.rules_task is None:
                host.rules_task = asyncio.create_task(self._fetch_rules(url, host))
                self._rules_tasks.add(host.rules_task)
                host.rules_task.add_done_callback(self._rules_tasks.discard)
            # Shielded: other rows wait for the same answer.
            await asyncio.shield(host.rules_task)
        robots = host.robots
        assert robots is not None
        if isinstance(robots, FetchError):
            raise FetchError(robots.reason, robots.detail)
        target = url.raw_path_qs
        if not robots.allows(target):
            raise FetchError("robots_disallowed", f"{host.name}/robots.txt")
        for usage in robots.usage(target):
            context.note(f"robots.txt Content-Usage: {usage}")
            if preference(usage, self.politeness.content_usage) is False:
                raise FetchError("opted_out", f"robots.txt Content-Usage: {usage}")
        reserved = host.reservations.reserved(target)
        if reserved is not None:
            context.note(f"tdmrep.json tdm-reservation: {reserved:d}")
        if reserved:
            raise FetchError("opted_out", "tdmrep.json tdm-reservation: 1")

    async def _fetch_rules(self, url: URL, host: Host) -> None:
        """Fetches the host's robots.txt, then its tdmrep.json if there is a robots.txt that allows it.

        tdmrep.json is not requested from a host without a robots.txt: most such hosts have one picture of a pool, and
        the request would add 50% to their load.
        """
        clock = Clock(min(self.limits.timeout, ROBOTS_SECONDS))
        context = FetchContext(clock, Lease(self._bytes), self._read_rules_file)
        robots: Robots | FetchError = Robots()
        found = Reservations()
        try:
            if self.politeness.robots_txt:
                robots = await self._fetch_robots(url, host, context)
            if isinstance(robots, Robots) and self._wants_tdmrep(robots):
                # Without the file, for whatever reason, no rights are reserved (TDMRep, "TDM File on the Origin
                # Server"), so it is not retried.
                with suppress(FetchError):
                    found = reservations(await self._follow_redirects(url.with_path(TDMREP), context))
        finally:
            host.rules_task = None
        self._hosts.remember(host, robots, found, ROBOTS_TTL if isinstance(robots, Robots) else ROBOTS_RETRY_TTL)

    def _wants_tdmrep(self, robots: Robots) -> bool:
        wanted = self.politeness.tdmrep_json and (robots.found or not self.politeness.robots_txt)
        return wanted and robots.allows(TDMREP)

    async def _fetch_robots(self, url: URL, host: Host, context: FetchContext) -> Robots | FetchError:
        """Returns the rules, or the failure that forbids all requests to the host (RFC 9309, 2.3.1)."""
        try:
            text = await self._with_retries(url.with_path("/robots.txt"), context)
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

    async def _read_rules_file(self, response: aiohttp.ClientResponse, context: FetchContext) -> bytes | str:
        # Opt-out headers are ignored: many sites send them with robots.txt to keep it out of search indexes.
        if response.status in _REDIRECTS:
            return _location(response)
        if not 200 <= response.status < 300:
            raise FetchError(f"http_{response.status:03d}", retry_after=_retry_after(response))
        text = bytearray()
        while len(text) <= MAX_BYTES and (chunk := await response.content.readany()):
            text += chunk
        compressions = _compressions(response)
        if not compressions:
            return bytes(text)
        try:
            if compressions not in (["gzip"], ["x-gzip"]):
                raise zlib.error
            unpacked = zlib.decompressobj(wbits=31)
            rules = unpacked.decompress(text, MAX_BYTES + 1)
            if not unpacked.eof and max(len(text), len(rules)) <= MAX_BYTES:
                raise zlib.error  # truncated: rules may be missing
            return rules
        except zlib.error:
            raise FetchError("content_encoding", ", ".join(compressions)) from None


class Clock:
    """A row's time budget, in seconds. Runs only inside `with clock:`. When the time is used up, the block raises
    FetchError("deadline")."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.left = seconds

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._expired = False
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._start()

    def _start(self) -> None:
        self._started = self._loop.time()
        self._alarm = self._loop.call_at(self._started + max(self.left, 0.0), self._expire)

    def _stop(self) -> None:
        self._alarm.cancel()
        self.left -= self._loop.time() - self._started

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the clock within `with clock:`, for waits that are not charged to the row."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()
        if self._expired:
            if sys.version_info >= (3, 11):
                self._task.uncancel()
            raise FetchError("deadline") from None


class Pace:
    """Closes a response whose body arrives at less than `min_rate` bytes/s over a whole RATE_WINDOW."""

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


# IANA's registry of content codings without identity, plus common unregistered names.
_COMPRESSIONS = frozenset(
    "aes128gcm br brotli bzip bzip2 compress dcb dcz deflate exi gzip lz4 lzma pack200-gzip sdch snappy xz zlib zstd "
    "x-brotli x-bzip x-bzip2 x-compress x-deflate x-gzip x-lzma x-xz x-zstd".split()
)


def _compressions(response: aiohttp.ClientResponse) -> list[str]:
    """The labels of Content-Encoding that name a compression.

    Any other label (none, utf-8, binary, aws-chunked, a media type) is a server mistake. It is ignored, as in browsers:
    the format is detected from the first bytes of the body.
    """
    labels = ",".join(response.headers.getall("Content-Encoding", ())).lower().split(",")
    return [label for label in map(str.strip, labels) if label in _COMPRESSIONS]


def _is_whole(response: aiohttp.ClientResponse) -> bool:
    """True if the body is the whole resource: status 200, 203 (changed by a proxy), or 206 with all bytes, which some
    servers send in answer to a request without a range."""
    if response.status == 206 and (sent := _RANGE.fullmatch(response.headers.get("Content-Range", ""))):
        return int(sent[1]) + 1 == int(sent[2])
    return response.status in (200, 203)


_RANGE = re.compile(r"bytes 0-([0-9]{1,19})/([0-9]{1,19})", re.IGNORECASE)


def _location(response: aiohttp.ClientResponse) -> str:
    locations = {location for location in response.headers.getall("Location", ()) if location}
    if len(locations) != 1:
        raise FetchError("bad_response", f"status {response.status} with {len(locations)} different Location headers")
    # Percent-encode non-ASCII bytes unchanged, as browsers and curl do: only the server knows their encoding.
    raw = locations.pop().encode("utf-8", "surrogateescape")
    return _BEYOND_ASCII.sub(lambda byte: b"%%%02X" % byte[0][0], raw).decode("ascii")


_BEYOND_ASCII = re.compile(rb"[\x80-\xff]")
_SECONDS = re.compile(r"\d{1,9}")


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds to wait, from either form of the header (RFC 9110, 10.2.3). None if absent or invalid."""
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
        # Truncation is transient. Invalid chunk framing is not.
        unfinished = "Not enough data" in text or not isinstance(
            error.__cause__, aiohttp.http_exceptions.HttpProcessingError
        )
        return FetchError("body_truncated" if unfinished else "bad_response", str(error))
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)):
        return FetchError("reset", text)
    return FetchError("bad_response", text)
