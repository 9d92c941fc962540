"""The API description says what is true: schemathesis finds nothing that contradicts it.

The same by hand, for a service that runs:

    SCHEMATHESIS_HOOKS=tests/app/schemathesis_hooks.py st run http://127.0.0.1:8000/openapi.json --checks all

Without the hooks, a hundred examples for each route also find that /te and /predict serve several prompts that have the
same number of rows, which the description leaves out.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app import wire
from app.main import create_app
from app.request.fields import BOUND
from app.routes.described import describe
from app.settings import Settings
from encoder import BUILT_IN
from tests.conftest import RunningServer, Start

ROOT = Path(__file__).parents[2]
HOOKS = str(Path(__file__).with_name("schemathesis_hooks.py"))
RUN = """import sys
from schemathesis.cli import schemathesis
sys.exit(schemathesis())"""


def assert_nothing_is_found(url: str, folder: Path, *options: str) -> None:
    """All checks, with valid and with invalid data. What is printed names each finding, with a curl line."""
    checks = ["--no-color", "run", f"{url}/openapi.json", "--checks", "all", "--continue-on-failure"]
    run = subprocess.run(
        [sys.executable, "-c", RUN, *checks, *options],
        env=os.environ | {"SCHEMATHESIS_HOOKS": HOOKS, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert "No issues found" in run.stdout


def test_examples_and_random_requests_agree_with_the_api_description(server: RunningServer, tmp_path: Path) -> None:
    options = ["--phases", "examples,fuzzing", "--max-examples", "5", "--generation-deterministic"]

    assert_nothing_is_found(server.url, tmp_path, *options)


def test_requests_at_the_bounds_agree_with_the_api_description(server: RunningServer, tmp_path: Path) -> None:
    """For one route, because there are thousands for all of them."""
    options = ["--phases", "coverage", "--include-path", "/te", "--generation-deterministic"]

    assert_nothing_is_found(server.url, tmp_path, *options)


@pytest.mark.long
def test_many_requests_agree_with_the_api_description(server: RunningServer, tmp_path: Path) -> None:
    assert_nothing_is_found(server.url, tmp_path, "--max-examples", "300", "--generation-database", "none")


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """All objects in a document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from parts(child)


def schema(described: dict[str, Any], path: str) -> dict[str, Any]:
    found = described["paths"][path]["post"]["requestBody"]["content"][wire.JSON]["schema"]
    assert isinstance(found, dict)
    return found


def test_bounds_are_those_of_the_settings_and_the_model(start_server: Start) -> None:
    with start_server(max_sequence_length=100, only_presets=("z-image", "flux2-klein")) as server:
        server.wait_until_ready()
        described = httpx.get(f"{server.url}/openapi.json").json()

    fields = schema(described, "/encode_layers")["properties"]
    assert fields["max_sequence_length"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 100}
    assert fields["preset"]["anyOf"][0]["enum"] == ["flux2-klein", "z-image", "z-image-turbo"]
    assert fields["layers"]["anyOf"][0]["items"] == {"type": "integer", "minimum": -36, "maximum": 35}
    assert not [part for part in parts(described) if BOUND in part]


def test_presets_that_do_not_fit_the_model_are_not_described(server: RunningServer) -> None:
    fields = schema(server.app.openapi(), "/encode")["properties"]

    assert "flux2-klein-9b" in BUILT_IN
    assert "flux2-klein-9b" not in fields["preset"]["anyOf"][0]["enum"]


def test_the_description_is_there_before_the_model() -> None:
    described = create_app(Settings()).openapi()

    assert schema(described, "/encode")["properties"]["preset"]["anyOf"][0] == {"type": "string"}
    assert not [part for part in parts(described) if BOUND in part]


def test_every_route_describes_what_can_happen_on_any(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()

    for methods in described["paths"].values():
        for operation in methods.values():
            assert {"405", "414", "431"} <= set(operation["responses"])
            assert set(operation["responses"]["405"]["headers"]) == {"allow"}


def test_an_empty_preset_is_none_of_them(client: httpx.Client) -> None:
    """Not the default: a variable that somebody forgot to set would go unnoticed."""
    for path, body in (("/predict", {"prompt": "a"}), ("/te", "a"), ("/sglang/encode", {"prompt": "a"})):
        assert client.post(f"{path}?preset=", json=body).status_code == 422


def test_the_description_is_made_beside_the_event_loop(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI takes a fifth of a second for it."""
    threads = []
    original = FastAPI.openapi

    def openapi(app: FastAPI) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return original(app)

    monkeypatch.setattr(FastAPI, "openapi", openapi)
    with start_server() as server:
        assert httpx.get(f"{server.url}/openapi.json").status_code == 200

    assert threads[0].startswith("builder")


def test_the_description_is_made_once(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes milliseconds, in which nobody else is answered."""
    made = []
    monkeypatch.setattr("app.main.described.describe", lambda app: made.append(app) or describe(app))
    with start_server() as server:
        server.wait_until_ready()
        first, second = (httpx.get(f"{server.url}/openapi.json") for _ in range(2))

    assert (len(made), second.content, second.headers["content-type"]) == (1, first.content, "application/json")
