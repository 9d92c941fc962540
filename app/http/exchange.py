"""One request from its first byte, and its response: the scope, `receive` and `send` of ASGI."""

import asyncio
import logging
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app.admission import CANCELLED_FOR, why_cancelled
from app.errors import BodyTimeout, TooManyBytes, error_response
from app.http.budget import Hold
from app.http.head import Header
from app.http.traffic import FREE_BYTES
from app.request_context import SECURITY_HEADERS
from encoder import DeadlineExceeded

if TYPE_CHECKING:
    from app.http.connection import Connection

logger = logging.getLogger(__name__)

READ_AHEAD = 64 * 1024  # bytes of a body that wait for the app; beyond that the connection is not read
NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2: a token
NOT_A_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
CLOSE = (b"connection", b"close")
DISCONNECT: Message = {"type": "http.disconnect"}
VERSION = b"HTTP/1.1 "  # what every response begins with


class Exchange:
    """One request and its response.

    Args:
        connection: where it came.
    Attributes:
        url, headers: as they arrived, names in lower case.
        size: bytes of head and body that have arrived.
        progress_tick: when the last of them did.
        more_body: whether the body goes on.
        disconnected: whether the client is gone, or the service has given it up.
        started: whether the response has begun. complete: whether all of it is written.
        reply_tick: when the response began.
        keep_alive: whether the connection may go on afterwards.
        version_sent: whether VERSION has been sent ahead of the response.
        hold: the bytes of results and reply; `request.state.hold`.
        task: which answers it, once its turn has come.
    """

    def __init__(self, connection: "Connection") -> None:
        self.url = b""
        self.headers: list[Header] = []
        self.size = self.body_size = 0
        self.progress_tick = connection.traffic.tick
        self.more_body = True
        self.disconnected = self.started = self.complete = self.version_sent = False
        self.reply_tick = 0
        self.keep_alive = True
        self.expects_continue = False
        self.scope: Scope = {}
        self.hold = Hold(connection.traffic.replies)
        self.task: asyncio.Task[None] | None = None
        self.received_at = time.perf_counter()
        self._connection = connection
        self._traffic = connection.traffic
        self._counted = 0  # bytes of `size` that `Traffic.arriving` has lent
        self._parts: list[bytes] = []  # of the body, for the app
        self._num_waiting = 0  # bytes of them
        self._delivered = False  # whether the app has the whole body
        self._refusal: Exception | None = None
        self._wake: asyncio.Event | None = None  # made by the first `receive` that has to wait
        self._left: int | None = 0  # bytes of the response that its content-length promises; None without one
        self._chunked = False
        self._ending: asyncio.TimerHandle | None = None  # ends a task that goes on though its client is gone

    # arrival

    def arrived(self, num_bytes: int) -> None:
        """Count what has arrived of head or body, and refuse it if all requests together would hold too much."""
        self.size += num_bytes
        self.progress_tick = self._traffic.tick
        missing = self.size - FREE_BYTES - self._counted
        if missing <= 0:
            return
        self._traffic.arrivals.setdefault(self)
        if not self._traffic.arriving.take(missing):
            self.refuse_bytes()
        elif self not in self._traffic.arrivals:  # it had to make room itself
            self._traffic.arriving.give_back(missing)
        else:
            self._counted += missing

    def body_arrived(self, body: bytes) -> None:
        """A part of the body. What is not read any more is dropped."""
        self.body_size += len(body)
        if self._refusal is None and not (self.complete or self.disconnected):
            self.arrived(len(body))
        if self._refusal is not None or self.complete or self.disconnected:
            self._connection.drop(len(body))
            return
        self._parts.append(body)
        self._num_waiting += len(body)
        if self._num_waiting > READ_AHEAD:
            self._connection.flow.pause_reading()
        self._notify()

    def body_ended(self) -> None:
        """All of the request has arrived: it is accepted, and is not refused for its bytes any more."""
        self.more_body = False
        self._traffic.arrivals.pop(self, None)
        self._notify()

    def refuse_bytes(self) -> None:
        """Stop its arrival, because requests in arrival hold too many bytes."""
        budget = self._traffic.arriving
        budget.refused += 1
        message = (
            f"Requests in arrival hold {budget.taken:,} of {budget.limit:,} bytes of memory; this one needs more than "
            "there is left."
        )
        self.refuse(TooManyBytes(message, budget.retry_after_s(self._counted), {"connection": "close"}))

    def refuse_late(self) -> None:
        """Stop its arrival, because it takes too long."""
        message = f"The body did not arrive within {self._traffic.body_timeout_s:g} s."
        self.refuse(BodyTimeout(message, "Send it faster, or smaller.", {"connection": "close"}))

    def refuse(self, error: Exception) -> None:
        """Let `receive` raise this error, so that the app answers it as any other."""
        self._refusal = error
        self._give_back_body()
        self._notify()

    def _give_back_body(self) -> None:
        """The body is not held any more, or not waited for."""
        self._parts.clear()
        self._num_waiting = 0
        self._traffic.arrivals.pop(self, None)
        self._traffic.arriving.give_back(self._counted)
        self._counted = 0

    # the app's side

    async def run(self, app: ASGIApp) -> None:
        """Let the app answer. What it fails to answer is answered here."""
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:  # RequestContext answers it
            await self._answer(why_cancelled(self.scope))
            raise
        except BaseException:  # RequestContext lets none through
            logger.exception("Exception in ASGI application")
            await self._answer(RuntimeError())
        else:
            if not self.complete:
                await self._answer(RuntimeError())
        finally:
            self.end()

    async def _answer(self, error: Exception) -> None:
        """Answer in place of the app; close where it has begun to answer."""
        if self.started or self.disconnected:
            self._connection.close()
            return
        response = error_response(error)
        headers = [*response.raw_headers, *SECURITY_HEADERS, CLOSE]
        await self.send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await self.send({"type": "http.response.body", "body": response.body})

    async def receive(self) -> Message:
        """The next part of the body, or that the client is gone. Errors: why the rest of the body is not read."""
        if self.expects_continue:
            self.expects_continue = False
            if not self.started:
                self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            if self.disconnected or self.complete:
                return DISCONNECT
            if self._refusal is not None and not self.started:
                raise self._refusal
            if self._parts or not (self.more_body or self._delivered):
                return self._take_body()
            self._connection.flow.resume_reading()
            if self._wake is None:
                self._wake = asyncio.Event()
            self._wake.clear()
            await self._wake.wait()

    def _take_body(self) -> Message:
        body = b"".join(self._parts)  # which copies nothing where it is one part
        self._parts.clear()
        self._num_waiting = 0
        self._delivered = not self.more_body
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        """Write a part of the response. Returns once the transport takes more, so that a reply is not held twice."""
        if self.disconnected:
            return
        if not self.started:
            self._start(message["status"], message.get("headers", ()))
        elif not self.complete:
            self._write_body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError("The response is complete, nothing can be added to it.")
        if self._connection.flow.write_paused:
            await self._connection.flow.drain()
        if self.complete:
            self.end()

    def _start(self, status: int, headers: Any) -> None:
        """Write the head of the response. Errors: RuntimeError, and nothing is written, for a header that is none."""
        self._left = None
        lines = [STATUS_LINE[status]]
        for name, value in [*self._connection.default_headers, *headers]:
            if not NAME.fullmatch(name) or NOT_A_VALUE.search(value):
                raise RuntimeError(f"{name!r}: {value!r} is no header of a response.")
            lower = name.lower()
            if lower == b"connection":
                self.keep_alive = self.keep_alive and b"close" not in value.lower()
                continue
            if lower == b"content-length":
                self._left = int(value)
            lines.append(b"%b: %b\r\n" % (lower, value))
        if self._left is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self._chunked = self.scope["http_version"] == "1.1"
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        self.keep_alive = self.keep_alive and not self._traffic.draining
        lines.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        self.started, self.expects_continue, self.reply_tick = True, False, self._traffic.tick
        self._give_back_body()
        head = b"".join(lines)
        self._connection.write(head[len(VERSION) :] if self.version_sent else head)

    def _write_body(self, body: bytes | memoryview, more_body: bool) -> None:
        if self.scope["method"] == "HEAD":
            self._left = None
        elif self._chunked:
            self._connection.write(b"%x\r\n" % len(body) + body + b"\r\n" if body else b"")
        else:
            if self._left is not None:
                self._left -= len(body)
                if self._left < 0:
                    raise RuntimeError("The response is longer than its content-length.")
            self._connection.write(body)
        if more_body:
            return
        if self._left:
            raise RuntimeError("The response is shorter than its content-length.")
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        self.complete = True
        self._notify()

    # the end

    def disconnect(self) -> None:
        """The client is gone, or is given up."""
        self.disconnected = True
        self._give_back_body()
        self._notify()
        if self.task is not None and not self.task.done() and self._ending is None:
            loop = asyncio.get_running_loop()
            self._ending = loop.call_later(self._traffic.answer_timeout_s, self.cancel)

    def cancel(self) -> None:
        """End what has taken too long, whatever it does: it is answered with `overdue`, and the connection closed."""
        assert self.task is not None, "only what has begun can take long"
        self.keep_alive = False
        self.scope["state"][CANCELLED_FOR] = self.overdue()
        self.task.cancel()

    def overdue(self) -> DeadlineExceeded:
        """What is answered where the app has not answered in all its time, and some more."""
        return DeadlineExceeded(f"No answer within {self._traffic.answer_timeout_s:g} s.", stage="")

    def end(self) -> None:
        """The response has left the process, or never will. Called once or more."""
        if self._ending is not None:
            self._ending.cancel()
        self._give_back_body()
        self.hold.release()
        self._connection.exchange_ended(self)

    def _notify(self) -> None:
        if self._wake is not None:
            self._wake.set()


def whole_response(response: Response, default_headers: Sequence[Header]) -> bytes:
    """A response to what is no request, after which the connection is closed."""
    headers = [*default_headers, *response.raw_headers, *SECURITY_HEADERS, CLOSE]
    lines = [STATUS_LINE[response.status_code], *(b"%b: %b\r\n" % header for header in headers), b"\r\n"]
    return b"".join(lines) + response.body
