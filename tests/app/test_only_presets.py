"""A service of some presets alone: it lists these, loads no deeper than they need, and refuses the rest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app import wire
from app.cli import main
from tests.conftest import run_server

KLEIN_LAYERS = 27  # of the demo's 36


@pytest.fixture(scope="module")
def klein() -> Iterator[httpx.Client]:
    """A client of a service that has FLUX.2 klein alone."""
    with run_server(only_presets="flux2-klein") as running:
        running.wait_until_ready()
        with httpx.Client(base_url=running.url, timeout=60) as client:
            yield client


def hidden_states(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = client.post(path, json={"prompt": "a cat", "dtype": "float32"} | body)
    assert response.status_code == 200, response.text
    return wire.unpack(response.content)["hidden_states"].array


def test_only_what_is_served_is_listed(klein: httpx.Client) -> None:
    listed = klein.get("/presets").json()

    assert listed["default_preset"] == "flux2-klein"
    assert [preset["name"] for preset in listed["presets"]] == ["flux2-klein"]


def test_layers_that_no_preset_needs_are_not_loaded(klein: httpx.Client, client: httpx.Client) -> None:
    part, whole = klein.get("/info").json(), client.get("/info").json()

    assert (part["num_layers"], whole["num_layers"]) == (KLEIN_LAYERS, 36)
    assert part["parameter_bytes"] < whole["parameter_bytes"]
    assert part["dims"] == whole["dims"]


def test_the_result_is_that_of_the_whole_model(klein: httpx.Client, client: httpx.Client) -> None:
    """A request that names no preset gets the one that was named first."""
    expected = hidden_states(client, "/encode", {"preset": "flux2-klein"})

    np.testing.assert_array_equal(hidden_states(klein, "/encode", {}), expected)
    assert klein.post("/predict", json={"prompt": "a cat"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/encode", {"prompt": "a cat", "preset": "z-image"}, ["'z-image' does not exist", "flux2-klein"]),
        ("/encode_layers", {"prompt": "a cat", "layers": [27]}, ["needs 28 decoder layers", "27 of 36 were loaded"]),
        ("/encode_layers", {"prompt": "a cat", "hidden_states": [-1]}, ["needs 36 decoder layers"]),
        ("/v1/hidden_states", {"input": "a cat", "layer": -2}, ["needs 35 decoder layers"]),
        ("/te?preset=z-image", ["a cat"], ["'z-image' does not exist"]),
    ],
)
def test_what_is_not_served_is_refused(klein: httpx.Client, path: str, body: Any, words: list[str]) -> None:
    response = klein.post(path, json=body)

    assert response.status_code == 422
    for word in words:
        assert word in response.text


def test_layers_within_what_is_loaded_can_be_asked_for(klein: httpx.Client, client: httpx.Client) -> None:
    body = {"preset": "flux2-klein", "layers": [0, 26]}

    np.testing.assert_array_equal(
        hidden_states(klein, "/encode_layers", body), hidden_states(client, "/encode_layers", body)
    )


def test_predict_without_klein_says_what_there_is() -> None:
    """And does not answer a client of FLUX.2 with another system's hidden states."""
    with run_server(only_presets="z-image") as running, httpx.Client(base_url=running.url, timeout=60) as client:
        running.wait_until_ready()
        response = client.post("/predict", json={"prompt": "a cat"})

    assert response.status_code == 422
    assert "'flux2-klein' does not exist; allowed are z-image" in response.text


def test_a_preset_of_a_file_can_be_served(tmp_path: Path) -> None:
    file = tmp_path / "presets.toml"
    file.write_text('[mine]\nbase = "flux2-klein"\nlayers = [3]\n')
    with run_server(presets=file, only_presets="mine") as running:
        running.wait_until_ready()

        assert httpx.get(f"{running.url}/info").json()["num_layers"] == 4


def test_a_service_of_the_embedding_alone_loads_no_layer() -> None:
    with run_server(only_presets="ace-step-lyrics") as running, httpx.Client(base_url=running.url, timeout=60) as alone:
        running.wait_until_ready()

        assert alone.get("/info").json()["num_layers"] == 0
        assert hidden_states(alone, "/encode", {}).shape[-1] == 32


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "36 of 36 are loaded: any preset may be asked for"),
        (["--only-presets", "flux2-klein"], "27 of 36 are loaded: flux2-klein needs the most of the presets served"),
        (["--num-layers", "30", "--only-presets", "flux2-klein"], "30 of 36 are loaded: set by num_layers"),
    ],
)
def test_inspect_says_how_many_layers_are_loaded_and_why(options: list[str], line: str, capsys: Any) -> None:
    assert main(["inspect", "demo", *options]) == 0
    assert line in capsys.readouterr().out
