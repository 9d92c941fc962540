"""HTTP/1 on one connection: uvicorn's protocol, right in three situations that it leaves to the system.

- **Upgrade.** A client may ask to go on in another protocol, as Java's HttpClient and `curl --http2` ask for h2c. The
  service ignores that (RFC 9110, section 7.8) and answers the request. httptools would stop after its head and take its
  body for the next request, which is also a way to smuggle one past a proxy.
- **Close.** A client that is refused may still be sending its body. If the socket were closed then, the kernel would
  answer the rest with a reset, and the client would lose the reply that it has not read yet. So the sending half is
  closed first, and what still comes is dropped for a while (RFC 9112, section 9.6).
- **Too many connections** for the files that the process may open are answered with 503; those before them go on.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from app import open_files
from app.admission import shutting_down
from app.errors import MalformedRequest, error_response
from encoder import Overloaded

LINGER_S = 10.0
MAX_LINGER_BYTES = 256 * 1024 * 1024  # dropped as they come, so they take no memory
RETRY_AFTER_S = 1


class State(ServerState):
    """What all connections share.

    Attributes:
        is_draining: whether each reply is the last on its connection.
    """

    is_draining = False


class Protocol(HttpToolsProtocol):
    """What uvicorn makes for each connection, by `uvicorn.Config(http=Protocol)`. The server has a `State`."""

    server_state: State

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Called once, first."""
        self._invalid = self._head_has_begun = False
        self._active_at = self.loop.time()
        self._closing = LingeringTransport(transport, self._is_receiving)
        super().connection_made(cast(asyncio.Transport, self._closing))
        allowed = open_files.max_connections()
        if allowed is not None and len(self.connections) > allowed:
            self._refuse(allowed)

    def _refuse(self, allowed: int) -> None:
        """No lingering, which would keep the file open."""
        open_files.warn(f"connection refused, {allowed:,} are open")
        self._answer(Overloaded(f"The service has {allowed:,} connections open and takes no more.", RETRY_AFTER_S))

    def _answer(self, error: Exception) -> None:
        """Answer what is no request, and close."""
        response = error_response(error)
        headers = [*response.raw_headers, (b"connection", b"close")]
        head = [STATUS_LINE[response.status_code], *(b"%b: %b\r\n" % header for header in headers), b"\r\n"]
        self.transport.write(b"".join(head) + response.body)
        self.transport.close()

    def _is_receiving(self) -> bool:
        """Whether the client may still be sending a request."""
        return self._invalid or (self.cycle is not None and self.cycle.more_body)

    def data_received(self, data: bytes) -> None:
        """Called with what the client sends, as it comes."""
        self._active_at = self.loop.time()
        if self._closing.lingers:
            self._closing.drop(len(data))
            return
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while rest:
                rest = self._feed(rest)
        except httptools.HttpParserError as error:
            self._end_request(error)

    def _end_request(self, error: httptools.HttpParserError) -> None:
        """Answer bytes that are no request. One before them that still runs ends as if the client had disconnected."""
        self._invalid = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        reason = str(error.__context__ or error)  # what a callback of the parser has raised, if it was one
        self._answer(
            MalformedRequest(
                f"This is no HTTP request: {reason}.", "Send HTTP/1.1, to an http:// address: the service has no TLS."
            )
        )

    def _feed(self, data: memoryview) -> memoryview:
        """Parse. Returns what is left, which is something only after a request that asks for an upgrade."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._parse_head_again()
            return data[upgrade.args[0] :]
        return data[:0]

    def _parse_head_again(self) -> None:
        """Let a new parser, which expects a body, begin where the old one has stopped."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        headers = [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.parser.feed_data(b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *headers, b"", b""]))

    def on_message_begin(self) -> None:
        """First byte of a request."""
        self._head_has_begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start a request, but not one that asks for an upgrade: its head is parsed again without that."""
        if not self.parser.should_upgrade():
            self._head_has_begun = False
            super().on_headers_complete()
            if self.server_state.is_draining:
                self.cycle.keep_alive = False
        elif self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("CONNECT is for proxies")

    def on_message_complete(self) -> None:
        """End of a request's body."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The last byte of a reply has been written."""
        self._active_at = self.loop.time()
        super().on_response_complete()

    def drain(self) -> None:
        """Say `connection: close` in the next reply. One that has begun without it is followed by one more."""
        for cycle in (self.cycle, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_started:
                cycle.keep_alive = False

    def close_if_silent(self, seconds: float) -> None:
        """Close, unless a request is being answered, or there were bytes in either direction within these `seconds`."""
        if self.loop.time() - self._active_at < seconds or self._is_answering():
            return
        if self._closing.lingers:
            self.abort()
        elif self._head_has_begun:
            self._invalid = True  # so that the rest of it is awaited
            self._answer(shutting_down())
        else:
            self.transport.close()

    def abort(self) -> None:
        """Close at once, whatever is left to send."""
        self._closing.abort()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class LingeringTransport:
    """A transport whose `close` waits for a client that may still be sending. All else is as the transport does it.

    Args:
        is_receiving: whether the client may still be sending.
    Attributes:
        lingers: whether it waits.
    """

    def __init__(self, transport: asyncio.Transport, is_receiving: Callable[[], bool]) -> None:
        self.lingers = False
        self.write: Callable[[Any], None] = (
            transport.write
        )  # without a call in between: large replies are written in many parts
        self._transport = transport
        self._is_receiving = is_receiving
        self._left = MAX_LINGER_BYTES

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more can be written."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """Send what has been written, then close: at once, or when the client closes, or after LINGER_S."""
        if self.lingers:
            return
        if self._transport.is_closing() or not self._is_receiving():
            self._transport.close()
            return
        self.lingers = True
        self.write = _write_nothing
        self._transport.resume_reading()
        self._transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)

    def drop(self, num_bytes: int) -> None:
        """Count what the client still sends."""
        self._left -= num_bytes
        if self._left < 0:
            self._transport.abort()


def _write_nothing(data: object) -> None:
    """For requests before the last that still run: the end of the stream has been sent."""
