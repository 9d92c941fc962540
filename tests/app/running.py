"""What tests do with a running service: ask for a metric, fill its queue, leave it, start it as a process."""

import contextlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app import wire
from app.wire import Tensor

Spawn = Callable[..., "subprocess.Popen[str]"]
PATIENCE_S = 300  # on the slowest machine; nothing here asserts a time
TOKENS = 448  # of a prompt that takes a while
MANY = [f"{number:02}" + "x" * (TOKENS - 2) for number in range(64)]  # bytes are tokens of the demo
ONE_BY_ONE = {"max_batch_tokens": TOKENS, "max_queue_tokens": 64 * TOKENS}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """The value of one sample; 0 where there is none yet."""
    text = client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return next((sample.value for sample in samples if (sample.name, sample.labels) == (name, labels)), 0.0)


def encode(client: httpx.Client, body: dict[str, Any]) -> Tensor:
    """What our own route answers to the same prompts."""
    hidden_states = wire.unpack(client.post("/encode", json=body).content)["hidden_states"]
    assert isinstance(hidden_states, Tensor)
    return hidden_states


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.array.shape) == (expected.dtype, expected.array.shape)
    assert bytes(found.tobytes()) == bytes(expected.tobytes())


@contextlib.contextmanager
def abandoned_request(url: str, body: object) -> Iterator[None]:
    """Sends a request, and closes the connection at the end without having read the answer."""
    request = httpx.Request("POST", url, json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        connection.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        yield


class Served:
    """A service in a process of its own, and the lines that it logs."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(lambda: self.curl is not None or process.poll() is not None)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def end(self) -> None:
        """End the service, and read what it still says."""
        self.process.terminate()
        self._reader.join()

    @property
    def curl(self) -> str | None:
        """The line that it prints when it is ready."""
        found = (re.search(r"(?:^|try:\\n) *(curl .*)", line) for line in self.lines)  # in a line of text, or of JSON
        return next((match[1] for match in found if match), None)

    @property
    def url(self) -> str:
        """Where it listens."""
        match = re.search(r"http://[^/]+", self.curl or "")
        assert match, "".join(self.lines)
        return match[0]
