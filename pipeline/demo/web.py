"""Builds and serves the demo web: captioned scenes on loopback, with the faults of the real web.

    winnow web runs/demo-web                       then, in another terminal: winnow run demo.yaml
    winnow web runs/demo-web --pictures 400        a smaller web

Writes `DIR/pool.parquet` (columns `url, caption`: the input of the pipeline), `DIR/site/` and
`DIR/truth/truth.parquet`, then serves the site on 127.0.0.1 until interrupted. The truth has the pool's rows plus
`kind` (a key of `KINDS`), `good` (whether the row belongs in a dataset) and `picture` (equal in rows that show the same
picture). It is for evaluating the pipeline, which never reads it.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import random
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipeline.demo import captions
from pipeline.demo.scenes import Scene, draw, random_scene
from trainer.terminal import guarded

PORT = 8765
"""The port that `conf/demo.yaml` allows."""


@dataclass(frozen=True)
class Kind:
    meaning: str
    share: float
    """Number of rows of this kind relative to clean rows."""
    good: bool = False


KINDS = {
    "clean": Kind("no defect", 1, good=True),
    # The caption
    "mismatched": Kind("the caption belongs to another picture", 0.35),
    "boilerplate": Kind("a file name, a button, a date", 0.08),
    "spam": Kind("one advertisement under many pictures", 0.04),
    "short": Kind("two words", 0.02),
    "not_english": Kind("a true caption in another language", 0.10),
    # Copies
    "same_url": Kind("a repeated url with another caption", 0.04),
    "exact_copy": Kind("the same bytes under another url", 0.05),
    "near_copy": Kind("the same picture re-encoded, resized or slightly cropped", 0.12),
    "placeholder": Kind("the “no image” picture that many rows share", 0.04),
    # The picture
    "tiny": Kind("24 pixels wide", 0.02),
    "banner": Kind("eight times as wide as it is high", 0.02),
    "other_format": Kind("PNG, WebP, GIF, CMYK, or turned by EXIF", 0.05, good=True),
    "html": Kind("a web page with status 200", 0.02),
    "svg": Kind("a vector drawing", 0.005),
    "empty": Kind("status 200 and no bytes", 0.005),
    "garbage": Kind("random bytes under an image name", 0.005),
    "corrupt": Kind("a PNG with damaged data", 0.005),
    "pixel_bomb": Kind("a PNG header that claims 50,000 × 50,000 pixels", 0.003),
    # The server
    "dead": Kind("status 404", 0.05),
    "gone": Kind("status 410", 0.01),
    "forbidden": Kind("status 403", 0.01),
    "error": Kind("status 500, always", 0.01),
    "flaky": Kind("status 503 once, then the picture", 0.02, good=True),
    "throttled": Kind("status 429 with Retry-After once, then the picture", 0.003, good=True),
    "moved": Kind("redirects to the picture", 0.03, good=True),
    "loop": Kind("a redirect loop", 0.005),
    "truncated": Kind("half of the bytes stated by Content-Length", 0.01),
    "wrong_length": Kind("Content-Length states half of the bytes", 0.005),
    "stalled": Kind("headers, then one byte per second", 0.003),
    "endless": Kind("a body that never ends", 0.002),
    "gzip_bomb": Kind("50 KB that unpack to 50 MB", 0.003),
    "long_header": Kind("a header line of 200 KB", 0.003),
    "not_http": Kind("a response that is not HTTP", 0.003),
    "reset": Kind("the connection is reset before a response", 0.003),
    "no_tls": Kind("an https url of a server that speaks plain HTTP", 0.003),
    # Opt-outs, and addresses that must never be dialled
    "opted_out": Kind("X-Robots-Tag: noai, noimageai or noindex", 0.02),
    "other_bot": Kind("X-Robots-Tag addressed to another crawler", 0.01, good=True),
    "private": Kind("points or redirects to a private address", 0.008),
    "bad_url": Kind("not an http url", 0.008),
    "bad_redirect": Kind("redirects to a local file", 0.003),
}
_COPIES = ("same_url", "exact_copy", "near_copy")
_NO_PICTURE = (
    *("placeholder", "html", "svg", "empty", "garbage", "pixel_bomb", "dead", "gone", "forbidden", "error", "loop"),
    *("endless", "gzip_bomb", "long_header", "not_http", "reset", "no_tls", "private", "bad_url", "bad_redirect"),
)
_INSIDE = ("http://127.0.0.1:1/", "http://localhost:1/", "http://[::1]:1/", "http://2130706433:1/")
_BAD_STARTS = (
    "file:///etc/", "ftp://127.0.0.1/", "javascript:", "data:image/png;base64,", "http://127.0.0.1:99999/", "../",
)  # fmt: skip


@dataclass
class Site:
    """The content of the server: files, and the paths that answer with something else."""

    folder: Path
    base: str
    rng: random.Random
    answers: dict[str, list[str]] = field(default_factory=dict)
    """Path to (name of a function in `ANSWERS`, its argument)."""

    def publish(self, body: bytes | None, answer: str | None = None, argument: str = "") -> str:
        """Adds a path that returns `body` or `answer`. Returns its url."""
        name = f"{self.rng.getrandbits(48):012x}.jpg"
        if body is not None:
            (self.folder / name).write_bytes(body)
        if answer is not None:
            self.answers[f"/{name}"] = [answer, argument]
        return f"{self.base}/{name}"


def build(folder: Path, pictures: int, seed: int, port: int) -> int:
    """Writes pool, site and truth with `pictures` clean rows, for a server on `port`. Returns the number of rows.

    Equal arguments give equal files.
    """
    rng = random.Random(seed)
    site = Site(folder / "site", f"http://127.0.0.1:{port}", rng)
    for part in (site.folder, folder / "truth"):
        part.mkdir(parents=True, exist_ok=True)

    counts = {name: max(2, round(kind.share * pictures)) for name, kind in KINDS.items()}
    kinds = [name for name, count in counts.items() for _ in range(count)]
    scenes = [random_scene(rng) for _ in kinds]
    # A copy shows the picture of a clean row. Rows of kinds without a picture get none drawn.
    originals = {row: rng.randrange(pictures) for row, kind in enumerate(kinds) if kind in _COPIES}
    own = [row for row, kind in enumerate(kinds) if kind not in _COPIES and kind not in _NO_PICTURE]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bodies = dict(zip(own, pool.map(drawn, [scenes[row] for row in own], chunksize=32)))

    urls: list[str] = []
    texts: list[str] = []
    seen: set[tuple[str, str]] = set()
    for row, kind in enumerate(kinds):
        original = originals.get(row, row)
        scene = scenes[original]
        url = _publish(kind, site, bodies.get(original, b""), urls[original] if row in originals else "")
        caption = _caption(kind, scene, scenes, rng)
        while (url, caption) in seen:
            caption = captions.english(scene, rng)
        seen.add((url, caption))
        urls.append(url)
        texts.append(caption)

    order = rng.sample(range(len(kinds)), len(kinds))
    truth = pa.table(
        {
            "url": [urls[row] for row in order],
            "caption": [texts[row] for row in order],
            "kind": [kinds[row] for row in order],
            "good": [KINDS[kinds[row]].good for row in order],
            "picture": [originals.get(row, row) for row in order],
        }
    )
    pq.write_table(truth, folder / "truth" / "truth.parquet")
    (site.folder / "answers.json").write_text(json.dumps(site.answers, indent=0), encoding="utf-8")
    table, path = truth.select(["url", "caption"]), folder / "pool.parquet"
    if not path.exists() or not pq.read_table(path).equals(table):  # a run recognises its pool by the time of the file
        pq.write_table(table, path)
    return len(truth)


def _caption(kind: str, scene: Scene, scenes: list[Scene], rng: random.Random) -> str:
    if kind == "mismatched":
        return captions.english(scene.mismatch(scenes, rng), rng)
    if kind == "boilerplate":
        return captions.boilerplate(rng)
    if kind == "spam":
        return rng.choice(captions.SPAM)
    if kind == "short":
        return scene.concept
    if kind == "not_english":
        return captions.foreign(scene, rng)
    return captions.english(scene, rng)


def _publish(kind: str, site: Site, body: bytes, original: str) -> str:
    """Publishes a row of a kind on the site and returns its url. `original` is the url of the row that it copies."""
    rng = site.rng
    if kind == "same_url":
        return original + rng.choice(("", "#main", "#top"))  # a fragment does not change the resource
    if kind == "near_copy":
        return site.publish(_near_copy(body, rng))
    if kind == "other_format":
        return site.publish(_other_format(body, rng))
    if kind == "placeholder":
        return site.publish(_placeholder())
    if kind in ("tiny", "banner"):
        image = _open(body)
        strip = image.crop((0, image.height // 3, image.width, image.height // 3 + image.width // 8))
        return site.publish(jpeg(image.resize((24, 24)) if kind == "tiny" else strip.resize((800, 100))))
    if kind == "corrupt":
        damaged = bytearray(_encode(_open(body), "PNG"))
        damaged[len(damaged) // 2 : len(damaged) // 2 + 64] = rng.randbytes(64)
        return site.publish(bytes(damaged))
    if kind in _FILES:
        return site.publish(_FILES[kind](rng))
    if kind == "moved":
        return site.publish(None, "redirect", site.publish(body))
    if kind == "loop":
        url = site.publish(None)
        site.answers[url.removeprefix(site.base)] = ["redirect", url]
        return site.publish(None, "redirect", url)
    if kind == "bad_redirect":
        return site.publish(None, "redirect", "file:///etc/hostname")
    if kind == "private":
        inside = f"{rng.choice(_INSIDE)}{rng.getrandbits(32):08x}.jpg"
        return inside if rng.random() < 0.5 else site.publish(None, "redirect", inside)
    if kind == "bad_url":
        return f"{rng.choice(_BAD_STARTS)}{rng.getrandbits(32):08x}.jpg"
    if kind == "no_tls":
        return site.publish(None).replace("http:", "https:")
    if kind == "opted_out":
        return site.publish(body, "robots_tag", rng.choice(("noai", "noimageai", "noindex, nofollow")))
    if kind == "other_bot":
        return site.publish(body, "robots_tag", "otherbot: noindex")
    if kind in _STATUS:
        return site.publish(body or None, *_STATUS[kind])
    return site.publish(body or None, kind if kind in ANSWERS else None)


_STATUS = {
    "dead": ("status", "404"),
    "gone": ("status", "410"),
    "forbidden": ("status", "403"),
    "error": ("status", "500"),
    "flaky": ("once", "503"),
    "throttled": ("once", "429"),
}

# --- pictures ------------------------------------------------------------------------------------------------------


def drawn(scene: Scene) -> bytes:
    return jpeg(draw(scene))


def _open(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body)).convert("RGB")


def _encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    return _encode(image, "JPEG", quality=quality)


def _near_copy(body: bytes, rng: random.Random) -> bytes:
    image = _open(body)
    way = rng.choice(("encode", "resize", "crop"))
    if way == "encode":
        return jpeg(image, rng.randint(35, 65))
    if way == "resize":
        scale = rng.uniform(0.6, 1.6)
        return jpeg(image.resize((round(image.width * scale), round(image.height * scale))), 85)
    x, y = rng.randint(1, max(1, image.width // 60)), rng.randint(1, max(1, image.height // 60))
    return jpeg(image.crop((x, y, image.width - x, image.height - y)), 85)


def _other_format(body: bytes, rng: random.Random) -> bytes:
    image = _open(body)
    way = rng.choice(("png", "alpha", "webp", "gif", "cmyk", "turned"))
    if way == "alpha":
        image.putalpha(Image.new("L", image.size, 255))
    if way == "cmyk":
        return _encode(image.convert("CMYK"), "JPEG", quality=90)
    if way == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: displayed rotated clockwise, so stored rotated counter-clockwise
        return _encode(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90, exif=exif)
    return _encode(image, {"webp": "WEBP", "gif": "GIF"}.get(way, "PNG"))


def _placeholder() -> bytes:
    image = Image.new("RGB", (200, 160), "#e4e4e8")
    pen = ImageDraw.Draw(image)
    pen.rectangle((70, 40, 130, 84), outline="#a9a9b4", width=3)
    pen.polygon([(76, 80), (94, 58), (106, 70), (114, 63), (125, 80)], fill="#c3c3cc")
    pen.text((47, 104), "image not available", fill="#9090a0")
    return jpeg(image, 80)


def _pixel_bomb(rng: random.Random) -> bytes:
    """The valid beginning of a 1-bit PNG of 50,000 × 50,000 pixels, different for every row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    comment = b"Comment\0" + rng.randbytes(8).hex().encode()
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tEXt", comment) + chunk(b"IDAT", pixels)


_FILES: dict[str, Callable[[random.Random], bytes]] = {
    "html": lambda rng: f"<!doctype html><title>Photo {rng.getrandbits(32):x}</title><h1>Please sign in</h1>".encode(),
    "svg": lambda rng: (
        f'<svg xmlns="http://www.w3.org/2000/svg"><circle id="c{rng.getrandbits(32):x}" r="9"/></svg>'.encode()
    ),
    "empty": lambda rng: b"",
    "garbage": lambda rng: b"\x00" + rng.randbytes(3000),
    "pixel_bomb": _pixel_bomb,
}

# --- server --------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Responds with the file of a path, or as stated in `answers.json`."""

    server: Server
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes. With Nagle's algorithm, the second waits 40 ms until the first is acknowledged.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = self.path.partition("#")[0]
        answer, argument = self.server.answers.get(path, ["file", ""])
        ANSWERS[answer](self, argument)

    def body(self) -> bytes | None:
        """The file of this path. Only plain names are looked up."""
        name = self.path.removeprefix("/").partition("?")[0]
        file = self.server.folder / name
        return file.read_bytes() if name.endswith(".jpg") and "/" not in name and file.is_file() else None

    def reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        """`length` overrides Content-Length. In header names, `_` stands for `-`."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Content-Type", _content_type(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # clients disconnect all the time
            super().handle()

    def log_message(self, *args: object) -> None:
        """Logs nothing: failures are intended."""


def _content_type(body: bytes) -> str:
    starts = {
        b"<!": "text/html",
        b"<s": "image/svg+xml",
        b"\x89P": "image/png",
        b"GI": "image/gif",
        b"RI": "image/webp",
    }
    return starts.get(body[:2], "image/jpeg")


def _file(request: Handler, argument: str) -> None:
    body = request.body()
    request.reply(404, b"<!doctype html>not here") if body is None else request.reply(200, body)


def _once(request: Handler, status: str) -> None:
    if request.server.first_visit(request.path):
        request.reply(int(status), b"", Retry_After="1")
    else:
        _file(request, "")


def _truncated(request: Handler, argument: str) -> None:
    body = request.body() or b""
    request.reply(200, body[: len(body) // 2], length=len(body))
    request.close_connection = True


def _wrong_length(request: Handler, argument: str) -> None:
    body = request.body() or b""
    request.reply(200, body, length=len(body) // 2, Connection="close")
    request.close_connection = True


def _stalled(request: Handler, argument: str) -> None:
    body = request.body() or b""
    request.reply(200, b"", length=len(body))
    for byte in body[:60]:
        request.wfile.write(bytes([byte]))
        time.sleep(1)
    request.close_connection = True


def _endless(request: Handler, argument: str) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nConnection: close\r\n\r\n\xff\xd8\xff\xe0")
    for _ in range(6000):  # one minute, longer than any client should wait
        request.wfile.write(bytes(10_000))
        time.sleep(0.01)
    request.close_connection = True


def _reset(request: Handler, argument: str) -> None:
    # Closing with a linger time of zero sends RST. Detach the socket, or the server would send FIN first.
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(request.connection.detach())
    request.close_connection = True


def _not_http(request: Handler, argument: str) -> None:
    request.wfile.write(b"\x16\x03\x01 I am not a web server\r\n\r\n")
    request.close_connection = True


ANSWERS: dict[str, Callable[[Handler, str], None]] = {
    "file": _file,
    "status": lambda request, status: request.reply(int(status), b"<!doctype html>no"),
    "once": _once,
    "redirect": lambda request, target: request.reply(301, b"", Location=target),
    "robots_tag": lambda request, tag: request.reply(200, request.body() or b"", X_Robots_Tag=tag),
    "gzip_bomb": lambda request, _: request.reply(200, gzip.compress(bytes(50_000_000), 6), Content_Encoding="gzip"),
    "long_header": lambda request, _: request.reply(200, b"", X_Long="a" * 200_000),
    "truncated": _truncated,
    "wrong_length": _wrong_length,
    "stalled": _stalled,
    "endless": _endless,
    "reset": _reset,
    "not_http": _not_http,
}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int) -> None:
        """`port` 0 chooses a free one; see `server_port`. Raises OSError if the port is taken."""
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = Path()
        self.answers: dict[str, list[str]] = {}
        self._visited: set[str] = set()
        self._lock = threading.Lock()

    def load(self, folder: Path) -> None:
        self.folder = folder / "site"
        self.answers = json.loads((self.folder / "answers.json").read_text(encoding="utf-8"))

    def first_visit(self, path: str) -> bool:
        with self._lock:
            first = path not in self._visited
            self._visited.add(path)
            return first

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors from sockets that this server broke on purpose."""


@contextmanager
def open_port(port: int) -> Iterator[Server]:
    """Binds a server on `port`, or on any free port if `port` is taken, without serving.

    `build` needs the port for its urls; `serving` then serves the web that was built.
    """
    try:
        server = Server(port)
    except OSError:
        server = Server(0)
    try:
        yield server
    finally:
        server.server_close()


@contextmanager
def serving(server: Server, folder: Path) -> Iterator[None]:
    """Serves a built web in a thread of this process."""
    server.load(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@guarded()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="winnow web", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--pictures", type=int, default=1400, help="clean rows; noisy rows are added (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all scenes and faults (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=PORT, help="port on 127.0.0.1; another if it is taken (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    with open_port(args.port) as server:
        rows = build(args.folder, args.pictures, args.seed, server.server_port)
        with serving(server, args.folder):
            print(f"{rows} rows in {args.folder}/pool.parquet, served on http://127.0.0.1:{server.server_port}")
            if server.server_port != PORT:
                allow = f'steps.download.allow_addrs=["127.0.0.1:{server.server_port}"]'
                print(f"The recipe allows port {PORT} only: add '{allow}' to `winnow run demo.yaml`.")
            sys.stdout.flush()
            with suppress(KeyboardInterrupt):
                threading.Event().wait()


if __name__ == "__main__":
    main()
