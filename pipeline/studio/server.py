"""Serves the studio's page and its answers to whoever has the token."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from pipeline import page
from pipeline.storage import DamagedError
from pipeline.studio.studio import Asked, LabelAsked, Question, Studio

FILES = {"studio.js": "text/javascript", "studio.css": "text/css", "page.css": "text/css", "page.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(studio: Studio, token: str, hosts: Sequence[str]) -> web.Application:
    """Builds the web application.

    Requests must have a Host among `hosts`, and the token in a cookie, which `/?token=TOKEN` sets.
    """
    cookie = f"winnow_studio_{hosts[0].rpartition(':')[2]}"

    def known(given: str | None) -> bool:
        return given is not None and hmac.compare_digest(given.encode(), token.encode())

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            answer = await _guarded(request, handler)
        except web.HTTPException as error:
            answer = web.Response(status=error.status, text=error.reason)
        answer.headers.update(
            {
                "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
            }
        )
        answer.headers.setdefault("Cache-Control", "no-store")
        return answer

    async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.host not in hosts:  # DNS rebinding: a foreign name that resolves to this machine
            return web.Response(status=403, text="This address is not the studio's.")
        if request.path == "/" and known(request.query.get("token")):
            answer = web.Response(status=303, headers={"Location": "/"})
            answer.set_cookie(cookie, token, httponly=True, samesite="Strict", path="/")
            return answer
        if not known(request.cookies.get(cookie)):
            return web.Response(status=403, text="Open the address that the command printed: it has a token.")
        if request.method == "POST":
            origin = request.headers.get("Origin")
            if origin is not None and origin != f"http://{request.host}":
                return web.Response(status=403, text="Requests from other pages are refused.")
            if request.content_type != "application/json":
                return web.Response(status=415, text="Expected JSON.")
        return await handler(request)

    async def index(_: web.Request) -> web.Response:
        html = page.environment().get_template("studio.html").render(name=studio.run.name)
        return web.Response(text=html, content_type="text/html")

    async def file(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in FILES:
            raise web.HTTPNotFound
        return web.Response(body=(page.FOLDER / name).read_bytes(), content_type=FILES[name], charset="utf-8")

    async def picture(request: web.Request) -> web.Response:
        row, data = int(request.match_info["row"]), None
        with contextlib.suppress(DamagedError, OSError):  # answered as not found: the page shows an empty frame
            data = await asyncio.to_thread(studio.picture, row) if row < studio.rows.n else None
        kind = picture_type(data or b"")
        if data is None or kind is None:
            raise web.HTTPNotFound
        return web.Response(body=data, content_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    async def start(_: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(studio.start))

    def asks(model: type[Asked], answer: Callable[[Any], dict[str, Any]]) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            try:
                asked = model.model_validate_json(await request.read())
                return web.json_response(await asyncio.to_thread(answer, asked))
            except ValueError as error:  # also ValidationError, RunError and EvaluationError
                problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                return web.json_response({"error": page.plain(problem)}, status=400)
            except (DamagedError, OSError) as error:
                return web.json_response({"error": page.plain(error)}, status=500)

        return handle

    app = web.Application(middlewares=[guard], client_max_size=1 << 20)
    app.add_routes(
        [
            web.get("/", index),
            web.get("/{name:[a-z]+\\.(?:js|css)}", file),
            web.get("/picture/{row:[0-9]{1,9}}", picture),
            web.get("/start", start),
            web.post("/summary", asks(Question, studio.summary)),
            web.post("/tiles", asks(Question, studio.tiles)),
            web.post("/export", asks(Question, studio.export)),
            web.post("/label", asks(LabelAsked, studio.label)),
        ]
    )
    return app


def picture_type(data: bytes) -> str | None:
    """The media type of a JPEG, PNG or WebP picture, by its first bytes; None for any other data."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
