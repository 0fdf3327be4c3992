"""Distinguishes a local network outage from dead hosts. In an outage, no row is at fault."""

from __future__ import annotations

from collections import Counter

from pipeline.fetch.reasons import FetchError
from pipeline.step import HaltError

ROWS, HOSTS = 200, 20
_SILENT = frozenset({"dns_unavailable", "unreachable", "deadline"})
_NOT_FROM_THE_NETWORK = frozenset({"bad_url", "bad_scheme", "addr_denied", "host_down", "host_busy"})


class OutageError(HaltError):
    """The local resolver or network is down. Raised instead of recording failures of rows."""


class Outage:
    """Watches the outcomes of a worker's rows.

    Declares an outage when 200 consecutive rows, of at least 20 hosts, end without a response of any kind: no HTTP
    status, no refused connection, no "no such name" from the resolver. Most dead hosts refuse connections or no longer
    resolve; some are silent, but not 20 in a row. A pool of fewer than 200 rows never triggers it.
    """

    def __init__(self) -> None:
        self._hosts: set[str] = set()
        self._reasons: Counter[str] = Counter()

    def host_answered(self) -> None:
        """Records that a host or the resolver responded."""
        self._hosts.clear()
        self._reasons.clear()

    def failed(self, host: str, failure: FetchError) -> None:
        """Records the failure of a row. Raises OutageError if there is an outage."""
        if failure.reason in _NOT_FROM_THE_NETWORK:
            return
        if failure.reason not in _SILENT:
            self.host_answered()
            return
        self._reasons[failure.reason] += 1
        rows = self._reasons.total()
        if len(self._hosts) < HOSTS:
            self._hosts.add(host)
        if rows >= ROWS and len(self._hosts) >= HOSTS:
            resolver = self._reasons["dns_unavailable"] > rows / 2
            what = "the resolver does not respond" if resolver else "the network is unreachable"
            cure = "/etc/resolv.conf" if resolver else "the route, the firewall and the proxy"
            counts = ", ".join(f"{reason} {n}" for reason, n in self._reasons.most_common())
            raise OutageError(
                f"{what}: the last {rows} rows, of {HOSTS} or more hosts, all failed without a response "
                f"({counts}; last {host}: {failure.detail or failure.reason}). Check {cure} of this machine, then run "
                "the same command to resume."
            )
