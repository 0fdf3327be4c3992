"""A web server that misbehaves on demand: each path is a behaviour, given byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

import numpy as np
from PIL import Image

from tests.images import encoded


def jpeg(width: int = 120, height: int = 80, seed: int = 0) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return encoded(smooth, "JPEG", quality=85)


JPEG = jpeg()
Answer = Callable[["Server", asyncio.StreamWriter, dict[str, str]], Awaitable[None]]


class Server:
    """Listens on a free port of 127.0.0.1 in a thread. `canary` is another port, which must never be dialled.

    `hosts` are further loopback addresses, with or without TLS, whose same port gives the same answers. At
    `neighbours`, the same port belongs to the canary. The headers passed to an answer include the request's path as
    ":path".
    """

    def __init__(
        self,
        answers: dict[str, Answer],
        hosts: Mapping[str, ssl.SSLContext | None] | None = None,
        neighbours: Collection[str] = (),
    ) -> None:
        self.answers = answers
        self.hosts = dict(hosts or {})
        self.neighbours = neighbours
        self.hits: Counter[str] = Counter()
        self.cookies: list[str] = []
        self.requests: dict[str, dict[str, str]] = {}
        self.canary_hits = 0
        self.open_now: Counter[str] = Counter()
        self.most_open: Counter[str] = Counter()
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(60)
        self.addr = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.addr}"

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        canary = await asyncio.start_server(self._chirp, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.canary = canary.sockets[0].getsockname()[1]
        # Kept in a list: unreferenced servers are closed.
        others = [
            await asyncio.start_server(self._serve, host, self.port, backlog=512, ssl=context)
            for host, context in self.hosts.items()
        ]
        others += [await asyncio.start_server(self._chirp, host, self.port) for host in self.neighbours]
        # The canary listens on every address of "localhost".
        with contextlib.suppress(OSError):
            others.append(await asyncio.start_server(self._chirp, "::1", self.canary))
        ready.set()
        await self._stop.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    async def _chirp(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.canary_hits += 1
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # CancelledError: the server closes during this answer.
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while line := await reader.readline():
                if not line.startswith(b"GET "):
                    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    break
                path = line.split()[1].decode()
                headers = {":path": path}
                while (field := (await reader.readline()).decode().strip()) != "":
                    name, _, value = field.partition(":")
                    headers[name.lower()] = value.strip()
                name = path[1:].partition("?")[0]
                self.hits[name] += 1
                self.requests[name] = headers
                if "cookie" in headers:
                    self.cookies.append(headers["cookie"])
                self.open_now[name] += 1
                self.most_open[name] = max(self.most_open[name], self.open_now[name])
                try:
                    await self.answers.get(name, missing)(self, writer, headers)
                    await writer.drain()
                finally:
                    self.open_now[name] -= 1
                if writer.is_closing():
                    break
        writer.close()


def answer(
    status: str = "200 OK", body: bytes = b"", length: str | None = None, close: bool = False, **headers: str
) -> Answer:
    """A plain response. `length` overrides Content-Length ("" omits it)."""

    async def reply(server: Server, writer: asyncio.StreamWriter, _: dict[str, str]) -> None:
        length_line = "" if length == "" else f"Content-Length: {len(body) if length is None else length}\r\n"
        lines = "".join(f"{k.replace('_', '-')}: {v.format(server=server)}\r\n" for k, v in headers.items())
        writer.write(f"HTTP/1.1 {status}\r\n{length_line}{lines}\r\n".encode() + body)
        if close:
            await writer.drain()
            writer.close()

    return reply


def raw(data: bytes) -> Answer:
    """Sends these bytes, then closes the connection."""

    async def reply(_: Server, writer: asyncio.StreamWriter, __: dict[str, str]) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    return reply


def flood(head: bytes, chunk: bytes, pause: float = 0) -> Answer:
    """Sends `head`, then `chunk` endlessly."""

    async def reply(_: Server, writer: asyncio.StreamWriter, __: dict[str, str]) -> None:
        writer.write(head)
        while not writer.is_closing():
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(pause)

    return reply


def in_turn(*answers: Answer) -> Answer:
    """Gives the first answer to the first request, and so on. Repeats the last one."""
    left = list(answers)

    async def reply(server: Server, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(server, writer, headers)

    return reply


def first_then(first: Answer, then: Answer) -> Answer:
    """Gives one answer to the first request for each url, the other from then on."""
    seen: set[str] = set()

    async def reply(server: Server, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        path = headers[":path"]
        now = then if path in seen else first
        seen.add(path)
        await now(server, writer, headers)

    return reply


async def reset(_: Server, writer: asyncio.StreamWriter, __: dict[str, str]) -> None:
    writer.transport.abort()


def cut(data: bytes) -> Answer:
    """Sends these bytes, then a TCP RST, like a crashing machine or a firewall."""

    async def reply(_: Server, writer: asyncio.StreamWriter, __: dict[str, str]) -> None:
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0.05)  # a reset discards bytes that the peer has not read
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return reply


async def silence(_: Server, writer: asyncio.StreamWriter, __: dict[str, str]) -> None:
    while not writer.is_closing():
        await asyncio.sleep(0.1)


missing = answer("404 Not Found", b"gone")


def redirect(location: str, status: str = "302 Found", **headers: str) -> Answer:
    return answer(status, Location=location, **headers)


@contextlib.contextmanager
def serving(
    answers: dict[str, Answer],
    hosts: Mapping[str, ssl.SSLContext | None] | None = None,
    neighbours: Collection[str] = (),
) -> Iterator[Server]:
    server = Server(answers, hosts, neighbours)
    try:
        yield server
    finally:
        server.close()
