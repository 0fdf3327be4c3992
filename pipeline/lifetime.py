"""How a command ends before its time: by a signal, or because its cluster is gone.

Both ends are one: the main thread gets a KeyboardInterrupt, has GRACE seconds to put things in order, and the process
ends with a line and a status. Whoever waits inside Ray for an answer that will never come is ended by the clock.
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
"""Seconds to put things in order."""
PROBE_EVERY = 2.0
"""Seconds between two looks at the cluster."""
PROBES = 3
"""Looks in a row that must fail: one may be a moment's overload."""
PROBE_SECONDS = 5.0
GOES_ON = "The same command goes on from what was committed."


class Watch:
    """Waits for signals and, once there is one, watches the cluster. Belongs to the main thread."""

    def __init__(self) -> None:
        self._why: tuple[int, str] | None = None
        self._raised = False
        self._parts: dict[str, tuple[str, int]] = {}
        self._over = threading.Event()
        self.take_signals()

    def take_signals(self) -> None:
        """Answers signals from now on: libraries, Ray above all, put handlers of their own in this place."""
        signal.signal(signal.SIGINT, self._caught)
        signal.signal(signal.SIGTERM, self._caught)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._caught)

    def watch(self, parts: dict[str, tuple[str, int]]) -> None:
        """Ends the command when one of the cluster's parts, by name, takes no connection at its address any more."""
        self._parts = parts
        threading.Thread(target=self._probe, name="cluster watch", daemon=True).start()

    def lost(self) -> str | None:
        """Which part of the cluster is gone, as a line for people; None: all answer."""
        for name, address in self._parts.items():
            try:
                socket.create_connection(address, PROBE_SECONDS).close()
            except OSError as error:
                why = error.strerror or str(error)
                return f"the cluster is gone: {name} at {address[0]}:{address[1]} does not answer ({why})"
        return None

    def is_ending(self) -> bool:
        """True once the command has been told to end, or has nothing left to run on."""
        return self._why is not None or self.lost() is not None

    def close(self) -> None:
        """Watches the cluster no longer."""
        self._over.set()

    def leave(self) -> NoReturn:
        """Says why and ends the process, without the exit handlers of Ray, which would wait for a cluster that may be
        gone."""
        status, line = self._why or (128 + signal.SIGINT, f"interrupted. {GOES_ON}")
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
        """Gives the command GRACE seconds. Only the first reason counts."""
        if self._why is None:
            self._why = (status, line)
            timer = threading.Timer(GRACE, self.leave)
            timer.daemon = True
            timer.start()

    def _caught(self, number: int, frame: Any) -> None:
        self.end(128 + number, f"interrupted by {signal.Signals(number).name}. {GOES_ON}")
        if not self._raised:  # a second signal does not disturb the end
            self._raised = True
            raise KeyboardInterrupt

    def _probe(self) -> None:
        missed = 0
        while not self._over.wait(PROBE_EVERY):
            lost = self.lost()
            missed = missed + 1 if lost else 0
            if lost and missed == PROBES:
                self.end(1, f"error: {lost}. {GOES_ON}")
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return
