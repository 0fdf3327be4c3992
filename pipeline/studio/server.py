"""Serves the studio's page and answers its questions, to whoever holds the token."""

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
    """The pages and answers. Every request needs one of `hosts`, and the token in a cookie that the first page sets."""
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
        if request.host not in hosts:  # a page elsewhere whose name was pointed at this machine
            return _refused(403, "This address is not the studio's.")
        if request.path == "/" and known(request.query.get("token")):
            answer = web.Response(status=303, headers={"Location": "/"})
            answer.set_cookie(cookie, token, httponly=True, samesite="Strict", path="/")
            return answer
        if not known(request.cookies.get(cookie)):
            return _refused(403, "Open the address that the command printed: it has a token.")
        if request.method == "POST":
            origin = request.headers.get("Origin")
            if origin is not None and origin != f"http://{request.host}":
                return _refused(403, "Another page must not ask.")
            if request.content_type != "application/json":
                return _refused(415, "Expected JSON.")
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
        with contextlib.suppress(DamagedError, OSError):  # the page shows an empty frame
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
            except (ValidationError, ValueError) as error:  # RunError and EvaluationError are ValueErrors
                said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                return web.json_response({"error": page.plain(said)}, status=400)
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


def _refused(status: int, why: str) -> web.Response:
    return web.Response(status=status, text=why)


def picture_type(data: bytes) -> str | None:
    """The media type of an encoded picture, by its first bytes; None for anything that a browser need not be shown."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
