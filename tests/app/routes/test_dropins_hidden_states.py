"""heylookitsanllm's `POST /v1/hidden_states` and `/v1/hidden_states/structured`."""

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from app import wire
from app.routes.dropins.chat import Chat
from tests.conftest import Start

TEXT = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"


def hidden_states(client: httpx.Client, body: dict[str, Any], path: str = "/v1/hidden_states") -> dict[str, Any]:
    response = client.post(path, json={"model": "qwen3-4b"} | body)
    assert response.status_code == 200, response.text
    document = response.json()
    assert isinstance(document, dict)
    return document


def decode(document: dict[str, Any]) -> NDArray[np.float32]:
    """As llm-dit-experiments does."""
    if document.get("encoding_format") == "base64":
        raw = base64.b64decode(document["hidden_states"])
        return np.frombuffer(raw, dtype=np.float32).reshape(document["shape"])
    return np.array(document["hidden_states"], np.float32)


def layer(client: httpx.Client, **numbering: list[int]) -> NDArray[Any]:
    body = {"prompt": TEXT, "dtype": "float32"} | numbering
    return wire.unpack(client.post("/encode_layers", json=body).content)["hidden_states"].array[0]


@pytest.mark.parametrize(
    ("index", "numbering"),
    [
        pytest.param(0, {"layers": [0]}, id="first"),
        pytest.param(10, {"hidden_states": [11]}, id="one less than Hugging Face's"),
        pytest.param(-2, {"hidden_states": [-2]}, id="second to last is the same in both"),
        pytest.param(-1, {"layers": [-1]}, id="last is un-normed"),
        pytest.param(35, {"layers": [-1]}, id="last by number"),
        pytest.param(-36, {"layers": [0]}, id="first from the end"),
    ],
)
def test_layer_counts_decoder_layers(client: httpx.Client, index: int, numbering: dict[str, list[int]]) -> None:
    found = decode(hidden_states(client, {"input": TEXT, "layer": index, "encoding_format": "base64"}))

    np.testing.assert_array_equal(found, layer(client, **numbering))


def test_the_default_is_z_image_s_layer_in_lists(client: httpx.Client) -> None:
    document = hidden_states(client, {"input": TEXT})

    assert set(document) == {"hidden_states", "shape", "model", "layer", "dtype"}
    assert (document["model"], document["layer"], document["dtype"]) == ("qwen3-4b", -2, "float32")
    assert document["shape"] == list(decode(document).shape)
    np.testing.assert_array_equal(decode(document), layer(client, layers=[-2]))


def test_base64_says_so(client: httpx.Client) -> None:
    """Its clients read lists unless the reply names the encoding."""
    document = hidden_states(client, {"input": TEXT, "encoding_format": "base64"})

    assert document["encoding_format"] == "base64"
    np.testing.assert_array_equal(decode(document), layer(client, layers=[-2]))


def test_a_list_of_one_is_that_one(client: httpx.Client) -> None:
    one, listed = (hidden_states(client, {"input": given})["hidden_states"] for given in (TEXT, [TEXT]))

    assert one == listed


def test_the_mask_comes_when_asked_for(client: httpx.Client) -> None:
    document = hidden_states(client, {"input": TEXT, "return_attention_mask": True})

    assert document["attention_mask"] == [1] * document["shape"][0]


def test_a_long_text_is_truncated(client: httpx.Client) -> None:
    document = hidden_states(client, {"input": TEXT, "max_length": 3, "encoding_format": "base64"})

    assert document["shape"] == [3, 32]
    # Two runs of other lengths, which round in another order.
    np.testing.assert_allclose(decode(document), layer(client, layers=[-2])[:3], rtol=1e-3, atol=1e-4)


def test_the_model_s_name_may_be_left_out(client: httpx.Client) -> None:
    response = client.post("/v1/hidden_states", json={"input": "a cat"})

    assert response.json()["model"] == client.get("/info").json()["model"]


@pytest.mark.parametrize("path", ["/v1/hidden_states", "/v1/hidden_states/structured"])
def test_half_a_surrogate_pair_in_the_model_s_name_does_not_break_the_reply(client: httpx.Client, path: str) -> None:
    """JSON can escape one, UTF-8 cannot encode it: the reply repeats the name as it was escaped."""
    body = json.dumps({"model": "\ud800", "input": TEXT, "user_prompt": "a cat"})

    response = client.post(path, content=body, headers={"content-type": wire.JSON})

    assert response.status_code == 200
    assert json.loads(response.content)["model"] == "\ud800"


def test_lists_have_the_limit_of_json(start_server: Start) -> None:
    with start_server(max_json_floats=100) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        lists = client.post("/v1/hidden_states", json={"input": TEXT})
        base64 = client.post("/v1/hidden_states", json={"input": TEXT, "encoding_format": "base64"})

    assert lists.status_code == 413
    assert "base64" in lists.json()["error"]["hint"]
    assert base64.status_code == 200


def structured(client: httpx.Client, **parts: Any) -> dict[str, Any]:
    body = {"encoding_format": "base64", "return_formatted_prompt": True, "return_token_boundaries": True} | parts
    return hidden_states(client, body, "/v1/hidden_states/structured")


def test_structured_puts_the_template_around_the_prompt(client: httpx.Client) -> None:
    document = structured(client, user_prompt="a cat")

    assert document["formatted_prompt"] == TEXT
    np.testing.assert_array_equal(decode(document), layer(client, layers=[-2]))


def test_structured_says_no_more_than_it_is_asked(client: httpx.Client) -> None:
    document = hidden_states(client, {"user_prompt": "a cat"}, "/v1/hidden_states/structured")

    assert set(document) == {"hidden_states", "shape", "model", "layer", "dtype"}


def test_boundaries_cut_the_tokens_into_sections(client: httpx.Client) -> None:
    """Each section's tokens are those of its own text, and nothing lies between one and the next."""
    document = structured(
        client,
        user_prompt="a cat",
        system_prompt="Be literal.",
        thinking_content="a cat, then",
        assistant_content="Yes.",
    )
    body = {"prompt": document["formatted_prompt"]}
    [tokenized] = client.post("/tokenize", json=body, headers={"accept": wire.JSON}).json()["prompts"]
    spelled = {
        name: "".join(tokenized["tokens"][bounds["start"] : bounds["end"]]).replace("Ġ", " ").replace("Ċ", "\n")
        for name, bounds in document["token_boundaries"].items()
    }

    assert spelled == {
        "system": "<|im_start|>system\nBe literal.<|im_end|>\n",
        "user": "<|im_start|>user\na cat<|im_end|>\n",
        "think": "<|im_start|>assistant\n<think>\na cat, then\n</think>",
        "assistant": "\n\nYes.<|im_end|>\n<|im_start|>assistant\n",
    }
    assert sum(document["token_counts"][name] for name in spelled) == document["token_counts"]["total"]
    assert document["token_counts"]["total"] == document["shape"][0]


def test_boundaries_end_where_the_window_does(client: httpx.Client) -> None:
    document = structured(client, user_prompt="a cat", system_prompt="Be literal.", max_length=5)

    assert document["token_boundaries"] == {"system": {"start": 0, "end": 5}, "user": {"start": 5, "end": 5}}
    assert document["token_counts"]["total"] == 5


@pytest.mark.parametrize(
    ("chat", "text"),
    [
        pytest.param(Chat("a"), "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", id="user"),
        pytest.param(
            Chat("a", enable_thinking=False),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            id="no thinking",
        ),
        pytest.param(
            Chat("a", assistant="b"),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n"
            "<|im_start|>assistant\n",
            id="an answer gets an empty block of thinking",
        ),
        pytest.param(
            Chat("a", thinking="t"),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nt\n</think>\n\n<|im_end|>\n"
            "<|im_start|>assistant\n",
            id="thinking alone",
        ),
    ],
)
def test_the_chat_is_that_of_qwen3_s_template(chat: Chat, text: str) -> None:
    """The template itself is the judge in tests/parity/test_dropins.py."""
    assert chat.text == text


def test_a_model_that_is_repeated_has_a_bound(client: httpx.Client) -> None:
    responses = [client.post("/v1/hidden_states", json={"input": "a", "model": "m" * n}) for n in (1000, 1001)]

    assert [response.status_code for response in responses] == [200, 422]
