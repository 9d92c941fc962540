"""What happens on a connection: who asks for an upgrade is answered, and who is refused reads why."""

import contextlib
import json
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.http import connection as protocol
from app.request_context import SECURITY_HEADERS
from tests.app.http.raw import BODY, connected, head, read_all, send, statuses
from tests.conftest import RunningServer, Start

H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
BIG = b'{"prompt": "' + b"a" * 9_000_000 + b'"}'


def exchange(server: RunningServer, parts: Sequence[bytes]) -> bytes:
    """Send the parts, each in a segment of its own, and `GET /livez` as the last request; read all that comes."""
    with connected(server) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.05)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return read_all(connection)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(H2C, id="h2c"),
        pytest.param(("Connection: keep-alive, upgrade", "Upgrade: websocket"), id="websocket"),
        pytest.param(("Connection: Upgrade", "Upgrade: TLS/1.0, HTTP/1.1"), id="TLS"),
        pytest.param(("Upgrade: foo", "UPGRADE: bar", "connection:upgrade"), id="two"),
        pytest.param(("Connection: Upgrade",), id="none named"),
        pytest.param(("Upgrade: h2c",), id="without connection"),
    ],
)
@pytest.mark.parametrize("cut", [0, 20, -3, None], ids=["one segment", "in the head", "at its end", "before the body"])
def test_upgrade_is_ignored_and_the_request_answered(
    server: RunningServer, headers: tuple[str, ...], cut: int | None
) -> None:
    """Wherever the segments end, there is one answer to one request, and the connection goes on."""
    start = head(*headers)
    whole = start + BODY
    parts = [start, BODY] if cut is None else [whole[:cut], whole[cut:]] if cut else [whole]
    answers = exchange(server, parts)

    assert statuses(answers) == [200, 200]
    assert b'"text":"a cat"' in answers


@pytest.mark.parametrize("headers", [H2C, ("Connection: Upgrade", "Upgrade: websocket")])
def test_upgrade_of_a_get_is_ignored(server: RunningServer, headers: tuple[str, ...]) -> None:
    answers = exchange(server, [head(*headers, line="GET /livez HTTP/1.1", length=None)] * 3)

    assert statuses(answers) == [200, 200, 200, 200]


def test_body_behind_an_upgrade_is_never_a_request(server: RunningServer) -> None:
    """It could be one that a proxy in front would not have let through."""
    inner = b"GET /presets HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    start = head(*H2C, length=len(inner))
    for parts in ([start, inner], [start + inner], [start[:-1], start[-1:] + inner[:9], inner[9:]]):
        answers = exchange(server, parts)
        assert statuses(answers) == [400, 200]
        assert b"flux2-klein" not in answers


def test_chunked_body_behind_an_upgrade_is_read(server: RunningServer) -> None:
    start = head(*H2C, "Transfer-Encoding: chunked", length=None)
    chunked = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (4, BODY[:4], len(BODY) - 4, BODY[4:])
    for parts in ([start + chunked], [start, chunked], [start, chunked[:5], chunked[5:]]):
        assert statuses(exchange(server, parts)) == [200, 200]


def test_upgrades_one_after_the_other_are_all_answered(server: RunningServer) -> None:
    """Pipelined in one segment."""
    assert statuses(exchange(server, [(head(*H2C) + BODY) * 5])) == [200] * 6


def test_upgrade_and_close_are_understood_together(server: RunningServer) -> None:
    with connected(server) as connection:
        connection.sendall(head("Connection: Upgrade", "Connection: close", "Upgrade: h2c") + BODY)
        answer = read_all(connection)

    assert statuses(answer) == [200]
    assert b"connection: close" in answer.lower()


def test_upgrade_keeps_its_expectation(server: RunningServer) -> None:
    """The client waits before it sends the body."""
    with connected(server) as connection:
        connection.sendall(head(*H2C, "Expect: 100-continue"))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("target", ["127.0.0.1:80", "/tokenize"])
def test_connect_is_refused_and_nothing_behind_it_is_served(server: RunningServer, target: str) -> None:
    inner = b"GET /presets HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(head(line=f"CONNECT {target} HTTP/1.1", length=None) + inner)
        answer = read_all(connection)

    assert statuses(answer) == [400]


REFUSED = [
    pytest.param({}, ["POST /encode HTTP/1.1", "Connection: close"], 413, id="413"),
    pytest.param({}, ["POST /encode HTTP/1.0"], 413, id="413 of HTTP/1.0"),
    pytest.param({}, ["POST /encode HTTP/1.1", "Connection: close", *H2C[1:]], 413, id="413 and an upgrade"),
    pytest.param({}, ["POST /encode HTTP/1.0", "Content-Encoding: br"], 415, id="415"),
    pytest.param({}, ["POST /encode HTTP/1.0", "Accept: text/csv"], 406, id="406"),
    pytest.param({}, ["POST /nowhere HTTP/1.0"], 404, id="404"),
    pytest.param({}, ["PUT /encode HTTP/1.0"], 405, id="405"),
    pytest.param({}, ["GET /nowhere HTTP/1.0"], 404, id="GET with a body"),
    pytest.param({}, ["POST /encode HTTP/9"], 400, id="400"),
    pytest.param({}, ["POST /encode HTTP/1.1", "no header"], 400, id="400 in a header"),
    pytest.param({"api_key": "k"}, ["POST /encode HTTP/1.0"], 401, id="401"),
    pytest.param({"allowed_hosts": "a"}, ["POST /encode HTTP/1.0", "Host: b"], 421, id="421"),
]


@pytest.mark.parametrize(("settings", "lines", "status"), REFUSED)
def test_refusal_reaches_a_client_that_sends_on(
    start_server: Start, settings: dict[str, str], lines: list[str], status: int
) -> None:
    """urllib, http.client and nginx send a body to its end before they read, on a connection that is then closed."""
    start = "\r\n".join([*lines, *([] if "Host: b" in lines else ["Host: 127.0.0.1"])])
    start += f"\r\nContent-Type: application/json\r\nContent-Length: {len(BIG)}\r\n\r\n"
    with start_server(**settings) as server, connected(server) as connection:
        connection.sendall(start.encode())
        time.sleep(0.2)  # the answer has been sent
        connection.sendall(BIG)
        answer = read_all(connection)

    assert statuses(answer) == [status]
    assert answer.endswith(b"}}")


def test_refusal_reaches_a_client_of_a_unix_socket(start_server: Start, tmp_path: Path) -> None:
    """nginx in front of one."""
    with start_server(uds=tmp_path / "s") as server, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(server.address)
        connection.sendall(head(line="POST /encode HTTP/1.0", length=len(BIG)))
        time.sleep(0.2)
        connection.sendall(BIG)
        answer = read_all(connection)

    assert statuses(answer) == [413]


def test_late_body_is_told_so(start_server: Start) -> None:
    """And may go on sending: the answer arrives all the same."""
    with start_server(body_timeout_s=0.1) as server, connected(server) as connection:
        connection.sendall(head(length=2_000_000) + b"{")
        time.sleep(0.5)
        connection.sendall(bytes(1_000_000))
        answer = read_all(connection)

    assert statuses(answer) == [408]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"POST http://[ HTTP/1.1\r\nHost: a\r\n\r\n", id="address"),
        pytest.param(b"GET / HTTP/1.1\r\nHost a\r\n\r\n", id="header"),
    ],
)
def test_what_is_no_request_is_told_so_as_every_error_is(server: RunningServer, sent: bytes) -> None:
    with connected(server) as connection:
        connection.sendall(sent)
        start, _, body = read_all(connection).partition(b"\r\n\r\n")

    assert start.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in start
    assert all(b"\r\n%b: %b" % header in start for header in SECURITY_HEADERS)
    error = json.loads(body)["error"]
    assert error["code"] == "malformed_request"
    assert error["message"].isprintable()


def test_body_that_breaks_off_into_something_else_ends_its_request(
    start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the request would wait for its body, and answer where 400 has been said."""
    caplog.set_level("INFO")
    with start_server(body_timeout_s=0.3) as server, connected(server) as connection:
        connection.sendall(head("Transfer-Encoding: chunked", length=None) + b"1\r\n{\r\n")
        time.sleep(0.1)
        connection.sendall(b"no chunk\r\n")
        answer = connection.recv(65536)
        time.sleep(0.5)
        connection.close()

    assert statuses(answer) == [400]
    assert "POST /tokenize 499" in caplog.text
    assert "Exception" not in caplog.text


@pytest.mark.parametrize("rest", [b"nonsense\r\n", head("Transfer-Encoding: chunked", length=None) + b"nonsense\r\n"])
def test_requests_before_what_is_no_request_are_answered(
    server: RunningServer, caplog: pytest.LogCaptureFixture, rest: bytes
) -> None:
    """Pipelined in one segment: none of them has been answered when the server sees it."""
    answers = send(server, (head() + BODY) * 2 + rest)

    assert statuses(answers) == [200, 200, 400]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_connection_that_is_kept_takes_the_next_request_after_a_refusal(server: RunningServer) -> None:
    assert statuses(exchange(server, [head(length=len(BIG)), BIG])) == [413, 200]


def refused(server: RunningServer, connection: socket.socket) -> None:
    connection.sendall(head("Connection: close", length=10**12))
    assert statuses(connection.recv(65536)) == [413]


def send_on(connection: socket.socket, data: bytes) -> None:
    """Errors: ConnectionError, when the server has had enough."""
    while True:
        connection.sendall(data)
        time.sleep(0.01)


def test_refused_client_is_listened_to_for_a_bounded_number_of_bytes(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_LINGER_BYTES", 1_000_000)
    with start_server() as server, connected(server) as connection:
        refused(server, connection)
        with pytest.raises(ConnectionError):
            send_on(connection, bytes(100_000))


def test_refused_client_is_listened_to_for_a_bounded_time(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_TICKS", 0)
    with start_server() as server, connected(server) as connection:
        refused(server, connection)
        with pytest.raises(ConnectionError):
            send_on(connection, b"a")


def test_refused_client_does_not_hold_up_the_end_of_the_service(
    start_server: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LINGER_TICKS", 1200)
    with contextlib.ExitStack() as stack, start_server() as server:  # the service ends first
        refused(server, stack.enter_context(connected(server)))

    assert "timeout graceful shutdown exceeded" not in caplog.text
