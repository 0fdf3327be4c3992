"""Limits per host, shared by all rows of one host: on this worker and, through a board, across the cluster.

A host is a scheme, a name and a port, as for robots.txt. The board is plain Python, asked a few times a second for all
hosts at once; whoever runs several workers gives them one board to share, in an actor of its own, say.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from yarl import URL

from pipeline.fetch.budget import Budget
from pipeline.fetch.opt_out import Reservations
from pipeline.fetch.outage import OutageError
from pipeline.fetch.reasons import FetchError
from pipeline.fetch.robots import Robots

KNOWN_HOSTS = 10_000
"""Hosts that a worker remembers; with their rules of robots.txt, of KNOWN_RULES bytes at most, some 40 MB."""
KNOWN_RULES = 16_000_000

DOWN_SECONDS = 30.0
"""The first pause of a host that does not answer; each next one is twice as long, up to DOWN_MOST."""
DOWN_MOST = 600.0
_DOWN = frozenset({"connect", "unreachable", "reset", "tls", "deadline", "too_slow"})

ASK_EVERY = 0.05
"""Seconds between two exchanges with a board about hosts of which there is not enough for all, or more where the board
takes long."""
WANT_EVERY = 0.2
"""The same about hosts that rows wait for and of which there is enough, as of each new one: an exchange through Ray
takes two milliseconds of CPU on either side."""
SETTLE_EVERY = 1.0
"""Seconds between two exchanges that give back what was not used in between."""
LEASE = 30.0
"""Seconds without an exchange after which a worker counts as dead and its permits go to the others."""
START_AHEAD = 1.0
"""Seconds ahead for which a board gives out starts: what a worker does not use of them is lost."""
LONGEST_PAUSE = 3600.0
"""Seconds of a Retry-After that a board remembers."""

Now = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Manners:
    """See the options of the same names in `pipeline.stages.download`."""

    per_host_rate: float = 0.0
    host_wait: float = 600.0
    host_failures: int = 10
    robots_txt: bool = True
    content_usage: tuple[str, ...] = ("train-ai", "all")
    tdm_reservation: bool = True
    tdmrep_json: bool = True


class Breaker:
    """Stops asking a host after `most` failures without an answer in between; 0: never.

    Then one row at a time may try, after pauses that double; the first success opens the host to all again.
    """

    def __init__(self, most: int, now: Now = time.monotonic):
        self._most = most
        self._now = now
        self._failures = 0
        self._pause = DOWN_SECONDS
        self._until = 0.0
        self._probing = False
        self._last = ""

    @property
    def closed_for(self) -> float:
        """Seconds until the next try; 0 where all may ask."""
        return max(0.0, self._until - self._now()) if self._until else 0.0

    @property
    def last(self) -> str:
        return self._last

    def refuse(self) -> None:
        """Raises FetchError("host_down") while nobody may ask."""
        if self._until and self._now() < self._until:
            raise FetchError("host_down", f"{self._failures} failures in a row, the last one {self._last}")

    def admit(self) -> None:
        """As `refuse`, and whoever passes when a pause is over is the one that tries."""
        if self._until:
            self.refuse()
            self._probing = True
            self._until = self._now() + self._pause

    def note(self, failure: FetchError | None) -> bool:
        """How a request ended: None, or a failure of any kind. True where the host was found down by this."""
        if failure is None or failure.reason not in _DOWN:
            if self._failures:
                self._failures, self._pause, self._until, self._probing = 0, DOWN_SECONDS, 0.0, False
            return False
        self._failures += 1
        self._last = f"{failure.reason}: {failure.detail}" if failure.detail else failure.reason
        # Those already on their way when the host was found down tell nothing new.
        if self._failures == self._most or (self._until and self._probing):
            self._probing = False
            self._until = self._now() + self._pause
            self._pause = min(2 * self._pause, DOWN_MOST)
            return True
        return False

    def close(self, seconds: float, last: str) -> None:
        """Another worker has found the host down."""
        if self._most:
            self._failures = max(self._failures, self._most)
            self._until, self._last = max(self._until, self._now() + seconds), last


class Ask(NamedTuple):
    """What a worker says about a host."""

    used: int
    """Requests under way, and permits that were in use a moment ago."""
    wanted: int
    """Rows that wait for a permit."""
    gap: float = 0.0
    """Least seconds between two requests, by Crawl-delay or the user's rate."""
    pause: float = 0.0
    """Seconds that the host has just asked us to wait (Retry-After), and the reason for rows that cannot wait."""
    refusal: str = ""
    down: float = 0.0
    """Seconds for which the host has just been found down, and by which failure."""
    failure: str = ""


_NO_NEWS = Ask(0, 0)


class Grant(NamedTuple):
    """What the board answers."""

    permits: int
    """Requests that the worker may have under way, those that are included."""
    starts: tuple[float, ...] = ()
    """With a gap: seconds from now at which requests may begin, one each."""
    pause: float = 0.0
    refusal: str = ""
    down: float = 0.0
    failure: str = ""


class Exchange(Protocol):
    def exchange(self, worker: str, asks: dict[str, Ask]) -> Awaitable[dict[str, Grant]]: ...


class Host:
    """What all rows of one host share.

    A row passes `entrance` before it begins, and holds it until its body is there: one slow host with a thousand rows
    fills none of the places among the rows at work but `per_host`. `begin` and `end` enclose each request: rows that
    come here by a redirect wait there alone, so no two rows can wait for each other.
    """

    __slots__ = (
        "_hosts",
        "_next",
        "_starts",
        "asking",
        "breaker",
        "entrance",
        "gap",
        "idle",
        "name",
        "news",
        "permits",
        "refusal",
        "reservations",
        "resumes",
        "robots",
        "rows",
        "scarce",
        "words_expire",
    )  # fmt: skip

    def __init__(self, name: str, hosts: Hosts):
        self.name = name
        self.rows = 0
        self.entrance = asyncio.Semaphore(hosts.per_host)
        self.permits = Budget(0 if hosts.board else hosts.per_host)
        self.idle = 0
        """Permits that were free all the time since the board last heard of this host."""
        self.scarce = False
        """The board had fewer permits than were wanted: those that are free go back at once."""
        self.breaker = Breaker(hosts.failures)
        self.gap = hosts.gap
        self.resumes = 0.0
        """`time.monotonic()` before which the host wants no request, by its Retry-After."""
        self.refusal = "http_503"
        self.robots: Robots | FetchError | None = None
        self.reservations = Reservations()
        self.words_expire = 0.0
        """`time.monotonic()` until which `robots` and `reservations` may be used."""
        self.asking: asyncio.Task[None] | None = None
        """Asks for both."""
        self.news = _NO_NEWS
        """What the board does not know yet."""
        self._hosts = hosts
        self._next = 0.0
        self._starts: deque[float] = deque()

    async def begin(self) -> None:
        """Waits for a permit, and for the time that must pass between two requests."""
        if self._hosts.board:
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
        if self._hosts.board:
            self._hosts.touched[self.name] = self
            if self.gap:
                # A start is good for one request.
                self.permits.resize(self.permits.total - 1)
        self.permits.release(1)

    def _start(self) -> float:
        if self._starts:
            return self._starts.popleft()
        start = max(time.monotonic(), self._next)
        self._next = start + self.gap
        return start

    def asks_to_wait(self, seconds: float, refusal: str) -> None:
        """Applies a Retry-After that one row received to all rows of the host."""
        self.resumes, self.refusal = time.monotonic() + seconds, refusal
        self.news = self.news._replace(pause=seconds, refusal=refusal)

    def note(self, failure: FetchError | None) -> None:
        """How a request ended."""
        if self.breaker.note(failure):
            self.news = self.news._replace(down=self.breaker.closed_for, failure=self.breaker.last)

    def ask(self, leaving: bool = False) -> Ask:
        """For the board. Permits that nobody has used since the last time go back with it."""
        at_once = leaving or self.scarce or self.gap
        kept = self.permits.used + (0 if at_once else max(0, self.permits.free - self.idle))
        ask = self.news._replace(used=kept, wanted=self.permits.wanted, gap=self.gap)
        self.news = _NO_NEWS
        self.permits.resize(kept)
        self.idle = self.permits.free
        return ask

    def hear(self, ask: Ask, grant: Grant) -> None:
        """Applies the board's answer to `ask`."""
        now = time.monotonic()
        self.scarce = grant.permits < ask.used + ask.wanted
        if grant.pause and now + grant.pause > self.resumes:
            self.resumes, self.refusal = now + grant.pause, grant.refusal
        if grant.down and not self.breaker.closed_for:
            self.breaker.close(grant.down, grant.failure)
        self._starts.extend(now + start for start in grant.starts)
        self.permits.resize(self.permits.total + grant.permits - ask.used)

    @property
    def urgent(self) -> bool:
        """Rows wait for permits, or others should know what this host has said."""
        return self.permits.wanted > 0 or self.pressing

    @property
    def pressing(self) -> bool:
        """Others wait for what this worker gives back or has to say."""
        return self.scarce or self.gap > 0 or self.news != _NO_NEWS

    @property
    def busy(self) -> bool:
        """More requests than one are there, or soon will be."""
        return self.rows > 1 or self.permits.used > 1

    @property
    def forgettable(self) -> bool:
        return not self.rows and not self.permits.used and not self.permits.wanted


class Hosts:
    """The hosts that a worker knows, the least recently used first."""

    def __init__(self, per_host: int, manners: Manners, board: Exchange | None = None):
        self.per_host = per_host
        self.gap = 1 / manners.per_host_rate if manners.per_host_rate else 0.0
        self.failures = manners.host_failures
        self.board = board
        self.touched: dict[str, Host] = {}
        """Hosts with something to report to the board."""
        self.lost: OutageError | None = None
        self._known: dict[str, Host] = {}
        self._rules = 0
        self._worker = secrets.token_hex(8)
        self._talk: asyncio.Task[None] | None = None

    def open(self) -> None:
        if self.board:
            self._talk = asyncio.create_task(self._exchange(self.board))

    async def close(self) -> None:
        if self._talk and self.board:
            self._talk.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._talk
            with contextlib.suppress(Exception):
                held = self.touched | {name: host for name, host in self._known.items() if host.permits.total}
                await self.board.exchange(self._worker, {n: host.ask(leaving=True) for n, host in held.items()})

    def find(self, url: URL) -> Host:
        name = f"{url.scheme}://{(url.raw_host or '').removesuffix('.')}:{url.port}"
        host = self._known.pop(name, None)
        if host is None:
            if len(self._known) >= KNOWN_HOSTS or self._rules > KNOWN_RULES:
                self._forget()
            host = Host(name, self)
        self._known[name] = host
        return host

    @contextmanager
    def row(self, url: URL) -> Iterator[Host]:
        """The host of a row, which is not forgotten until the row has ended."""
        host = self.find(url)
        host.rows += 1
        try:
            yield host
        finally:
            host.rows -= 1

    def remember(self, host: Host, robots: Robots | FetchError, reservations: Reservations, seconds: float) -> None:
        self._rules -= _size(host)
        host.robots, host.reservations, host.words_expire = robots, reservations, time.monotonic() + seconds
        self._rules += _size(host)

    def _forget(self) -> None:
        """Drops the hosts that were not used for longest, a tenth at once; those in use stay, however many they are."""
        for name in list(self._known):
            if len(self._known) <= 0.9 * KNOWN_HOSTS and self._rules <= 0.9 * KNOWN_RULES:
                return
            host = self._known[name]
            if host.forgettable:
                del self._known[name]
                self._rules -= _size(host)

    async def _exchange(self, board: Exchange) -> None:
        heard = settled = time.monotonic()
        pause = ASK_EVERY
        while True:
            await asyncio.sleep(pause)
            started = time.monotonic()
            if started - heard > LEASE / 2:
                # Should the board have given us up, it learns anew what we hold.
                self.touched.update((n, h) for n, h in self._known.items() if h.permits.used)
            if started - settled >= SETTLE_EVERY:
                settled, asked = started, self.touched
            else:
                asked = {name: host for name, host in self.touched.items() if host.urgent}
                if started - heard < WANT_EVERY and not any(host.pressing for host in asked.values()):
                    continue
            if not asked and started - heard < LEASE / 4:
                continue
            self.touched = {name: host for name, host in self.touched.items() if name not in asked}
            asks = {name: host.ask() for name, host in asked.items()}
            try:
                grants = await board.exchange(self._worker, asks)
            except Exception as error:
                self.touched = {**asked, **self.touched}
                if time.monotonic() - heard > LEASE:
                    self.lost = OutageError(f"the board of hosts has not answered for {LEASE:.0f} s: {error}")
                    for host in self._known.values():
                        host.permits.fail(self.lost)
                    return
                continue
            heard = time.monotonic()
            pause = max(ASK_EVERY, 2 * (heard - started))
            for name, host in asked.items():
                host.hear(asks[name], grants[name])
                if host.permits.wanted or host.permits.free > 0:
                    self.touched[name] = host


def _size(host: Host) -> int:
    """Bytes that the rules of a host take."""
    return host.reservations.size + (host.robots.size if isinstance(host.robots, Robots) else 0)


class _Shared:
    """A host as the board sees it; times are the board's own."""

    __slots__ = ("down", "failure", "gap", "held", "next_start", "queue", "refusal", "resumes")

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        """Permits by worker: as many requests may be under way there."""
        self.queue: dict[str, int] = {}
        """Workers with rows that wait, and how many, the one whose turn is next first."""
        self.gap = self.next_start = self.resumes = self.down = 0.0
        self.refusal = self.failure = ""


class Board:
    """Shares out `per_host` requests at once, and starts at the least gap, among all workers.

    Workers that want more than there is get equal shares; where there are more workers than permits, they take turns of
    one request. What a worker holds is what it said last, or was granted since, so the sum never exceeds `per_host`.
    Memory is bounded by the requests under way and by the hosts that asked us to wait.
    """

    def __init__(self, per_host: int, now: Now = time.monotonic):
        self._per_host = per_host
        self._now = now
        self._hosts: dict[str, _Shared] = {}
        self._workers: dict[str, float] = {}
        """When each was heard last, the longest silent first."""
        self._swept = now()

    async def exchange(self, worker: str, asks: dict[str, Ask]) -> dict[str, Grant]:
        """A grant for each host that is asked about."""
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
            host.queue[worker] = ask.wanted  # its place stays if it has one
        elif not host.queue.keys() - {worker}:
            return ask.used, ()
        held = {**host.held, worker: ask.used}
        fair = self._per_host // len(held.keys() | host.queue.keys())
        # What those need who wait for their share, and of that, what those need whose turn comes before ours.
        needs = {w: min(n, max(fair, 1) - held.get(w, 0)) for w, n in host.queue.items() if w != worker}
        others = [w for w, need in needs.items() if need > 0]
        if not others:
            most = self._per_host
        else:
            most = fair if ask.used else max(fair, 1)
        if not ask.wanted:
            return min(ask.used, most), ()
        order = list(host.queue)
        ahead = sum(needs[w] for w in others if order.index(w) < order.index(worker))
        extra = max(0, min(ask.wanted, most - ask.used, self._per_host - sum(held.values()) - ahead))
        starts: tuple[float, ...] = ()
        if host.gap:
            # Of starts there is one at a time: whoever is first among those who wait gets the next ones.
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
        """Takes back what dead workers held, and forgets the hosts of which there is nothing left to say."""
        if now - self._swept < LEASE / 4:
            return
        self._swept = now
        dead = [worker for worker, heard in self._workers.items() if now - heard > LEASE]
        for worker in dead:
            del self._workers[worker]
        for name, host in list(self._hosts.items()):
            for worker in dead:
                host.held.pop(worker, None)
                host.queue.pop(worker, None)
            if self._idle(host, now):
                del self._hosts[name]
