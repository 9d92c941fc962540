"""What surrounds every route, in plain ASGI. `create_app` adds these by `app.add_middleware`, from the inside out.

A request passes Profiler → RequestContext → HostCheck → OriginCheck → CORSMiddleware → KeyCheck → Head → FastAPI's
routes. HostCheck, OriginCheck and KeyCheck are in app/access/. Profiler, CORSMiddleware and KeyCheck are there only if
the settings ask for them, the two other checks unless the settings switch them off. CORS comes before the key, because
a browser asks for permission without one.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.admission import Admission, shutting_down
from app.errors import answer_outside_routes

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = frozenset({"/livez", "/readyz"})  # an orchestrator asks these without a key
UNMATCHED = "(none)"
DISCONNECTED = 499  # in log and metrics: the request ended without a response

# On every response. Replies are made from somebody's prompts: no proxy or browser keeps them, no page of another origin
# embeds them, and none is taken for something that runs.
SECURITY_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)

Observe = Callable[[str, int, float], None]  # route, status, seconds


class RequestContext:
    """Lets requests in, gives each an id, measures it, logs one line, and answers errors raised outside the routes.

    The id is in `scope["request_id"]` and in the header x-request-id of every response. An error that reaches this
    place was raised by a middleware, or is a bug in a route: the app's handler for it answers, so the error ends here
    with one log record under the request's id, not with another of the server's.

    Neither headers nor prompts are logged: clients send their Hugging Face token in Authorization.
    """

    def __init__(self, app: ASGIApp, observe: Observe, admission: Admission) -> None:
        self.app = app
        self.observe = observe
        self.admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        scope["request_id"] = request_id(header(scope, b"x-request-id"))
        app = scope["app"]  # a mounted app puts itself in its place
        task = asyncio.current_task()
        assert task is not None
        status, seconds = DISCONNECTED, 0.0

        async def send_with_context(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - started
                self.admission.leave(task)
                own = [(b"x-request-id", scope["request_id"].encode()), (b"x-total-time", b"%.2f" % (seconds * 1e3))]
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS, *own]
            await send(message)

        try:
            self.admission.enter(task, scope["method"])
            await self.app(scope, receive, send_with_context)
        except asyncio.CancelledError:
            if status != DISCONNECTED:
                raise
            response = await answer_outside_routes(app, Request(scope), shutting_down())
            await response(scope, receive, send_with_context)
        except Exception as error:  # noqa: BLE001  # whatever a request raises ends with the request
            response = await answer_outside_routes(app, Request(scope), error)
            if status == DISCONNECTED:
                await response(scope, receive, send_with_context)
        finally:
            self.admission.leave(task)
            self._record(scope, scope.get("route"), status, seconds or time.perf_counter() - started)

    def _record(self, scope: Scope, route: Any, status: int, seconds: float) -> None:
        self.observe(getattr(route, "path", UNMATCHED), status, seconds)
        path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]  # still percent-encoded: one line
        logger.info("%s %s %d %.1f ms request=%s", scope["method"], path, status, seconds * 1e3, scope["request_id"])


def header(scope: Scope, name: bytes) -> str:
    """The first header of this name, which is in lower case; empty if there is none.

    Starlette's Headers would copy all of them to find one.
    """
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""


def request_id(wanted: str) -> str:
    """The client's own id if it is harmless in headers and logs, else a new one."""
    return wanted if REQUEST_ID.fullmatch(wanted) else f"{random.getrandbits(128):032x}"


class Head:
    """Answers HEAD as GET. The server leaves the body out, because its own scope still says HEAD."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, HEAD as GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        inner: Scope = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, send)
        finally:
            scope["route"] = inner.get("route")  # RequestContext counts by it
