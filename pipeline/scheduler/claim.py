"""Ensures that a run directory has a single writer.

A claim is a small file `claim/NNNNNNN.json` in the run directory. Its owner rewrites it every HEARTBEAT seconds and
removes it at the end. The highest number is the valid claim. A command that finds the owner dead creates the next
number. `Store.create` succeeds for exactly one caller, locally and in an object store, so only one command takes over.

An owner is dead if it ran on this machine and its process is gone, or if it ran elsewhere and its claim is more than
EXPIRY seconds old and does not change for WATCH seconds, or dated in the future and does not change for EXPIRY seconds.
A live owner therefore never loses its directory to clock skew. An owner that was suspended detects a takeover with
`Claim.check` before it writes again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.scheduler.progress import clock
from pipeline.storage import DamagedError, Store
from trainer.errors import FailedError, InputError
from trainer.terminal import one_line

HEARTBEAT = 10.0
"""Seconds between heartbeats."""
EXPIRY = 60.0
"""Age in seconds after which a claim from another machine may have expired."""
ATTEMPTS = 20
"""Attempts to create a claim while other commands do the same."""
WATCH = 1.5 * HEARTBEAT
"""Seconds to watch an expired claim for changes before taking it over."""


class InUseError(InputError):
    """The run directory belongs to a running command."""


class LostClaimError(FailedError):
    """Another command has taken over the run directory; this one must stop writing."""


@dataclass(frozen=True)
class Owner:
    """The command that holds a run directory, according to its claim."""

    host: str
    pid: int
    since: float
    beat: float
    """`since`: when it claimed the directory; `beat`: its last heartbeat. Seconds since 1970, by its own clock."""
    alive: bool
    """False if its process on this machine is gone, or if it ran elsewhere and its last heartbeat is more than
    EXPIRY seconds away by the clock of this machine."""


def find_owner(store: Store) -> Owner | None:
    """The owner of a run directory, or None. Only reads, and does not wait."""
    for name in reversed(_names(store)):
        if (data := store.read_if_there(name)) is not None:
            claim = _parsed(data)
            alive = _runs_here(claim) if _on_this_machine(claim) else _is_fresh(claim)
            return Owner(claim["host"], claim["pid"], claim["since"], claim["beat"], alive)
    return None


class Claim:
    """Marks this command as the only writer of a run directory. Workers call `check` on copies of it."""

    def __init__(self, store: Store, number: int, owner: dict[str, Any]) -> None:
        self._store, self._number, self._owner = store, number, owner
        self._confirmed = 0.0
        self._ended = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_confirmed": 0.0, "_ended": None}

    def check(self) -> None:
        """Raises LostClaimError if another command has taken over. Reads the store at most once per two heartbeats."""
        if abs(time.time() - self._confirmed) > 2 * HEARTBEAT:
            self._confirm()

    def _confirm(self) -> None:
        now = time.time()
        names = _names(self._store)
        mine = _name(self._number)
        data = self._store.read_if_there(mine) if names[-1:] == [mine] else None
        if data is None or _parsed(data).get("token") != self._owner["token"]:
            self._confirmed = 0.0
            raise LostClaimError(
                f"{self._store.root}: another command has taken over this directory because this one sent no heartbeat "
                f"for {EXPIRY:.0f} s. Committed results are kept; this command writes nothing more"
            )
        self._confirmed = now

    def _write(self) -> None:
        self._store.write(_name(self._number), _dump(self._owner | {"beat": time.time()}))

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                self._confirm()
                self._write()
            except LostClaimError:
                return
            except Exception:  # unreachable store: `check` raises before the next write
                continue

    def _release(self) -> None:
        with contextlib.suppress(Exception):  # unreachable store: the claim expires
            self._confirm()
            self._store.remove(_name(self._number))
            if self._store.local:
                with contextlib.suppress(OSError):  # another command is creating its claim
                    os.rmdir(self._store.path("claim"))


@contextlib.contextmanager
def hold(store: Store) -> Iterator[Claim]:
    """Claims a run directory for the duration of a block. Raises InUseError if a live command holds it."""
    claim = _take(store)
    heartbeat = threading.Thread(target=claim._keep, daemon=True)
    heartbeat.start()
    try:
        yield claim
    finally:
        claim._ended.set()
        heartbeat.join(HEARTBEAT)
        claim._release()


def _take(store: Store) -> Claim:
    owner = {**_host_identity(), "pid": os.getpid(), "started": _start_time(os.getpid()), "since": time.time()}
    owner["token"] = secrets.token_hex(8)
    for attempt in range(ATTEMPTS):
        time.sleep(0.05 * attempt)
        names = _names(store)
        if names:
            data = store.read_if_there(names[-1])
            if data is not None and _alive(store, names[-1], data):
                raise InUseError(_refusal(store, _parsed(data)))
        number = int(Path(names[-1]).stem) + 1 if names else 1
        if not store.create(_name(number), _dump(owner | {"beat": time.time()})):
            continue
        claim = Claim(store, number, owner)
        if _names(store) != [*names, _name(number)]:  # another command interfered: try again
            store.remove(_name(number))
            continue
        for name in names:
            store.remove(name)
        claim._confirm()
        return claim
    raise DamagedError(f"{store.path('claim')}: {ATTEMPTS} attempts to create a claim failed; remove this folder")


def _alive(store: Store, name: str, data: bytes) -> bool:
    owner = _parsed(data)
    if _on_this_machine(owner):
        return _runs_here(owner)
    if _is_fresh(owner):
        return True
    # A heartbeat in the future may be recent, by a clock that is ahead of ours.
    seconds = WATCH if owner["beat"] < time.time() else EXPIRY
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 5))
        if store.read_if_there(name) != data:
            return True
    return False


def _on_this_machine(owner: dict[str, Any]) -> bool:
    return all(owner.get(key) == value for key, value in _host_identity().items())


def _runs_here(owner: dict[str, Any]) -> bool:
    started = _start_time(owner["pid"])
    return bool(started) and owner.get("started") == started


def _is_fresh(owner: dict[str, Any]) -> bool:
    """Whether the last heartbeat is less than EXPIRY seconds away. One further in the future is from a wrong clock."""
    return abs(time.time() - owner["beat"]) < EXPIRY


def _refusal(store: Store, owner: dict[str, Any]) -> str:
    now = time.time()
    since, beat = (max(0.0, now - (owner[key] or now)) for key in ("since", "beat"))
    return (
        f"{store.root} is in use by another command: pid {owner['pid']} on {owner['host']}, started "
        f"{clock(since)} ago, last heartbeat {clock(beat)} ago. Wait for it to end, or stop it there, then run "
        f"this command again; the claim of a machine that died expires after {EXPIRY:.0f} s"
    )


def _host_identity() -> dict[str, str]:
    """Identifies host, boot and PID namespace. Only if all three match can a process check whether another is alive."""
    identity = {"host": socket.gethostname(), "boot": "", "pids": ""}
    with contextlib.suppress(OSError):
        identity["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity["pids"] = os.readlink("/proc/self/ns/pid")
    return identity


def _start_time(pid: int) -> str:
    """The start time of a process on this machine, in the kernel's format; empty if the process is gone."""
    if not os.path.isdir("/proc/self"):  # no /proc: only check that the PID exists
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
        return "alive"
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _names(store: Store) -> list[str]:
    return [f"claim/{name}" for name in store.names("claim") if re.fullmatch(r"[0-9]{7,}\.json", name)]


def _name(number: int) -> str:
    return f"claim/{number:07d}.json"


def _dump(owner: dict[str, Any]) -> bytes:
    return json.dumps(owner).encode()


def _parsed(data: bytes) -> dict[str, Any]:
    """Parses a claim. `host`, `pid`, `since` and `beat` have the right types whatever the file holds."""
    owner: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        owner = found if isinstance(found, dict) else {}
    pid = owner.get("pid")
    return owner | {
        "host": one_line(str(owner.get("host", "an unknown host"))),
        "pid": pid if isinstance(pid, int) and 0 < pid < 1 << 31 else 0,
        **{key: _seconds(owner.get(key)) for key in ("since", "beat")},
    }


def _seconds(value: Any) -> float:
    """The value if it is a time in seconds since 1970 that a calendar can represent; else 0."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1 << 38 else 0.0
