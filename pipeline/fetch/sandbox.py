"""Calls a function in expendable processes: a call that crashes, hangs or exhausts memory fails only itself.

    async with Sandbox(partial(decode, rules=rules), processes=2, seconds=20, memory=512_000_000) as sandbox:
        picture = await sandbox(body)

The processes are fresh interpreters, never forks, because the parent may have threads. Each runs one call at a time and
has the next one in its socket, so it does not wait for a busy event loop. A call costs the parent one write and one
read. Shared memory would save a third of that (1% of decoding an image) but would need slots for every size of body.

This protects against accidents, not attackers: a child has the privileges of its parent, which unpickles its answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import cloudpickle

from pipeline.child import die_with_parent, start_child
from pipeline.fetch.reasons import FetchError

T = TypeVar("T")

# Wall time allowed per CPU time. Catches deadlocks, which use no CPU, but tolerates an overloaded machine.
WALL_FACTOR = 5
# Consecutive processes that died before they began a call, after which the sandbox fails. One may be an OOM kill.
MAX_FAILED_STARTS = 3
EXTERNAL_SIGNALS = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
"""Signals that a decoder never raises: they come from the OOM killer, an operator or a shutdown."""
# Attempts at a call if its process is killed externally each time.
MAX_ATTEMPTS = 3
# Calls assigned to a child at once: the running one and the next.
DEPTH = 2
# Bytes of address space that calls may leave allocated in a child, such as imported modules, uncharged to later calls.
RETAINED_BYTES = 160_000_000

_SOCKET_BYTES = 1 << 20  # holds most bodies, if the system grants it
_ANSWER_BYTES = 1 << 16  # holds most answers in one read
_REQUEST = struct.Struct("=QQ")  # bytes of the pickled arguments, bytes of the body
_SIZE = struct.Struct("=Q")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEPT_BYTES = 16 << 20  # holds the largest web pictures; more would count against the worker's memory
# Children run in parallel; a thread pool in each would only cost memory.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}

# Kinds of answers from a child.
_READY, _UNUSABLE, _RESULT, _FAILURE, _EXHAUSTED = range(5)


class SandboxError(RuntimeError):
    """No process is available: an internal or system failure, not the fault of the input."""


class Sandbox(Generic[T]):
    """`await sandbox(body, *args)` runs `target(body, *args)` in one of `processes` children.

    A call may use `seconds` of CPU time and WALL_FACTOR times as much wall time, counted from when its child begins it.
    It may use `memory` bytes of address space, including its body, beyond what the child already holds (Linux only).
    `target` and `args` are pickled; `body` is sent as raw bytes.

    A sandbox is bound to the event loop that entered it and, on Linux, to its thread: the children die with the thread.
    """

    def __init__(self, target: Callable[..., T], *, processes: int, seconds: float, memory: int):
        self._setup = _request(cloudpickle.dumps(target), (seconds, seconds * WALL_FACTOR, memory))
        self._processes = processes
        self._seconds = seconds
        self._children: list[_Child] = []
        self._queue: deque[_Call] = deque()
        self._failed_starts = 0
        self._closed: str | None = "the sandbox is not open"

    async def __aenter__(self) -> Sandbox[T]:
        self._loop = asyncio.get_running_loop()
        self._closed = None
        try:
            for _ in range(self._processes):
                self._start()
        except BaseException:
            self._end_all()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._close("the sandbox is closed")
        self._end_all()

    async def __call__(self, body: bytes, *args: Any) -> T:
        """Raises the target's own FetchError, or FetchError `decoder_crash`, `decoder_timeout` or `decoder_memory` if
        the call ended its process; `decoder_killed` (transient) if the process was killed externally MAX_ATTEMPTS
        times; `unexpected` for any other exception. Raises SandboxError if no process starts.
        """
        if self._closed is not None:
            raise SandboxError(self._closed)
        call = _Call(_request(body, args), self._loop.create_future())
        self._queue.append(call)
        self._feed()
        try:
            return await call.answer
        finally:
            # Break the reference cycle exception → frame → call → exception, which would keep the body alive.
            del call

    def _start(self) -> None:
        child = _Child()
        self._children.append(child)
        self._loop.add_reader(child.socket, self._read, child)
        self._send(child, self._setup)

    def _feed(self) -> None:
        while self._queue:
            free = [child for child in self._children if child.ready and len(child.calls) < DEPTH]
            if not free:
                return
            call = self._queue.popleft()
            if not call.answer.done():  # not cancelled while it waited
                child = min(free, key=lambda child: len(child.calls))
                child.calls.append(call)
                self._send(child, call.request)

    def _send(self, child: _Child, request: list[bytes]) -> None:
        waiting = bool(child.unsent)
        child.unsent += map(memoryview, request)
        if not waiting and not child.flush():
            self._loop.add_writer(child.socket, self._send_more, child)

    def _send_more(self, child: _Child) -> None:
        if child.flush():
            self._loop.remove_writer(child.socket)

    def _read(self, child: _Child) -> None:
        try:
            for kind, value in child.answers():
                self._take(child, kind, value)
        except Exception as error:  # a process with corrupted memory may write anything
            self._lost(child, f"unreadable answer: {type(error).__name__}: {error}")
        else:
            if child.ended:
                self._lost(child)
        self._feed()

    def _take(self, child: _Child, kind: int, value: Any) -> None:
        if kind == _READY:
            child.ready = True
            return
        if kind == _UNUSABLE:
            self._close(value)
            return
        call = child.calls.popleft()
        child.answered += 1
        call.end(value, failed=kind != _RESULT)
        if kind == _EXHAUSTED:
            child.ended = True

    def _lost(self, child: _Child, cause: str | None = None) -> None:
        """Ends a child that died or wrote an unreadable answer, and starts another.

        Fails the call that the child had begun, or retries it if the process was killed externally. Its other calls
        return to the head of the queue.
        """
        begun = child.begun
        status = self._end(child)
        if begun > child.answered and child.calls:
            call = child.calls[0]
            killed = cause is None and -status in EXTERNAL_SIGNALS
            call.kills += killed
            if not killed or call.kills == MAX_ATTEMPTS:
                child.calls.popleft().end(self._verdict(status, cause), failed=True)
        self._queue.extendleft(reversed(child.calls))
        self._failed_starts = 0 if begun else self._failed_starts + 1
        if self._failed_starts == MAX_FAILED_STARTS:
            self._close(
                f"{MAX_FAILED_STARTS} processes in a row died before they began a call, the last of {_ending(status)}"
            )
        if self._closed is None:
            try:
                self._start()
            except OSError as error:
                self._close(f"cannot start a process: {error}")

    def _verdict(self, status: int, cause: str | None) -> FetchError:
        if status == -signal.SIGPROF:
            return FetchError("decoder_timeout", f"over {self._seconds:g} s of CPU time")
        if status == -signal.SIGALRM:
            return FetchError("decoder_timeout", f"over {self._seconds * WALL_FACTOR:g} s")
        if cause is None and -status in EXTERNAL_SIGNALS:
            return FetchError("decoder_killed", f"{_ending(status)}, {MAX_ATTEMPTS} times")
        return FetchError("decoder_crash", cause or _ending(status))

    def _close(self, why: str) -> None:
        """Fails all current and future calls with SandboxError."""
        if self._closed is None:
            self._closed = why
        for call in [*self._queue, *(call for child in self._children for call in child.calls)]:
            call.end(SandboxError(self._closed), failed=True)
        self._queue.clear()

    def _end(self, child: _Child) -> int:
        self._loop.remove_reader(child.socket)
        self._loop.remove_writer(child.socket)
        self._children.remove(child)
        return child.end()

    def _end_all(self) -> None:
        # Nothing is awaited, so no cancellation can interrupt this. A killed process exits within milliseconds.
        for child in self._children:
            child.process.kill()
        for child in list(self._children):
            self._end(child)


@dataclass
class _Call:
    request: list[bytes]
    answer: asyncio.Future[Any]
    kills: int = 0
    """How often its process was killed externally."""

    def end(self, value: Any, *, failed: bool) -> None:
        self.request = []
        if self.answer.done():  # cancelled
            return
        if failed:
            self.answer.set_exception(value)
        else:
            self.answer.set_result(value)


class _Child:
    """The parent's side of one process."""

    def __init__(self) -> None:
        self.ready = False
        self.ended = False
        self.calls: deque[_Call] = deque()
        self.unsent: list[memoryview] = []
        self.answered = 0
        self._buffer = bytearray(_ANSWER_BYTES)
        self._filled = 0
        self.socket, theirs = socket.socketpair()
        # The child counts its calls in a shared file mapping, which the parent can read after the child's death.
        with theirs, tempfile.TemporaryFile() as counter:
            counter.write(bytes(_SIZE.size))  # allocate now: the disk may be full later
            counter.flush()
            self._begun = mmap.mmap(counter.fileno(), _SIZE.size)
            self.socket.setblocking(False)
            for end in (self.socket, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            fds = (theirs.fileno(), counter.fileno())
            try:
                self.process = start_child(
                    "pipeline.fetch.sandbox",
                    *map(str, fds),
                    env=_ONE_THREAD,
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # only the parent handles Ctrl-C
                )
            except BaseException:
                self._begun.close()
                self.socket.close()
                raise

    @property
    def begun(self) -> int:
        """The number of calls that the child has begun."""
        return int(_SIZE.unpack_from(self._begun)[0])

    def flush(self) -> bool:
        """Sends as much as possible without blocking. Returns True if nothing is left."""
        try:
            sent = self.socket.sendmsg(self.unsent)
        except BlockingIOError:
            return False
        except OSError:  # the child is dead; reading will detect that
            self.unsent.clear()
            return True
        while self.unsent and sent >= len(self.unsent[0]):
            sent -= len(self.unsent.pop(0))
        if self.unsent:
            self.unsent[0] = self.unsent[0][sent:]
        return not self.unsent

    def answers(self) -> Iterator[tuple[int, Any]]:
        """Yields the answers received so far. Sets `ended` at the end of the stream."""
        try:
            read = self.socket.recv_into(memoryview(self._buffer)[self._filled :])
        except BlockingIOError:
            return
        except ConnectionResetError:  # the child died with a request unread
            read = 0
        self.ended = not read
        self._filled += read
        while self._filled >= _SIZE.size:
            end = _SIZE.size + _SIZE.unpack_from(self._buffer)[0]
            if end > self._filled:
                if end > len(self._buffer):
                    self._buffer = self._buffer[: self._filled] + bytearray(end - self._filled)
                return
            answer = pickle.loads(memoryview(self._buffer)[_SIZE.size : end])
            rest = self._buffer[end : self._filled]
            self._filled = len(rest)
            if len(self._buffer) > _ANSWER_BYTES:
                self._buffer = bytearray(max(_ANSWER_BYTES, len(rest)))
            self._buffer[: len(rest)] = rest
            yield answer

    def end(self) -> int:
        """Kills and reaps the process. Returns its status as in subprocess."""
        self.process.kill()
        status = self.process.wait()
        self.socket.close()
        self._begun.close()
        return status


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"signal {-status}"


def _request(body: bytes, args: tuple[Any, ...]) -> list[bytes]:
    pickled = pickle.dumps(args, pickle.HIGHEST_PROTOCOL)
    return [_REQUEST.pack(len(pickled), len(body)) + pickled, body]


def _answer(kind: int, value: Any) -> bytes:
    pickled = pickle.dumps((kind, value), pickle.HIGHEST_PROTOCOL)
    return _SIZE.pack(len(pickled)) + pickled


def _read(channel: socket.socket, size: int) -> bytes:
    """Raises EOFError when the parent is gone."""
    data = channel.recv(size, socket.MSG_WAITALL) if size else b""
    if len(data) < size:
        raise EOFError
    return data


def _main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    begun = mmap.mmap(int(sys.argv[2]), _SIZE.size)
    _prepare()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        args_size, target_size = _REQUEST.unpack(_read(channel, _REQUEST.size))
        cpu_seconds, wall_seconds, memory = pickle.loads(_read(channel, args_size))
        try:
            target = pickle.loads(_read(channel, target_size))
        except Exception:
            channel.sendall(_answer(_UNUSABLE, f"a process cannot load its target:\n{traceback.format_exc()}"))
            return
        limit = _MemoryLimit(memory)
        # Built in advance: there would be no memory for it later.
        exhausted = _answer(_EXHAUSTED, FetchError("decoder_memory", f"over {memory} bytes"))
        _silence_libraries()
        channel.sendall(_answer(_READY, None))
        number = 0
        while True:
            args_size, body_size = _REQUEST.unpack(_read(channel, _REQUEST.size))
            number += 1
            _SIZE.pack_into(begun, 0, number)
            limit.renew()
            try:
                args = pickle.loads(_read(channel, args_size))
                body = _read(channel, body_size)
                # The kernel enforces the limits: they hold wherever the process hangs and however busy the parent is.
                signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
                signal.setitimer(signal.ITIMER_REAL, wall_seconds)
                answer = _work(target, body, args)
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.setitimer(signal.ITIMER_PROF, 0)
            except MemoryError:
                answer = exhausted
            channel.sendall(answer)
            if answer is exhausted:  # do not reuse a process that ran out of memory
                return
            del args, body, answer


def _work(target: Callable[..., Any], body: bytes, args: tuple[Any, ...]) -> bytes:
    try:
        return _answer(_RESULT, target(body, *args))
    except MemoryError:
        raise
    except FetchError as error:
        return _answer(_FAILURE, error)
    except BaseException as error:  # SystemExit is a failure too
        return _answer(_FAILURE, FetchError("unexpected", f"{type(error).__name__}: {error}"))


def set_malloc(*, mmap_threshold: int, trim_threshold: int, arenas: int | None = None) -> None:
    """Sets glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes, and M_ARENA_MAX. No effect with another malloc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if arenas:
            mallopt(_M_ARENA_MAX, arenas)
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_M_TRIM_THRESHOLD, trim_threshold)


def _prepare() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT):  # KeyboardInterrupt would look like a failure
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # Reuse the pages of the last call's pixels: fresh pages from the kernel would take 5% of the decoding time.
        # Use one arena: each further one would reserve 64 MB of the address space limit.
        set_malloc(mmap_threshold=_KEPT_BYTES, trim_threshold=_KEPT_BYTES, arenas=1)
        # On other systems, the child exits at the end of the stream, after its current call.
        die_with_parent()
        with contextlib.suppress(OSError):  # let the OOM killer choose a child before the worker
            Path("/proc/self/oom_score_adj").write_text("1000")


def _silence_libraries() -> None:
    """Redirects the stderr of C libraries to /dev/null: warnings could fill the log. Keeps Python's sys.stderr."""
    with contextlib.suppress(OSError):
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


class _MemoryLimit:
    """Limits each call's address space relative to what the process already holds, so that modules imported by one call
    are not charged to the next. All calls together may leave at most RETAINED_BYTES allocated.
    """

    def __init__(self, memory: int):
        self._memory = memory
        self._statm = -1
        with contextlib.suppress(OSError):  # other systems ignore or refuse such limits
            self._statm = os.open("/proc/self/statm", os.O_RDONLY)
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = self._held() + memory + RETAINED_BYTES
            self._hard = most if hard == resource.RLIM_INFINITY else min(most, hard)

    def _held(self) -> int:
        return int(os.pread(self._statm, 100, 0).split()[0]) * resource.getpagesize()

    def renew(self) -> None:
        if self._statm >= 0:
            resource.setrlimit(resource.RLIMIT_AS, (min(self._held() + self._memory, self._hard), self._hard))


if __name__ == "__main__":
    _main()
