"""Misbehaving servers, and the reason given for each."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from pipeline.fetch import client as client_module
from pipeline.fetch import resolver as resolver_module
from pipeline.fetch.budget import Budget, Lease
from pipeline.fetch.client import Client, Limits, user_agent
from pipeline.fetch.guard import Guard
from pipeline.fetch.reasons import FetchError
from pipeline.fetch.resolver import Resolver
from tests.fetch.fetched import body_or_failure
from tests.fetch.server import (
    JPEG,
    Answer,
    Server,
    answer,
    flood,
    in_turn,
    raw,
    redirect,
    reset,
    serving,
    silence,
)

PATIENCE = 60.0
"""Time limit in seconds for operations that take a moment on an idle machine."""

OK = answer(body=JPEG)
HEAD = b"HTTP/1.1 200 OK\r\n"
LENGTH = f"Content-Length: {len(JPEG)}\r\n".encode()
LATER = format_datetime(datetime.now(timezone.utc) + timedelta(hours=2), usegmt=True)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def noai(value: str) -> Answer:
    return answer(body=JPEG, X_Robots_Tag=value)


# name -> (behaviour, expected reason or None for a body, number of requests)
TABLE: dict[str, tuple[Answer, str | None, int]] = {
    "plain": (OK, None, 1),
    "http10": (raw(b"HTTP/1.0 200 OK\r\n\r\n" + JPEG), None, 1),
    "no_length": (raw(HEAD + b"\r\n" + JPEG), None, 1),
    "chunked": (raw(CHUNKED + f"{len(JPEG):x}\r\n".encode() + JPEG + b"\r\n0\r\n\r\n"), None, 1),
    "identity": (answer(body=JPEG, Content_Encoding="identity"), None, 1),
    "404": (answer("404 Not Found", b"gone"), "http_404", 1),
    "410": (answer("410 Gone"), "http_410", 1),
    "999": (answer("999 Denied"), "http_999", 1),
    "204": (answer("204 No Content", length=""), "http_204", 1),
    "206": (answer("206 Partial Content", JPEG), "http_206", 1),
    "304": (answer("304 Not Modified", length=""), "http_304", 1),
    "500": (answer("500 Oops", b"sorry"), "http_500", 3),
    "408_then_fine": (in_turn(answer("408 Timeout"), OK), None, 2),
    "503_then_fine": (in_turn(answer("503 Busy"), OK), None, 2),
    "429_then_fine": (in_turn(answer("429 Slow Down", Retry_After="1"), OK), None, 2),
    "429_nonsense": (in_turn(answer("429 Slow Down", Retry_After="soon"), OK), None, 2),
    "429_negative": (in_turn(answer("429 Slow Down", Retry_After="-5"), OK), None, 2),
    "reset": (reset, "reset", 3),
    "reset_then_fine": (in_turn(reset, OK), None, 2),
    "reset_in_headers": (raw(HEAD + b"Content-Le"), "reset", 3),
    "truncated": (answer(body=JPEG[:-50], length=str(len(JPEG)), close=True), "body_truncated", 3),
    "truncated_once": (in_turn(answer(body=JPEG[:-50], length=str(len(JPEG)), close=True), OK), None, 2),
    "chunked_cut": (raw(CHUNKED + b"fff\r\nabc"), "body_truncated", 3),
    "chunked_garbage": (raw(CHUNKED + b"zz\r\nabc\r\n"), "bad_response", 1),
    "length_negative": (answer(body=JPEG, length="-5"), "bad_response", 1),
    "length_words": (answer(body=JPEG, length="many"), "bad_response", 1),
    "length_twice": (raw(HEAD + LENGTH + b"Content-Length: 7\r\n\r\n" + JPEG), "bad_response", 1),
    "not_http": (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "bad_response", 1),
    "silent": (silence, "deadline", 1),
    "stalled": (flood(HEAD + LENGTH + b"\r\n", b"x", pause=0.2), "too_slow", 1),
    "stalls_at_once": (flood(HEAD + LENGTH + b"\r\n", b"", pause=0.2), "too_slow", 1),
    "endless": (flood(HEAD + b"\r\n", b"\xff" * 65536), "body_too_large", 1),
    "endless_headers": (flood(HEAD, b"X-A: b\r\n" * 100), "bad_response", 1),
    "long_header": (raw(HEAD + b"X-A: " + b"b" * 300_000 + b"\r\n\r\n"), "bad_response", 1),
    "announced_large": (answer(body=b"x", length="9999999999999", close=True), "body_too_large", 1),
    "empty": (answer(), "empty_body", 1),
    "gzip": (answer(body=b"\x1f\x8b\x08" + bytes(100), Content_Encoding="gzip"), "content_encoding", 1),
    "brotli": (answer(body=bytes(100), Content_Encoding="br"), "content_encoding", 1),
    "moved": (redirect("/plain", "301 Moved Permanently"), None, 1),
    "moved_absolute": (redirect("{server.url}/plain", "308 Permanent Redirect"), None, 1),
    "moved_to_404": (redirect("/404"), "http_404", 1),
    "moved_nowhere": (answer("302 Found"), "bad_response", 1),
    "moved_to_file": (redirect("file:///etc/passwd"), "bad_scheme", 1),
    "moved_to_ftp": (redirect("ftp://example.com/a.jpg"), "bad_scheme", 1),
    "moved_to_data": (redirect("data:image/png;base64,iVBORw0KGgo="), "bad_scheme", 1),
    "moved_to_canary": (redirect("http://127.0.0.1:{server.canary}/"), "addr_denied", 1),
    "moved_to_private": (redirect("http://10.0.0.1/a.jpg"), "addr_denied", 1),
    "moved_to_metadata": (redirect("//169.254.169.254/latest/meta-data/"), "addr_denied", 1),
    "moved_to_mapped": (redirect("http://[::ffff:127.0.0.1]:{server.canary}/"), "addr_denied", 1),
    "moved_to_name": (redirect("http://inside.example:{server.canary}/"), "addr_denied", 1),
    "moved_to_password": (redirect("http://user:secret@127.0.0.1:{server.port}/plain"), "bad_url", 1),
    "loop": (redirect("/loop"), "redirect_loop", 1),
    "loop_of_two": (redirect("/loop_back"), "redirect_loop", 1),
    "loop_back": (redirect("/loop_of_two"), "redirect_loop", 1),
    **{f"hop{n}": (redirect(f"/hop{n + 1}"), "too_many_redirects" if n <= 1 else None, 1) for n in range(7)},
    "hop7": (OK, None, 1),
    "noai": (noai("noai"), "opted_out", 1),
    "noai_upper": (noai(" NoAI , other"), "opted_out", 1),
    "noindex_after_date": (noai("unavailable_after: 25 Jun 2030 15:00:00 PST, noindex"), "opted_out", 1),
    "none": (noai("none"), "opted_out", 1),
    "noai_for_us": (noai("winnow: noai"), "opted_out", 1),
    "noai_for_all": (noai("*: noai"), "opted_out", 1),
    "noai_for_other": (noai("otherbot: noai, noindex"), None, 1),
    "noai_for_both": (noai("otherbot: nofollow, winnow: noimageai"), "opted_out", 1),
    "nofollow": (noai("nofollow, max-image-preview: large"), None, 1),
    "noai_on_redirect": (redirect("/plain", X_Robots_Tag="noai"), "opted_out", 1),
    "cookie": (in_turn(answer("503 Busy", Set_Cookie="id=1"), OK), None, 2),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    answers = {name: behaviour for name, (behaviour, _, _) in TABLE.items()}
    with serving(answers) as server:
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF", 0.02)


NAMES = {
    "inside.example": ["10.1.2.3", "127.0.0.1"],
    "site.example": ["127.0.0.1"],
    "dead.example": [],
}


def limits(server: Server, **options: object) -> Limits:
    fixed = {"timeout": PATIENCE, "max_bytes": 1_000_000, "allow_addrs": (server.addr,)}
    return Limits(**{**fixed, **options})  # type: ignore[arg-type]


def fetch_all(limits: Limits, urls: Sequence[str | None]) -> list[bytes | FetchError]:
    async def all_of_them() -> list[bytes | FetchError]:
        async with Client(limits, lookup=lambda host: NAMES[host]) as client:
            return await asyncio.gather(*(body_or_failure(client, url) for url in urls))

    return asyncio.run(all_of_them())


def fetch(server: Server, path: str, **options: object) -> bytes | FetchError:
    return fetch_all(limits(server, **options), [f"{server.url}/{path}"])[0]


def test_each_behaviour_gives_its_reason(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # One client each, so that a Retry-After does not affect the other behaviours.
    slow = ["silent", "stalled", "stalls_at_once", "429_then_fine"]
    results = {name: fetch(server, name) for name in TABLE if name not in slow}
    monkeypatch.setattr(client_module, "RATE_WINDOW", 0.5)
    together = fetch_all(limits(server, per_host=50, timeout=5.0), [f"{server.url}/{name}" for name in slow])
    results |= zip(slow, together)
    reasons = {name: r.reason if isinstance(r, FetchError) else None for name, r in results.items()}
    assert {name: r for name, r in results.items() if reasons[name] != TABLE[name][1]} == {}
    assert server.canary_hits == 0
    assert server.cookies == []


@pytest.mark.parametrize("name", ["404", "500", "503_then_fine", "chunked_garbage", "noai", "truncated"])
def test_only_transient_failures_are_retried(server: Server, name: str) -> None:
    behaviour, _, requests = TABLE[name]
    with serving({name: in_turn(answer("503 Busy"), OK) if name == "503_then_fine" else behaviour}) as fresh:
        fetch(fresh, name)
        assert fresh.hits[name] == requests
    with serving({name: behaviour}) as fresh:
        fetch(fresh, name, retries=0)
        assert fresh.hits[name] == 1


def test_the_body_arrives_as_sent() -> None:
    with serving({"a": OK}) as server:
        assert fetch(server, "a?x=1") == JPEG
        headers = server.requests["a"]
        assert headers["accept-encoding"] == "identity"
        assert "winnow" in headers["user-agent"]
        assert headers["host"] == server.addr


def test_user_agent_has_name_and_contact() -> None:
    assert (
        user_agent("winnow", "https://example.org/bot") == "Mozilla/5.0 (compatible; winnow; +https://example.org/bot)"
    )


def test_names_are_resolved_once_and_checked() -> None:
    asked: list[str] = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        time.sleep(0.05)
        return NAMES[host]

    with serving({"a": OK}) as server:

        async def go() -> list[bytes | FetchError]:
            urls = (f"http://site.example:{server.port}/a", "http://INSIDE.example./a", "http://dead.example/a")
            async with Client(limits(server), lookup) as client:
                return await asyncio.gather(*(body_or_failure(client, url) for url in urls for _ in range(20)))

        results = asyncio.run(go())
    assert results[:20] == [JPEG] * 20
    assert {r.reason for r in results[20:40] if isinstance(r, FetchError)} == {"addr_denied"}
    assert {r.reason for r in results[40:] if isinstance(r, FetchError)} == {"dns"}
    assert sorted(asked) == ["dead.example", "inside.example", "site.example"]


def test_retry_after_beyond_the_deadline_applies_to_the_whole_host() -> None:
    for path in ("forever", "until_date"):
        header = "3600" if path == "forever" else LATER
        with serving({path: answer("503 Busy", Retry_After=header)}) as server:
            started = time.monotonic()
            results = fetch_all(limits(server, per_host=2), [f"{server.url}/{path}"] * 30)
            assert {r.reason for r in results if isinstance(r, FetchError)} == {"http_503"}
            assert server.hits[path] <= 2
            assert time.monotonic() - started < PATIENCE  # not the hour


def test_refused_connection_and_bad_certificate() -> None:
    with serving({}) as server:
        port = server.port
        results = fetch_all(limits(server, timeout=2), [f"https://{server.addr}/a"])
        assert [r.reason for r in results if isinstance(r, FetchError)] == ["tls"]
    results = fetch_all(limits(server), [f"http://127.0.0.1:{port}/a"])
    assert [r.reason for r in results if isinstance(r, FetchError)] == ["connect"]


def test_the_deadline_covers_redirects_and_retries_together() -> None:
    async def slow(server: Server, writer: asyncio.StreamWriter, _: dict[str, str]) -> None:
        await asyncio.sleep(0.8)
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")

    async def slow_move(server: Server, writer: asyncio.StreamWriter, _: dict[str, str]) -> None:
        await asyncio.sleep(0.4)
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /slow\r\nContent-Length: 0\r\n\r\n")

    with serving({"move": slow_move, "slow": slow}) as server:
        started = time.monotonic()
        result = fetch(server, "move", timeout=1.0, retries=100)
        assert isinstance(result, FetchError)
        assert result.reason == "deadline"
        assert time.monotonic() - started < PATIENCE  # a hundred attempts take 80 s and more


def test_waiting_for_a_busy_host_does_not_count_against_timeout() -> None:
    async def slow(server: Server, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        await asyncio.sleep(0.25)
        await OK(server, writer, headers)

    with serving({"a": slow}) as server:
        results = fetch_all(limits(server, timeout=5.0, per_host=2), [f"{server.url}/a"] * 48)  # 6 s
        assert results == [JPEG] * 48
        assert server.most_open["a"] == 2


def test_large_bodies_share_a_budget_without_deadlock() -> None:
    big = b"\xff\xd8\xff" + bytes(600_000)
    with serving({"known": answer(body=big), "unknown": raw(HEAD + b"\r\n" + big)}) as server:
        urls = [f"{server.url}/{name}" for name in ("known", "unknown")] * 8
        results = fetch_all(limits(server, bytes_in_flight=1_000_000, per_host=16, timeout=PATIENCE), urls)
        assert results == [big] * 16


def test_byte_budget_serves_in_order_and_survives_cancelled_waiters() -> None:
    async def go() -> list[str]:
        order = []
        budget = Budget(10)
        first, done = Lease(budget), Lease(budget)
        await first.take(10)

        async def take(name: str, size: int) -> None:
            lease = Lease(budget)
            await lease.take(size)
            order.append(name)
            lease.give_back()

        tasks = [asyncio.create_task(take(name, size)) for name, size in (("a", 8), ("b", 99), ("c", 1))]
        await asyncio.sleep(0)
        tasks[0].cancel()
        first.keep(1)
        await asyncio.sleep(0)
        assert order == []  # b waits for all of it and is first in the queue
        first.give_back()
        await asyncio.gather(*tasks, return_exceptions=True)
        await done.take(10)
        return order

    assert asyncio.run(asyncio.wait_for(go(), PATIENCE)) == ["b", "c"]


def test_names_that_never_resolve_block_others_only_until_their_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more slow names than threads, later rows still end, and rows with cached names proceed."""
    monkeypatch.setattr(resolver_module, "RESOLVER_THREADS", 4)
    monkeypatch.setattr(resolver_module, "DNS_SECONDS", 0.4)
    done = threading.Event()

    def lookup(host: str) -> list[str]:
        if host.startswith("forever"):
            done.wait(PATIENCE)
        return ["127.0.0.1"]

    with serving({"a": OK}) as server:

        async def go() -> tuple[list[bytes | FetchError], float]:
            try:
                async with Client(limits(server), lookup) as client:

                    def fetch_from(host: str) -> Awaitable[bytes | FetchError]:
                        return body_or_failure(client, f"http://{host}.example:{server.port}/a")

                    assert await fetch_from("known") == JPEG
                    started = time.monotonic()
                    stuck = [fetch_from(f"forever{n}") for n in range(10)]
                    results = await asyncio.gather(*stuck, fetch_from("behind"), fetch_from("known"))
                    return results, time.monotonic() - started
            finally:
                done.set()

        results, seconds = asyncio.run(go())
    found = [r.reason if isinstance(r, FetchError) else r for r in results]
    assert found == ["dns_unavailable"] * 11 + [JPEG]
    assert seconds < PATIENCE  # until then the threads are busy


@pytest.mark.parametrize(
    ("code", "reason", "ttl"),
    [(socket.EAI_NONAME, "dns", "DNS_TTL"), (socket.EAI_AGAIN, "dns_unavailable", "DNS_RETRY_TTL")],
)
def test_resolver_failures_are_cached_until_they_expire(
    code: int, reason: str, ttl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        raise socket.gaierror(code, "no")

    async def go() -> None:
        resolver = Resolver(Guard(), lookup)
        for expected in (1, 1, 1):
            with pytest.raises(FetchError, match=reason):
                await resolver.resolve("dead.example", 80)
            assert len(asked) == expected
        monkeypatch.setattr(resolver_module, ttl, -1.0)
        for host in ("other.example", "other.example"):
            with pytest.raises(FetchError, match=reason):
                await resolver.resolve(host, 80)
        assert len(asked) == 3
        await resolver.close()

    asyncio.run(go())


def test_the_resolver_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "DNS_ENTRIES", 10)

    async def go() -> int:
        resolver = Resolver(Guard(), lambda host: ["93.184.216.34"])
        for number in range(50):
            await resolver.resolve(f"h{number}.example", 80)
        await resolver.close()
        return len(resolver._known)

    assert asyncio.run(go()) == 10
