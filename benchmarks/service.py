"""The service in a process of its own, and a client that adds as little as it can to what is measured."""

import http.client
import json
import os
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
NO_STORE = {"cache-control": "no-store"}


class Reply(NamedTuple):
    """A whole reply and the milliseconds from sending the request to its last byte."""

    ms: float
    headers: Mapping[str, str]
    body: bytes

    @property
    def inference_ms(self) -> float:
        """What the service says of the forward pass."""
        return float(self.headers["x-inference-time"])


class Connection(http.client.HTTPConnection):
    """A kept connection, to a port on loopback or to a Unix socket."""

    def __init__(self, address: int | Path) -> None:
        super().__init__("127.0.0.1", address if isinstance(address, int) else None)
        self._address = address

    def connect(self) -> None:
        if isinstance(self._address, int):
            super().connect()  # which also sets TCP_NODELAY
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._address))

    def post(self, path: str, fields: Mapping[str, Any], headers: Mapping[str, str] = NO_STORE) -> Reply:
        """Send a request as JSON, read the reply whole. Errors: SystemExit unless it is a 200."""
        body = json.dumps(fields)
        started = time.perf_counter()
        self.request("POST", path, body, {"content-type": "application/json", **headers})
        response = self.getresponse()
        content = response.read()
        ms = (time.perf_counter() - started) * 1e3
        if response.status != 200:
            raise SystemExit(f"POST {path} was answered with {response.status}: {content[:500]!r}")
        return Reply(ms, {name.lower(): value for name, value in response.getheaders()}, content)

    def metrics(self) -> dict[str, float]:
        """The numbers of GET /metrics that have no labels."""
        self.request("GET", "/metrics")
        lines = self.getresponse().read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line]
        return {name.removeprefix("qwen3_encoder_"): float(value) for name, value in pairs}


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

    def connect(self) -> Connection:
        """A connection of its own."""
        return Connection(self.address)

    def memory_bytes(self) -> int:
        """Resident now; Linux only."""
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
        connection = self.connect()
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def close(self) -> None:
        """End it as a user would."""
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
