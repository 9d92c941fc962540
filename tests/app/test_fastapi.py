"""The app is a plain FastAPI app: what FastAPI documents for users of an app acts on every route."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import Unauthorized
from app.main import create_app
from app.middleware import OPEN_PATHS
from app.service import Service, get_service, service_of
from app.settings import Settings
from encoder import EncoderError, Engine, InvalidField, QueueFull
from tests.conftest import Start

PROMPT = {"prompt": "a cat"}
PROMPT_ROUTES: dict[str, dict[str, Any]] = {
    "/encode": PROMPT,
    "/encode_layers": PROMPT | {"layers": [3]},
    "/tokenize": PROMPT,
    "/predict": PROMPT,
}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of the engine and of every app of this module."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(runner: asyncio.Runner) -> Iterator[Engine]:
    """A loaded engine, which the apps of this module share: none of them has to load one of its own."""
    engine = service_of(create_app(Settings())).engine
    runner.run(engine.start())
    yield engine
    runner.run(engine.close())


class Client:
    """A client of an app, without a server and without the app's lifespan, so that nothing is loaded."""

    def __init__(self, runner: asyncio.Runner, app: FastAPI, **headers: str) -> None:
        self.runner = runner
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.runner.run(self.http.request(method, path, **options))

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


Connect = Callable[..., Client]


@pytest.fixture
def connect(runner: asyncio.Runner, engine: Engine) -> Connect:
    """Makes a client of an app, which uses the shared engine or the one given."""

    def connect(app: FastAPI, engine: Any = engine, **headers: str) -> Client:
        app.state.service = replace(service_of(app), engine=engine)
        return Client(runner, app, **headers)

    return connect


def ask_all(client: Client) -> dict[str, httpx.Response]:
    """The reply of every route of the prompts, and of one that takes none."""
    replies = {path: client.post(path, json=body) for path, body in PROMPT_ROUTES.items()}
    return {**replies, "/livez": client.get("/livez")}


class Stamp:
    """A middleware in plain ASGI: adds a header."""

    def __init__(self, app: ASGIApp, value: str) -> None:
        self.app = app
        self.value = value

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", self.value.encode())]
            await send(message)

        await self.app(scope, receive, stamped)


def test_a_middleware_acts_on_every_route(connect: Connect) -> None:
    app = create_app(Settings())
    app.add_middleware(Stamp, value="plain")

    @app.middleware("http")
    async def mark(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["x-mark"] = request.url.path
        return response

    replies = ask_all(connect(app))

    assert {path: reply.status_code for path, reply in replies.items()} == dict.fromkeys(replies, 200)
    assert {path: reply.headers["x-stamp"] for path, reply in replies.items()} == dict.fromkeys(replies, "plain")
    assert {path: reply.headers["x-mark"] for path, reply in replies.items()} == {path: path for path in replies}


def test_a_middleware_may_change_the_body_of_a_large_reply(connect: Connect) -> None:
    """Starlette's own compression, on a body that is sent in parts without a copy."""
    body = PROMPT | {"preset": "flux2-klein"}
    plain, app = create_app(Settings()), create_app(Settings())
    app.add_middleware(GZipMiddleware)

    expected = connect(plain).post("/encode", json=body)
    found = connect(app).post("/encode", json=body)

    assert found.headers["content-encoding"] == "gzip"
    assert found.content == expected.content


@pytest.mark.parametrize("path", PROMPT_ROUTES)
def test_an_exception_handler_of_ones_own_replaces_ours(connect: Connect, path: str) -> None:
    app = create_app(Settings())

    @app.exception_handler(InvalidField)
    async def teapot(request: Request, error: InvalidField) -> Response:
        return JSONResponse({"field": error.field}, 418)

    reply = connect(app).post(path, json=PROMPT_ROUTES[path] | {"preset": "sdxl"}, params={"preset": "sdxl"})

    assert (reply.status_code, reply.json()) == (418, {"field": "preset"})


@pytest.mark.parametrize("path", PROMPT_ROUTES)
def test_a_body_that_does_not_fit_is_fastapis_validation_error(connect: Connect, path: str) -> None:
    """So that FastAPI's way to answer those, "Override request validation exceptions", works."""
    app = create_app(Settings())

    @app.exception_handler(RequestValidationError)
    async def plain(request: Request, error: RequestValidationError) -> Response:
        return PlainTextResponse(str(error.errors()[0]["loc"]), 400)

    reply = connect(app).post(path, json={"prompt": 5})

    assert reply.status_code == 400
    assert reply.text.startswith("('body', 'prompt'")


class BrokenEngine:
    """Raises the same error whatever is asked of it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


BROKEN_ROUTES = {path: ("POST", body) for path, body in PROMPT_ROUTES.items()} | {"/info": ("GET", None)}


@pytest.mark.parametrize("path", BROKEN_ROUTES)
@pytest.mark.parametrize(
    ("raised", "handled"),
    [
        pytest.param(QueueFull("full", 1), QueueFull, id="class"),
        pytest.param(QueueFull("full", 1), EncoderError, id="base class"),
        pytest.param(KeyError("bug"), Exception, id="unexpected"),
        pytest.param(KeyError("bug"), 500, id="unexpected, by its status"),
        pytest.param(KeyError("bug"), LookupError, id="base class of an unexpected one"),
    ],
)
@pytest.mark.parametrize("kind", ["async", "sync"])
def test_what_the_engine_raises_is_answered_by_the_apps_handler(
    connect: Connect, path: str, raised: Exception, handled: Any, kind: str
) -> None:
    app = create_app(Settings())
    method, body = BROKEN_ROUTES[path]

    def answer(request: Request, error: Exception) -> Response:
        return PlainTextResponse(f"mine: {type(error).__name__}", 418)

    async def answer_async(request: Request, error: Exception) -> Response:
        return answer(request, error)

    app.add_exception_handler(handled, answer if kind == "sync" else answer_async)

    reply = connect(app, BrokenEngine(raised)).request(method, path, json=body)

    assert (reply.status_code, reply.text) == (418, f"mine: {type(raised).__name__}")
    assert reply.headers["x-request-id"]


def test_an_error_that_our_middleware_raises_is_answered_by_the_apps_handler(connect: Connect) -> None:
    app = create_app(Settings(api_key="key"))

    @app.exception_handler(Unauthorized)
    async def ask_to_log_in(request: Request, error: Unauthorized) -> Response:
        return PlainTextResponse("log in", 401)

    reply = connect(app).post("/encode", json=PROMPT)

    assert (reply.status_code, reply.text) == (401, "log in")
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize("path", [*PROMPT_ROUTES, "/info", "/presets", "/metrics", "/readyz"])
def test_a_dependency_override_replaces_the_service_of_every_route(connect: Connect, engine: Engine, path: str) -> None:
    app = create_app(Settings())
    used: list[str] = []

    def other(request: Request) -> Iterator[Service]:
        used.append(request.url.path)
        yield replace(service_of(app), engine=engine)

    app.dependency_overrides[get_service] = other
    body = PROMPT_ROUTES.get(path)

    reply = connect(app, None).request("POST" if body else "GET", path, json=body)

    assert reply.status_code == 200
    assert used == [path]


@pytest.mark.parametrize("path", [*PROMPT_ROUTES, "/livez"])
def test_a_route_can_be_replaced(connect: Connect, path: str) -> None:
    app = create_app(Settings())

    async def mine() -> dict[str, str]:
        return {"mine": path}

    app.router.routes.insert(0, APIRoute(path, mine, methods=["GET", "POST"]))

    replies = ask_all(connect(app))

    assert replies.pop(path).json() == {"mine": path}
    assert {reply.status_code for reply in replies.values()} == {200}


def test_a_mounted_app_stands_beside_our_routes_behind_the_same_middleware(connect: Connect) -> None:
    sub = FastAPI()

    @sub.get("/hello")
    async def hello() -> str:
        return "hello"

    app = create_app(Settings(api_key="key"))
    app.mount("/sub", sub)
    client = connect(app, authorization="Bearer key")

    assert connect(app).get("/sub/hello").status_code == 401
    reply = client.get("/sub/hello")
    assert (reply.status_code, reply.json()) == (200, "hello")
    assert reply.headers["x-request-id"]
    assert {reply.status_code for reply in ask_all(client).values()} == {200}


def test_the_app_can_be_mounted_in_another(connect: Connect, runner: asyncio.Runner) -> None:
    outer, app = FastAPI(), create_app(Settings())
    outer.mount("/encoder", app)
    connect(app)
    client = Client(runner, outer)

    assert client.post("/encoder/encode", json=PROMPT).status_code == 200
    assert client.post("/encoder/encode", json={}).json()["error"]["code"] == "invalid_field"


def test_the_api_description_says_where_a_key_is_needed() -> None:
    described = create_app(Settings(api_key="key")).openapi()

    assert [scheme["scheme"] for scheme in described["components"]["securitySchemes"].values()] == ["bearer"]
    paths = described["paths"].items()
    assert {path for path, item in paths for route in item.values() if "security" not in route} == OPEN_PATHS


def test_without_a_key_the_api_description_has_no_security() -> None:
    described = create_app(Settings()).openapi()

    assert "securitySchemes" not in described["components"]
    assert not [route for item in described["paths"].values() for route in item.values() if "security" in route]


def test_a_request_is_counted_by_its_route(client: httpx.Client) -> None:
    client.post("/encode", json=PROMPT)
    client.head("/info")

    counted = client.get("/metrics").text
    assert 'qwen3_encoder_requests_total{route="/encode",status="200"}' in counted
    assert 'qwen3_encoder_requests_total{route="/info",status="200"}' in counted


@pytest.mark.parametrize("path", PROMPT_ROUTES)
def test_a_bug_is_500_without_its_details_and_logged_once(
    start_server: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The log has them, under the request's id. uvicorn would log them again if it saw them."""

    def fail(*arguments: object) -> None:
        raise KeyError("a bug")

    with start_server() as server:
        for work in ("encode", "tokenize"):
            monkeypatch.setattr(service_of(server.app).engine, work, fail)
        response = httpx.post(server.url + path, json=PROMPT_ROUTES[path], headers={"x-request-id": "req-8"})

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] == "req-8"
    assert "KeyError" not in response.text
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "req-8" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        pytest.param("GET", "/nothing", "localhost", 404, id="404"),
        pytest.param("DELETE", "/encode", "localhost", 405, id="405"),
        pytest.param("OPTIONS", "/encode", "localhost", 204, id="204"),
        pytest.param("POST", "/encode", "localhost", 415, id="415"),
        pytest.param("GET", "/livez", "evil.example", 421, id="421"),
    ],
)
def test_every_reply_has_the_request_id(client: httpx.Client, method: str, path: str, host: str, status: int) -> None:
    reply = client.request(method, path, headers={"host": host, "x-request-id": "req-9"})

    assert reply.status_code == status
    assert reply.headers["x-request-id"] == "req-9"


def test_a_request_that_the_server_cancels_is_not_counted_as_a_client_that_left(
    connect: Connect, runner: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn cancels what is left at the end of a shutdown."""
    caplog.set_level(logging.INFO)
    started = asyncio.Event()

    class Busy:
        async def encode(self, *arguments: object) -> None:
            started.set()
            await asyncio.Event().wait()

    async def ask_and_cancel(client: Client) -> None:
        asking = asyncio.create_task(client.http.post("/encode", json=PROMPT))
        await started.wait()
        asking.cancel()
        assert (await asking).status_code == 503

    app = create_app(Settings())
    client = connect(app, Busy())
    runner.run(ask_and_cancel(client))

    assert "POST /encode 503" in caplog.text
    assert "499" not in caplog.text


def test_a_body_that_another_server_waits_for_has_its_time(connect: Connect) -> None:
    """uvicorn, for one, waits for ever."""

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    client = connect(create_app(Settings(request_timeout_s=0.1)))
    headers = {"content-type": "application/json"}
    reply = client.request("POST", "/encode", content=never(), headers=headers)

    assert reply.status_code == 504
    assert "while the body was read" in reply.json()["error"]["message"]
