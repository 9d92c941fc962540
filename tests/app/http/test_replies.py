"""What is sent to clients that read slowly, not at all, or not any more: bounded in time and bytes."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from app.http import traffic as traffic_module
from app.http.connection import Connection
from app.reply.formats import Body
from app.request.disconnect import unless_disconnected
from app.routes import prompts
from app.service import service_of
from tests.app.http.raw import BODY, LIVEZ, connected, head, read_all, read_reply, send, statuses, traffic_of
from tests.app.running import wait_for
from tests.conftest import RunningServer, run_server

SIZE = 300 * 36 * 32 * 4  # bytes of one result: 300 rows of 36 layers of 32 numbers of float32
LIMIT = 12 * (SIZE + 1000)  # of which an eighth is for smaller replies
PATH = "POST /encode_layers HTTP/1.1"


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningServer]:
    """A service with little memory for replies, and none for a cache.

    Systems take megabytes of a reply that nobody reads; here they are to stay in the process.
    """
    made = Connection.connection_made

    def connection_made(self: Connection, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    with (
        pytest.MonkeyPatch.context() as patch,
        run_server(max_reply_bytes=LIMIT, max_json_floats=2_000_000, cache_bytes=0) as running,
    ):
        patch.setattr(Connection, "connection_made", connection_made)
        running.wait_until_ready()
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(strict: RunningServer) -> Iterator[None]:
    """However a test ends its connections, all bytes are given back."""
    yield
    traffic = traffic_of(strict)
    wait_for(lambda: (traffic.replies.taken, traffic.arriving.taken, len(traffic.connections)) == (0, 0, 0))


def wanted(number: int, prompts: int = 1) -> dict[str, Any]:
    """A request for `prompts` times SIZE bytes, unlike that of any other number."""
    texts = [f"{number:06}{prompt:04}{'x' * 290}" for prompt in range(prompts)]
    return {"prompts": texts, "layers": list(range(36)), "dtype": "float32", "max_sequence_length": 300}


@contextlib.contextmanager
def unread(server: RunningServer, number: int) -> Iterator[socket.socket]:
    """A client that has asked for a reply, and reads none of it."""
    body = json.dumps(wanted(number)).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(server.address[:2])
        connection.sendall(
            head(line=PATH, length=len(body)).replace(b"/json\r\nContent-L", b"/msgpack\r\nContent-L") + body
        )
        yield connection


def post(server: RunningServer, body: object, accept: str = "application/msgpack", query: str = "") -> httpx.Response:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        return client.post(f"/encode_layers{query}", json=body, headers={"accept": accept})


def test_bytes_of_a_reply_are_held_until_it_has_been_read(strict: RunningServer) -> None:
    traffic = traffic_of(strict)
    with unread(strict, 1) as connection:
        wait_for(lambda: traffic.states() == {"writing": 1})
        assert SIZE <= traffic.replies.taken < SIZE + 1000  # with the mask, and the names of its parts
        assert len(read_reply(connection)) > SIZE
        wait_for(lambda: traffic.states() == {"idle": 1})
        assert traffic.replies.taken == 0


def test_replies_are_bounded_together_and_the_unread_make_room(
    strict: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those who read are served although others do not."""
    traffic = traffic_of(strict)
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(traffic_module, "STALLED_TICKS", 10_000)
        clients = [stack.enter_context(unread(strict, 100 + number)) for number in range(12)]
        wait_for(lambda: traffic.states() == {"writing": 10, "idle": 2})
        refused = post(strict, wanted(2))
        small = send(strict, LIVEZ[:-2] + b"Connection: close\r\n\r\n")
        small_reply = post(strict, {"prompt": "a", "layers": [0]})
        monkeypatch.setattr(traffic_module, "STALLED_TICKS", 1)
        tick = traffic.tick
        wait_for(lambda: traffic.tick >= tick + 2)
        served = post(strict, wanted(2))
        gone = traffic.timeouts["write"]
        kept = len(read_reply(clients[9]))

    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "too_many_bytes"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (statuses(small), small_reply.status_code) == ([200], 200)
    assert (served.status_code, gone) == (200, 1)
    assert kept > SIZE
    assert "is given up: it makes no progress, and others need its memory" in caplog.text


def test_tokens_are_held_before_they_are_spelled(strict: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request is spelled at a time: the tokens of all others wait."""
    taken = []

    def spell(*arguments: Any) -> Body:
        taken.append(traffic_of(strict).replies.taken)
        return spell_before(*arguments)

    spell_before = prompts._spell
    monkeypatch.setattr(prompts, "_spell", spell)
    with httpx.Client(base_url=strict.url, timeout=60) as client:
        reply = client.post("/tokenize", json={"prompt": "x" * 2000, "max_sequence_length": 2000})

    assert reply.status_code == 200
    assert taken == [2000 * prompts.TOKEN_BYTES]


@pytest.mark.parametrize(
    ("prompts", "accept", "query"),
    [
        pytest.param(6, "application/msgpack", "", id="several prompts, which are copied"),
        pytest.param(3, "application/json", "?encoding=float", id="numbers as text"),
    ],
)
def test_reply_that_could_never_be_held_is_refused_for_good(
    strict: RunningServer, prompts: int, accept: str, query: str
) -> None:
    reply = post(strict, wanted(3, prompts), accept, query)

    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert f"large requests together may take {LIMIT * 7 // 8:,}" in reply.json()["error"]["message"]


def test_reply_that_is_not_read_in_time_is_given_up(
    strict: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the client reads a little now and then."""
    traffic = traffic_of(strict)
    before = traffic.timeouts["write"]
    with unread(strict, 4) as silent, unread(strict, 5) as slow:
        wait_for(lambda: traffic.states() == {"writing": 2})
        monkeypatch.setattr(traffic, "limits", replace(traffic.limits, write=2))
        with contextlib.suppress(ConnectionError):
            while slow.recv(100):
                time.sleep(0.01)
        wait_for(lambda: not traffic.connections)
        assert traffic.replies.taken == 0
        with pytest.raises(ConnectionError):
            read_reply(silent)

    assert traffic.timeouts["write"] == before + 2
    assert caplog.text.count("is given up: it was not read within 60 s") == 2


def test_client_that_goes_while_its_reply_is_sent_gives_its_bytes_back(strict: RunningServer) -> None:
    traffic = traffic_of(strict)
    with unread(strict, 6):
        wait_for(lambda: traffic.states() == {"writing": 1})

    wait_for(lambda: traffic.replies.taken == 0)


def test_memory_goes_back_to_the_kernel_after_large_replies(
    strict: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Malloc would keep it: hundreds of megabytes, for as long as the service lives."""
    returned = threading.Event()
    traffic = traffic_of(strict)
    monkeypatch.setattr(traffic_module, "return_memory", returned.set)
    monkeypatch.setattr(traffic_module, "PEAK_BYTES", SIZE // 2)
    monkeypatch.setattr(traffic_module, "QUIET_TICKS", 1)
    with unread(strict, 7):
        tick = traffic.tick
        wait_for(lambda: traffic.states() == {"writing": 1} and traffic.tick >= tick + 2)
        returned.clear()  # a peak of the tests before
        tick = traffic.tick
        wait_for(lambda: traffic.tick >= tick + 3)
        assert not returned.is_set()

    wait_for(returned.is_set)


class Slow:
    """A route that answers when it is told to."""

    def __init__(self, server: RunningServer) -> None:
        self.may_end = threading.Event()
        self.begun = self.ended = 0
        server.app.router.routes.insert(0, Route("/slow", self.answer, methods=["POST"]))

    async def answer(self, request: Request) -> PlainTextResponse:
        await request.body()
        self.begun += 1
        try:
            await unless_disconnected(request, self.work())
        finally:
            self.ended += 1
        return PlainTextResponse("at last")

    async def work(self) -> None:
        while not self.may_end.is_set():
            await asyncio.sleep(0.01)


@pytest.fixture
def slow(strict: RunningServer) -> Iterator[Slow]:
    slow = Slow(strict)
    yield slow
    slow.may_end.set()
    del strict.app.router.routes[0]


ASK = head(line="POST /slow HTTP/1.1") + BODY


@pytest.mark.parametrize("requests", [1, 3])
def test_half_closed_client_is_answered(strict: RunningServer, slow: Slow, requests: int) -> None:
    """As `nc -N` is, and whoever closes its side after its last request."""
    with connected(strict) as connection:
        connection.sendall(ASK * requests)
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: slow.begun == 1)
        begin = connection.recv(65536)
        slow.may_end.set()
        answer = begin + read_all(connection)

    assert statuses(answer) == [200] * requests
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"connection: close\r\n\r\nat last")


@pytest.mark.parametrize("is_gone", [True, False])
def test_client_that_is_gone_is_told_from_one_that_is_half_closed(
    strict: RunningServer, slow: Slow, is_gone: bool
) -> None:
    """Both have sent the same. The work for the one stops, that for the other goes on."""
    with connected(strict) as connection:
        connection.sendall(ASK)
        wait_for(lambda: slow.begun == 1)
        if is_gone:
            connection.close()
            wait_for(lambda: slow.ended == 1)
        else:
            connection.shutdown(socket.SHUT_WR)
            tick = traffic_of(strict).tick
            wait_for(lambda: traffic_of(strict).tick >= tick + 2)
            assert slow.ended == 0


class Stuck:
    """A route that never answers, and may not even let itself be cancelled."""

    def __init__(self, server: RunningServer, *, heeds: bool) -> None:
        self.begun = self.cancelled = 0
        self.heeds = heeds
        self.may_end = threading.Event()
        server.app.router.routes.insert(0, Route("/stuck", self.answer, methods=["POST"]))

    async def answer(self, request: Request) -> PlainTextResponse:
        self.begun += 1
        while not self.may_end.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.cancelled += 1
                if self.heeds:
                    raise
        return PlainTextResponse("too late")


@contextlib.contextmanager
def stuck_route(server: RunningServer, monkeypatch: pytest.MonkeyPatch, *, heeds: bool = True) -> Iterator[Stuck]:
    """The route, where the outermost limit is short."""
    traffic = traffic_of(server)
    monkeypatch.setattr(traffic, "limits", replace(traffic.limits, answer=1))
    monkeypatch.setattr(traffic, "answer_timeout_s", 0.5)
    route = Stuck(server, heeds=heeds)
    yield route
    route.may_end.set()
    del server.app.router.routes[0]


@pytest.mark.parametrize("heeds", [True, False])
def test_request_that_never_answers_is_answered_and_ends(
    strict: RunningServer, monkeypatch: pytest.MonkeyPatch, heeds: bool
) -> None:
    before = traffic_of(strict).timeouts["answer"]
    with stuck_route(strict, monkeypatch, heeds=heeds) as stuck:
        answer = send(strict, head(line="POST /stuck HTTP/1.1") + BODY)

    assert statuses(answer) == [504]
    assert b"connection: close\r\n" in answer
    assert b'"code":"deadline_exceeded"' in answer
    assert stuck.cancelled == 1
    assert traffic_of(strict).timeouts["answer"] == before + 1


def test_request_that_never_answers_ends_where_its_client_is_gone(
    strict: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stuck_route(strict, monkeypatch) as stuck:
        with connected(strict) as connection:
            connection.sendall(head(line="POST /stuck HTTP/1.1") + BODY)
            wait_for(lambda: stuck.begun == 1)
        wait_for(lambda: stuck.cancelled == 1)
    assert not len(service_of(strict.app).admission)


def test_header_that_is_none_is_an_error_of_the_service(strict: RunningServer) -> None:
    """Nothing of the response has left when it is noticed, so the client is told."""

    async def wrong(request: Request) -> PlainTextResponse:
        return PlainTextResponse("", headers={"x-two": "lines\r\nx-smuggled: 1"})

    strict.app.router.routes.insert(0, Route("/wrong", wrong))
    try:
        answer = send(strict, b"GET /wrong HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    finally:
        del strict.app.router.routes[0]

    assert statuses(answer) == [500]
    assert b"smuggled" not in answer


def test_client_that_ends_in_the_middle_of_its_body_is_gone(strict: RunningServer) -> None:
    with connected(strict) as connection:
        connection.sendall(head(length=100) + b"{")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""


def test_request_behind_a_slow_one_is_answered_after_it(strict: RunningServer, slow: Slow) -> None:
    with connected(strict) as connection:
        connection.sendall(ASK + head() + BODY[:3])
        wait_for(lambda: slow.begun == 1)
        connection.sendall(BODY[3:])
        slow.may_end.set()
        first = connection.recv(65536)
        assert statuses(first)[0] == 200
        connection.sendall(LIVEZ[:-2] + b"Connection: close\r\n\r\n")
        assert statuses(first + read_all(connection)) == [200, 200, 200]
