"""The client against the real service, and against small servers that misbehave on purpose."""

import asyncio
import contextlib
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import pytest

from app import wire
from app.client import AsyncClient, Client, ClientError
from app.exchange import encode_call, encode_layers_call
from app.pipelines.texts import clean_web_text
from app.wire import Tensor
from tests.conftest import RunningServer, Start

BUSY = 429, {"retry-after": "0.2"}, {"error": {"code": "queue_full", "message": "The queue is full.", "hint": "Wait."}}
OVERDUE = {"error": {"code": "deadline_exceeded", "message": "It took too long."}}
INFO = 200, {}, {"model": "demo"}
MASK = np.array([[True, True, True, False]])
Answer = tuple[int, dict[str, str], Any]


@pytest.fixture
def api(server: RunningServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


class Scripted(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `answers`; the last one stays. A callable gets the handler itself."""

    def __init__(self, *answers: Answer | Callable[[http.server.BaseHTTPRequestHandler], None]) -> None:
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.answers = list(answers)
        self.times: list[float] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class ScriptedHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_GET(self) -> None:
        self.server.times.append(time.monotonic())
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if callable(answer):
            return answer(self)
        status, headers, document = answer
        body = wire.dump_json(document)
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def scripted(*answers: Any) -> Iterator[Scripted]:
    """A server that follows this script."""
    with Scripted(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def error_of(client: Client) -> ClientError:
    with pytest.raises(ClientError) as caught:
        client.info()
    return caught.value


def wait_until_listening(uds: Path, process: subprocess.Popen[str]) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        while probe.connect_ex(str(uds)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)


def hang_up(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer, as a server does with an idle one at the wrong moment."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("call", [encode_call, encode_layers_call])
def test_a_reply_is_read_where_it_lies(call: Any) -> None:
    """Hidden states are megabytes."""
    embeds = {"hidden_states": Tensor(np.ones((1, 4, 6), "<u2"), "bfloat16"), "attention_mask": Tensor(MASK, "bool")}
    body = wire.pack_safetensors({"model": "m", "preset": "p", "num_tokens": [3], "truncated": [False]} | embeds)
    response = httpx.Response(200, headers={"content-type": wire.SAFETENSORS}, content=body)

    found = call("a cat", None, {}).reply(response)

    assert (found.model, found.preset, found.num_tokens, found.truncated) == ("m", "p", (3,), (False,))
    assert np.shares_memory(found.hidden_states.array, np.frombuffer(response.content, np.uint8))
    np.testing.assert_array_equal(found.attention_mask.array, MASK)


def test_encode_returns_the_bits_of_the_reply(api: Client, server: RunningServer) -> None:
    body = {"prompts": ["a cat", "a cat on a sofa"], "preset": "z-image"}
    reply = wire.unpack(httpx.post(f"{server.url}/encode", json=body).content)

    embeds = api.encode(["a cat", "a cat on a sofa"], preset="z-image")

    assert embeds.hidden_states.dtype == "bfloat16"
    np.testing.assert_array_equal(embeds.hidden_states.array, reply["hidden_states"].array)
    np.testing.assert_array_equal(embeds.attention_mask.array, reply["attention_mask"].array)
    assert embeds.num_tokens == tuple(reply["num_tokens"])
    assert embeds.truncated == (False, False)
    assert (embeds.preset, len(embeds)) == ("z-image", 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_mlx_gets_the_dtype_and_the_bits(api: Client, dtype: str) -> None:
    embeds = api.encode("a cat", dtype=dtype)

    array = embeds.mlx()

    assert str(array.dtype) == f"mlx.core.{dtype}"
    np.testing.assert_array_equal(np.array(array.astype(mx.float32)), embeds.numpy())
    assert embeds.numpy().dtype == np.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_gets_the_dtype_and_the_bits(api: Client, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
    embeds = api.encode("a cat", dtype=dtype)

    tensor = embeds.torch()

    assert tensor.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(tensor.float().numpy(), embeds.numpy())
    assert embeds.torch(dtype=torch.float64).dtype == torch.float64


def test_rows_are_the_real_ones(api: Client) -> None:
    """A prompt has the rows that it has alone, whatever the batch and the preset pad it to."""
    both = api.encode(["a cat", "a cat on a red sofa"], preset="flux2-klein", max_sequence_length=64)
    alone = api.encode("a cat", preset="flux2-klein", padding="none")

    assert both.hidden_states.array.shape[1] == 64
    # bfloat16 of two runs that round in another order.
    np.testing.assert_allclose(both.rows(0).numpy(), alone.rows(0).numpy(), rtol=1e-2, atol=1e-3)
    assert len(both.rows(1).array) == both.num_tokens[1]


@pytest.mark.parametrize("layers", [[0, 5], [0, 1, 2, 3, 4]])
def test_rows_of_stacked_hidden_states(api: Client, layers: list[int]) -> None:
    """Also where there are as many hidden states as rows."""
    both = api.encode_layers(["", "a cat"], layers=layers, combine="stack")  # (B, n, L, D)

    assert both.num_tokens == (0, 5)
    assert both.rows(0).array.shape[:2] == (len(layers), 0)
    assert both.rows(1).array.shape[:2] == (len(layers), 5)


def test_encode_layers_takes_the_layers(api: Client) -> None:
    layers = api.encode_layers("a cat", preset="flux2-klein", layers=[8, 17, 26])
    preset = api.encode("a cat", preset="flux2-klein")

    np.testing.assert_array_equal(layers.hidden_states.array, preset.hidden_states.array)


def test_tokenize_presets_and_info(api: Client) -> None:
    [tokenized] = api.tokenize("a cat", preset="z-image")

    assert tokenized["text"].startswith("<|im_start|>user\na cat")
    assert api.presets()["z-image"]["fits"] is True
    assert api.info()["model"] == "demo"


def test_the_services_error_arrives_whole(api: Client) -> None:
    with pytest.raises(ClientError, match="no-such-preset") as caught:
        api.encode("a cat", preset="no-such-preset")

    assert (caught.value.status, caught.value.code) == (422, "invalid_field")


def test_a_lone_surrogate_is_refused_by_the_service(api: Client) -> None:
    """It has no UTF-8, so it must not break the client before the service can say what is wrong."""
    with pytest.raises(ClientError, match="surrogate"):
        api.encode("\ud83d")


def test_async_client_does_the_same(server: RunningServer, api: Client) -> None:
    async def ask() -> tuple[Any, ...]:
        async with AsyncClient(server.url) as client:
            encode = client.encode("a cat"), client.encode_layers("a cat", layers=[-2])
            tokenize = client.tokenize("a cat")
            return await asyncio.gather(*encode, tokenize, client.presets(), client.info())

    last, layer, tokenized, presets, info = asyncio.run(ask())

    np.testing.assert_array_equal(last.numpy(), api.encode("a cat").numpy())
    np.testing.assert_array_equal(layer.numpy(), api.encode_layers("a cat", layers=[-2]).numpy())
    assert tokenized == api.tokenize("a cat")
    assert presets == api.presets()
    assert info == api.info()


@pytest.mark.parametrize("key", ["secret", "sécret 鍵"])
def test_the_key_is_sent(start_server: Start, key: str) -> None:
    with start_server(api_key=key) as server:
        server.wait_until_ready()
        with Client(server.url, api_key=key) as client:
            assert client.info()["model"] == "demo"
        for none in (None, ""):  # an empty variable's value is no key
            with Client(server.url, api_key=none) as stranger, pytest.raises(ClientError) as caught:
                stranger.info()
            assert caught.value.status == 401


def test_a_unix_socket(spawn: Callable[..., Any], tmp_path: Path) -> None:
    uds = tmp_path / "encoder.sock"
    process = spawn("serve", "--uds", str(uds))

    with Client(uds=uds) as client:
        wait_until_listening(uds, process)  # from then on the client itself waits, until the model is loaded

        assert client.encode("a cat").num_tokens == (5,)


def test_a_busy_service_is_asked_again_when_it_says() -> None:
    with scripted(BUSY, BUSY, INFO) as server, Client(server.url) as client:
        assert client.info() == {"model": "demo"}

    first, second, third = server.times
    assert second - first >= 0.2
    assert third - second >= 0.2


def test_the_async_client_asks_again_too() -> None:
    async def ask(url: str) -> dict[str, Any]:
        async with AsyncClient(url) as client:
            return await client.info()

    with scripted(BUSY, INFO) as server:
        assert asyncio.run(ask(server.url)) == {"model": "demo"}

    assert len(server.times) == 2


@pytest.mark.parametrize(
    ("answer", "retries", "attempts"),
    [
        pytest.param(BUSY, 2, 3, id="retries used up"),
        pytest.param(BUSY, 0, 1, id="no retries wanted"),
        pytest.param((503, {"retry-after": "3600"}, BUSY[2]), 5, 1, id="longer than anyone waits"),
        pytest.param((500, {}, BUSY[2]), 5, 1, id="not a matter of time"),
        pytest.param((504, {}, OVERDUE), 5, 1, id="the service has tried"),
    ],
)
def test_giving_up(answer: Answer, retries: int, attempts: int) -> None:
    with scripted(answer) as server, Client(server.url, retries=retries) as client:
        error = error_of(client)

    assert (error.status, error.code) == (answer[0], answer[2]["error"]["code"])
    assert len(server.times) == attempts


def test_a_connection_that_was_closed_while_idle_is_opened_anew() -> None:
    with scripted(INFO, hang_up, INFO) as server, Client(server.url) as client:
        client.info()

        assert client.info() == {"model": "demo"}


def break_off(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Send half a reply, as a service does that is killed."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"model": ')
    hang_up(handler)


def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Send a reply that never ends, byte by byte."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.02)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(hang_up, id="no reply"),
        pytest.param(break_off, id="half a reply"),
        pytest.param((502, {}, "bad gateway"), id="502 of a proxy"),
        pytest.param((503, {}, "unavailable"), id="503 of a proxy"),
        pytest.param((504, {"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, "timeout"), id="504 of a proxy"),
    ],
)
def test_what_passes_with_a_restart_is_tried_again(answer: Any) -> None:
    async def ask(url: str) -> dict[str, Any]:
        async with AsyncClient(url) as client:
            return await client.info()

    with scripted(answer, answer, INFO, answer, answer, INFO) as server, Client(server.url) as client:
        assert client.info() == {"model": "demo"}
        assert asyncio.run(ask(server.url)) == {"model": "demo"}

    assert len(server.times) == 6


def test_a_service_that_starts_late_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """As after a crash, until the supervisor has started it anew. The client says that it waits."""
    with contextlib.ExitStack() as later:
        server = later.enter_context(Scripted(INFO))
        server.socket.close()  # nobody listens there any more
        found: list[Any] = []
        with Client(server.url) as client:
            asking = threading.Thread(target=lambda: found.append(client.info()))
            asking.start()
            while "trying again" not in caplog.text:
                time.sleep(0.01)
            server.socket = socket.create_server(server.server_address)  # type: ignore[arg-type]
            serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            serving.start()
            asking.join()
            server.shutdown()
            serving.join()

    assert found == [{"model": "demo"}]


def test_a_service_that_keeps_hanging_up_is_unreachable() -> None:
    with scripted(hang_up) as server, Client(server.url, retries=2) as client:
        error = error_of(client)

    assert (error.status, error.code) == (None, "unreachable")
    assert "tried 3 times" in error.message
    assert len(server.times) == 3


def test_nobody_listens() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with Client(f"http://127.0.0.1:{reserved.getsockname()[1]}", timeout=0.5) as client:
            error = error_of(client)

    assert (error.status, error.code) == (None, "unreachable")
    assert "tried" in error.message


def test_a_reply_that_never_ends_is_given_up() -> None:
    """Each byte comes in time; the time is that of the whole call."""

    async def ask(url: str) -> None:
        async with AsyncClient(url, timeout=0.2) as client:
            await client.info()

    with scripted(drip) as server, Client(server.url, timeout=0.2) as client:
        error = error_of(client)
        with pytest.raises(ClientError) as caught:
            asyncio.run(ask(server.url))

    assert {error.code, caught.value.code} == {"timeout"}


def test_an_answer_that_takes_too_long() -> None:
    with scripted(lambda handler: time.sleep(1)) as server, Client(server.url, timeout=0.2) as client:
        error = error_of(client)

    assert (error.status, error.code) == (None, "timeout")


def test_another_service_is_recognized() -> None:
    """Port 8000 is popular."""
    page = 200, {"content-type": "text/html"}, "hello"
    with scripted(page) as server, Client(server.url) as client:
        error = error_of(client)

    assert error.code == "unexpected_reply"


def test_an_error_that_is_not_the_services_is_quoted() -> None:
    with scripted((502, {}, "bad gateway")) as server, Client(server.url, retries=0) as client:
        error = error_of(client)

    assert (error.status, error.code) == (502, "http_error")
    assert "bad gateway" in error.message


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "no address"])
def test_the_environments_proxy_is_not_asked(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """A proxy cannot reach what listens on this machine."""
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    with Client(server.url) as client:
        assert client.info()["model"] == "demo"


def test_prx_pixel_without_ftfy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)

    with pytest.raises(ModuleNotFoundError, match="pip install ftfy"):
        clean_web_text(None, ["a cat"], {})


def test_importing_the_client_imports_neither_the_server_nor_mlx() -> None:
    code = "import sys, app.client; print(sorted({'mlx', 'torch', 'encoder', 'fastapi'} & {*sys.modules}))"

    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
