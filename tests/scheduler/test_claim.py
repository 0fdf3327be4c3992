"""A run directory has a single writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from pipeline.scheduler import claim
from pipeline.scheduler.claim import InUseError, LostClaimError, hold
from pipeline.storage import DamagedError, Store
from tests.conftest import environment

HOLDER = textwrap.dedent("""
    import sys, time
    from pipeline.scheduler import claim
    from pipeline.storage import Store
    with claim.hold(Store(sys.argv[1])):
        print("held", flush=True)
        time.sleep(120)
""")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Store, subprocess.Popen[str]]]:
    """A process that holds the claim on a directory."""
    store = Store(str(tmp_path / "run"))
    argv = [sys.executable, "-c", HOLDER, store.root]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield store, process
        process.kill()


def of_another_machine(store: Store, age: float) -> dict[str, Any]:
    """Writes the claim of a process on another machine whose last heartbeat is `age` seconds old."""
    now = time.time()
    owner = {"host": "node7", "boot": "b", "pids": "p", "pid": 4711, "started": "1", "since": now - 9000, "token": "t"}
    store.write("claim/0000003.json", json.dumps(owner | {"beat": now - age}).encode())
    return owner


def test_a_claim_exists_while_held_and_leaves_no_file(store: Store) -> None:
    with hold(store) as held:
        assert store.names("claim") == ["0000001.json"]
        held.check()
    assert store.names("claim") == []
    if store.local:
        assert os.listdir(store.root) == []


def test_a_second_command_is_refused_with_the_owner_named(holder: tuple[Store, subprocess.Popen[str]]) -> None:
    store, process = holder
    with pytest.raises(InUseError) as refused, hold(store):
        pass
    message = str(refused.value)
    assert f"{store.root} is in use by another command: pid {process.pid} on " in message
    assert "last heartbeat" in message
    process.send_signal(signal.SIGSTOP)  # a stopped process is alive
    with pytest.raises(InUseError), hold(store):
        pass


def test_the_claim_of_a_killed_local_process_is_taken_over_at_once(holder: tuple[Store, subprocess.Popen[str]]) -> None:
    store, process = holder
    process.kill()  # not reaped: a zombie counts as dead
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    started = time.monotonic()
    with hold(store):
        assert time.monotonic() - started < claim.WATCH / 2
        assert store.names("claim") == ["0000002.json"]


def test_a_reused_pid_does_not_keep_a_claim_alive(store: Store) -> None:
    with hold(store):
        owner = json.loads(store.read("claim/0000001.json"))
    store.write("claim/0000001.json", json.dumps(owner | {"pid": os.getpid(), "started": "7"}).encode())
    with hold(store):
        pass


@pytest.mark.parametrize(("age", "refused"), [(3.0, True), (-3.0, True), (claim.EXPIRY + 1, False)])
def test_the_claim_of_another_machine_expires(
    store: Store, monkeypatch: pytest.MonkeyPatch, age: float, refused: bool
) -> None:
    monkeypatch.setattr(claim, "WATCH", 0.2)
    of_another_machine(store, age)
    with ExitStack() as stack:
        if refused:
            stack.enter_context(pytest.raises(InUseError, match=r"pid 4711 on node7, started .* ago"))
        with hold(store):
            assert store.names("claim") == ["0000004.json"]


@pytest.mark.parametrize("age", [3600, -3600])
def test_an_old_claim_with_heartbeats_is_alive(store: Store, monkeypatch: pytest.MonkeyPatch, age: float) -> None:
    """Even if the clock of the other machine is an hour slow or fast."""
    monkeypatch.setattr(claim, "WATCH", 60.0)
    owner = of_another_machine(store, age)
    with ThreadPoolExecutor(1) as thread:

        def enter() -> None:
            with hold(store):
                pass

        entering = thread.submit(enter)
        while not entering.done():
            store.write("claim/0000003.json", json.dumps(owner | {"beat": time.time() - 3600}).encode())
            time.sleep(0.2)
        with pytest.raises(InUseError):
            entering.result()


def test_exactly_one_of_many_commands_takes_over_a_dead_claim(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WATCH", 0.2)
    of_another_machine(store, 3600)

    def enter(stack: ExitStack) -> bool:
        try:
            stack.enter_context(hold(store))
        except InUseError:
            return False
        return True

    with ExitStack() as stack, ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(enter, [stack] * 8)) == 1


def test_a_lost_claim_raises_before_the_next_write(store: Store) -> None:
    with hold(store) as held:
        copy, later = (cloudpickle.loads(cloudpickle.dumps(held)) for _ in range(2))  # as workers get it
        copy.check()
        store.write("claim/0000002.json", b"{}")
        with pytest.raises(LostClaimError, match="another command has taken over"):
            later.check()
        held._confirmed -= 3 * claim.HEARTBEAT  # as if suspended for this long
        with pytest.raises(LostClaimError):
            held.check()
    assert store.names("claim") == ["0000001.json", "0000002.json"], "the other claim is untouched"


def test_an_unreadable_claim_is_taken_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "WATCH", 0.2)
    store.write("claim/0000001.json", b"\x00")
    with hold(store):
        pass


ODD = [
    b"", b"{", b"\xff", b"null", b"[1]", b"[" * 100_000, b"{}", b'{"beat": "now"}', b'{"beat": null, "since": []}',
    b'{"beat": 1e300, "since": -1e300}', b'{"beat": Infinity, "pid": null}', b'{"beat": NaN, "pid": "1/../self"}',
    b'{"beat": 9' + b"9" * 5_000 + b"}", b'{"pid": 1e30, "host": [1], "boot": {}}',
]  # fmt: skip


@pytest.mark.parametrize("data", ODD, ids=lambda data: data[:30].decode("latin-1"))
def test_a_claim_that_no_command_wrote_is_watched_and_taken_over(
    store: Store, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "WATCH", 0.05)
    store.write("claim/0000001.json", data)
    owner = claim.find_owner(store)
    assert owner is not None
    assert not owner.alive
    with hold(store):
        assert claim.find_owner(store).pid == os.getpid()  # type: ignore[union-attr]


def test_a_heartbeat_in_the_future_does_not_hold_a_directory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's clock was wrong. Without this rule, the directory would stay in use until that time."""
    monkeypatch.setattr(claim, "EXPIRY", 0.05)
    of_another_machine(store, -86_400)
    with hold(store):
        pass


def test_a_claim_cannot_imitate_lines_of_output(store: Store) -> None:
    owner = of_another_machine(store, 1) | {"host": "node7\nerror: all is lost\x1b[2J"}
    store.write("claim/0000003.json", json.dumps(owner | {"beat": time.time()}).encode())
    with pytest.raises(InUseError, match=r"on node7\\nerror: all is lost\\x1b\[2J"), hold(store):
        pass


def test_a_folder_that_takes_no_claim_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "ATTEMPTS", 3)
    (tmp_path / "claim/0000001.json").mkdir(parents=True)
    with pytest.raises(DamagedError, match="3 attempts to create a claim failed"), hold(Store(str(tmp_path))):
        pass
