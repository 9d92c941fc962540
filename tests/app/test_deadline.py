"""A request's time begins with its first byte, and covers every stage until its reply is built."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pkgutil import resolve_name
from typing import Any

import httpx
import pytest

from encoder import Engine
from tests.app.running import wait_for
from tests.conftest import RunningServer, run_server

LONG = "x" * 1000


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets a function wait until the end of the test, or until the event is set."""
    release = threading.Event()

    def block(path: str) -> threading.Event:
        original = resolve_name(path)

        def blocked(*args: Any, **kwargs: Any) -> Any:
            release.wait(60)
            return original(*args, **kwargs)

        monkeypatch.setattr(path, blocked)
        return release

    yield block
    release.set()


@pytest.mark.parametrize(
    ("path", "route", "stage"),
    [
        pytest.param("encoder.TextEncoder.tokenize", "/encode", "the prompts were tokenized", id="tokenizing"),
        pytest.param("encoder.TextEncoder.tokenize", "/tokenize", "the prompts were tokenized", id="tokenize"),
        pytest.param("encoder.TextEncoder.begin", "/encode", "the model ran", id="model"),
        pytest.param("app.reply.reply._build", "/encode?encoding=float", "the reply was built", id="reply"),
        pytest.param("app.routes.prompts._spell", "/tokenize", "the reply was built", id="reply-of-tokenize"),
    ],
)
def test_a_request_may_ask_for_less_time_whatever_stage_it_is_in_then(
    client: httpx.Client, block: Any, monkeypatch: pytest.MonkeyPatch, path: str, route: str, stage: str
) -> None:
    monkeypatch.setattr("app.routes.prompts.MAX_TOKENS_ON_LOOP", 10)
    monkeypatch.setattr("app.reply.reply.MAX_COPY_ON_LOOP", 10)
    block(path)
    headers = {"accept": "application/json", "cache-control": "no-store"}

    body = {"prompt": f"{stage}{path} {LONG}", "max_sequence_length": 32, "timeout_ms": 500}
    response = client.post(route, json=body, headers=headers)

    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert f"No result within 0.5 s; the time ran out while {stage}." in response.json()["error"]["message"]


def test_a_request_that_waits_for_the_model_says_so(client: httpx.Client, server: RunningServer, block: Any) -> None:
    release = block("encoder.TextEncoder.begin")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/encode", json={"prompt": "runs while another waits"})
        wait_for(lambda: server.app.state.service.engine.stats().running_prompts == 1)

        response = client.post("/encode", json={"prompt": "waits while another runs", "timeout_ms": 100})

        release.set()
        assert running.result().status_code == 200
    assert response.status_code == 504
    assert "the time ran out while the prompts waited for the model" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def hasty() -> Iterator[httpx.Client]:
    """A client of a service that allows little time."""
    with run_server(request_timeout_s=0.3) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        yield client


def test_no_request_gets_more_time_than_the_server_gives(hasty: httpx.Client, block: Any) -> None:
    block("encoder.TextEncoder.begin")
    response = hasty.post("/encode", json={"prompt": "a cat", "timeout_ms": 10**400})

    assert response.status_code == 504
    assert "within 0.3 s" in response.json()["error"]["message"]


def test_a_large_body_that_is_not_parsed_in_time_is_given_up(hasty: httpx.Client, block: Any) -> None:
    block("app.request.body._understand")
    response = hasty.post("/encode", json={"prompts": ["x" * 2000] * 40})

    assert response.status_code == 504
    assert "the time ran out while the body was read" in response.json()["error"]["message"]


def test_time_passes_from_the_first_byte_on(server: RunningServer) -> None:
    """A body that comes late leaves no time for the rest. The cached result would not need any."""
    body = b'{"prompt": "a cat", "timeout_ms": 50}'
    head = b"POST /encode HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection(server.address) as connection:
        connection.sendall(head)
        threading.Event().wait(0.2)
        connection.sendall(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        response = connection.makefile("rb").read()

    assert response.startswith(b"HTTP/1.1 504 ")
    assert b"the time ran out while the body was read" in response


@pytest.mark.parametrize(
    ("route", "body"),
    [
        pytest.param("/sglang/encode", {"prompt": "a cat", "negative_prompt": "a dog"}, id="sglang"),
        pytest.param(
            "/v1/hidden_states/structured",
            {"user_prompt": "a cat", "system_prompt": "Be literal.", "return_token_boundaries": True},
            id="structured",
        ),
    ],
)
def test_the_steps_of_a_request_share_its_deadline(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, route: str, body: dict[str, Any]
) -> None:
    deadlines: list[Any] = []
    encode, tokenize = Engine.encode, Engine.tokenize

    async def recorded_encode(self: Engine, prompts: Any, preset: Any, dtype: Any, deadline: Any, *rest: Any) -> Any:
        deadlines.append(deadline)
        return await encode(self, prompts, preset, dtype, deadline, *rest)

    async def recorded_tokenize(self: Engine, prompts: Any, preset: Any, deadline: Any) -> Any:
        deadlines.append(deadline)
        return await tokenize(self, prompts, preset, deadline)

    monkeypatch.setattr(Engine, "encode", recorded_encode)
    monkeypatch.setattr(Engine, "tokenize", recorded_tokenize)

    assert client.post(route, json=body).status_code == 200

    [first, second] = deadlines
    assert first is second


@pytest.mark.parametrize("value", [0, -1, 1.5, "1", True])
def test_a_timeout_is_a_whole_number_of_milliseconds(client: httpx.Client, value: object) -> None:
    response = client.post("/encode", json={"prompt": "a cat", "timeout_ms": value})
    assert response.status_code == 422
    assert "timeout_ms" in response.json()["error"]["message"]


def test_beside_clients_with_much_text_a_short_prompt_is_answered_first(
    server: RunningServer, client: httpx.Client
) -> None:
    """The threads of the tokenizer serve all by turns."""
    prompts = [f"{number}" + "x y z " * 5000 for number in range(8)]
    answered: list[int] = []

    def send_much(number: int) -> None:
        body = {"prompts": prompts, "prefix": str(number), "max_sequence_length": 16}
        answered.append(httpx.post(f"{server.url}/encode", json=body, timeout=60).status_code)

    with ThreadPoolExecutor(4) as pool:
        much = [pool.submit(send_much, number) for number in range(4)]
        wait_for(lambda: server.app.state.service.engine.stats().tokenizing_requests >= 3 or len(answered) > 0)
        short = client.post("/encode", json={"prompt": "a cat " * 100})  # long enough for the threads
        before = len(answered)
        for request in much:
            request.result()

    assert short.status_code == 200
    assert before < 4
    assert answered == [200] * 4
