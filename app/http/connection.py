"""One connection: its requests in turn, its limits of time, and how it ends. Decision 10 says why it is not uvicorn's.

- **Time** is bounded by `sweep`, which `Traffic` calls: no request needs a timer of its own.
- **Close.** A client that is refused may still be sending its body. If the socket were closed then, the kernel would
  answer the rest with a reset, and the client would lose the reply that it has not read yet. So the sending half is
  closed first, and what still comes is dropped for a while (RFC 9112, section 9.6).
- **Half-closed.** A client may close its sending half after a request, and is answered.
"""

import asyncio
import logging
import socket
import struct
from collections import deque
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from app import open_files
from app.admission import shutting_down
from app.errors import HeadTimeout, ServiceError, answer, error_response
from app.http.exchange import VERSION, Exchange, whole_response
from app.http.flow import Flow
from app.http.half_closed import abort_when_gone
from app.http.receiver import Enough, Receiver
from app.http.traffic import TICK_S, Traffic
from encoder import Overloaded

logger = logging.getLogger(__name__)

MAX_PIPELINED = 16  # requests that wait for the one before them; then the connection ends with the last of them
OVERDUE_TICKS = round(2 / TICK_S)  # for a request that is cancelled to answer that it is
LINGER_TICKS = round(10 / TICK_S)
MAX_LINGER_BYTES = 256 * 1024 * 1024  # dropped as they come, so they take no memory
MAX_REFUSED = 32  # connections beyond the limit that are listened to until they have read that they are
RETRY_AFTER_S = 1
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # else the system keeps what it has of an unread reply, and goes on sending it

ENDING = frozenset({"lingering", "closing", "closed"})


class Connection(asyncio.Protocol):
    """What uvicorn makes for each connection, by `uvicorn.Config(http=partial(Connection, traffic))`.

    Attributes:
        state: new (nothing has come), head, body, working, overdue (cancelled, since it takes too long), writing,
            dropping (the rest of a refused body), idle, lingering (the reply is sent, the client may still be
            sending), closing, closed.
        since: the tick at which that began.
        flow: of the transport, in both directions.
    """

    def __init__(
        self,
        traffic: Traffic,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.traffic = traffic
        self.state, self.since = "new", traffic.tick
        self._loop = _loop or asyncio.get_running_loop()
        self._app: ASGIApp = config.loaded_app
        self._server_state = server_state
        self._scope = {
            "type": "http",
            "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
            "scheme": "http",
            "root_path": config.root_path,
            "state": app_state,
        }
        self._current: Exchange | None = None  # is being answered
        self._waiting: deque[Exchange] = deque()
        self._deaf = False  # what comes is dropped: the last request that is answered here has come
        self._refusal: ServiceError | None = None  # of what came behind it
        self._dropped = 0

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of every response."""
        return self._server_state.default_headers

    # beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Called once, first."""
        self._transport = transport
        self.flow = Flow(transport, self.traffic)
        self._client = get_remote_addr(transport)
        scope = {**self._scope, "client": self._client, "server": get_local_addr(transport)}
        self._receiver = Receiver(self._begin_request, self._start_or_queue, self._request_arrived, scope)
        self._server_state.connections.add(self)  # type: ignore[arg-type]  # only the code that Server replaces calls them
        allowed = self.traffic.max_connections
        if (by_files := open_files.max_connections()) is not None:
            allowed = min(allowed, by_files)
        if len(self.traffic.connections) < allowed:
            self.traffic.connections.add(self)
        else:
            self._refuse(allowed)

    def _refuse(self, allowed: int) -> None:
        """Answer that there are too many connections. Some are listened to until they have read it."""
        if allowed < self.traffic.max_connections:
            open_files.warn(f"connection refused, {allowed:,} are open")
        lingers = len(self.traffic.refused_connections) < MAX_REFUSED
        self.traffic.refused_connections.add(self)
        error = Overloaded(f"The service has {allowed:,} connections open and takes no more.", RETRY_AFTER_S)
        self._answer(error, lingers=lingers)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        """Called once, last."""
        self._enter("closed")
        self._server_state.connections.discard(self)
        self.traffic.connections.discard(self)
        self.traffic.refused_connections.discard(self)
        self._disconnect()

    def _disconnect(self) -> None:
        """No request of this connection will be answered."""
        for exchange in (self._receiver.incoming, self._current, *self._waiting):
            if exchange is not None:
                exchange.disconnect()
        self._waiting.clear()
        self.flow.resume_writing()

    def close_if_silent(self, seconds: float) -> None:
        """Close, unless a request is being answered, or has come within these `seconds`, to the next tick.

        For the end of the service. A request whose head is incomplete gets 503.
        """
        if (self.traffic.tick - self.since - 1) * TICK_S < seconds:
            return
        if self.state in ("new", "idle"):
            self.close()
        elif self.state == "head":
            self._answer(shutting_down())
        elif self.state in ("dropping", "lingering") and not self._transport.get_write_buffer_size():
            self.abort()

    def close(self) -> None:
        """Send what has been written, then close; if the client may still be sending, once it has had time to read."""
        if self.state not in ENDING and not self._transport.is_closing():
            self._close(lingers=self._receiver.incoming is not None or self.flow.read_paused)

    def _close(self, *, lingers: bool) -> None:
        self._deaf, self._dropped = True, 0
        if self.flow.eof or not lingers:
            self._enter("closing")
            self._transport.close()
        else:
            self.flow.resume_reading()
            self._enter("lingering")
            self._transport.write_eof()

    def abort(self) -> None:
        """Close at once; what has been written and not sent is lost."""
        self._transport.abort()

    def eof_received(self) -> bool:
        """End of what the client sends. True keeps the connection open to answer what it has sent before."""
        self.flow.eof = True
        if self._current is None or self._current.more_body or self.state in ENDING:
            return False
        self._deaf = True
        (self._waiting[-1] if self._waiting else self._current).keep_alive = False
        if not self._current.started:
            self._transport.write(VERSION)
            self._current.version_sent = True
        abort_when_gone(self._transport, lambda: self.state in ENDING)
        return True

    # time

    def _enter(self, state: str) -> None:
        self.state, self.since = state, self.traffic.tick

    def sweep(self) -> None:
        """End what has taken too long in this state."""
        late, limits = self.traffic.tick - self.since, self.traffic.limits
        match self.state:
            case "new" if late > limits.header:
                self._count_timeout("header")
                self.abort()
            case "head" if late > limits.header:
                self._count_timeout("header")
                self._answer(HeadTimeout("The target and headers of the request did not arrive in time."))
            case "body" if late > limits.body and self._current is not None:
                self._count_timeout("body")
                self._enter("working")
                self._current.refuse_late()
            case "working" if late > limits.answer and self._current is not None and not self._current.started:
                self._count_timeout("answer")
                self._enter("overdue")
                self._current.cancel()
            case "overdue" if late > OVERDUE_TICKS and self._current is not None:  # it has not heard of that
                self._answer(self._current.overdue())
            case "writing":
                self._sweep_reply(limits.write)
            case "idle" if late > limits.idle:
                self._count_timeout("idle")
                self.close()
            case "dropping" | "lingering" if late > LINGER_TICKS:
                self.abort()
            case "closing" if late > limits.write:
                self._count_timeout("close")
                self.abort()

    def _count_timeout(self, kind: str) -> None:
        self.traffic.timeouts[kind] += 1

    def stalled_ticks(self) -> int:
        """How long the reply has made no progress; 0 if none is being sent."""
        return self.flow.stalled_ticks() if self.state == "writing" else 0

    def _sweep_reply(self, limit: int) -> None:
        self.flow.note_progress()
        if self._current is None or self.traffic.tick - self._current.reply_tick > limit:
            self.give_up_reply(f"it was not read within {self.traffic.write_timeout_s:g} s")

    def give_up_reply(self, why: str) -> None:
        """Abort the reply that is being sent, and give back its memory."""
        logger.warning("a reply to %s is given up: %s", self._client or "a client", why)
        self._count_timeout("write")
        if self._current is not None:
            self._current.hold.release()
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.abort()

    # requests

    def data_received(self, data: bytes) -> None:
        """Called with what the client sends, as it comes."""
        if self._deaf:
            self.drop(len(data))
            return
        try:
            self._receiver.feed(data)
        except Enough:
            pass
        except ServiceError as error:
            self._refuse_request(error)

    def _refuse_request(self, error: ServiceError) -> None:
        """What has come is no request. It is told so once those before it have been answered."""
        incoming = self._receiver.incoming
        if self._current is None or self._current is incoming:
            self._answer(error)
            return
        self._deaf, self._refusal = True, error
        if incoming is not None:
            incoming.disconnect()
            if incoming in self._waiting:
                self._waiting.remove(incoming)

    def drop(self, num_bytes: int) -> None:
        """Count what nobody reads."""
        self._dropped += num_bytes
        if self._dropped > MAX_LINGER_BYTES:
            self.abort()

    def _begin_request(self) -> Exchange:
        """Called with the first byte of each request. Errors: Enough."""
        if len(self._waiting) >= MAX_PIPELINED:
            self._deaf = True
            self._waiting[-1].keep_alive = False
            raise Enough
        if self._current is None:
            self._enter("head")
        return Exchange(self)

    def _start_or_queue(self, exchange: Exchange) -> None:
        """Called when its head is complete."""
        if self._current is None:
            self._start(exchange)
        else:
            self._waiting.append(exchange)
            self.flow.pause_reading()
        exchange.arrived(0)  # the head

    def _start(self, exchange: Exchange) -> None:
        self._current = exchange
        self._enter("body" if exchange.more_body else "working")
        exchange.task = task = self._loop.create_task(exchange.run(self._app))
        self._server_state.tasks.add(task)
        task.add_done_callback(self._server_state.tasks.discard)

    def _request_arrived(self, exchange: Exchange) -> None:
        """Called when its body is complete."""
        if exchange is self._current and self.state == "body":
            self._enter("working")
        elif self.state == "dropping":
            self._enter("idle")

    def exchange_ended(self, exchange: Exchange) -> None:
        """Its response has left, or never will: go on with what has come meanwhile, or close."""
        if exchange is not self._current:
            return
        self._current = None
        if self.state in ENDING:
            return
        if not exchange.keep_alive or exchange.disconnected:
            self.close()
            return
        if self._waiting:
            self._start(self._waiting.popleft())
            return
        if self._refusal is not None:
            self._answer(self._refusal)
            return
        incoming = self._receiver.incoming
        self._dropped = 0
        self._enter("idle" if incoming is None else "dropping" if incoming is exchange else "head")
        self.flow.resume_reading()

    def _answer(self, error: Exception, *, lingers: bool = True) -> None:
        """Answer in place of a request that is none, or that answers nothing; then close."""
        response = error_response(error)
        code = answer(error).code
        self.traffic.refusals[code] += 1
        # Not its message, which shows what the client has sent: a target may hold a token.
        logger.info("%d %s to %s", response.status_code, code, self._client or "a client")
        within_reply = self._current is not None and self._current.started
        self._deaf = True
        self._disconnect()
        if not within_reply:
            self._transport.write(whole_response(response, self.default_headers))
        self._close(lingers=lingers)

    # what the transport calls, and what is written to it

    def write(self, data: bytes | memoryview) -> None:
        """Send, unless the connection is ending."""
        if self.state not in ENDING:
            self._transport.write(data)

    def pause_writing(self) -> None:
        """The transport holds too much."""
        self.flow.pause_writing()
        if self.state not in ENDING:
            self._enter("writing")

    def resume_writing(self) -> None:
        """All of it has been sent."""
        self.flow.resume_writing()
        if self.state == "writing":
            self._enter("working")
