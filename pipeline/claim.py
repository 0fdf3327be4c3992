"""One writer for a run directory: who it is, whether it is alive, and how it learns that it no longer is the one.

A claim is a small file `claim/NNNNNNN.json` in the run directory. Its owner rewrites it every BEAT seconds and removes
it at the end. The highest number counts. Whoever finds the owner dead creates the next number: `Store.create` succeeds
for exactly one caller, on a disk as in an object store, so no two commands take over one claim.

An owner is dead if it ran on this machine and its process is gone, or if it ran elsewhere and its claim is older than
EXPIRY seconds and does not change while it is watched. So neither a clock that is ahead nor one that is behind takes a
directory from a live owner. An owner that was suspended finds its claim replaced before it writes on: `Claim.check`.
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
from pathlib import Path
from typing import Any

from pipeline.storage import Store

BEAT = 10.0
"""Seconds between two signs of life."""
EXPIRY = 60.0
"""Age in seconds from which the claim of another machine's process may be void."""
WATCH = 1.5 * BEAT
"""Seconds for which such a claim is watched before it is taken over."""


class InUseError(Exception):
    """The run directory belongs to a command that is at work."""


class LostClaimError(Exception):
    """Another command has taken over the run directory; this one must write no more."""


class Claim:
    """What makes this command the only writer of a run directory. Workers get copies of it, to call `check`."""

    def __init__(self, store: Store, number: int, owner: dict[str, Any]) -> None:
        self._store, self._number, self._owner = store, number, owner
        self._confirmed = 0.0
        self._ended = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_confirmed": 0.0, "_ended": None}

    def check(self) -> None:
        """LostClaimError if another command has taken over. Asks the store only if nobody did for two beats."""
        if abs(time.time() - self._confirmed) > 2 * BEAT:
            self._confirm()

    def _confirm(self) -> None:
        now = time.time()
        names = _names(self._store)
        mine = _name(self._number)
        data = self._store.read_if_there(mine) if names[-1:] == [mine] else None
        if data is None or _parsed(data).get("token") != self._owner["token"]:
            self._confirmed = 0.0
            raise LostClaimError(
                f"{self._store.root}: another command has taken over this directory, as this one gave no sign of life "
                f"for {EXPIRY:.0f} s. What was committed stays; nothing more is written here"
            )
        self._confirmed = now

    def _write(self) -> None:
        self._store.write(_name(self._number), _dump(self._owner | {"beat": time.time()}))

    def _keep(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                self._confirm()
                self._write()
            except LostClaimError:
                return
            except Exception:  # a store that is out of reach: `check` will tell, once it matters
                continue

    def _release(self) -> None:
        with contextlib.suppress(Exception):  # a store that is out of reach: then the claim expires
            self._confirm()
            self._store.remove(_name(self._number))
            if self._store.local:
                with contextlib.suppress(OSError):  # somebody else's claim is under way
                    os.rmdir(self._store.path("claim"))


@contextlib.contextmanager
def hold(store: Store) -> Iterator[Claim]:
    """Takes a run directory for the time of a block; InUseError if a command that is alive has it."""
    claim = _take(store)
    beats = threading.Thread(target=claim._keep, daemon=True)
    beats.start()
    try:
        yield claim
    finally:
        claim._ended.set()
        beats.join(BEAT)
        claim._release()


def _take(store: Store) -> Claim:
    me = {**_place(), "pid": os.getpid(), "started": _started(os.getpid()), "since": time.time()}
    me["token"] = secrets.token_hex(8)
    while True:
        names = _names(store)
        if names:
            data = store.read_if_there(names[-1])
            if data is not None and _alive(store, names[-1], data):
                raise InUseError(_refusal(store, _parsed(data)))
        number = int(Path(names[-1]).stem) + 1 if names else 1
        if not store.create(_name(number), _dump(me | {"beat": time.time()})):
            continue
        claim = Claim(store, number, me)
        if _names(store) != [*names, _name(number)]:  # others came and went meanwhile: look again
            store.remove(_name(number))
            continue
        for name in names:
            store.remove(name)
        claim._confirm()
        return claim


def _alive(store: Store, name: str, data: bytes) -> bool:
    owner = _parsed(data)
    if all(owner.get(key) == value for key, value in _place().items()):
        return owner.get("started") in ({_started(owner.get("pid", 0))} - {""})
    if time.time() - owner.get("beat", 0.0) < EXPIRY:
        return True
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH / 5))
        if store.read_if_there(name) != data:
            return True
    return False


def _refusal(store: Store, owner: dict[str, Any]) -> str:
    now = time.time()
    since, beat = (max(0.0, now - owner.get(key, now)) for key in ("since", "beat"))
    return (
        f"{store.root} is in use by another command: pid {owner.get('pid')} on {owner.get('host')}, started "
        f"{_duration(since)} ago, last sign of life {_duration(beat)} ago. Wait for its end, or end it there and give "
        f"this command again; the claim of a machine that died is void after {EXPIRY:.0f} s"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _place() -> dict[str, str]:
    """What two processes share if, and only if, each can see whether the other is alive."""
    place = {"host": socket.gethostname(), "boot": "", "pids": ""}
    with contextlib.suppress(OSError):
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place["pids"] = os.readlink("/proc/self/ns/pid")
    return place


def _started(pid: int) -> str:
    """When a process of this machine started, in a form of the system's own; empty if there is none."""
    if not os.path.isdir("/proc/self"):  # a system that does not tell: a process of that number must do
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
    with contextlib.suppress(ValueError):
        owner = json.loads(data)
        if isinstance(owner, dict):
            return owner
    return {}
