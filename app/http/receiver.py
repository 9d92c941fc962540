"""From bytes to requests, with httptools as the parser. Bounds what arrives; what is done with it is the connection's.

A client may ask to go on in another protocol, as Java's HttpClient and `curl --http2` ask for h2c. The service ignores
that (RFC 9110, section 7.8) and answers the request. httptools would stop after its head and take its body for the next
request, which is also a way to smuggle one past a proxy.
"""

from collections.abc import Callable

import httptools
from starlette.types import Scope

from app.errors import HeadersTooLarge, MalformedRequest, ServiceError, TargetTooLong
from app.http.exchange import Exchange
from app.http.head import check_headers, parse_target

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 256
# Bytes of chunk sizes, extensions and trailers for each byte of a body, beyond 2 * MAX_HEAD_BYTES. A chunk of one byte
# has five, and takes the loop as long as one of thousands: two million of them would keep it from everybody else.
MAX_FRAMING = 1


class Enough(Exception):
    """Stops the parser at a request that will not be answered on this connection."""


class Receiver:
    """Parses what one connection sends.

    Args:
        begin: called with the first byte of a request; makes its exchange. Errors: Enough.
        start: called when its head is complete and right.
        end: called when its body is complete.
        scope: what the scopes of all its requests share.
    Attributes:
        incoming: the request in arrival, or None.
    """

    def __init__(
        self,
        begin: Callable[[], Exchange],
        start: Callable[[Exchange], None],
        end: Callable[[Exchange], None],
        scope: Scope,
    ) -> None:
        self.incoming: Exchange | None = None
        self._begin, self._start, self._end, self._shared = begin, start, end, scope
        self._root_path: str = scope["root_path"]
        self._raw = 0  # bytes of the message in arrival, as far as they came in parts of their own
        self._message_ended = False  # within this part
        self._new_parser()

    def feed(self, data: bytes) -> None:
        """Parse, at most as many bytes of a head as one may have before it is looked at.

        Errors: ServiceError, Enough.
        """
        rest = memoryview(data)
        try:
            while rest:
                room = MAX_HEAD_BYTES + 1 - self._raw if self._is_in_head() else len(rest)
                rest = rest[self._parse(rest[:room]) :]
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None  # what a callback has raised
        except httptools.HttpParserError as error:
            raise MalformedRequest(
                f"This is no HTTP request: {error}.", "Send HTTP/1.1, to an http:// address: the service has no TLS."
            ) from error

    def _is_in_head(self) -> bool:
        return self.incoming is None or not self.incoming.scope

    def _parse(self, part: memoryview) -> int:
        """Returns how many bytes were parsed: not all of them after a head that asks for an upgrade."""
        self._message_ended = False
        parsed = len(part)
        try:
            self._parser.feed_data(part)
        except httptools.HttpParserUpgrade as upgrade:
            parsed = upgrade.args[0]
            self._parse_head_again()
        self._raw = 0 if self._message_ended else self._raw + parsed
        if self._raw > MAX_HEAD_BYTES:
            self._check_raw()
        return parsed

    def _check_raw(self) -> None:
        """Bound what the parser keeps, or reads without a word: heads, sizes of chunks, their extensions, trailers."""
        if self.incoming is None or not self.incoming.scope:
            raise _head_too_large(self.incoming)
        if self._raw > 2 * MAX_HEAD_BYTES + (1 + MAX_FRAMING) * self.incoming.body_size:
            raise MalformedRequest("The body has more framing than content: sizes of chunks, extensions, trailers.")

    def _new_parser(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # else a request before it is lost

    def _parse_head_again(self) -> None:
        """Let a new parser, which expects a body, begin where the old one has stopped."""
        assert self.incoming is not None
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        headers = [b"%b: %b" % (name, value) for name, value in self.incoming.headers if name != b"upgrade"]
        url = self.incoming.url
        self._new_parser()
        self._parser.feed_data(b"\r\n".join([b"%b %b HTTP/%b" % (method, url, version), *headers, b"", b""]))

    # what the parser calls

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self.incoming = self._begin()

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        assert self.incoming is not None
        self.incoming.url += url
        self.incoming.size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is dropped."""
        exchange = self.incoming
        assert exchange is not None
        if exchange.scope:
            return
        exchange.size += len(name) + len(value) + len(": \r\n")
        exchange.headers.append((name.lower(), value))
        if exchange.size > MAX_HEAD_BYTES or len(exchange.headers) > MAX_HEADERS:
            raise _head_too_large(exchange)

    def on_headers_complete(self) -> None:
        """Start a request, but not one that asks for an upgrade: its head is parsed again without that."""
        if self._parser.should_upgrade():
            if self._parser.get_method() == b"CONNECT":
                raise MalformedRequest("CONNECT is for proxies.")
            return
        exchange = self.incoming
        assert exchange is not None
        version, method = self._parser.get_http_version(), self._parser.get_method()
        exchange.expects_continue = check_headers(exchange.headers, version)
        exchange.keep_alive = version == "1.1" and self._parser.should_keep_alive()
        exchange.scope = self._scope(exchange, method, version)
        self._start(exchange)

    def _scope(self, exchange: Exchange, method: bytes, version: str) -> Scope:
        target = parse_target(exchange.url, method, exchange.headers)
        return {
            **self._shared,
            "http_version": version,
            "method": method.decode("ascii"),
            "path": self._root_path + target.path,
            "raw_path": self._root_path.encode("ascii") + target.raw_path,
            "query_string": target.query_string,
            "headers": exchange.headers,
            "state": {**self._shared["state"], "received_at": exchange.received_at, "hold": exchange.hold},
        }

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        assert self.incoming is not None
        self.incoming.body_arrived(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        if self._parser.should_upgrade():
            return
        exchange, self.incoming, self._message_ended = self.incoming, None, True
        assert exchange is not None
        exchange.body_ended()
        self._end(exchange)


def _head_too_large(exchange: Exchange | None) -> ServiceError:
    if exchange is not None and len(exchange.url) > MAX_HEAD_BYTES // 2:
        return TargetTooLong(f"Target and headers may have {MAX_HEAD_BYTES:,} bytes; the target alone has more.")
    if exchange is not None and len(exchange.headers) > MAX_HEADERS:
        return HeadersTooLarge(f"A request may have {MAX_HEADERS} headers; this one has more.")
    return HeadersTooLarge(f"Target and headers may have {MAX_HEAD_BYTES:,} bytes; those of this request have more.")
