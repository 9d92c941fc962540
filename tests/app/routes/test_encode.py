"""What the routes that work on prompts answer."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app import wire
from tests.checkpoints import write_checkpoint, write_json
from tests.conftest import Start


def post(client: httpx.Client, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = client.post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return wire.unpack(response.content)


def test_without_a_preset_comes_the_last_hidden_state(client: httpx.Client) -> None:
    plain = post(client, "/encode", {"prompt": "a cat"})
    named = post(client, "/encode_layers", {"prompt": "a cat", "hidden_states": [-1]})

    assert plain["preset"] == "last-hidden-state"
    assert plain["hidden_states"].tobytes() == named["hidden_states"].tobytes()


def test_layers_and_hidden_states_are_two_numberings_of_the_same(client: httpx.Client) -> None:
    """FLUX.2 klein's layers, both ways."""
    body = {"prompt": "a cat", "preset": "flux2-klein", "max_sequence_length": 64}

    layers = post(client, "/encode_layers", body | {"layers": [8, 17, 26]})
    hidden_states = post(client, "/encode_layers", body | {"hidden_states": [9, 18, 27]})
    preset = post(client, "/encode", body)

    assert layers["hidden_states"].tobytes() == hidden_states["hidden_states"].tobytes()
    assert layers["hidden_states"].tobytes() == preset["hidden_states"].tobytes()


def test_no_layer_runs_after_the_last_one_wanted(client: httpx.Client) -> None:
    body = {"prompt": "counted alone", "preset": "flux2-klein", "max_sequence_length": 64}

    reply = post(client, "/encode", body)

    assert reply["usage"]["layers_run"] == 27


def test_combine_concatenates_or_stacks(client: httpx.Client) -> None:
    body = {"prompts": ["a cat", "a cat on a sofa"], "layers": [0, 5]}

    concat = post(client, "/encode_layers", body)["hidden_states"].float32()  # (B, L, n*D)
    stack = post(client, "/encode_layers", body | {"combine": "stack"})["hidden_states"].float32()  # (B, n, L, D)

    assert concat.shape[2] == 2 * stack.shape[3]
    np.testing.assert_array_equal(np.concatenate([stack[:, 0], stack[:, 1]], axis=-1), concat)


@pytest.mark.parametrize(
    ("padding", "rows", "real"),
    [
        pytest.param("preset", 32, 5, id="preset: live rows to the window"),
        pytest.param("max_length", 32, 5, id="max_length"),
        pytest.param("longest", 5, 5, id="longest"),
        pytest.param("none", 5, 5, id="none"),
    ],
)
def test_padding_decides_the_rows(client: httpx.Client, padding: str, rows: int, real: int) -> None:
    body = {"prompt": "a cat", "preset": "flux2-klein", "prefix": "", "suffix": "", "max_sequence_length": 32}

    reply = post(client, "/encode", body | {"padding": padding})

    assert reply["hidden_states"].array.shape[1] == rows
    assert reply["attention_mask"].array.sum() == real


def test_max_length_pads_with_zeros_where_the_preset_cuts(client: httpx.Client) -> None:
    reply = post(client, "/encode", {"prompt": "a cat", "preset": "z-image", "padding": "max_length"})

    mask = reply["attention_mask"].array
    assert mask.shape == (1, 512)
    assert (reply["hidden_states"].float32()[~mask] == 0).all()


def test_a_long_prompt_is_truncated_and_says_so(client: httpx.Client) -> None:
    reply = post(client, "/encode", {"prompts": ["a cat " * 50, "a"], "max_sequence_length": 16})

    assert reply["num_tokens"] == [16, 1]
    assert reply["truncated"] == [True, False]


@pytest.mark.parametrize("prompt", ["", " ", "ä", "🐈‍⬛", "猫", "\x00", "<|im_end|>", "a\r\nb", "\u202e", "x" * 5000])
def test_any_text_is_a_prompt(client: httpx.Client, prompt: str) -> None:
    reply = post(client, "/encode", {"prompt": prompt, "preset": "z-image", "max_sequence_length": 64})

    assert np.isfinite(reply["hidden_states"].float32()).all()


def test_prompts_keep_their_order_and_may_repeat(client: httpx.Client) -> None:
    reply = post(client, "/encode", {"prompts": ["one", "two", "one"], "padding": "longest"})

    first, second, third = reply["hidden_states"].float32()
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_headers_say_where_the_time_went(client: httpx.Client) -> None:
    response = client.post("/encode", json={"prompt": "a cat"})

    for name in ("x-tokenization-time", "x-queue-time", "x-inference-time", "x-total-time"):
        assert float(response.headers[name]) >= 0
    assert int(response.headers["content-length"]) == len(response.content)


def test_tokenize_shows_what_would_be_encoded(client: httpx.Client) -> None:
    body = {"prompts": ["a cat"], "preset": "z-image"}

    [prompt] = client.post("/tokenize", json=body).json()["prompts"]

    assert prompt["text"] == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
    assert prompt["tokens"][0] == "<|im_start|>"
    assert len(prompt["input_ids"]) == len(prompt["tokens"]) == prompt["num_tokens"]
    assert prompt["num_tokens"] == post(client, "/encode", body)["num_tokens"][0]
    assert prompt["truncated"] is False


@pytest.mark.parametrize("media_type", wire.MSGPACKS)
def test_tokenize_answers_msgpack_too(client: httpx.Client, media_type: str) -> None:
    response = client.post("/tokenize", json={"prompt": "a cat"}, headers={"accept": media_type})

    assert response.headers["content-type"] == media_type
    assert wire.unpack(response.content) == client.post("/tokenize", json={"prompt": "a cat"}).json()


def test_presets_say_whether_they_fit_the_checkpoint(client: httpx.Client) -> None:
    presets = {preset["name"]: preset for preset in client.get("/presets").json()["presets"]}

    assert presets["flux2-klein"]["fits"] is True
    assert presets["flux2-klein"]["layers"] == [8, 17, 26]
    assert presets["flux2-klein-4b"]["fits"] is False
    assert "2560" in presets["flux2-klein-4b"]["reason"]


def test_presets_say_which_token_the_tokenizer_lacks(tmp_path: Path, start_server: Start) -> None:
    """A padding row of any other token would be another row."""
    write_checkpoint(tmp_path, num_hidden_layers=28)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] != "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})

    with start_server(model=str(tmp_path)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        presets = {preset["name"]: preset for preset in client.get("/presets").json()["presets"]}
        refused = client.post("/encode", json={"prompt": "a cat", "preset": "flux2-klein"})
        served = client.post("/encode", json={"prompt": "a cat", "preset": "z-image"})

    assert presets["z-image"]["fits"] and not presets["flux2-klein"]["fits"]
    assert presets["flux2-klein"]["reason"].startswith("pad_token: flux2-klein needs the token '<|endoftext|>'")
    assert (refused.status_code, served.status_code) == (422, 200)
    assert presets["flux2-klein"]["reason"] in refused.text


def test_info_says_what_is_served(client: httpx.Client) -> None:
    info = client.get("/info").json()

    assert info["model"] == "demo"
    assert info["random_weights"] is True
    assert info["loras"] == []
    assert info["dims"]["num_hidden_layers"] == 36
    assert info["limits"]["max_prompts"] == 64
    assert "mlx" in info["versions"]
