"""The end of a service at a signal: what it accepted is answered, nobody is cut, and it does end."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.app.running import MANY, ONE_BY_ONE, PATIENCE_S, Served, Spawn, metric, wait_for

FLAGS = [part for name, value in ONE_BY_ONE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
FEW = MANY[:8]
JSON = {"content-type": "application/json"}


@pytest.fixture
def serve(spawn: Spawn) -> Callable[..., Served]:
    """Starts a service that takes one prompt at a time."""

    def serve(drain_timeout_s: float = PATIENCE_S, *flags: str) -> Served:
        return Served(spawn("serve", "--port", "0", *FLAGS, "--drain-timeout-s", str(drain_timeout_s), *flags))

    return serve


@pytest.fixture
def serve_broken() -> Iterator[Callable[[str], Served]]:
    """Starts a service in which something is broken on purpose: a line of Python that runs first."""
    started: list[subprocess.Popen[str]] = []

    def serve(breakage: str, *flags: str) -> Served:
        code = f"import sys, threading; from app.cli import main; {breakage}; sys.exit(main(sys.argv[1:]))"
        arguments = [sys.executable, "-c", code, "serve", "--port", "0", *flags]
        started.append(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True))
        return Served(started[-1])

    yield serve
    for process in started:
        process.kill()
        process.communicate()


class Connection:
    """One connection, on which a test speaks HTTP byte by byte."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self.socket = socket.create_connection((address.hostname, address.port), PATIENCE_S)

    def send(self, method: str, path: str, body: bytes = b"", declared: int | None = None) -> None:
        """A request, or the beginning of one that declares more than it has."""
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        length = len(body) if declared is None else declared
        self.socket.sendall(f"{head}content-length: {length}\r\n\r\n".encode() + body)

    def reply(self) -> http.client.HTTPResponse:
        """The next reply, read to its end."""
        response = http.client.HTTPResponse(self.socket)
        response.begin()
        response.read()
        return response

    def rest(self) -> bytes:
        """What comes until the service closes the connection."""
        return b"".join(iter(lambda: self.socket.recv(2**16), b""))


Connect = Callable[[Served], Connection]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens connections, which are closed at the end."""
    with contextlib.ExitStack() as opened:

        def connect(served: Served) -> Connection:
            connection = Connection(served.url)
            opened.enter_context(connection.socket)
            return connection

        yield connect


def terminate(served: Served) -> None:
    """Send SIGTERM, and return when it is being followed."""
    served.process.send_signal(signal.SIGTERM)
    wait_for(lambda: any("draining" in line for line in served.lines))


def keep_busy(served: Served, body: dict[str, Any], path: str = "/encode") -> "tuple[threading.Thread, list[Any]]":
    """Send a long request, and return when it runs."""
    answers: list[httpx.Response] = []
    ask = threading.Thread(target=lambda: answers.append(httpx.post(served.url + path, json=body, timeout=PATIENCE_S)))
    ask.start()
    with httpx.Client(base_url=served.url) as client:
        wait_for(lambda: metric(client, "qwen3_encoder_running_prompts") > 0)
    return ask, answers


def test_under_load_every_request_gets_a_whole_reply(serve: Callable[..., Served]) -> None:
    """Clients that ask again and again, on kept connections and new ones, until nobody listens any more."""
    served = serve()
    outcomes: Counter[str] = Counter()
    address = urlsplit(served.url).netloc

    def ask(name: int) -> None:
        connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
        for number in range(10**6):
            try:
                connection.connect() if connection.sock is None else None
            except OSError:
                return
            try:
                connection.request("POST", "/encode", json.dumps({"prompt": f"{name} {number}"}), JSON)
                response = connection.getresponse()
                response.read()
                outcomes[f"{response.status} {response.getheader('connection')}"] += 1
            except (OSError, http.client.HTTPException) as error:
                outcomes[repr(error)] += 1

    clients = [threading.Thread(target=ask, args=(name,)) for name in range(16)]
    for client in clients:
        client.start()
    wait_for(lambda: outcomes["200 None"] > 50)
    terminate(served)
    for client in clients:
        client.join()

    assert served.process.wait(PATIENCE_S) == 0
    assert set(outcomes) <= {"200 None", "200 close", "503 close"}
    assert outcomes["503 close"] > 0


def test_a_request_is_accepted_once_with_all_its_steps_and_its_body(
    serve: Callable[..., Served], connect: Connect
) -> None:
    served = serve()
    sglang = json.dumps({"prompt": FEW[0], "negative_prompt": FEW[1]}).encode()
    structured = {"user_prompt": FEW[2], "return_token_boundaries": True, "encoding_format": "base64"}
    others, _ = keep_busy(served, {"prompts": FEW[3:]})
    connections = [connect(served) for _ in range(3)]
    connections[0].send("POST", "/sglang/encode", sglang)
    connections[1].send("POST", "/v1/hidden_states/structured", json.dumps(structured).encode())
    connections[2].send("POST", "/sglang/encode", sglang[:5], declared=len(sglang))
    httpx.get(f"{served.url}/livez")  # answered after those have been read
    terminate(served)
    connections[2].socket.sendall(sglang[5:])
    replies = [connection.reply() for connection in connections]
    others.join()

    assert [reply.status for reply in replies] == [200, 200, 200]
    assert {reply.getheader("connection") for reply in replies} == {"close"}


def test_while_draining_every_reply_is_the_last_on_its_connection(
    serve: Callable[..., Served], connect: Connect
) -> None:
    served = serve()
    requests = [
        ("GET", "/livez"),
        ("GET", "/metrics"),
        ("GET", "/none"),
        ("POST", "/encode"),
        ("POST", "/sglang/encode"),
    ]
    connections = [connect(served) for _ in requests]
    for connection in connections:
        connection.send("GET", "/livez")
        assert connection.reply().getheader("connection") is None
    ask, _ = keep_busy(served, {"prompts": FEW})
    terminate(served)
    replies = []
    for connection, (method, path) in zip(connections, requests, strict=True):
        connection.send(method, path, b"{}" if method == "POST" else b"")
        replies.append(connection.reply())
    ask.join()

    assert [reply.status for reply in replies] == [200, 200, 404, 503, 503]
    assert {reply.getheader("connection") for reply in replies} == {"close"}
    assert all(int(reply.getheader("retry-after", "0")) > 0 for reply in replies if reply.status == 503)


def test_what_never_comes_to_its_end_gets_503_and_an_idle_connection_no_reset(
    serve: Callable[..., Served], connect: Connect
) -> None:
    served = serve(0.1)
    half_a_head, half_a_body, fresh, kept = [connect(served) for _ in range(4)]
    half_a_head.socket.sendall(b"POST /encode HTTP/1.1\r\nhost: localhost\r\ncontent-type: appl")
    half_a_body.send("POST", "/encode", b"{", declared=9)
    kept.send("GET", "/livez")
    kept.reply()
    terminate(served)
    refused = [half_a_head.reply(), half_a_body.reply()]

    assert [reply.status for reply in refused] == [503, 503]
    assert {reply.getheader("connection") for reply in refused} == {"close"}
    assert all(int(reply.getheader("retry-after", "0")) > 0 for reply in refused)
    assert (fresh.rest(), kept.rest()) == (b"", b"")
    assert served.process.wait(PATIENCE_S) == 0


def test_an_event_loop_that_hangs_ends_with_1(serve_broken: Callable[..., Served], connect: Connect) -> None:
    """Somebody may not have been answered."""
    hang = "import time, app.admission as a, app.shutdown as s; s.LIMIT_S = 0.1; a.Admission.enter = "
    served = serve_broken(hang + "lambda *_: time.sleep(1000)", "--drain-timeout-s", "0.1")
    connect(served).send("POST", "/encode", b"{}")
    served.process.send_signal(signal.SIGTERM)

    assert served.process.wait(PATIENCE_S) == 1
    assert any("has not ended in time" in line for line in served.lines)


FOREVER = "lambda *_, **__: threading.Event().wait()"
HANG_ON_LONG_PROMPTS = (
    "import encoder.text_encoder as t; tokenize = t.TextEncoder.tokenize; t.TextEncoder.tokenize = lambda self, "
    "prompts, preset: threading.Event().wait() if len(prompts[0]) > 400 else tokenize(self, prompts, preset)"
)


@pytest.mark.parametrize(
    ("breakage", "body"),
    [
        pytest.param(
            HANG_ON_LONG_PROMPTS, {"prompts": ["a long prompt " * 50]}, id="tokenizer", marks=pytest.mark.long
        ),
        pytest.param(
            f"import encoder.serving.cache.folder as f; f.ResultFolder.read = f.ResultFolder.write = {FOREVER}",
            {"prompt": "a cat"},
            id="disk",
        ),
    ],
)
def test_what_hangs_does_not_hold_up_the_end(
    serve_broken: Callable[..., Served], connect: Connect, breakage: str, body: dict[str, Any], tmp_path: Any
) -> None:
    served = serve_broken(breakage, "--disk-cache-dir", str(tmp_path), "--drain-timeout-s", "0.1")
    connection = connect(served)
    connection.send("POST", "/encode", json.dumps(body).encode())
    with httpx.Client(base_url=served.url) as client:
        client.get("/livez")
    terminate(served)

    assert connection.reply().status == 503
    assert served.process.wait(PATIENCE_S) == 0


def test_the_end_is_not_logged_as_part_of_the_request_that_the_signal_interrupts(
    serve_broken: Callable[[str], Served],
) -> None:
    served = serve_broken(
        "import os, signal; from encoder import Engine; check = Engine.check_ready; "
        "Engine.check_ready = lambda engine: (os.kill(os.getpid(), signal.SIGTERM), check(engine))"
    )
    httpx.get(f"{served.url}/readyz")
    wait_for(lambda: any("draining" in line for line in served.lines))

    assert [line for line in served.lines if "draining" in line and "request=" in line] == []
