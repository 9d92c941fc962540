"""Which routes need a key, ids, and what reaches the log."""

import logging
import re
from collections.abc import Iterator

import httpx
import pytest

from app.middleware import OPEN_PATHS
from tests.conftest import RunningServer, run_server

KEY = "correct horse"
SECRET = "hf_SECRET"


def routes(server: RunningServer) -> list[tuple[str, str]]:
    """Every method and path of the API description, and the description itself."""
    described = server.app.openapi()["paths"]
    walked = [(method.upper(), path) for path, methods in described.items() for method in methods]
    return [*walked, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/nothing")]


@pytest.fixture(scope="module")
def locked_server() -> Iterator[RunningServer]:
    """A service that asks for KEY, ready."""
    with run_server(api_key=KEY) as server:
        server.wait_until_ready()
        yield server


def test_without_the_key_no_route_answers_but_liveness_and_readiness(locked_server: RunningServer) -> None:
    """The routes come from the API description, so a new one is covered the day it is written."""
    with httpx.Client(base_url=locked_server.url) as client:
        answers = {path: client.request(method, path) for method, path in routes(locked_server)}

    assert {"/encode", "/encode_layers", "/tokenize", "/info", "/presets", "/health", "/metrics"} < set(answers)
    assert {path for path, answer in answers.items() if answer.status_code != 401} == OPEN_PATHS
    assert all(
        answer.headers["www-authenticate"] == "Bearer" for path, answer in answers.items() if path not in OPEN_PATHS
    )


@pytest.mark.parametrize(
    ("header", "status"),
    [
        pytest.param(f"Bearer {KEY}", 200, id="right"),
        pytest.param(f"bearer {KEY}", 200, id="scheme in lower case"),
        pytest.param(f"Basic {KEY}", 401, id="other scheme"),
        pytest.param(KEY, 401, id="no scheme"),
        pytest.param(f"Bearer {KEY}x", 401, id="longer"),
        pytest.param(f"Bearer {KEY[:-1]}", 401, id="shorter"),
        pytest.param("Bearer", 401, id="empty"),
        pytest.param("Bearer None", 401, id="what diffusers sends without a token"),
        pytest.param("Bearer kéy", 401, id="not ASCII"),
    ],
)
def test_only_the_right_key_opens(locked_server: RunningServer, header: str, status: int) -> None:
    response = httpx.get(f"{locked_server.url}/openapi.json", headers={"authorization": header.encode("latin-1")})

    assert response.status_code == status


def test_without_a_configured_key_any_authorization_is_ignored_and_never_logged(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers sends the user's Hugging Face token to whatever encoder it is pointed at."""
    caplog.set_level(logging.DEBUG)

    response = client.post("/encode", json={"prompt": "hush"}, headers={"authorization": f"Bearer {SECRET}"})
    client.get("/livez")  # by its answer the first line is in the log

    assert response.status_code == 200
    assert "POST /encode 200" in caplog.text
    assert SECRET not in caplog.text
    assert "hush" not in caplog.text


def test_a_request_id_comes_back(client: httpx.Client) -> None:
    assert client.get("/livez", headers={"x-request-id": "job-42"}).headers["x-request-id"] == "job-42"


@pytest.mark.parametrize("wanted", ["", "a b", "x" * 129, "a;b", "{jndi}", "é"])
def test_a_harmful_request_id_is_replaced(client: httpx.Client, wanted: str) -> None:
    found = client.get("/livez", headers={"x-request-id": wanted.encode("latin-1")}).headers["x-request-id"]

    assert re.fullmatch("[0-9a-f]{32}", found)


def test_a_path_cannot_break_the_log_line(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    client.get("/a%0aINFO%20forged")
    client.get("/livez")  # by its answer the first line is in the log

    line, *_ = [record.getMessage() for record in caplog.records if record.name == "app.request_context"]
    assert "forged" in line
    assert "\n" not in line
