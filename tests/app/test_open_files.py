"""More connections than a process may have files open: those that are open go on, the others are told."""

import asyncio
import contextlib
import errno
import logging
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from app import open_files, server
from tests.app.running import Served, wait_for

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
TOKENIZE = (
    b"POST /encode HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAccept: application/json\r\n"
    b'Content-Length: 17\r\n\r\n{"prompt": "cat"}'
)
FILES = 80


def limited(files: int, hard: int) -> Callable[[], None]:
    """What a shell does for `ulimit -n`."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def answer(connection: socket.socket, request: bytes) -> bytes:
    """A whole reply; nothing from a connection that the service has closed without a word."""
    received = b""
    with contextlib.suppress(ConnectionError):
        connection.sendall(request)
        while not is_whole(received) and (part := connection.recv(65536)):
            received += part
    return received


def is_whole(received: bytes) -> bool:
    """Whether the reply has the body that its head announces. The two may come apart."""
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return length is not None and len(body) >= int(length[1])


def test_connections_beyond_the_limit_are_told_and_the_others_go_on(
    spawn: Callable[..., "subprocess.Popen[str]"],
) -> None:
    served = Served(spawn("serve", "--port", "0", preexec_fn=limited(FILES, FILES)))
    address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address, 60)) for _ in range(3 * FILES)]
        answers = [answer(connection, LIVEZ) for connection in connections]
        first = answer(connections[0], TOKENIZE)
    with_200 = [text.startswith(b"HTTP/1.1 200 ") for text in answers]
    accepted = sum(with_200)

    assert 0 < accepted < FILES
    assert with_200 == [True] * accepted + [False] * (3 * FILES - accepted)
    assert first.startswith(b"HTTP/1.1 200 ")
    refused = [text for text in answers[accepted:] if text]
    assert refused
    for text in refused:
        assert text.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in text
        assert f'"message":"The service has {accepted} connections open and takes no more."'.encode() in text

    wait_for(lambda: answer(stack.enter_context(socket.create_connection(address, 60)), LIVEZ)[9:12] == b"200")
    stack.close()
    served.process.terminate()
    served.process.wait()
    told = [line for line in served.lines if "ulimit -n" in line]
    assert len(told) == 1
    assert f"{accepted} are open: this process may have {FILES} files open" in told[0]
    assert "Traceback" not in "".join(served.lines)


def test_soft_limit_is_raised_as_far_as_the_hard_limit_allows() -> None:
    """On macOS it is 256, which is few for a service and its downloads."""
    script = "from app.open_files import *; raise_limit(); print(max_connections())"
    outputs = [
        subprocess.check_output([sys.executable, "-c", script], text=True, preexec_fn=limited(soft, hard))
        for soft, hard in ((100, 300), (300, 300), (100, 100), (60, 60))
    ]

    assert outputs == ["236\n", "236\n", "36\n", "15\n"]


def test_event_loop_that_cannot_accept_says_so_in_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio reports each attempt with a traceback. Any other error keeps its own."""
    monkeypatch.setattr(open_files, "_reminded_at", float("-inf"))
    loop = asyncio.new_event_loop()
    for error in (OSError(errno.EMFILE, "Too many open files"), OSError(errno.EMFILE, "again"), ValueError("a bug")):
        server._on_loop_error(loop, {"message": "socket.accept() out of system resource", "exception": error})
    loop.close()

    [told, other] = caplog.records
    assert (told.levelno, "ulimit -n" in told.getMessage(), told.exc_info) == (logging.WARNING, True, None)
    assert other.exc_info is not None
