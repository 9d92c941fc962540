"""What surrounds every route, in plain ASGI. `create_app` adds these by `app.add_middleware`, from the inside out.

A request passes Profiler → RequestContext → HostCheck → KeyCheck → Head → FastAPI's routes. Profiler, HostCheck and
KeyCheck are there only if the settings ask for them.
"""

import asyncio
import hmac
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import HostNotAllowed, Unauthorized, answer_outside_routes

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = frozenset({"/livez", "/readyz"})  # an orchestrator asks these without a key
UNMATCHED = "(none)"
DISCONNECTED = 499  # in log and metrics: the request ended without a response
CANCELLED = 503  # in log and metrics: the server cancelled the request before its response began

Observe = Callable[[str, int, float], None]  # route, status, seconds


class RequestContext:
    """Gives each request an id, measures it, logs one line, and answers errors raised outside the routes.

    The id is in `scope["request_id"]` and in the header x-request-id of every response. An error that reaches this
    place was raised by a middleware, or is a bug in a route: the app's handler for it answers, so the error ends here
    with one log record under the request's id, not with another of the server's.

    Neither headers nor prompts are logged: clients send their Hugging Face token in Authorization.
    """

    def __init__(self, app: ASGIApp, observe: Observe) -> None:
        self.app = app
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        scope["request_id"] = request_id(header(scope, b"x-request-id"))
        app = scope["app"]  # a mounted app puts itself in its place
        status, seconds = DISCONNECTED, 0.0

        async def send_with_context(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - started
                own = [(b"x-request-id", scope["request_id"].encode()), (b"x-total-time", b"%.2f" % (seconds * 1e3))]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            await self.app(scope, receive, send_with_context)
        except asyncio.CancelledError:
            if status == DISCONNECTED:  # our own shutdown ended it, not the client
                status = CANCELLED
            raise
        except Exception as error:  # noqa: BLE001  # whatever a request raises ends with the request
            response = await answer_outside_routes(app, Request(scope), error)
            if status == DISCONNECTED:
                await response(scope, receive, send_with_context)
        finally:
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


class HostCheck:
    """Refuses a Host header that names another host, so that no web page reaches a local service by DNS rebinding.

    Args:
        allowed: host names without port, lower case.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self.app = app
        self.allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. Errors: HostNotAllowed."""
        if scope["type"] == "http":
            host = host_name(header(scope, b"host"))
            if host and host not in self.allowed:  # browsers always send one; HTTP/1.0 need not
                raise HostNotAllowed(
                    f"host: {host[:100]!a} is not this service.",
                    "Add it to allowed_hosts if it is a name of this service.",
                )
        await self.app(scope, receive, send)


def host_name(header: str) -> str:
    """The name in a Host header, without the port."""
    header = header.strip().lower()
    if header.startswith("["):  # [::1]:8000
        return header[1:].partition("]")[0]
    return header.partition(":")[0].rstrip(".")


class KeyCheck:
    """Requires the API key on every path except OPEN_PATHS, also where no route is."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. Errors: Unauthorized."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            raise Unauthorized(
                "authorization: the API key is missing or wrong.",
                "Send 'Authorization: Bearer <key>' with the key of the service.",
                {"www-authenticate": "Bearer"},
            )
        await self.app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, token = header(scope, b"authorization").partition(" ")
        given = token.strip().encode("latin-1")  # the bytes that the header had
        return hmac.compare_digest(given, self.api_key) and scheme.lower() == "bearer"


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
