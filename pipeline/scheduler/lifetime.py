"""Ends a command early on a signal or when its cluster is lost.

Both are handled alike: the main thread gets a KeyboardInterrupt and has GRACE seconds to clean up; then the process
exits with one line and a status. A timer enforces this even while the main thread hangs in a Ray call.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from typing import Any, NoReturn

from trainer.terminal import mask, visible

GRACE = 10.0
"""Seconds to clean up before the process exits."""
PROBE_EVERY = 2.0
"""Seconds between cluster probes."""
PROBES = 3
"""Consecutive probes that must fail; a single failure may be momentary overload."""
PROBE_SECONDS = 5.0
"""Connection timeout of a probe in seconds."""
GOES_ON = "Run the same command again to resume from what was committed."


class Watch:
    """Handles signals and, after `watch`, monitors the cluster. Create it in the main thread."""

    def __init__(self) -> None:
        self._reason: tuple[int, str] | None = None
        self._raised = False
        self._parts: dict[str, tuple[str, int]] = {}
        self._closed = threading.Event()
        self.take_signals()

    def take_signals(self) -> None:
        """Installs the signal handlers. Call it again after libraries such as Ray have installed theirs."""
        signal.signal(signal.SIGINT, self._caught)
        signal.signal(signal.SIGTERM, self._caught)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._caught)

    def watch(self, parts: dict[str, tuple[str, int]]) -> None:
        """Ends the command when a part of the cluster stops accepting connections. `parts` maps names to addresses."""
        self._parts = parts
        threading.Thread(target=self._probe, name="cluster watch", daemon=True).start()

    def lost(self) -> str | None:
        """Describes the first part of the cluster that does not answer; None if all do."""
        for name, address in self._parts.items():
            try:
                socket.create_connection(address, PROBE_SECONDS).close()
            except OSError as error:
                why = error.strerror or str(error)
                return f"the cluster is lost: {name} at {address[0]}:{address[1]} does not answer ({why})"
        return None

    def is_ending(self) -> bool:
        """Whether a signal has ended the command, or the cluster is lost."""
        return self._reason is not None or self.lost() is not None

    def close(self) -> None:
        """Stops watching the cluster, so that it can be shut down. From now on `lost` returns None."""
        self._closed.set()
        self._parts = {}

    def leave(self) -> NoReturn:
        """Prints the reason and exits, skipping Ray's exit handlers, which would wait for a lost cluster."""
        status, line = self._reason or (128 + signal.SIGINT, f"interrupted. {GOES_ON}")
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        try:
            os.write(2, f"{visible(mask(line))}\n".encode())
        finally:
            os._exit(status)

    def end(self, status: int, line: str) -> None:
        """Exits after GRACE seconds with a status and a line. Later calls have no effect."""
        if self._reason is None:
            self._reason = (status, line)
            timer = threading.Timer(GRACE, self.leave)
            timer.daemon = True
            timer.start()

    def _caught(self, number: int, frame: Any) -> None:
        self.end(128 + number, f"interrupted by {signal.Signals(number).name}. {GOES_ON}")
        if not self._raised:  # a second signal does not interrupt the cleanup
            self._raised = True
            raise KeyboardInterrupt

    def _probe(self) -> None:
        failures = 0
        while not self._closed.wait(PROBE_EVERY):
            lost = self.lost()
            failures = failures + 1 if lost else 0
            if lost and failures == PROBES:
                self.end(1, f"error: {lost}. {GOES_ON}")
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return
