"""Resolves host names to public addresses, with a cache shared by all rows."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.fetch.guard import Guard
from pipeline.fetch.reasons import FetchError

RESOLVER_THREADS = 32
DNS_SECONDS = 8.0
"""Timeout of a lookup, including the wait for a thread. The system resolver may try for 30 s."""
DNS_TTL = 300.0
"""Seconds for which addresses, and the answer that a name has none, are cached."""
DNS_RETRY_TTL = 5.0
"""Seconds for which a transient failure is cached."""
DNS_ENTRIES = 50_000
"""Most names in the cache."""

Lookup = Callable[[str], list[str]]


def system_lookup(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class Resolver(AbstractResolver):
    """Resolves host names to public addresses. Caches answers and failures. Runs one lookup at a time per name.

    Lookups run in their own threads, so names that never resolve block only other lookups.
    """

    def __init__(self, guard: Guard, lookup: Lookup):
        self._guard = guard
        self._lookup = lookup
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="dns")
        self._known: dict[str, tuple[float, list[str] | FetchError]] = {}
        self._lookups: dict[str, asyncio.Task[list[str] | FetchError]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises FetchError: `dns`, `dns_unavailable`, or `addr_denied` if the host has no public address."""
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
        # A running lookup cannot be cancelled; its thread ends with the answer.
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _addresses(self, host: str) -> list[str]:
        expires, known = self._known.get(host, (0.0, []))
        if expires < time.monotonic():
            if host not in self._lookups:
                self._lookups[host] = asyncio.create_task(self._query(host))
            # Shielded: this row may run out of time while other rows still wait for the answer.
            known = await asyncio.shield(self._lookups[host])
        if isinstance(known, FetchError):
            # Raise a new instance: raising the same one again would accumulate tracebacks.
            raise FetchError(known.reason, known.detail)
        return known

    async def _query(self, host: str) -> list[str] | FetchError:
        answer: list[str] | FetchError
        try:
            loop = asyncio.get_running_loop()
            # A timeout cancels a lookup that still waits for a thread.
            answer = await asyncio.wait_for(loop.run_in_executor(self._threads, self._lookup, host), DNS_SECONDS)
            if not answer:
                answer = FetchError("dns", f"{host} has no address")
        except asyncio.TimeoutError:
            answer = FetchError("dns_unavailable", f"{host}: no answer in {DNS_SECONDS:g} s")
        except socket.gaierror as error:
            gone = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
            answer = FetchError("dns" if gone else "dns_unavailable", f"{host}: {error.strerror}")
        except (OSError, ValueError) as error:  # ValueError: the name cannot be encoded
            answer = FetchError("dns", f"{host}: {error}")
        finally:
            del self._lookups[host]
        if len(self._known) >= DNS_ENTRIES:
            del self._known[next(iter(self._known))]
        lasting = isinstance(answer, list) or not answer.transient
        self._known[host] = (time.monotonic() + (DNS_TTL if lasting else DNS_RETRY_TTL), answer)
        return answer
