"""The application: routes and doors put together, and the account of each request."""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin import __version__
from opsin.server import chat, completions, metrics, page, responses, routes
from opsin.server.context import Context
from opsin.server.errors import RESPONSES, add_error_handlers
from opsin.server.limits import Limits
from opsin.server.request_stats import RequestStats
from opsin.server.security import SecurityMiddleware

_ROUTES = [route for room in (chat, responses, completions) for route in room.router.routes if isinstance(route, Route)]
_PATHS = frozenset(route.path for route in _ROUTES)


def create_app(context: Context, *, keys: tuple[str, ...] = ()) -> FastAPI:
    """The whole server as an ASGI application; `keys` are the API keys that are let in, none lets everybody in."""
    # FastAPI's own pages for documentation load scripts from elsewhere.
    app = FastAPI(title="Opsin", version=__version__, docs_url=None, redoc_url=None, responses=RESPONSES)
    app.state.context = context
    for room in (chat, responses, completions, routes, metrics, page):
        app.include_router(room.router)
    add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(Limits, settings=context.settings, routes=_ROUTES, queue=context.queue)
    app.add_middleware(SecurityMiddleware, settings=context.settings, keys=keys)
    app.add_middleware(Accounts, context=context)
    return app


class Accounts:
    """Keeps the stats of each request to the API, also of those that no handler sees."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and tell the watchers when its last byte is out."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        # Any text may stand in a path, also one that would be a line of the log.
        stats = RequestStats(route=scope["path"] if scope["path"] in _PATHS else "other")
        headers = dict(scope["headers"])
        stats.traceparent = headers[b"traceparent"].decode("latin-1") if b"traceparent" in headers else None
        state = scope.setdefault("state", {})
        state["stats"] = stats

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                stats.status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", stats.id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            stats.status, stats.refused = 500, "internal_error"
            raise
        finally:
            stats.key = state.get("key", "")
            stats.ended = time.perf_counter()
            self._context.finished(stats)
