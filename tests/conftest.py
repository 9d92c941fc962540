"""A real service on a real socket, with the demo checkpoint, shared by all tests that need one."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.listen import listening_socket
from app.main import create_app
from app.server import Server
from app.settings import Settings

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # true float32 on a GPU; MLX reads this at its first product

STARTUP_S = 300  # on a busy machine; nothing asserts a time
Start = Callable[..., contextlib.AbstractContextManager["RunningServer"]]


@dataclass
class RunningServer:
    """A service that accepts requests; its model may still be loading."""

    address: Any
    app: FastAPI

    @property
    def url(self) -> str:
        """Where to reach it by TCP."""
        return f"http://{self.address[0]}:{self.address[1]}"

    def wait_until_ready(self) -> None:
        """Return when /readyz says so."""
        deadline = time.monotonic() + STARTUP_S
        with httpx.Client(base_url=self.url, timeout=STARTUP_S) as client:  # httpx.get makes a TLS context each time
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline, "the model did not load"
                time.sleep(0.02)


@contextlib.contextmanager
def run_server(**overrides: Any) -> Iterator[RunningServer]:
    """uvicorn in a thread, on a port of its own."""
    settings = Settings(port=0, **overrides)
    app = create_app(settings)
    with listening_socket(settings) as sock:
        server = Server(app, sock)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server ended while it started"
                time.sleep(0.01)
            yield RunningServer(sock.getsockname(), app)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """The service with its default settings, ready."""
    with run_server() as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of `server`."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def start_server() -> Start:
    """Starts a service with other settings, for as long as the `with` block lasts."""
    return run_server


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m app` with arguments; what is left of it ends with the test."""
    processes: list[subprocess.Popen[str]] = []

    def spawn(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", *arguments],
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        processes.append(process)
        return process

    yield spawn
    for process in processes:
        process.kill()
        process.communicate()
