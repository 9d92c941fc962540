"""What clients send, slowly, without end or all at once: bounded in time and bytes, and others are served meanwhile."""

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from app.http import connection as connections
from app.http import receiver
from app.http.traffic import FREE_BYTES
from tests.app.http.raw import (
    BODY,
    LIVEZ,
    connected,
    head,
    read_all,
    read_reply,
    send,
    statuses,
    traffic_of,
)
from tests.app.running import wait_for
from tests.conftest import RunningServer, run_server

MAX = receiver.MAX_HEAD_BYTES
ARRIVING = 1_000_000
LARGE = b'{"prompt": "' + b"a" * 400_000 + b'"}'


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningServer]:
    """A service with little patience and little memory."""
    with run_server(
        header_timeout_s=0.4,
        idle_timeout_s=0.4,
        max_arriving_bytes=ARRIVING,
        max_prompt_chars=500_000,
        max_sequence_length=512,
    ) as running:
        running.wait_until_ready()
        yield running


SLOW: dict[str, tuple[bytes, bytes, list[int]]] = {
    "silent": (b"", b"", []),
    "empty lines": (b"\r\n", b"\r\n", []),
    "half a request line": (b"GET /liv", b"", [408]),
    "a target without end": (b"GET /", b"a", [408]),
    "half a head": (LIVEZ[:-2], b"", [408]),
    "a head without end": (LIVEZ[:-2], b"a:b\r\n", [408]),
    "idle": (LIVEZ, b"", [200]),
    "empty lines after a request": (LIVEZ, b"\r\n", [200]),
    "half the head of a second request": (LIVEZ + LIVEZ[:-2], b"x", [200, 408]),
}


def trickle(connection: socket.socket) -> None:
    """Errors: ConnectionError, when the server has had enough."""
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def drip(connection: socket.socket, data: bytes) -> bool:
    """Send a little more, and say whether the server has closed."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)
        connection.setblocking(False)
        try:
            return connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        finally:
            connection.settimeout(60)
    return True


def test_connection_without_a_whole_head_is_closed(strict: RunningServer) -> None:
    """By the time since its first byte: who sends a byte now and then is no better than who sends none."""
    with contextlib.ExitStack() as stack:
        slow = {name: stack.enter_context(connected(strict)) for name in SLOW}
        for name, connection in slow.items():
            connection.sendall(SLOW[name][0])
        ticks = traffic_of(strict).tick + 6
        while traffic_of(strict).tick < ticks:
            for name, connection in slow.items():
                if SLOW[name][1] and not SLOW[name][2][1:]:
                    drip(connection, SLOW[name][1])
            time.sleep(0.05)
        answers = {name: statuses(read_all(connection)) for name, connection in slow.items() if SLOW[name][2]}

        assert answers == {name: expected for name, (_, _, expected) in SLOW.items() if expected}
        wait_for(lambda: all(state == "lingering" for state in traffic_of(strict).states()))


def test_timeouts_are_counted_by_kind(strict: RunningServer) -> None:
    wait_for(lambda: not traffic_of(strict).connections)
    before = traffic_of(strict).timeouts.copy()
    send(strict, b"GET /")
    send(strict, LIVEZ)
    counted = traffic_of(strict).timeouts - before

    assert counted == {"header": 1, "idle": 1}
    assert traffic_of(strict).refusals["head_timeout"] >= 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"GET /" + b"a" * MAX, 414, id="target"),
        pytest.param(b"GET /" + b"a" * 1000 * MAX, 414, id="target of 64 MB"),
        pytest.param(LIVEZ[:-2] + b"a: " + b"b" * MAX, 431, id="one header"),
        pytest.param(LIVEZ[:-2] + b"a" * MAX, 431, id="the name of one header"),
        pytest.param(LIVEZ[:-2] + b"a: %b\r\n" % (b"b" * 8000) * 9, 431, id="nine headers"),
        pytest.param(LIVEZ[:-2] + b"a: %b\r\n" % (b"b" * 8000) * 9 + b"\r\n", 431, id="a whole head"),
        pytest.param(LIVEZ[:-2] + b"a:\r\n" * (receiver.MAX_HEADERS + 1), 431, id="many headers"),
        pytest.param(b"\r\n" * MAX, 431, id="empty lines"),
    ],
)
def test_long_head_is_refused_before_its_end(strict: RunningServer, data: bytes, status: int) -> None:
    """However much of it comes, and in how many segments."""
    for size in (len(data), 10_000):
        with connected(strict) as connection:
            with contextlib.suppress(ConnectionError):  # for 64 MB in segments
                for start in range(0, min(len(data), 10 * MAX), size):
                    connection.sendall(data[start : start + size])
            answer = read_all(connection)
        assert statuses(answer) == [status]
        assert b"connection: close" in answer


def test_head_of_nearly_the_limit_is_read(strict: RunningServer) -> None:
    long = LIVEZ[:-2] + b"a: %b\r\n\r\n" % (b"b" * (MAX - 200))

    assert statuses(send(strict, long * 6 + LIVEZ[:-2] + b"Connection: close\r\n\r\n")) == [200] * 7


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"1;" + b"a" * 10 * MAX, id="an extension without end"),
        pytest.param(b"1;a=" + b"b" * 20_000 + b"\r\nx\r\n", id="an extension for each byte"),
        pytest.param(b"1\r\n \r\n" * 20_000, id="a chunk for each byte"),
        pytest.param(b"0\r\n" + b"a: " + b"b" * 10 * MAX, id="a trailer without end"),
        pytest.param(b"0\r\n" + b"a: b\r\n" * 2 * MAX, id="many trailers"),
    ],
)
def test_framing_of_a_body_is_bounded(strict: RunningServer, rest: bytes) -> None:
    """The parser reads all of that and says nothing."""
    chunked = head("Transfer-Encoding: chunked", length=None)
    with connected(strict) as connection:
        connection.sendall(chunked)
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                connection.sendall(rest)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = read_all(connection)

    assert statuses(answer) in ([400], [])


def test_body_in_chunks_of_one_byte_is_read(strict: RunningServer) -> None:
    """Their framing is five times the content: a small body may have that, a large one may not."""
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in LARGE[:12] + b"a" * 30_000 + LARGE[-2:])
    with connected(strict) as connection:
        connection.sendall(head("Transfer-Encoding: chunked", length=None) + chunks + b"0\r\n\r\n")
        assert statuses(read_reply(connection)) == [200]


def test_requests_that_wait_on_one_connection_are_bounded(strict: RunningServer) -> None:
    """All in one segment. The connection ends after some of them, in order, as HTTP allows."""
    answer = send(strict, LIVEZ * 1000)

    assert statuses(answer) == [200] * (1 + connections.MAX_PIPELINED)
    assert answer.lower().count(b"connection: close") == 1


def test_half_sent_bodies_are_bounded_together(strict: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on sending is served, and so is who comes with a small request; the others are told to come back."""
    monkeypatch.setattr("app.http.traffic.STALLED_TICKS", 10_000)  # the first pauses while the others send
    traffic = traffic_of(strict)
    before = traffic.arriving.refused
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(connected(strict))
        first.sendall(head(length=len(LARGE)) + LARGE[:200_000])
        wait_for(lambda: traffic.arriving.taken > 100_000)
        others = [stack.enter_context(connected(strict)) for _ in range(10)]
        for other in others:
            other.sendall(head(length=len(LARGE)) + LARGE[:-1])
        wait_for(lambda: traffic.arriving.refused >= before + 8)
        assert traffic.arriving.taken <= ARRIVING
        small = send(strict, head("Connection: close") + BODY)
        first.sendall(LARGE[200_000:])
        answer = read_reply(first)
        told = [read_reply(other) for other in others[-5:]]

    assert statuses(small) == [200]
    assert statuses(answer) == [200]
    assert [statuses(answer) for answer in told] == [[429]] * 5
    for answer in told:
        assert b'"code":"too_many_bytes"' in answer
        assert b"retry-after: " in answer
        assert b"connection: close" in answer
    wait_for(lambda: traffic.arriving.taken == 0)


def test_bodies_that_make_no_progress_are_refused_for_those_that_do(
    strict: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a client that holds many half-sent bodies would keep all large ones out until their time is up."""
    monkeypatch.setattr("app.http.traffic.STALLED_TICKS", 1)
    traffic = traffic_of(strict)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            holder = stack.enter_context(connected(strict))
            holder.sendall(head(length=len(LARGE)) + LARGE[: ARRIVING // 3])
        wait_for(lambda: traffic.arriving.taken > 0.9 * (ARRIVING - 3 * FREE_BYTES))
        tick = traffic.tick
        wait_for(lambda: traffic.tick >= tick + 2)
        answer = send(strict, head("Connection: close", length=len(LARGE)) + LARGE)

    assert statuses(answer) == [200]


def test_late_body_is_answered_and_counted(strict: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_of(strict), "limits", replace(traffic_of(strict).limits, body=1))
    before = traffic_of(strict).timeouts["body"]
    answer = send(strict, head(length=100) + b"{")

    assert statuses(answer) == [408]
    assert traffic_of(strict).timeouts["body"] == before + 1


def test_refused_body_does_not_hold_a_connection(strict: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a connection that is kept, too, the rest of it is awaited for a bounded time."""
    monkeypatch.setattr(connections, "LINGER_TICKS", 0)
    with connected(strict) as connection:
        connection.sendall(head(length=10**9))
        answer = read_reply(connection)
        assert (statuses(answer), b"connection: close" in answer) == ([413], False)
        with pytest.raises(ConnectionError):
            trickle(connection)


def test_connections_are_limited(strict: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each beyond the limit is told so, also one that has sent its request already."""
    traffic = traffic_of(strict)
    wait_for(lambda: not traffic.connections)
    monkeypatch.setattr(traffic, "max_connections", 3)
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(connected(strict)) for _ in range(3)]
        for connection in open_ones:
            connection.sendall(LIVEZ)
            assert statuses(read_reply(connection)) == [200]
        refused = send(strict, head(length=len(LARGE)) + LARGE)
        assert traffic.states() == {"idle": 3}

    assert statuses(refused) == [503]
    assert b"retry-after: 1\r\n" in refused
    assert b"The service has 3 connections open and takes no more." in refused
    wait_for(lambda: not traffic.connections)
    assert statuses(send(strict, LIVEZ)) == [200]
