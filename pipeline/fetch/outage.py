"""Tells a web that is gone from hosts that are gone: the first is our own trouble, and no verdict on any row."""

from __future__ import annotations

from collections import Counter

from pipeline.fetch.reasons import FetchError
from pipeline.step import HaltError

ROWS, HOSTS = 200, 20
_SILENT = frozenset({"dns_unavailable", "unreachable", "deadline"})
_NO_WORD_FROM_OUTSIDE = frozenset({"bad_url", "bad_scheme", "addr_denied", "host_down", "host_busy"})


class OutageError(HaltError):
    """The resolver or the network fails for everyone; raised in place of the rows' failures, so that none is final."""


class Outage:
    """Watches the ends of a worker's rows.

    It is an outage when 200 rows in a row, of 20 hosts at least, ended without a sign of life from any host: no answer
    of any status, no refused connection, no "no such name" from the resolver. Dead hosts refuse, or have lost their
    name; some are silent, but not all of 20 in a row. A pool of fewer than 200 rows always comes to its end.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._hosts: set[str] = set()
        self._reasons: Counter[str] = Counter()

    def alive(self) -> None:
        """A host, or the resolver, has answered."""
        if self._rows:
            self.__init__()  # type: ignore[misc]

    def failed(self, host: str, failure: FetchError) -> None:
        """A row has ended. Raises OutageError when that was one too many."""
        if failure.reason in _NO_WORD_FROM_OUTSIDE:
            return
        if failure.reason not in _SILENT:
            self.alive()
            return
        self._rows += 1
        self._reasons[failure.reason] += 1
        if len(self._hosts) < HOSTS:
            self._hosts.add(host)
        if self._rows >= ROWS and len(self._hosts) >= HOSTS:
            resolver = self._reasons["dns_unavailable"] > self._rows / 2
            what = "the resolver answers for no name" if resolver else "the network reaches no host"
            cure = "/etc/resolv.conf" if resolver else "the route, the firewall and the proxy"
            counts = ", ".join(f"{reason} {n}" for reason, n in self._reasons.most_common())
            raise OutageError(
                f"{what}: the last {self._rows} rows, of {HOSTS} hosts or more, all ended without a sign of life "
                f"({counts}; last {host}: {failure.detail or failure.reason}). Check {cure} of this machine; the same "
                "command goes on where it stopped."
            )
