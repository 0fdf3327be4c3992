"""Politeness towards hosts: which hosts are skipped and for how long, and limits that hold across workers."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.fetch import client as client_module
from pipeline.fetch import hosts as hosts_module
from pipeline.fetch.client import Client, Limits
from pipeline.fetch.hosts import DOWN_MOST, DOWN_SECONDS, LEASE, Ask, Breaker, Grant, HostLimiter, Politeness
from pipeline.fetch.outage import HOSTS, ROWS, Outage, OutageError
from pipeline.fetch.reasons import FetchError
from tests.fetch.fetched import at_once, body_or_failure
from tests.fetch.server import JPEG, Answer, Server, answer, in_turn, redirect, reset, serving, silence

OK = answer(body=JPEG)
RESET = FetchError("reset", "by peer")
DEFAULT = Politeness()
PATIENCE = 60.0
"""Time limit in seconds for operations that take a moment on an idle machine."""


class Time:
    """A clock set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF", 0.01)
    monkeypatch.setattr(hosts_module, "ASK_EVERY", 0.01)


def refused(breaker: Breaker) -> bool:
    try:
        breaker.admit()
    except FetchError as failure:
        return failure.reason == "host_down" and failure.transient
    return False


def test_a_failing_host_is_skipped_and_retried_after_doubling_pauses() -> None:
    clock = Time()
    breaker = Breaker(3, clock)
    for _ in range(3):
        assert not refused(breaker)
        breaker.note(RESET)
    pause = DOWN_SECONDS
    for _ in range(7):
        assert refused(breaker)
        breaker.note(RESET)  # from a request in flight: does not prolong the pause
        clock.now += pause - 1
        assert refused(breaker)
        clock.now += 2
        assert not refused(breaker)  # the probe
        assert refused(breaker)
        breaker.note(RESET)
        pause = min(2 * pause, DOWN_MOST)
    clock.now += pause + 1
    assert not refused(breaker)
    breaker.note(FetchError("http_404"))  # an error response is a response
    assert [refused(breaker) for _ in range(5)] == [False] * 5


def test_a_cancelled_probe_does_not_block_a_host_forever() -> None:
    clock = Time()
    breaker = Breaker(1, clock)
    breaker.note(RESET)
    clock.now += DOWN_SECONDS + 1
    assert not refused(breaker)  # the probe's row is cancelled
    assert refused(breaker)
    clock.now += 2 * DOWN_SECONDS + 1
    assert not refused(breaker)


def test_responses_reset_the_breaker_and_zero_disables_it() -> None:
    breaker, unlimited = Breaker(3), Breaker(0)
    for failure in (RESET, RESET, FetchError("http_500"), RESET, RESET, None, RESET, RESET):
        breaker.note(failure)
        assert not refused(breaker)
    for _ in range(100):
        unlimited.note(RESET)
        assert not refused(unlimited)


# --- The limiter ------------------------------------------------------------------------------------------------------


def ask(limiter: HostLimiter, worker: str, used: int, wanted: int, **more: Any) -> Grant:
    return asyncio.run(limiter.exchange(worker, {"h": Ask(used, wanted, **more)}))["h"]


def test_one_worker_gets_what_it_wants_up_to_the_limit() -> None:
    limiter = HostLimiter(4)
    assert ask(limiter, "a", 0, 3).permits == 3
    assert ask(limiter, "a", 3, 9).permits == 4
    assert ask(limiter, "a", 1, 0).permits == 1
    assert ask(limiter, "b", 0, 9).permits == 3


def test_a_worker_yields_permits_as_its_requests_end() -> None:
    limiter = HostLimiter(4)
    assert ask(limiter, "a", 0, 99).permits == 4
    assert ask(limiter, "b", 0, 99).permits == 0
    assert ask(limiter, "a", 4, 99).permits == 2  # finishes four, then begins two at a time
    assert ask(limiter, "b", 0, 99).permits == 0
    assert ask(limiter, "a", 2, 99).permits == 2
    assert ask(limiter, "b", 0, 99).permits == 2
    assert ask(limiter, "a", 2, 0).permits == 2
    assert ask(limiter, "a", 0, 0).permits == 0
    assert ask(limiter, "b", 2, 99).permits == 4


def test_more_workers_than_permits_take_turns() -> None:
    """Simulates workers that always want more permits. A request takes three exchanges."""
    limiter = HostLimiter(3)
    running: dict[str, list[int]] = {f"w{n}": [] for n in range(10)}
    served: Counter[str] = Counter()
    for turn in range(600):
        worker = f"w{turn % 10}"
        running[worker] = [n - 1 for n in running[worker] if n > 1]
        grant = ask(limiter, worker, len(running[worker]), 50)
        while len(running[worker]) < grant.permits:
            running[worker].append(2)
            served[worker] += 1
        assert sum(map(len, running.values())) <= 3
    assert min(served.values()) * 2 >= max(served.values())
    assert served.total() > 60


def test_a_dead_workers_permits_are_released_and_idle_hosts_forgotten() -> None:
    clock = Time()
    limiter = HostLimiter(2, clock)
    assert ask(limiter, "dead", 0, 5).permits == 2
    clock.now += LEASE - 1
    assert ask(limiter, "b", 0, 5).permits == 0
    clock.now += LEASE / 2
    assert ask(limiter, "b", 0, 5).permits == 2
    ask(limiter, "b", 0, 0)
    asyncio.run(limiter.exchange("b", {f"h{n}": Ask(0, 1) for n in range(1000)}))
    asyncio.run(limiter.exchange("b", {f"h{n}": Ask(0, 0) for n in range(1000)}))
    asyncio.run(limiter.exchange("b", {f"p{n}": Ask(0, 0, pause=5.0, refusal="http_429") for n in range(1000)}))
    clock.now += LEASE
    asyncio.run(limiter.exchange("b", {}))
    assert not limiter._hosts


def test_start_times_keep_the_gap_across_workers() -> None:
    clock = Time()
    limiter = HostLimiter(8, clock)
    starts: list[float] = []
    used = Counter[str]()
    for _ in range(100):
        for worker in ("a", "b", "c"):
            grant = ask(limiter, worker, 0, 5, gap=0.25)
            assert grant.permits == len(grant.starts)
            starts += [clock.now + start for start in grant.starts]
            used[worker] += len(grant.starts)
        clock.now += 0.1
    assert min(late - early for early, late in itertools.pairwise(starts)) > 0.249
    assert starts[-1] - starts[0] < 11.1
    assert len(starts) >= 40
    assert min(used.values()) > 5


def test_news_of_a_host_reaches_all_workers() -> None:
    clock = Time()
    limiter = HostLimiter(8, clock)
    ask(limiter, "a", 1, 0, pause=20.0, refusal="http_429", down=0.0)
    clock.now += 5
    heard = ask(limiter, "b", 0, 1)
    assert (heard.pause, heard.refusal) == (15.0, "http_429")
    ask(limiter, "a", 0, 0, down=30.0, failure="reset: by peer")
    assert ask(limiter, "b", 0, 1).failure == "reset: by peer"
    clock.now += 40
    heard = ask(limiter, "c", 0, 1)
    assert (heard.pause, heard.down) == (0.0, 0.0)


# --- Clients ----------------------------------------------------------------------------------------------------------

Result = bytes | FetchError


async def run_client(
    server: Server, urls: list[str], politeness: Politeness, limiter: HostLimiter | None = None, **options: Any
) -> list[Result]:
    limits = Limits(**{"timeout": PATIENCE, "allow_addrs": (server.addr,), **options})
    async with Client(limits, lambda host: ["127.0.0.1"], politeness, limiter) as client:
        return await asyncio.gather(*(body_or_failure(client, url) for url in urls))


def fetch_all(server: Server, urls: list[str], politeness: Politeness = DEFAULT, **options: Any) -> list[Result]:
    return asyncio.run(run_client(server, urls, politeness, **options))


def reasons(results: list[Result]) -> Counter[str]:
    return Counter(r.reason if isinstance(r, FetchError) else "ok" for r in results)


def slow(seconds: float) -> Answer:
    async def reply(server: Server, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        await asyncio.sleep(seconds)
        await OK(server, writer, headers)

    return reply


def test_clients_with_one_limiter_never_exceed_the_limit_in_total() -> None:
    async def go(server: Server) -> list[list[Result]]:
        limiter = HostLimiter(3)
        urls = [f"{server.url}/a"] * 15
        workers = [run_client(server, urls, Politeness(), limiter, per_host=3) for _ in range(5)]
        return await asyncio.gather(*workers)

    with serving({"a": slow(0.02)}) as server:
        results = asyncio.run(asyncio.wait_for(go(server), PATIENCE))
        assert results == [[JPEG] * 15] * 5
        assert server.most_open["a"] <= 3


def test_clients_with_one_limiter_keep_the_rate_in_total() -> None:
    begun: list[float] = []

    async def noted(server: Server, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        begun.append(time.monotonic())
        await OK(server, writer, headers)

    async def go(server: Server) -> list[list[Result]]:
        limiter = HostLimiter(8)
        politeness = Politeness(per_host_rate=20.0, robots_txt=False)
        return await asyncio.gather(
            *(run_client(server, [f"{server.url}/a"] * 8, politeness, limiter) for _ in range(3))
        )

    with serving({"a": noted}) as server:
        started = time.monotonic()
        results = asyncio.run(asyncio.wait_for(go(server), PATIENCE))
    assert results == [[JPEG] * 8] * 3
    assert begun[-1] - started >= 23 * 0.05 - 0.1


def test_retry_after_received_by_one_client_applies_to_all() -> None:
    async def go(server: Server) -> list[Result]:
        limiter = HostLimiter(8)
        politeness = Politeness(robots_txt=False)
        first = await run_client(server, [f"{server.url}/busy"], politeness, limiter)
        rest = [run_client(server, [f"{server.url}/fine"] * 5, politeness, limiter) for _ in range(3)]
        return first + [result for results in await asyncio.gather(*rest) for result in results]

    with serving({"busy": answer("429 Slow Down", Retry_After="100"), "fine": OK}) as server:
        assert reasons(asyncio.run(go(server))) == {"http_429": 16}
        assert (server.hits["busy"], server.hits["fine"]) == (1, 0)


def test_a_lost_limiter_does_not_drop_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        async def exchange(self, worker: str, asks: dict[str, Ask]) -> dict[str, Grant]:
            raise ConnectionError("the actor died")

    monkeypatch.setattr(hosts_module, "LEASE", 0.2)
    with serving({"a": OK}) as server, pytest.raises(OutageError, match="the actor died"):
        asyncio.run(run_client(server, [f"{server.url}/a"], Politeness(), Gone()))  # type: ignore[arg-type]


def test_one_client_keeps_the_rate_without_a_limiter() -> None:
    with serving({"a": OK}) as server:
        started = time.monotonic()
        results = fetch_all(server, [f"{server.url}/a"] * 10, Politeness(per_host_rate=25.0))
        assert results == [JPEG] * 10
        assert time.monotonic() - started >= 10 * 0.04 - 0.01  # the robots.txt takes a turn as well


def test_a_dead_host_with_a_thousand_rows_costs_the_time_of_a_few() -> None:
    with serving({"a": silence}) as server:
        silent = Politeness(robots_txt=False, tdmrep_json=False)
        results = fetch_all(server, [f"{server.url}/a"] * 1000, silent, timeout=0.3)
        found = reasons(results)
        assert found.keys() == {"deadline", "host_down"}
        assert found["deadline"] < 10 + 8  # ten consecutive failures, and those in flight by then
        assert server.hits["a"] < 10 + 8  # eight at a time: 0.9 s, and not 37 s
        downs = [r for r in results if isinstance(r, FetchError) and r.reason == "host_down"]
        assert "last: deadline" in downs[-1].detail


def test_a_row_reports_its_own_failure() -> None:
    with serving({"a": reset, "robots.txt": answer("404 None")}) as server:
        results = fetch_all(server, [f"{server.url}/a"] * 8, Politeness(host_failures=10))
        assert reasons(results) == {"reset": 8}
        assert server.hits["a"] < 8 * 3 * 2  # aiohttp retries once if a kept-alive connection is reset


def test_rows_do_not_wait_forever_for_a_busy_host() -> None:
    with serving({"a": slow(0.1)}) as server:
        found = reasons(fetch_all(server, [f"{server.url}/a"] * 100, Politeness(host_wait=0.5), per_host=1))
        assert found.keys() == {"ok", "host_busy"}
        assert server.hits["a"] == found["ok"] < 20


def test_the_least_recently_used_host_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "KNOWN_HOSTS", 10)
    with serving({"a": OK}) as server:
        urls = [f"http://h{n}.example:{server.port}/a" for n in range(40)]

        async def go() -> int:
            async with Client(Limits(allow_addrs=(server.addr,)), lambda host: ["127.0.0.1"]) as client:
                for url in urls:
                    assert await body_or_failure(client, url) == JPEG
                return len(client._hosts._known)

        assert asyncio.run(go()) <= 10


# --- robots.txt and tdm-reservation -----------------------------------------------------------------------------------


def robots(text: str, **headers: Any) -> Answer:
    return answer(body=text.encode(), **headers)


DISALLOW = robots("User-agent: *\nDisallow: /no")


def test_robots_txt_is_fetched_once_and_obeyed_on_every_hop() -> None:
    answers = {"robots.txt": DISALLOW, "yes": OK, "no": OK, "to_no": redirect("/no"), "to_yes": redirect("/yes")}
    with serving(answers) as server:
        urls = [f"{server.url}/{name}" for name in ("yes", "no", "to_no", "to_yes")] * 10
        assert reasons(fetch_all(server, urls)) == {"ok": 20, "robots_disallowed": 20}
        assert server.hits["robots.txt"] == 1
        assert server.hits["no"] == 0
        assert reasons(fetch_all(server, urls, Politeness(robots_txt=False))) == {"ok": 40}


def test_robots_txt_is_per_host() -> None:
    by_host = {"a.example": DISALLOW, "b.example": answer("404 None")}

    async def file(server: Server, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        await by_host[headers["host"].partition(":")[0]](server, writer, headers)

    with serving({"robots.txt": file, "no": OK, "over": redirect("http://a.example:{server.port}/no")}) as server:
        paths = ("a.example", "no"), ("b.example", "no"), ("b.example", "over")
        results = fetch_all(server, [f"http://{host}:{server.port}/{path}" for host, path in paths])
        assert [r.reason if isinstance(r, FetchError) else None for r in results] == [
            "robots_disallowed", None, "robots_disallowed",
        ]  # fmt: skip


ROBOTS: dict[str, tuple[Answer, str | None]] = {
    "not there": (answer("404 None"), None),
    "forbidden": (answer("403 No"), None),
    "unauthorized": (answer("401 No"), None),
    "empty": (answer(), None),
    "server error": (answer("500 Oops"), "robots_unavailable"),
    "for a moment": (in_turn(answer("503 Busy"), DISALLOW), "robots_disallowed"),
    "too many requests": (answer("429 Slow"), "robots_unavailable"),
    "status 999": (answer("999 No"), "robots_unavailable"),
    "silent": (silence, "deadline"),
    "reset": (reset, "reset"),
    "cut short": (answer(body=b"User-agent: *", length="999", close=True), "robots_unavailable"),
    "a loop": (redirect("/robots.txt"), None),
    "to a file": (redirect("file:///etc/passwd"), None),
    "to where nobody may go": (redirect("http://127.0.0.1:{server.canary}/robots.txt"), "addr_denied"),
    "noindex": (robots("User-agent: *\nDisallow: /x", X_Robots_Tag="noindex"), None),
    "moved": (redirect("/moved"), "robots_disallowed"),
    "unasked gzip": (
        answer(body=gzip.compress(b"User-agent: *\nDisallow: /no"), Content_Encoding="gzip"),
        "robots_disallowed",
    ),
    "bomb": (answer(body=gzip.compress(bytes(50_000_000)), Content_Encoding="gzip"), None),
    "gzip twice": (
        answer(body=gzip.compress(gzip.compress(b"User-agent: *\nDisallow: /no")), Content_Encoding="gzip, gzip"),
        "robots_unavailable",
    ),
    "gzip cut short": (
        answer(body=gzip.compress(b"User-agent: *\nDisallow: /no")[:-20], Content_Encoding="gzip"),
        "robots_unavailable",
    ),
    "brotli": (answer(body=b"x", Content_Encoding="br"), "robots_unavailable"),
    "large": (robots("User-agent: *\nDisallow: /no\n" + "#\n" * 1_000_000), "robots_disallowed"),
}


@pytest.mark.parametrize("name", ROBOTS)
def test_outcome_of_rows_by_robots_txt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "silent":
        monkeypatch.setattr(client_module, "ROBOTS_SECONDS", 0.5)
    behaviour, reason = ROBOTS[name]
    with serving({"robots.txt": behaviour, "moved": DISALLOW, "no": OK}) as server:
        results = fetch_all(server, [f"{server.url}/no"] * 3)
        assert reasons(results) == {reason or "ok": 3}
        assert server.hits["robots.txt"] <= 6
        assert server.hits["no"] == (0 if reason else 3)
        assert server.canary_hits == 0


def test_crawl_delay_is_obeyed() -> None:
    with serving({"robots.txt": robots("User-agent: *\nCrawl-delay: 0.2"), "a": OK}) as server:
        started = time.monotonic()
        assert fetch_all(server, [f"{server.url}/a"] * 4) == [JPEG] * 4
        assert time.monotonic() - started >= 0.6


def test_fetching_robots_txt_does_not_count_against_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ROBOTS_SECONDS", PATIENCE)

    async def late(server: Server, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        await asyncio.sleep(4)
        await answer("404 None")(server, writer, headers)

    with serving({"robots.txt": late, "a": slow(4)}) as server:
        assert fetch_all(server, [f"{server.url}/a"], timeout=7.5, retries=0) == [JPEG]


def test_tdm_reservation_on_any_hop() -> None:
    reserved = answer(body=JPEG, tdm_reservation="1")
    free = answer(body=JPEG, tdm_reservation="0")
    hop = redirect("/free", tdm_reservation="1")
    with serving({"reserved": reserved, "free": free, "hop": hop}) as server:
        urls = [f"{server.url}/{name}" for name in ("reserved", "free", "hop")]
        results = fetch_all(server, urls)
        assert reasons(results) == {"opted_out": 2, "ok": 1}
        assert isinstance(results[0], FetchError)
        assert results[0].detail == "tdm-reservation: 1"
        assert reasons(fetch_all(server, urls, Politeness(tdm_reservation=False))) == {"ok": 3}


# --- Publisher statements ---------------------------------------------------------------------------------------------

RESERVED = [{"location": "/no", "tdm-reservation": 1}, {"location": "/free", "tdm-reservation": 0}]
TDMREP = ".well-known/tdmrep.json"


def usages(server: Server, urls: list[str], politeness: Politeness = DEFAULT) -> list[str | None]:
    """The statements kept with each picture; for dropped rows, reason and detail."""

    async def go() -> list[str | None]:
        found: list[str | None] = []
        limits = Limits(timeout=PATIENCE, allow_addrs=(server.addr,))
        async with Client(limits, lambda host: ["127.0.0.1"], politeness) as client:
            for url in urls:
                try:
                    async with client.fetch(url, at_once) as fetched:
                        found.append(fetched.usage)
                except FetchError as failure:
                    found.append(f"{failure.reason.replace('_', ' ')}: {failure.detail}")
        return found

    return asyncio.run(go())


def test_tdmrep_json_is_fetched_once_and_obeyed_on_every_hop() -> None:
    answers = {
        "robots.txt": robots("User-agent: *\nAllow: /"),
        TDMREP: answer(body=json.dumps(RESERVED).encode()),
        **dict.fromkeys(("yes", "no", "free"), OK),
        "to_no": redirect("/no"),
    }
    with serving(answers) as server:
        urls = [f"{server.url}/{name}" for name in ("yes", "no", "to_no", "free")] * 5
        assert reasons(fetch_all(server, urls)) == {"ok": 10, "opted_out": 10}
        assert (server.hits[TDMREP], server.hits["robots.txt"], server.hits["no"]) == (1, 1, 0)
        assert usages(server, urls[:4]) == [
            None,
            "opted out: tdmrep.json tdm-reservation: 1",
            "opted out: tdmrep.json tdm-reservation: 1",
            "tdmrep.json tdm-reservation: 0",
        ]
        asked = server.hits[TDMREP]
        assert reasons(fetch_all(server, urls, Politeness(tdmrep_json=False))) == {"ok": 20}
        assert server.hits[TDMREP] == asked


TDMREPS: dict[str, tuple[Answer, str]] = {
    "not there": (answer("404 None"), "ok"),
    "server error": (answer("500 Oops"), "ok"),
    "silent": (silence, "ok"),
    "reset": (reset, "ok"),
    "html": (answer(body=b"<html>"), "ok"),
    "nested": (answer(body=b"[" * 400_000), "ok"),
    "moved": (redirect("/moved"), "opted_out"),
    "to where nobody may go": (redirect("http://127.0.0.1:{server.canary}/"), "ok"),
    "gzip": (answer(body=gzip.compress(json.dumps(RESERVED).encode()), Content_Encoding="gzip"), "opted_out"),
    "bomb": (answer(body=gzip.compress(bytes(50_000_000)), Content_Encoding="gzip"), "ok"),
}


@pytest.mark.parametrize("name", TDMREPS)
def test_outcome_of_rows_by_tdmrep_json(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "silent":
        monkeypatch.setattr(client_module, "ROBOTS_SECONDS", 3.0)  # enough for robots.txt
    behaviour, reason = TDMREPS[name]
    moved = answer(body=json.dumps(RESERVED).encode())
    there = robots("User-agent: *\nAllow: /")
    with serving({"robots.txt": there, TDMREP: behaviour, "moved": moved, "no": OK}) as server:
        assert reasons(fetch_all(server, [f"{server.url}/no"] * 3)) == {reason: 3}
        assert server.hits[TDMREP] <= 2  # one more if a kept-alive connection is lost
        assert server.canary_hits == 0


def test_a_robots_txt_that_forbids_tdmrep_json_is_obeyed() -> None:
    with serving({"robots.txt": robots("User-agent: *\nDisallow: /.well-known/"), "a": OK}) as server:
        assert fetch_all(server, [f"{server.url}/a"]) == [JPEG]
        assert server.hits[TDMREP] == 0


def test_a_host_without_robots_txt_is_spared_the_request_for_tdmrep_json() -> None:
    answers = {TDMREP: answer(body=json.dumps(RESERVED).encode()), "no": OK}
    with serving(answers) as server:
        assert fetch_all(server, [f"{server.url}/no"]) == [JPEG]
        assert server.hits[TDMREP] == 0
        # Without robots.txt to go by, the file is asked for.
        assert reasons(fetch_all(server, [f"{server.url}/no"], Politeness(robots_txt=False))) == {"opted_out": 1}


def test_content_usage_of_header_and_robots_txt() -> None:
    rules = "User-agent: *\nContent-Usage: search=n\nContent-Usage: /no train-ai=n\nContent-Usage: /yes train-ai=y"
    answers = {
        "robots.txt": robots(rules),
        "plain": OK,
        "no": OK,
        "yes": answer(body=JPEG, Content_Usage="train-ai=n"),  # any "n" is a no
        "header": answer(body=JPEG, Content_Usage="train-ai=y", tdm_reservation="0", X_Robots_Tag="nofollow"),
        "general": answer(body=JPEG, Content_Usage="all=n;a=b"),
        "broken": answer(body=JPEG, Content_Usage="train-ai=n,,"),
        "hop": redirect("/plain", Content_Usage="train-ai=n"),
    }
    expected = {
        "plain": "robots.txt Content-Usage: search=n",
        "no": "opted out: robots.txt Content-Usage: train-ai=n",
        "yes": "opted out: Content-Usage: train-ai=n",
        "header": "robots.txt Content-Usage: search=n\nX-Robots-Tag: nofollow\nContent-Usage: train-ai=y\n"
        "tdm-reservation: 0",
        "general": "opted out: Content-Usage: all=n;a=b",
        "broken": "robots.txt Content-Usage: search=n\nContent-Usage: train-ai=n,,",
        "hop": "opted out: Content-Usage: train-ai=n",
    }
    with serving(answers) as server:
        urls = [f"{server.url}/{name}" for name in expected]
        assert dict(zip(expected, usages(server, urls))) == expected
        assert server.hits["no"] == 0
        assert reasons(fetch_all(server, urls, Politeness(content_usage=()))) == {"ok": len(urls)}
        assert reasons(fetch_all(server, urls, Politeness(content_usage=("search",)))) == {"ok": 2, "opted_out": 5}


# --- Outages ----------------------------------------------------------------------------------------------------------

UNAVAILABLE, NO_ROUTE, LATE = (FetchError(r) for r in ("dns_unavailable", "unreachable", "deadline"))


def rows_until_outage(failures: Iterator[tuple[str, FetchError]]) -> int | None:
    outage = Outage()
    for number, (host, failure) in enumerate(failures, 1):
        try:
            outage.failed(host, failure)
        except OutageError:
            return number
    return None


@pytest.mark.parametrize(
    ("failures", "rows"),
    [
        ([UNAVAILABLE], ROWS),
        ([NO_ROUTE], ROWS),
        ([LATE], ROWS),
        ([UNAVAILABLE, NO_ROUTE, FetchError("bad_url")], ROWS * 3 // 2),
        ([FetchError("dns")], None),
        ([FetchError("connect")], None),
        ([FetchError("reset")], None),
        ([UNAVAILABLE] * 150 + [FetchError("dns")], None),
        ([LATE] * 199 + [FetchError("http_404")], None),
        ([LATE] * 199 + [FetchError("connect")], None),
    ],
)
def test_an_outage_is_many_silent_rows_of_many_hosts(failures: list[FetchError], rows: int | None) -> None:
    found = rows_until_outage((f"h{n}", failures[n % len(failures)]) for n in range(2000))
    assert found is None if rows is None else abs((found or 0) - rows) <= 1
    assert rows_until_outage((f"h{n % (HOSTS - 1)}", failures[n % len(failures)]) for n in range(2000)) is None
    assert rows_until_outage((f"h{n}", failures[n % len(failures)]) for n in range(ROWS - 1)) is None


@pytest.mark.parametrize(("rows", "outage"), [(190, False), (210, True)])
def test_a_resolver_that_fails_for_everyone_stops_the_client(rows: int, outage: bool) -> None:
    def lookup(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    async def go() -> list[BaseException | bytes]:
        async with Client(Limits(), lookup) as client:
            urls = [f"http://h{n}.example/a.jpg" for n in range(rows)]
            return await asyncio.gather(*(body_or_failure(client, url) for url in urls), return_exceptions=True)

    results = asyncio.run(go())
    stops = [r for r in results if isinstance(r, OutageError)]
    assert bool(stops) is outage
    assert all("the resolver does not respond" in str(stop) for stop in stops)
    assert all(
        isinstance(r, OutageError) or (isinstance(r, FetchError) and r.reason == "dns_unavailable") for r in results
    )
