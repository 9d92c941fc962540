"""The short way to a route that works on prompts answers as FastAPI does."""

import logging

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tests.conftest import RunningServer, Start

BODY = {"prompt": "a cat"}


def test_prompts_meet_no_layer_of_fastapi_and_all_else_does(
    server: RunningServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another method of the same path is FastAPI's, which knows what to say."""
    met: list[tuple[str, str]] = []
    stack = server.app.middleware_stack
    assert stack is not None

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        met.append((scope["method"], scope["path"]))
        await stack(scope, receive, send)

    monkeypatch.setattr(server.app, "middleware_stack", note)
    for path in ("/encode", "/tokenize"):
        assert client.post(path, json=BODY).status_code == 200
    assert client.post("/encode_layers", json={**BODY, "layers": [3]}).status_code == 200
    assert met == []

    assert client.get("/encode").status_code == 405
    assert client.post("/encode/", json=BODY).status_code == 404
    assert client.get("/livez").status_code == 200
    assert met == [("GET", "/encode"), ("POST", "/encode/"), ("GET", "/livez")]


def test_a_request_that_went_the_short_way_is_counted_by_its_route(client: httpx.Client) -> None:
    client.post("/encode", json=BODY)

    assert 'qwen3_encoder_requests_total{route="/encode",status="200"}' in client.get("/metrics").text


def test_a_bug_on_the_short_way_is_500_without_its_details(
    start_server: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has them, under the request's id."""
    with start_server() as server:
        server.wait_until_ready()
        monkeypatch.setattr(server.app.state.engine, "encode", lambda *arguments: 1 / 0)
        with caplog.at_level(logging.ERROR):
            response = httpx.post(f"{server.url}/encode", json=BODY, headers={"x-request-id": "req-8"})

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] == "req-8"
    assert "ZeroDivisionError" not in response.text
    assert "req-8" in caplog.text
    assert "ZeroDivisionError" in caplog.text
