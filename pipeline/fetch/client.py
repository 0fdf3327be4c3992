"""Fetches bodies over HTTP from hosts that may be slow, broken, private or hostile.

Built on aiohttp, whose 0.15 ms of CPU an image (0.3 without keep-alive) is small beside the 3 ms of decoding it;
libcurl would save a tenth of a millisecond and cost callbacks in C. What decided: its socket factory sees every address
that is dialled, IP literals and all, so the guard has no way around it.
"""

from __future__ import annotations

import asyncio
import functools
import random
import re
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipeline.fetch.guard import Guard, parse_url
from pipeline.fetch.opt_out import disallowed_directive
from pipeline.fetch.reasons import FetchError

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

# A body that needs more first reserves it, all at once, from the bytes shared by all rows: no two rows can then wait
# for each other's last bytes. Nine of ten web images fit into the free part.
FREE_BYTES = 256 * 1024
# The rate is judged over whole windows, so that a pause of a busy server is not taken for its rate.
RATE_WINDOW = 3.0
BACKOFF = 0.25
# Transient, but no sooner than in another run: the row's time is up, or the answer would come from the cache.
_NOT_AT_ONCE = frozenset({"deadline", "too_slow", "dns_unavailable"})

RESOLVER_THREADS = 32
DNS_TTL = 300.0
DNS_RETRY_TTL = 5.0
DNS_ENTRIES = 50_000

Lookup = Callable[[str], list[str]]


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
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    allow_addrs: tuple[str, ...] = ()


@functools.cache
def tls_context() -> ssl.SSLContext:
    """One for the process: loading the certificate authorities takes tens of milliseconds."""
    return ssl.create_default_context()


def user_agent(token: str, contact: str) -> str:
    return f"Mozilla/5.0 (compatible; {token}; +{contact})" if contact else f"Mozilla/5.0 (compatible; {token})"


class Client:
    """Use as `async with Client(limits) as client: async with client.fetch(url, begin) as body: ...`."""

    def __init__(self, limits: Limits, lookup: Lookup | None = None):
        """`lookup` gives the addresses of a host name, and may block; the system's resolver by default."""
        self.limits = limits
        self._guard = Guard(limits.allow_addrs)
        self._resolver = Resolver(self._guard, lookup or system_lookup)
        self._bytes = ByteBudget(limits.bytes_in_flight)
        self._hosts: dict[str, Host] = {}

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # rows and hosts have limits of their own
                ssl=tls_context(),
                resolver=self._resolver,
                use_dns_cache=False,
                socket_factory=self._open_socket,
            ),
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
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()
        await self._resolver.close()

    def _open_socket(self, info: tuple[int, int, int, str, tuple]) -> socket.socket:
        family, kind, protocol, _, address = info
        self._guard.check(address[0], address[1])
        return socket.socket(family, kind, protocol)

    @asynccontextmanager
    async def fetch(self, url: str | None, begin: Callable[[], Awaitable[None]]) -> AsyncIterator[bytes]:
        """The body behind `url`. Raises FetchError.

        `begin` is awaited once, when the row's first host has room for it: the caller's own limit on rows at work.
        The bytes count as in flight until the block is left.
        """
        lease = Lease(self._bytes)
        try:
            yield await self._persist(parse_url(url), begin, lease)
        finally:
            lease.give_back()

    async def _persist(self, url: URL, begin: Callable[[], Awaitable[None]], lease: Lease) -> bytes:
        """Asks again after transient failures for as long as the row's time allows."""
        clock = Clock(self.limits.timeout)
        # A row waits here while its host is busy, without taking one of the places among the rows at work: one slow
        # host with a thousand rows holds up none of the others.
        with self._host(url) as host:
            async with host.entrance:
                await begin()
        for attempt in range(self.limits.retries + 1):
            try:
                return await self._follow(url, clock, lease)
            except FetchError as failure:
                lease.give_back()
                pause = max(failure.retry_after or 0.0, BACKOFF * 2**attempt * random.uniform(1, 1.5))
                hopeless = not failure.transient or failure.reason in _NOT_AT_ONCE
                if hopeless or attempt == self.limits.retries or pause >= clock.left:
                    raise
            with clock:
                await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _follow(self, url: URL, clock: Clock, lease: Lease) -> bytes:
        seen = {url}
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._hop(url, clock, lease)
            if isinstance(found, bytes):
                return found
            url = parse_url(found, base=url)
            if url in seen:
                raise FetchError("redirect_loop", str(url))
            seen.add(url)
        raise FetchError("too_many_redirects", f"the {MAX_REDIRECTS + 1}th leads to {url}")

    async def _hop(self, url: URL, clock: Clock, lease: Lease) -> bytes | str:
        """One request: the body, or where a redirect leads."""
        with self._host(url) as host:
            # Time spent waiting for our own politeness is not the host's slowness: the clock stands still.
            async with host.requests:
                try:
                    if (pause := host.resumes - time.monotonic()) > 0:
                        if pause >= clock.left:
                            raise FetchError(host.refusal, f"not asked: the host wants {pause:.0f} s of peace")
                        with clock:
                            await asyncio.sleep(pause)
                    return await self._exchange(url, host, clock, lease)
                except FetchError as failure:
                    # Said to one row, meant for all: 429 and 503 speak of the host.
                    if failure.retry_after and failure.reason in ("http_429", "http_503"):
                        host.resumes = time.monotonic() + failure.retry_after
                        host.refusal = failure.reason
                    raise

    async def _exchange(self, url: URL, host: Host, clock: Clock, lease: Lease) -> bytes | str:
        # Keep-alive pays only where more rows wait for the host; else thousands of idle sockets would pile up.
        headers = {} if host.users > 1 else {"Connection": "close"}
        try:
            with clock:
                response = await self._session.get(url, allow_redirects=False, headers=headers)
            try:
                return await self._answer(response, clock, lease)
            finally:
                response.release()  # closes the connection where a part of the body is still to come
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _translate(error) from None

    async def _answer(self, response: aiohttp.ClientResponse, clock: Clock, lease: Lease) -> bytes | str:
        tags = response.headers.getall("X-Robots-Tag", ())
        directives = self.limits.disallowed_header_directives
        if directive := disallowed_directive(tags, self.limits.user_agent_token, directives):
            raise FetchError("opted_out", f"X-Robots-Tag: {directive}")
        if response.status in _REDIRECTS:
            return _location(response)
        if response.status != 200:
            raise FetchError(f"http_{response.status:03d}", retry_after=_retry_after(response))
        return await self._body(response, clock, lease)

    async def _body(self, response: aiohttp.ClientResponse, clock: Clock, lease: Lease) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            # Asked for as it is, an image comes compressed from one server in thousands; a bomb comes that way too.
            raise FetchError("content_encoding", encoding)
        length, cap = response.content_length, self.limits.max_bytes
        if length is not None and length > cap:
            raise FetchError("body_too_large", f"{length} bytes announced, at most {cap}")
        if length is not None and length > FREE_BYTES:
            await lease.take(length)
        body = bytearray()
        pace = Pace(self.limits.min_rate, response)
        try:
            while True:
                with clock:
                    chunk = await response.content.readany()
                if not chunk:
                    break
                body += chunk
                pace.received += len(chunk)
                if len(body) > cap:
                    raise FetchError("body_too_large", f"more than {cap} bytes")
                if len(body) > FREE_BYTES and not lease.size:
                    pace.stop()
                    await lease.take(cap)
                    pace = Pace(self.limits.min_rate, response)
        except aiohttp.ClientError:
            if pace.too_slow:
                raise FetchError("too_slow", f"{len(body)} bytes until then") from None
            raise
        finally:
            pace.stop()
        if not body:
            raise FetchError("empty_body")
        lease.keep(len(body))
        return bytes(body)

    @contextmanager
    def _host(self, url: URL) -> Iterator[Host]:
        name = url.raw_host or ""
        if name not in self._hosts:
            self._hosts[name] = Host(self.limits.per_host)
        host = self._hosts[name]
        host.users += 1
        try:
            yield host
        finally:
            host.users -= 1
            if not host.users and host.resumes < time.monotonic():
                del self._hosts[name]


class Host:
    """What all rows of one host share.

    Rows pass `entrance` before they begin and `requests` for each request. One gate for both could lock up: rows that
    have begun wait for `requests` (after a redirect, say), so none that holds it may wait to begin.
    """

    def __init__(self, limit: int):
        self.entrance = asyncio.Semaphore(limit)
        self.requests = asyncio.Semaphore(limit)
        self.users = 0
        self.resumes = 0.0
        """`time.monotonic()` before which the host wants no request, by its Retry-After."""
        self.refusal = "http_503"


class Clock:
    """A row's seconds. They run inside `with clock:` only; when they are used up, the block ends in FetchError."""

    def __init__(self, seconds: float):
        self.left = seconds

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._struck = False
        task = asyncio.current_task()
        assert task is not None
        self._alarm = self._loop.call_later(max(self.left, 0.0), self._strike, task)

    def _strike(self, task: asyncio.Task) -> None:
        self._struck = True
        task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._alarm.cancel()
        self.left -= self._loop.time() - self._started
        if self._struck:
            if sys.version_info >= (3, 11) and (task := asyncio.current_task()):
                task.uncancel()
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


class ByteBudget:
    """A number of bytes that rows reserve and give back, first come, first served."""

    def __init__(self, total: int):
        self.total = total
        self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def reserve(self, size: int) -> None:
        if self.free >= size and not self._waiting:
            self.free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(size)
            raise

    def release(self, size: int) -> None:
        self.free += size
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self.free):
            needed, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= needed
                turn.set_result(None)


@dataclass
class Lease:
    """One row's share of a budget: taken at most once at a time, given back as a whole."""

    budget: ByteBudget
    size: int = 0

    async def take(self, size: int) -> None:
        size = min(size, self.budget.total)
        await self.budget.reserve(size)
        self.size = size

    def keep(self, size: int) -> None:
        """Gives back what is over `size`."""
        if self.size > size:
            self.budget.release(self.size - size)
            self.size = size

    def give_back(self) -> None:
        self.keep(0)


def system_lookup(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class Resolver(AbstractResolver):
    """Host names to public addresses: cached, refusals too, and one question at a time for each name.

    The questions have threads of their own: names that never answer must not hold up anything but each other.
    """

    def __init__(self, guard: Guard, lookup: Lookup):
        self._guard = guard
        self._lookup = lookup
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="dns")
        self._known: dict[str, tuple[float, list[str] | FetchError]] = {}
        self._asking: dict[str, asyncio.Task[list[str] | FetchError]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises FetchError: `dns`, `dns_unavailable`, or `addr_denied` where no address of the host is public."""
        addresses = await self._addresses(host.lower().removesuffix("."))
        allowed = []
        for address in addresses:
            try:
                self._guard.check(address, port)
                allowed.append(address)
            except FetchError as error:
                denial = error
        if not allowed:
            raise denial
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in allowed
        ]

    async def close(self) -> None:
        # A question cannot be taken back; its thread ends with the answer.
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _addresses(self, host: str) -> list[str]:
        expires, known = self._known.get(host, (0.0, []))
        if expires < time.monotonic():
            if host not in self._asking:
                self._asking[host] = asyncio.create_task(self._ask(host))
            # Shielded: the row that asked may run out of time while others still wait for the answer.
            known = await asyncio.shield(self._asking[host])
        if isinstance(known, FetchError):
            # A fresh one: an exception raised again would drag every earlier row's traceback along.
            raise FetchError(known.reason, known.detail)
        return known

    async def _ask(self, host: str) -> list[str] | FetchError:
        answer: list[str] | FetchError
        try:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._threads, self._lookup, host)
            if not answer:
                answer = FetchError("dns", f"{host} has no address")
        except socket.gaierror as error:
            gone = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
            answer = FetchError("dns" if gone else "dns_unavailable", f"{host}: {error.strerror}")
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be encoded
            answer = FetchError("dns", f"{host}: {error}")
        finally:
            del self._asking[host]
        if len(self._known) >= DNS_ENTRIES:
            del self._known[next(iter(self._known))]
        lasting = isinstance(answer, list) or not answer.transient
        self._known[host] = (time.monotonic() + (DNS_TTL if lasting else DNS_RETRY_TTL), answer)
        return answer


def _location(response: aiohttp.ClientResponse) -> str:
    location = response.headers.get("Location", "").strip()
    if not location:
        raise FetchError("bad_response", f"status {response.status} without a Location")
    # Header bytes that are not UTF-8 arrive as surrogates; Latin-1 is what HTTP once meant by them.
    if any("\ud800" <= c <= "\udfff" for c in location):
        return location.encode("utf-8", "surrogateescape").decode("latin-1")
    return location


_SECONDS = re.compile(r"\d{1,9}")


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds until then, from either form of the header (RFC 9110, 10.2.3); None where there is no sense in it."""
    text = response.headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _translate(error: Exception) -> FetchError:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError, ssl.CertificateError)):
        return FetchError("tls", str(error))
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("bad_url", str(error))
    if isinstance(error, aiohttp.ClientConnectorError):
        return FetchError("connect", error.strerror or str(error.os_error))
    if isinstance(error, aiohttp.ClientPayloadError):
        # Both mean an unfinished body, but garbage between chunks will be garbage again.
        unfinished = "Not enough data" in text or not isinstance(
            error.__cause__, aiohttp.http_exceptions.BadHttpMessage
        )
        return FetchError("body_truncated" if unfinished else "bad_response", str(error))
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)):
        return FetchError("reset", text)
    return FetchError("bad_response", text)
