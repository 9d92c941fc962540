"""A service from its start to its end: disconnects, full queues, signals, sockets."""

import contextlib
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app import wire
from tests.app.running import MANY, ONE_BY_ONE, PATIENCE_S, TOKENS, Served, Spawn, abandoned_request, metric, wait_for
from tests.conftest import Start


def test_a_client_that_leaves_frees_its_place(start_server: Start) -> None:
    """A full queue is 429; what fills it goes with the client that wanted it, without being run."""
    with start_server(**ONE_BY_ONE) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        with abandoned_request(f"{server.url}/encode", {"prompts": MANY}):
            wait_for(lambda: metric(client, "qwen3_encoder_queued_prompts") > 0)
            refused = client.post("/encode", json={"prompts": [prompt[::-1] for prompt in MANY]})
        wait_for(lambda: metric(client, "qwen3_encoder_queued_prompts") == 0)
        served = client.post("/encode", json={"prompt": "a cat"})
        prompts_run = metric(client, "qwen3_encoder_prompts_total")

    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) > 0
    assert served.status_code == 200
    assert prompts_run < len(MANY)


def test_a_result_that_takes_too_long_is_504(start_server: Start) -> None:
    with start_server(request_timeout_s=0.001) as server:
        server.wait_until_ready()
        response = httpx.post(f"{server.url}/encode", json={"prompts": MANY}, timeout=60)

    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


class Busy(Served):
    """A service in the middle of a long request."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__(process)
        self._answers: list[httpx.Response] = []
        self._thread = threading.Thread(target=self._send)
        self._thread.start()
        with httpx.Client(base_url=self.url) as client:
            wait_for(lambda: metric(client, "qwen3_encoder_running_prompts") > 0)

    def _send(self) -> None:
        with contextlib.suppress(httpx.TransportError):
            self._answers.append(httpx.post(f"{self.url}/encode", json={"prompts": MANY}, timeout=PATIENCE_S))

    def answers(self) -> list[httpx.Response]:
        """The answer to the long request, none if the connection broke."""
        self._thread.join()
        return self._answers


@pytest.fixture
def busy(spawn: Spawn) -> Callable[..., Busy]:
    """Starts a service and sends it a long request."""
    flags = [part for name, value in ONE_BY_ONE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return lambda drain_timeout_s: Busy(
        spawn("serve", "--port", "0", *flags, "--drain-timeout-s", str(drain_timeout_s))
    )


def test_sigterm_answers_what_was_accepted_and_refuses_new_work(busy: Callable[..., Busy]) -> None:
    served = busy(drain_timeout_s=PATIENCE_S)
    served.process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{served.url}/readyz").status_code == 503)
    livez = httpx.get(f"{served.url}/livez")
    refused = httpx.post(f"{served.url}/encode", json={"prompt": "a cat"})

    [accepted] = served.answers()
    served.process.wait(PATIENCE_S)

    assert livez.status_code == 200
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert accepted.status_code == 200
    assert wire.unpack(accepted.content)["num_tokens"] == [TOKENS] * len(MANY)
    assert served.process.returncode == 0


def test_what_is_left_after_the_drain_timeout_gets_503(busy: Callable[..., Busy]) -> None:
    served = busy(drain_timeout_s=0.01)
    served.process.send_signal(signal.SIGTERM)

    [left] = served.answers()

    assert left.status_code == 503
    assert served.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in "".join(served.lines)


def test_a_second_signal_ends_it_at_once(busy: Callable[..., Busy]) -> None:
    served = busy(drain_timeout_s=PATIENCE_S)
    served.process.send_signal(signal.SIGINT)
    wait_for(lambda: httpx.get(f"{served.url}/readyz").status_code == 503)
    served.process.send_signal(signal.SIGINT)

    assert served.process.wait(PATIENCE_S) == 128 + signal.SIGINT


def test_an_idle_service_ends_with_0(spawn: Spawn) -> None:
    served = Served(spawn("serve", "--port", "0"))
    served.process.send_signal(signal.SIGTERM)

    assert served.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in "".join(served.lines)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("address", ["port", "uds"])
def test_the_printed_curl_line_works_when_pasted(spawn: Spawn, tmp_path: Path, address: str) -> None:
    flags = ["--port", "0"] if address == "port" else ["--uds", str(tmp_path / "encoder.sock")]
    served = Served(spawn("serve", *flags))

    pasted = subprocess.run(f"{served.curl} -sf", shell=True, capture_output=True, text=True)

    assert pasted.returncode == 0, pasted.stderr
    assert '"hidden_states"' in pasted.stdout


def test_a_unix_socket_serves_and_is_removed_at_the_end(start_server: Start, tmp_path: Path) -> None:
    path = tmp_path / "encoder.sock"
    with start_server(uds=path):
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://any.name") as client:
            response = client.get("/livez")

    assert response.status_code == 200
    assert not path.exists()


def test_a_unix_socket_that_was_left_behind_is_replaced(start_server: Start, tmp_path: Path) -> None:
    path = tmp_path / "encoder.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    with start_server(uds=path):
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            assert client.get("/livez").status_code == 200


def test_a_port_in_use_is_one_clear_line(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _, log = spawn("serve", "--port", str(port)).communicate(timeout=PATIENCE_S)

    [line] = log.splitlines()
    assert f"127.0.0.1 port {port}" in line
    assert "--port" in line


def test_a_file_at_the_unix_socket_s_path_is_left_alone(spawn: Spawn, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")

    process = spawn("serve", "--uds", str(path))
    process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 2
    assert path.read_text() == "precious"


def test_a_model_that_does_not_load_ends_the_process_with_one_clear_error(spawn: Spawn, tmp_path: Path) -> None:
    process = spawn("serve", "--port", "0", "--model", str(tmp_path))
    _, log = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 1
    assert "Traceback" not in log
    [line] = [line for line in log.splitlines() if "ERROR" in line]
    assert str(tmp_path) in line
