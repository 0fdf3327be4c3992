"""Per-host limits, shared by all rows of a host: on one worker and, through a `HostLimiter`, across the cluster.

A host is a scheme, a name and a port, as in robots.txt. A `HostLimiter` is a plain Python object; to share it between
workers, run it in an actor. Each worker calls it a few times a second, with all of its active hosts in one call.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from yarl import URL

from pipeline.fetch.budget import Budget
from pipeline.fetch.opt_out import Reservations
from pipeline.fetch.outage import OutageError
from pipeline.fetch.reasons import FetchError
from pipeline.fetch.robots import Robots

KNOWN_HOSTS = 10_000
"""Most hosts remembered by a worker. With KNOWN_RULES bytes of rules, they take about 40 MB."""
KNOWN_RULES = 16_000_000
"""Most bytes of robots.txt and tdmrep.json rules remembered by a worker."""

DOWN_SECONDS = 30.0
"""Seconds for which an unresponsive host is skipped the first time. Doubles each time, up to DOWN_MOST."""
DOWN_MOST = 600.0
_DOWN = frozenset({"connect", "unreachable", "reset", "tls", "deadline", "too_slow"})

ASK_EVERY = 0.05
"""Seconds between exchanges with the limiter about contended hosts; longer if the limiter is slow."""
WANT_EVERY = 0.2
"""Seconds between exchanges about uncontended hosts with waiting rows, such as every new host. An exchange through Ray
costs 2 ms of CPU on each side."""
SETTLE_EVERY = 1.0
"""Seconds between exchanges that return unused permits."""
LEASE = 30.0
"""Seconds without an exchange after which a worker counts as dead and its permits are released."""
START_AHEAD = 1.0
"""The limiter grants start times of requests up to this many seconds ahead. Unused ones are lost."""
LONGEST_PAUSE = 3600.0
"""Longest Retry-After that the limiter remembers, in seconds."""

Now = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Politeness:
    """How to treat hosts and publishers. See the options of the same names in `pipeline.stages.download`."""

    per_host_rate: float = 0.0
    host_wait: float = 600.0
    host_failures: int = 10
    robots_txt: bool = True
    content_usage: tuple[str, ...] = ("train-ai", "all")
    tdm_reservation: bool = True
    tdmrep_json: bool = True


class Breaker:
    """A circuit breaker: stops requests to a host after `most` consecutive connection failures or timeouts.

    While tripped, it admits one request after each pause, and the pauses double. Any other outcome of a request resets
    it. 0 disables it.
    """

    def __init__(self, most: int, now: Now = time.monotonic):
        self._most = most
        self._now = now
        self._failures = 0
        self._pause = DOWN_SECONDS
        self._until = 0.0
        self._probing = False
        self.last = ""
        """The last failure, as `reason: detail`."""

    @property
    def down_for(self) -> float:
        """Seconds until the next attempt; 0 if requests are allowed."""
        return max(0.0, self._until - self._now())

    def refuse(self) -> None:
        """Raises FetchError("host_down") during a pause."""
        if self.down_for:
            raise FetchError("host_down", f"{self._failures} consecutive failures, last: {self.last}")

    def admit(self) -> None:
        """Like `refuse`. The first caller after a pause becomes the probe and starts the next pause for the others."""
        if self._until:
            self.refuse()
            self._probing = True
            self._until = self._now() + self._pause

    def note(self, failure: FetchError | None) -> bool:
        """Records the outcome of a request: None for success. Returns True if this trips the breaker."""
        if failure is None or failure.reason not in _DOWN:
            if self._failures:
                self._failures, self._pause, self._until, self._probing = 0, DOWN_SECONDS, 0.0, False
            return False
        self._failures += 1
        self.last = f"{failure.reason}: {failure.detail}" if failure.detail else failure.reason
        # Requests already in flight when the breaker tripped do not count again.
        if self._failures == self._most or (self._until and self._probing):
            self._probing = False
            self._until = self._now() + self._pause
            self._pause = min(2 * self._pause, DOWN_MOST)
            return True
        return False

    def trip(self, seconds: float, last: str) -> None:
        """Stops requests for `seconds`, because another worker found the host down."""
        if self._most:
            self._failures = max(self._failures, self._most)
            self._until, self.last = max(self._until, self._now() + seconds), last


class Ask(NamedTuple):
    """A worker's report about a host, and its request for permits."""

    used: int
    """Permits in use, now or at some time since the last exchange."""
    wanted: int
    """Rows waiting for a permit."""
    gap: float = 0.0
    """Minimum seconds between requests, from Crawl-delay or `per_host_rate`."""
    pause: float = 0.0
    """A new Retry-After of the host, in seconds. `refusal` is the drop reason of rows that cannot wait that long."""
    refusal: str = ""
    down: float = 0.0
    """Seconds for which the worker has just marked the host as down. `failure` says why."""
    failure: str = ""


_NOTHING_NEW = Ask(0, 0)


class Grant(NamedTuple):
    """The limiter's answer to an `Ask`."""

    permits: int
    """Concurrent requests that the worker may have, including those in flight."""
    starts: tuple[float, ...] = ()
    """If the host has a gap: start times for one request each, in seconds from now."""
    pause: float = 0.0
    refusal: str = ""
    down: float = 0.0
    failure: str = ""


class Exchange(Protocol):
    """A `HostLimiter`, or a client of a remote one."""

    def exchange(self, worker: str, asks: dict[str, Ask]) -> Awaitable[dict[str, Grant]]: ...


class Host:
    """State shared by all rows of a host.

    A row acquires `entrance` before it begins and holds it until its body has arrived, so a slow host with a thousand
    rows takes at most `per_host` of the places for running rows. `begin` and `end` enclose each request. Rows
    redirected to this host wait only in `begin`, so rows cannot deadlock.
    """

    __slots__ = (
        "_hosts", "_next", "_starts", "breaker", "entrance", "gap", "idle", "name", "permits", "refusal",
        "reservations", "resumes", "robots", "rows", "rules_expire", "rules_task", "scarce", "unreported",
    )  # fmt: skip

    def __init__(self, name: str, hosts: Hosts):
        self.name = name
        self.rows = 0
        self.entrance = asyncio.Semaphore(hosts.per_host)
        self.permits = Budget(0 if hosts.limiter else hosts.per_host)
        self.idle = 0
        """Permits that stayed free since the last exchange about this host."""
        self.scarce = False
        """True if the limiter granted fewer permits than wanted. Free permits are then returned immediately."""
        self.breaker = Breaker(hosts.failures)
        self.gap = hosts.gap
        self.resumes = 0.0
        """`time.monotonic()` before which no request may be sent (Retry-After)."""
        self.refusal = "http_503"
        self.robots: Robots | FetchError | None = None
        self.reservations = Reservations()
        self.rules_expire = 0.0
        """`time.monotonic()` until which `robots` and `reservations` are valid."""
        self.rules_task: asyncio.Task[None] | None = None
        """The fetch of `robots` and `reservations`, while it runs."""
        self.unreported = _NOTHING_NEW
        """News not yet sent to the limiter."""
        self._hosts = hosts
        self._next = 0.0
        self._starts: deque[float] = deque()

    async def begin(self) -> None:
        """Waits for a permit and for the minimum gap between requests."""
        if self._hosts.limiter:
            self._hosts.touched[self.name] = self
            if self._hosts.lost:
                raise self._hosts.lost
        await self.permits.reserve(1)
        self.idle = min(self.idle, self.permits.free)
        if self.gap and (pause := self._start() - time.monotonic()) > 0:
            try:
                await asyncio.sleep(pause)
            except BaseException:
                self.end()
                raise

    def end(self) -> None:
        if self._hosts.limiter:
            self._hosts.touched[self.name] = self
            if self.gap:
                # A granted start time is valid for one request.
                self.permits.resize(self.permits.total - 1)
        self.permits.release(1)

    def _start(self) -> float:
        if self._starts:
            return self._starts.popleft()
        start = max(time.monotonic(), self._next)
        self._next = start + self.gap
        return start

    def apply_retry_after(self, seconds: float, refusal: str) -> None:
        """Applies a Retry-After received by one row to all rows of the host."""
        self.resumes, self.refusal = time.monotonic() + seconds, refusal
        self.unreported = self.unreported._replace(pause=seconds, refusal=refusal)

    def note(self, failure: FetchError | None) -> None:
        """Records the outcome of a request: None for success."""
        if self.breaker.note(failure):
            self.unreported = self.unreported._replace(down=self.breaker.down_for, failure=self.breaker.last)

    def ask(self, leaving: bool = False) -> Ask:
        """Builds the report for the limiter. Gives up the permits that were unused since the last exchange."""
        return_all = leaving or self.scarce or self.gap
        kept = self.permits.used + (0 if return_all else max(0, self.permits.free - self.idle))
        ask = self.unreported._replace(used=kept, wanted=self.permits.wanted, gap=self.gap)
        self.unreported = _NOTHING_NEW
        self.permits.resize(kept)
        self.idle = self.permits.free
        return ask

    def apply(self, ask: Ask, grant: Grant) -> None:
        """Applies the limiter's grant for `ask`."""
        now = time.monotonic()
        self.scarce = grant.permits < ask.used + ask.wanted
        if grant.pause and now + grant.pause > self.resumes:
            self.resumes, self.refusal = now + grant.pause, grant.refusal
        if grant.down and not self.breaker.down_for:
            self.breaker.trip(grant.down, grant.failure)
        self._starts.extend(now + start for start in grant.starts)
        self.permits.resize(self.permits.total + grant.permits - ask.used)

    @property
    def urgent(self) -> bool:
        """True if rows wait for permits, or if other workers may wait for this report."""
        return self.permits.wanted > 0 or self.pressing

    @property
    def pressing(self) -> bool:
        """True if other workers may wait for returned permits or for news about the host."""
        return self.scarce or self.gap > 0 or self.unreported != _NOTHING_NEW

    @property
    def busy(self) -> bool:
        """True if the host has, or will soon have, more than one request, so keep-alive pays off."""
        return self.rows > 1 or self.permits.used > 1

    @property
    def evictable(self) -> bool:
        return not self.rows and not self.permits.used and not self.permits.wanted


class Hosts:
    """The hosts known to a worker, least recently used first."""

    def __init__(self, per_host: int, politeness: Politeness, limiter: Exchange | None = None):
        self.per_host = per_host
        self.gap = 1 / politeness.per_host_rate if politeness.per_host_rate else 0.0
        self.failures = politeness.host_failures
        self.limiter = limiter
        self.touched: dict[str, Host] = {}
        """Hosts to report to the limiter."""
        self.lost: OutageError | None = None
        """Set once the limiter is unreachable."""
        self._known: dict[str, Host] = {}
        self._rules = 0
        self._worker = secrets.token_hex(8)
        self._exchange_task: asyncio.Task[None] | None = None

    def open(self) -> None:
        if self.limiter:
            self._exchange_task = asyncio.create_task(self._exchange(self.limiter))

    async def close(self) -> None:
        if self._exchange_task and self.limiter:
            self._exchange_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._exchange_task
            with suppress(Exception):
                held = self.touched | {name: host for name, host in self._known.items() if host.permits.total}
                await self.limiter.exchange(self._worker, {n: host.ask(leaving=True) for n, host in held.items()})

    def find(self, url: URL) -> Host:
        name = f"{url.scheme}://{(url.raw_host or '').removesuffix('.')}:{url.port}"
        host = self._known.pop(name, None)
        if host is None:
            if len(self._known) >= KNOWN_HOSTS or self._rules > KNOWN_RULES:
                self._evict()
            host = Host(name, self)
        self._known[name] = host
        return host

    @contextmanager
    def row(self, url: URL) -> Iterator[Host]:
        """The host of a row. It is not evicted until the row has ended."""
        host = self.find(url)
        host.rows += 1
        try:
            yield host
        finally:
            host.rows -= 1

    def remember(self, host: Host, robots: Robots | FetchError, reservations: Reservations, seconds: float) -> None:
        self._rules -= _size(host)
        host.robots, host.reservations, host.rules_expire = robots, reservations, time.monotonic() + seconds
        self._rules += _size(host)

    def _evict(self) -> None:
        """Evicts the least recently used tenth of the hosts. Hosts in use are never evicted."""
        for name in list(self._known):
            if len(self._known) <= 0.9 * KNOWN_HOSTS and self._rules <= 0.9 * KNOWN_RULES:
                return
            host = self._known[name]
            if host.evictable:
                del self._known[name]
                self._rules -= _size(host)

    async def _exchange(self, limiter: Exchange) -> None:
        answered = settled = time.monotonic()
        pause = ASK_EVERY
        while True:
            await asyncio.sleep(pause)
            started = time.monotonic()
            if started - answered > LEASE / 2:
                # The limiter may have released our permits: report all that we hold again.
                self.touched.update((n, h) for n, h in self._known.items() if h.permits.used)
            if started - settled >= SETTLE_EVERY:
                settled, asked = started, self.touched
            else:
                asked = {name: host for name, host in self.touched.items() if host.urgent}
                if started - answered < WANT_EVERY and not any(host.pressing for host in asked.values()):
                    continue
            if not asked and started - answered < LEASE / 4:
                continue
            self.touched = {name: host for name, host in self.touched.items() if name not in asked}
            asks = {name: host.ask() for name, host in asked.items()}
            try:
                grants = await limiter.exchange(self._worker, asks)
            except Exception as error:
                self.touched = {**asked, **self.touched}
                if time.monotonic() - answered > LEASE:
                    self.lost = OutageError(f"the host limiter has not answered for {LEASE:.0f} s: {error}")
                    for host in self._known.values():
                        host.permits.fail(self.lost)
                    return
                continue
            answered = time.monotonic()
            pause = max(ASK_EVERY, 2 * (answered - started))
            for name, host in asked.items():
                host.apply(asks[name], grants[name])
                if host.permits.wanted or host.permits.free > 0:
                    self.touched[name] = host


def _size(host: Host) -> int:
    """Bytes used by the rules of a host."""
    return host.reservations.size + (host.robots.size if isinstance(host.robots, Robots) else 0)


class _Shared:
    """The limiter's state of a host. Times are those of the limiter's clock."""

    __slots__ = ("down", "failure", "gap", "held", "next_start", "queue", "refusal", "resumes")

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        """Permits by worker."""
        self.queue: dict[str, int] = {}
        """Waiting rows by worker, next in turn first."""
        self.gap = self.next_start = self.resumes = self.down = 0.0
        self.refusal = self.failure = ""


class HostLimiter:
    """Enforces per-host limits across all workers: `per_host` concurrent requests, and start times spaced by the gap.

    Under contention, workers get equal shares. If there are more workers than permits, they take turns of one request.
    A worker is charged with what it last reported or was granted since, so the sum never exceeds `per_host`. Memory is
    bounded by the requests in flight and the hosts with a pending Retry-After.
    """

    def __init__(self, per_host: int, now: Now = time.monotonic):
        self._per_host = per_host
        self._now = now
        self._hosts: dict[str, _Shared] = {}
        self._workers: dict[str, float] = {}
        """Time of each worker's last exchange, oldest first."""
        self._swept = now()

    async def exchange(self, worker: str, asks: dict[str, Ask]) -> dict[str, Grant]:
        """Returns a grant for each host in `asks`."""
        now = self._now()
        self._workers.pop(worker, None)
        self._workers[worker] = now
        self._sweep(now)
        return {name: self._answer(worker, name, ask, now) for name, ask in asks.items()}

    def _answer(self, worker: str, name: str, ask: Ask, now: float) -> Grant:
        host = self._hosts.setdefault(name, _Shared())
        if ask.pause and now + ask.pause > host.resumes:
            host.resumes, host.refusal = now + min(ask.pause, LONGEST_PAUSE), ask.refusal
        if ask.down and now + ask.down > host.down:
            host.down, host.failure = now + ask.down, ask.failure
        host.gap = max(host.gap, ask.gap)
        permits, starts = self._share(worker, host, ask, now)
        host.held[worker] = max(ask.used, permits)
        if not host.held[worker]:
            del host.held[worker]
        if not ask.wanted:
            host.queue.pop(worker, None)
            if self._idle(host, now):
                del self._hosts[name]
        pause, down = max(0.0, host.resumes - now), max(0.0, host.down - now)
        return Grant(permits, starts, pause, host.refusal, down, host.failure)

    def _share(self, worker: str, host: _Shared, ask: Ask, now: float) -> tuple[int, tuple[float, ...]]:
        if ask.wanted:
            host.queue[worker] = ask.wanted  # a worker already in the queue keeps its place
        elif not host.queue.keys() - {worker}:
            return ask.used, ()
        held = {**host.held, worker: ask.used}
        fair = self._per_host // len(held.keys() | host.queue.keys())
        # Permits that each other waiting worker still lacks of its fair share.
        needs = {w: min(n, max(fair, 1) - held.get(w, 0)) for w, n in host.queue.items() if w != worker}
        others = [w for w, need in needs.items() if need > 0]
        most = self._per_host
        if others:
            most = fair if ask.used else max(fair, 1)
        if not ask.wanted:
            return min(ask.used, most), ()
        order = list(host.queue)
        # Permits due to the workers ahead of this one.
        ahead = sum(needs[w] for w in others if order.index(w) < order.index(worker))
        extra = max(0, min(ask.wanted, most - ask.used, self._per_host - sum(held.values()) - ahead))
        starts: tuple[float, ...] = ()
        if host.gap:
            # Start times form one sequence: the first worker in the queue gets the next ones.
            starts = () if ahead else self._starts(host, extra, now)
            extra = len(starts)
        if extra or ask.used > most:
            host.queue[worker] = host.queue.pop(worker)  # to the end
        return min(ask.used, most) + extra, starts

    def _starts(self, host: _Shared, most: int, now: float) -> tuple[float, ...]:
        starts: list[float] = []
        while len(starts) < most and host.next_start <= now + START_AHEAD:
            start = max(now, host.next_start)
            starts.append(start - now)
            host.next_start = start + host.gap
        return tuple(starts)

    def _idle(self, host: _Shared, now: float) -> bool:
        return not host.held and not host.queue and now >= max(host.next_start, host.resumes, host.down)

    def _sweep(self, now: float) -> None:
        """Releases the permits of dead workers and forgets idle hosts."""
        if now - self._swept < LEASE / 4:
            return
        self._swept = now
        dead = [worker for worker, last in self._workers.items() if now - last > LEASE]
        for worker in dead:
            del self._workers[worker]
        for name, host in list(self._hosts.items()):
            for worker in dead:
                host.held.pop(worker, None)
                host.queue.pop(worker, None)
            if self._idle(host, now):
                del self._hosts[name]
