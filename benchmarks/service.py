"""The service in a process of its own, and a client that adds as little time as possible."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

STARTUP_S = 120
POLL_S = 0.005
READ_BYTES = 64 * 2**20  # room for the longest reply
CHUNK_BYTES = 2**18  # the memory for a reply that is thrown away
END = b"\r\n\r\n"
NO_STORE = {"cache-control": "no-store"}


class Reply(NamedTuple):
    """A whole reply, and the milliseconds from sending the request to the reply's last byte."""

    ms: float
    headers: Mapping[str, str]
    body: bytes | memoryview

    @property
    def inference_ms(self) -> float:
        """The time of the forward pass, as the service reports it."""
        return float(self.headers["x-inference-time"])


class Connection:
    """A persistent connection to a port on loopback or to a Unix socket.

    It sends a request in one piece, reads the reply into memory that it reuses, and parses headers after the time has
    been taken. A selector accepts it like a socket.

    Args:
        address: the port, or the socket's path.
        keeps_bodies: whether a reply's body can be had afterwards; otherwise its parts overwrite each other.
    """

    def __init__(self, address: int | Path, keeps_bodies: bool = True) -> None:
        if isinstance(address, int):
            self._socket = socket.create_connection(("127.0.0.1", address))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(str(address))
        self._keeps_bodies = keeps_bodies
        self._memory = bytearray(READ_BYTES if keeps_bodies else CHUNK_BYTES)
        self._head = b""
        self._start = 0  # of the body
        self._at = self._left = 0  # where the next bytes go, and how many are still to come

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    def post(self, path: str, fields: Mapping[str, Any], headers: Mapping[str, str] = NO_STORE) -> Reply:
        """Send a request as JSON and read the whole reply. Errors: SystemExit unless it is a 200."""
        request = post_request(path, fields, headers)
        started = time.perf_counter()
        head, content = self._ask(request)
        ms = (time.perf_counter() - started) * 1e3
        return Reply(ms, reply_headers(f"POST {path}", head, content), content)

    def get(self, path: str) -> Reply:
        """Send a GET request and read the whole reply. Errors: SystemExit unless it is a 200."""
        started = time.perf_counter()
        head, content = self._ask(_head("GET", path, {}))
        ms = (time.perf_counter() - started) * 1e3
        return Reply(ms, reply_headers(f"GET {path}", head, content), content)

    def metrics(self) -> dict[str, float]:
        """The values of GET /metrics without labels, by name."""
        lines = bytes(self.get("/metrics").body).decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line]
        return {name.removeprefix("qwen3_encoder_"): float(value) for name, value in pairs}

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def send(self, request: bytes) -> None:
        """Send a request; `receive` reads its reply."""
        self._socket.sendall(request)
        self._head, self._at = b"", 0

    def receive(self) -> tuple[bytes, memoryview] | None:
        """Read what has arrived. Returns head and body once the reply is complete.

        The body is valid until the next request.
        """
        memory = memoryview(self._memory)
        received = self._socket.recv_into(memory[self._at :])
        if not received:
            raise ConnectionError("The service closed the connection within a reply.")
        self._at += received
        self._left -= received
        if not self._head and (end := self._memory.find(END, 0, self._at)) > 0:
            self._head, self._start = bytes(memory[:end]), end + len(END)
            self._left = self._start + int(re.findall(rb"(?i)content-length: (\d+)", self._head)[0]) - self._at
            if self._keeps_bodies and self._at + self._left > len(memory):
                raise SystemExit(f"A reply has {self._left} bytes more than this client reads.")
        if not self._head or self._left:
            if self._at == len(memory):
                self._at = self._start
            return None
        return self._head, memory[self._start : self._at]

    def _ask(self, request: bytes) -> tuple[bytes, memoryview]:
        self.send(request)
        while (reply := self.receive()) is None:
            pass
        return reply


def post_request(path: str, fields: Mapping[str, Any], headers: Mapping[str, str]) -> bytes:
    """A request with JSON as its body."""
    body = json.dumps(fields).encode()
    return _head("POST", path, {"content-type": "application/json", "content-length": str(len(body)), **headers}) + body


def _head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def reply_headers(what: str, head: bytes, content: memoryview) -> dict[str, str]:
    """The headers by lower-case name. Errors: SystemExit unless the reply is a 200."""
    status, *lines = head.decode("latin-1").split("\r\n")
    if status.split()[1] != "200":
        raise SystemExit(f"{what} was answered with {status}: {bytes(content[:500])!r}")
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


class Service:
    """`python -m app serve`, ready when this returns.

    Args:
        model: a folder, or "demo".
        uds: path of a Unix socket to listen on instead of a port.
        settings: flags of `serve`, by name.
    """

    def __init__(self, model: str | Path, uds: Path | None = None, **settings: object) -> None:
        self.address: int | Path = uds or _free_port()
        where = ["--uds", str(uds)] if uds else ["--port", str(self.address)]
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "app", "serve", "--model", str(model), "--log-level", "warning"]
        started = time.perf_counter()
        self._process = subprocess.Popen([*command, *where, *flags])
        self._wait_until_ready()
        self.startup_s = time.perf_counter() - started

    def connect(self, keeps_bodies: bool = True) -> Connection:
        """A new connection."""
        return Connection(self.address, keeps_bodies)

    def memory_bytes(self) -> int:
        """Resident memory now; Linux only."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTUP_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise SystemExit("The service did not start; its error stands above.")
            time.sleep(POLL_S)

    def _is_ready(self) -> bool:
        try:
            with contextlib.closing(self.connect()) as connection:
                connection.get("/readyz")
        except (OSError, SystemExit):
            return False
        return True

    def close(self) -> None:
        """Send SIGTERM and wait for the process to end."""
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
