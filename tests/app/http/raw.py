"""Raw HTTP on a socket: what a client library would not send."""

import contextlib
import re
import socket
from collections.abc import Iterator

from app.http.traffic import Traffic
from app.service import service_of
from tests.conftest import RunningServer

BODY = b'{"prompt": "a cat"}'
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def head(*headers: str, line: str = "POST /tokenize HTTP/1.1", length: int | None = len(BODY)) -> bytes:
    """The head of a request, with the headers that its body needs."""
    lines = [line, "Host: 127.0.0.1", "Content-Type: application/json", "Accept: application/json", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@contextlib.contextmanager
def connected(server: RunningServer) -> Iterator[socket.socket]:
    """A connection, each of whose writes is a segment."""
    with socket.create_connection(server.address[:2], 60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def read_reply(connection: socket.socket) -> bytes:
    """One whole reply with a content-length."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        assert part, f"closed after {received!r}"
        received += part
    start, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", start)
    while length is not None and len(body) < int(length[1]):
        part = connection.recv(65536)
        assert part, "closed in the middle of a reply"
        body += part
    return start + b"\r\n\r\n" + body


def send(server: RunningServer, data: bytes) -> bytes:
    """Send, and read what comes until the server closes."""
    with connected(server) as connection:
        connection.sendall(data)
        return read_all(connection)


def statuses(answers: bytes) -> list[int]:
    """The status codes of the replies."""
    return [int(rest[:3]) for rest in answers.split(b"HTTP/1.1 ")[1:]]


def traffic_of(server: RunningServer) -> Traffic:
    """What all connections of the server share."""
    return service_of(server.app).traffic
