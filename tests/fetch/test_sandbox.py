"""The sandbox: what it contains, which call it fails, and that it leaks nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.fetch import sandbox as sandbox_module
from pipeline.fetch.decoder import Decoder, Rules, decode
from pipeline.fetch.reasons import REASONS, FetchError
from pipeline.fetch.sandbox import MAX_ATTEMPTS, MAX_FAILED_STARTS, Sandbox, SandboxError
from tests.conftest import HUNG
from tests.fetch.hostile_images import smooth
from tests.images import encoded

linux = pytest.mark.skipif(sys.platform != "linux", reason="what only Linux offers")


def hostile() -> Callable[..., Any]:
    """A target that does what its body says. Defined in a function, so it is pickled by value: children start fast."""

    def act(body: bytes, directory: str = "") -> Any:
        import ctypes
        import os
        import signal
        import sys
        import time
        from pathlib import Path

        from pipeline.fetch.reasons import FetchError

        name = body[:20].decode("ascii", "replace")
        if directory:
            with (Path(directory) / "calls").open("a") as calls:
                calls.write(f"{name} {os.getpid()}\n")
        if name.startswith("wait"):
            while not (Path(directory) / "go").exists():
                time.sleep(0.005)
        elif name == "sleep":
            signal.pause()
        elif name == "spin":
            while True:
                pass
        elif name == "segfault":
            ctypes.string_at(0)
        elif name == "abort":
            os.abort()
        elif name == "exit":
            os._exit(7)
        elif name == "quit":
            raise SystemExit(5)
        elif name == "garble":
            os.write(int(sys.argv[1]), bytes(8))
        elif name == "eat":
            eaten = []
            while True:
                eaten.append(bytearray(1 << 20))
        elif name == "raise":
            raise ZeroDivisionError("a bug")
        elif name == "refuse":
            raise FetchError("too_small", "1 x 1")
        elif name == "generator":
            return (x for x in [1])
        elif name == "process":
            return os.getpid(), os.getsid(0), len(os.listdir("/dev/fd"))
        return body[::-1]

    return act


async def outcome(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except FetchError as failure:
        return failure.reason, failure.detail


def sandbox(target: Callable[..., Any] | None = None, **options: Any) -> Sandbox[Any]:
    return Sandbox(target or hostile(), **{"processes": 2, "seconds": 20, "memory": 100 << 20, **options})


async def started(directory: Path, count: int) -> list[tuple[str, int]]:
    """(name, process) of the calls in the order they began, once there are `count`."""
    while True:
        lines = (directory / "calls").read_text().splitlines() if (directory / "calls").exists() else []
        if len(lines) >= count:
            return [(name, int(process)) for name, process in map(str.split, lines)]
        await asyncio.sleep(0.005)


LOSSES = {
    "segfault": ("decoder_crash", "signal SIGSEGV"),
    "abort": ("decoder_crash", "signal SIGABRT"),
    "exit": ("decoder_crash", "exit status 7"),
    "quit": ("unexpected", "SystemExit: 5"),
    "spin": ("decoder_timeout", "over 0.6 s of CPU time"),
    "garble": ("decoder_crash", "unreadable answer: EOFError: Ran out of input"),
    "raise": ("unexpected", "ZeroDivisionError: a bug"),
    "refuse": ("too_small", "1 x 1"),
    "eat": ("decoder_memory", f"over {100 << 20} bytes"),
}
if sys.platform != "linux":
    del LOSSES["eat"]


def test_a_lost_process_fails_only_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "WALL_FACTOR", 500)  # the limits that count here are in CPU time and bytes
    bodies = [f"harmless {i}".encode() for i in range(200)]
    for i, name in enumerate(LOSSES):
        bodies[3 + 19 * i] = name.encode()

    async def run() -> list[Any]:
        async with sandbox(seconds=0.6) as box:
            return await asyncio.gather(*(outcome(box(body)) for body in bodies))

    assert asyncio.run(run()) == [LOSSES.get(body.decode(), body[::-1]) for body in bodies]


def test_a_call_that_uses_no_cpu_is_ended_by_wall_time() -> None:
    async def run() -> Any:
        async with sandbox(processes=1, seconds=0.2) as box:
            return await outcome(box(b"sleep"))

    assert asyncio.run(run()) == ("decoder_timeout", "over 1 s")


def test_the_row_behind_a_crash_is_not_blamed() -> None:
    async def run() -> list[Any]:
        async with sandbox(processes=1) as box:
            return await asyncio.gather(*(outcome(box(b"exit" if i % 2 else b"%d" % i)) for i in range(10)))

    assert asyncio.run(run()) == [LOSSES["exit"] if i % 2 else b"%d" % i for i in range(10)]


def test_a_process_that_dies_between_calls_fails_no_call() -> None:
    async def run() -> None:
        async with sandbox(processes=1) as box:
            process, _, _ = await box(b"process")
            os.kill(process, signal.SIGKILL)
            assert await box(b"next") == b"txen"

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_call_is_retried_if_its_process_is_killed_externally(number: signal.Signals, tmp_path: Path) -> None:
    async def run() -> None:
        async with sandbox(processes=1) as box:
            calls = [asyncio.create_task(box(b"wait%d" % i, str(tmp_path))) for i in range(3)]
            for begun in range(1, MAX_ATTEMPTS):
                name, process = (await started(tmp_path, begun))[-1]
                assert name == "wait0"
                os.kill(process, number)
            await started(tmp_path, MAX_ATTEMPTS)
            (tmp_path / "go").touch()
            assert await asyncio.gather(*calls) == [b"0tiaw", b"1tiaw", b"2tiaw"]

    asyncio.run(run())


def test_a_call_whose_processes_keep_being_killed_fails_for_a_transient_reason(tmp_path: Path) -> None:
    async def run() -> None:
        async with sandbox(processes=1) as box:
            call = asyncio.create_task(outcome(box(b"wait", str(tmp_path))))
            for begun in range(1, MAX_ATTEMPTS + 1):
                os.kill((await started(tmp_path, begun))[-1][1], signal.SIGKILL)
            assert await call == ("decoder_killed", f"signal SIGKILL, {MAX_ATTEMPTS} times")
            assert await box(b"next") == b"txen"

    asyncio.run(run())
    assert REASONS["decoder_killed"].transient


def test_a_crashing_call_is_found_despite_external_kills(tmp_path: Path) -> None:
    async def run() -> None:
        async with sandbox(processes=1) as box:
            calls = [asyncio.create_task(outcome(box(body, str(tmp_path)))) for body in (b"wait", b"segfault", b"ok")]
            os.kill((await started(tmp_path, 1))[-1][1], signal.SIGKILL)
            await started(tmp_path, 2)
            (tmp_path / "go").touch()
            assert await asyncio.gather(*calls) == [b"tiaw", LOSSES["segfault"], b"ko"]
            assert [name for name, _ in await started(tmp_path, 4)] == ["wait", "wait", "segfault", "ok"]

    asyncio.run(run())


def test_an_unpicklable_result_is_unexpected_and_the_process_continues() -> None:
    async def run() -> None:
        async with sandbox(processes=1) as box:
            before = await box(b"process")
            with pytest.raises(FetchError, match="unexpected: TypeError: cannot pickle 'generator'"):
                await box(b"generator")
            assert await box(b"process") == before

    asyncio.run(run())


def test_stderr_of_c_libraries_is_silenced_and_pythons_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    def say(body: bytes) -> None:
        os.write(2, b"libpng error: not by us\n")
        print(body.decode(), file=sys.stderr)

    async def run() -> None:
        async with sandbox(say, processes=1) as box:
            await box(b"by us")

    asyncio.run(run())
    assert capfd.readouterr().err == "by us\n"


def test_a_call_cancelled_in_the_queue_never_begins(tmp_path: Path) -> None:
    async def run() -> None:
        async with sandbox(processes=1) as box:
            calls = [asyncio.create_task(box(b"wait%d" % i, str(tmp_path))) for i in range(5)]
            await started(tmp_path, 1)
            calls[0].cancel()  # begun: its answer is discarded
            calls[3].cancel()  # queued
            (tmp_path / "go").touch()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert [a if isinstance(a, bytes) else type(a) for a in answers] == [
                asyncio.CancelledError, b"1tiaw", b"2tiaw", asyncio.CancelledError, b"4tiaw",
            ]  # fmt: skip
            assert [name for name, _ in await started(tmp_path, 4)] == ["wait0", "wait1", "wait2", "wait4"]

    asyncio.run(run())


def test_bodies_and_answers_of_20_megabytes() -> None:
    bodies = [np.random.default_rng(i).bytes(20_000_000 + i) for i in range(4)]

    async def run() -> None:
        async with sandbox() as box:
            answers = await asyncio.gather(*(box(body) for body in bodies), box(b"small"))
        assert answers == [body[::-1] for body in bodies] + [b"llams"]

    asyncio.run(run())


def test_closing_during_work_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    async def run() -> list[int]:
        before = set(os.listdir("/dev/fd"))
        with contextlib.suppress(ZeroDivisionError):
            async with sandbox() as box:
                calls = [asyncio.create_task(box(b"spin", str(tmp_path))) for _ in range(6)]
                processes = [process for _, process in await started(tmp_path, 2)]
                raise ZeroDivisionError
        ends = await asyncio.gather(*calls, box(b"too late"), return_exceptions=True)
        assert [str(end) for end in ends] == ["the sandbox is closed"] * 7
        assert set(os.listdir("/dev/fd")) == before
        return processes

    for process in set(asyncio.run(run())):
        with pytest.raises(ProcessLookupError):  # a zombie would still be found
            os.kill(process, 0)


PARENT = """
import asyncio
from pipeline.fetch.sandbox import Sandbox

def hang(body):
    print("begun", flush=True)
    while True:
        pass

async def main():
    async with Sandbox(hang, processes=1, seconds=1000, memory=1 << 30) as sandbox:
        await sandbox(b"")

asyncio.run(main())
"""


@linux
def test_a_killed_parent_leaves_no_process() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"begun\n"
    parent.kill()
    # The child shares this pipe: it ends when both are gone.
    assert parent.communicate(timeout=HUNG) == (b"", None)


def test_a_child_has_no_terminal_and_no_files_of_its_parent() -> None:
    async def files() -> int:
        async with sandbox(processes=1) as box:
            _, session, count = await box(b"process")
            assert session != os.getsid(0)
            return count

    ours = os.open("/dev/null", os.O_RDONLY)
    before = asyncio.run(files())
    os.set_inheritable(ours, True)
    assert asyncio.run(files()) == before
    os.close(ours)


class Unloadable:
    """Can be pickled, but misbehaves when the child loads it."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.reduced = function, args

    def __call__(self, body: bytes) -> None: ...

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Unloadable(exec, "import no_such_module"), "No module named 'no_such_module'"),
        (
            Unloadable(os._exit, 3),
            f"{MAX_FAILED_STARTS} processes in a row died before they began a call, the last of exit status 3",
        ),
    ],
)
def test_a_target_that_cannot_be_loaded_fails_every_call(target: Unloadable, message: str) -> None:
    async def run() -> list[Any]:
        async with sandbox(target) as box:
            waiting = await asyncio.gather(*(box(b"") for _ in range(5)), return_exceptions=True)
            return [*waiting, *await asyncio.gather(box(b""), return_exceptions=True)]

    failures = asyncio.run(run())
    assert [type(failure) for failure in failures] == [SandboxError] * 6
    assert all(message in str(failure) for failure in failures)


def test_decode_gives_the_same_as_in_this_process() -> None:
    pixels = np.random.default_rng(7).integers(0, 255, (90, 120, 3), np.uint8)
    bodies = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        body = encoded(pixels, kind)
        bodies += [body, body[: len(body) // 2]]
    bodies += [b"", b"<svg/>"]
    rules = Rules(image_size=64)

    async def here(body: bytes) -> Any:
        return decode(body, rules)

    async def run() -> None:
        async with sandbox(Decoder(rules), memory=1 << 30) as box:
            found = await asyncio.gather(*(outcome(box(body)) for body in bodies))
        assert found == [await outcome(here(body)) for body in bodies]
        assert {type(one) for one in found} == {tuple, type(decode(bodies[0], rules))}

    asyncio.run(run())


@linux
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [("RGB", "WEBP", {}), ("RGBA", "WEBP", {}), ("RGB", "JPEG", {"subsampling": 0}), ("CMYK", "JPEG", {})],
    ids=["webp", "webp_alpha", "jpeg", "jpeg_cmyk"],
)
def test_a_picture_too_large_for_memory_is_not_called_broken(mode: str, kind: str, options: dict[str, Any]) -> None:
    """These decoders report both as failures. After a failure, the next picture has the full memory."""
    if kind == "JPEG":
        options = {**options, "progressive": True}
    large, small = (smooth(side, side, mode, kind, quality=50, **options) for side in (3000, 1000))
    bodies = [small, large, large[: len(large) // 2], small, small[: len(small) // 2]]

    async def run() -> list[str]:
        async with sandbox(Decoder(Rules()), processes=1, memory=40_000_000) as box:
            found = [await outcome(box(body)) for body in bodies]
        return [one[0] if isinstance(one, tuple) else one.original_format for one in found]

    kept, memory = kind.lower(), "decoder_memory"
    assert asyncio.run(run()) == [kept, memory, memory, kept, "decode_error"]
