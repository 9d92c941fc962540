"""The middleware that gives each request its id and profile, and that counts and logs how the request ended."""

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import profile
from app.admission import Admission, why_cancelled
from app.errors import answer_outside_routes
from app.profile import Profile
from app.trace_context import trace_id
from app.tracing import ROUTINE, Tracing

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
UNMATCHED = "(none)"
DISCONNECTED = 499  # in log and metrics: the request ended without a response
MAX_PATH = 200  # characters in the log
SLOW_MS = 10.0  # a stage that takes as long is named in the log

# On every response. Replies are made from somebody's prompts: no proxy or browser keeps them, no page of another origin
# embeds them, and none is taken for something that runs.
SECURITY_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)

Observe = Callable[[str, int, float, Profile], None]  # route, status, seconds


class RequestContext:
    """Lets requests in, gives each an id, measures it, logs one line, and answers errors raised outside the routes.

    The id is in `scope["request_id"]`, in the header x-request-id of every response, and in every line that is logged
    meanwhile. An error that reaches this place was raised by a middleware, or is a bug in a route: the app's handler
    for it answers, so the error ends here with one log record under the request's id, not with another of the server's.

    Neither headers nor prompts are logged: clients send their Hugging Face token in Authorization.
    """

    def __init__(self, app: ASGIApp, observe: Observe, admission: Admission, tracing: Tracing | None) -> None:
        self.app = app
        self.observe = observe
        self.admission = admission
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request = begin(scope)
        span = self.tracing.enter(request) if self.tracing else None
        app = scope["app"]  # a mounted app puts itself in its place
        task = asyncio.current_task()
        assert task is not None
        status, seconds = DISCONNECTED, 0.0
        sending_at, sending_s = 0.0, 0.0

        async def send_with_context(message: Message) -> None:
            nonlocal status, seconds, sending_at, sending_s
            began = time.perf_counter()
            if message["type"] == "http.response.start":
                status, seconds, sending_at = message["status"], began - started, began
                self.admission.leave(task)
                if span is not None and request.code:
                    span.fail(request.code)
                own = [(b"x-request-id", request.request_id.encode()), (b"x-total-time", b"%.2f" % (seconds * 1e3))]
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS, *own]
            await send(message)
            sending_s += time.perf_counter() - began

        token = profile.current.set(request)
        try:
            self.admission.enter(task, scope["method"])
            await self.app(scope, receive, send_with_context)
        except asyncio.CancelledError:
            if status != DISCONNECTED:
                raise
            response = await answer_outside_routes(app, Request(scope), why_cancelled(scope))
            await response(scope, receive, send_with_context)
        except Exception as error:  # noqa: BLE001  # whatever a request raises ends with the request
            response = await answer_outside_routes(app, Request(scope), error)
            if status == DISCONNECTED:
                await response(scope, receive, send_with_context)
        finally:
            self.admission.leave(task)
            if sending_at:
                request.add("send", sending_at, sending_s)
            if span is not None:
                span.add_stages(request)
            self._record(scope, request, status, seconds or time.perf_counter() - started)
            profile.current.reset(token)

    def _record(self, scope: Scope, request: Profile, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self.observe(route, status, seconds, request)
        level = logging.DEBUG if route in ROUTINE and status == 200 else logging.INFO
        if logger.isEnabledFor(level):
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:MAX_PATH]  # percent-encoded
            ended = {
                "method": scope["method"],
                "path": path,
                "route": route,
                "status": status,
                "seconds": round(seconds, 6),
                "code": request.code,
                "expired_in": request.expired_in,
                "stages": {stage: round(took, 6) for stage, (_, took) in request.timed.items()},
            }
            words = in_words(seconds, request)
            logger.log(level, "%s %s %d%s", scope["method"], path, status, words, extra={"ended": ended})


def begin(scope: Scope) -> Profile:
    """The profile of a new request, which is also in its scope."""
    wanted, traceparents = "", []
    for name, value in scope["headers"]:  # once: Starlette's Headers would copy all of them to find one
        if name == b"x-request-id":
            wanted = wanted or str(value, "latin-1")
        elif name == b"traceparent":
            traceparents.append(str(value, "latin-1"))
    request = Profile(request_id(wanted), trace_id(traceparents) if traceparents else "")
    scope["request_id"], scope["profile"] = request.request_id, request
    return request


def request_id(wanted: str) -> str:
    """The client's own id if it is harmless in headers and logs, else a new one."""
    return wanted if REQUEST_ID.fullmatch(wanted) else f"{random.getrandbits(128):032x}"


def in_words(seconds: float, request: Profile) -> str:
    """How a request ended, as in ` deadline_exceeded 500.2 ms, queue 499.1 ms`: why it failed, and what was slow."""
    why = f" {request.code}" if request.code else ""
    stage, took_ms = max(request.stages.items(), key=lambda item: item[1], default=("", 0.0))
    slow = f", {stage} {took_ms:.1f} ms" if took_ms >= SLOW_MS else ""
    return f"{why} {seconds * 1e3:.1f} ms{slow}"
