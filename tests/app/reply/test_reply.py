"""Every format of a reply says the same."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
import safetensors

from app import wire
from app.reply import torch_file
from app.reply.formats import FORMATS
from app.reply.reply import PartsResponse, respond
from app.wire import Tensor
from encoder import PromptEmbeds
from tests.app.reply.torch_file_reader import read_torch_file

BODY = {"prompts": ["a cat on a red sofa", ""], "preset": "z-image"}
REPLY_KEYS = {"model", "preset", "hidden_states", "attention_mask", "num_tokens", "truncated", "usage"}


def encode(client: httpx.Client, accept: str, body: dict[str, Any] | None = None, **params: str) -> httpx.Response:
    response = client.post("/encode", json=body or BODY, headers={"accept": accept}, params=params)
    assert response.status_code == 200, response.text
    return response


@pytest.fixture(scope="module")
def reference(client: httpx.Client) -> dict[str, Any]:
    return wire.unpack(encode(client, wire.MSGPACK).content)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.array.shape == expected.array.shape
    np.testing.assert_array_equal(found.numbers(), expected.numbers())


READERS: dict[str, Callable[[httpx.Response], dict[str, Any]]] = {
    wire.MSGPACK: lambda reply: wire.unpack(reply.content),
    wire.X_MSGPACK: lambda reply: wire.unpack(reply.content),
    wire.VND_MSGPACK: lambda reply: wire.unpack(reply.content),
    wire.JSON: lambda reply: wire.unpack_json(reply.content),
    wire.SAFETENSORS: lambda reply: wire.unpack_safetensors(reply.content),
    wire.TENSOR: lambda reply: {"hidden_states": wire.unpack_tensor(reply.content, reply.headers)},
    torch_file.MEDIA_TYPE: lambda reply: {"hidden_states": read_torch_file(reply.content)},
}


@pytest.mark.parametrize("media_type", FORMATS)
def test_formats_carry_the_same_tensors(client: httpx.Client, media_type: str) -> None:
    body = BODY if FORMATS[media_type].has_mask else {"prompts": ["a cat", "a dog"], "preset": "z-image"}
    expected = wire.unpack(encode(client, wire.MSGPACK, body).content)

    response = encode(client, media_type, body)

    document = READERS[media_type](response)
    assert response.headers["content-type"] == media_type
    assert_same(document["hidden_states"], expected["hidden_states"])
    if FORMATS[media_type].has_mask:
        assert_same(document["attention_mask"], expected["attention_mask"])


def test_the_api_description_lists_every_format(client: httpx.Client) -> None:
    reply = client.get("/openapi.json").json()["paths"]["/encode"]["post"]["responses"]["200"]

    assert set(reply["content"]) == set(FORMATS)


@pytest.mark.parametrize("media_type", [wire.MSGPACK, wire.SAFETENSORS, wire.TENSOR])
def test_the_hidden_states_of_one_prompt_are_sent_uncopied(media_type: str) -> None:
    embeds = PromptEmbeds(np.zeros((100, 400), "<u2"), np.ones(100, bool), "bfloat16")

    response = asyncio.run(respond(FORMATS[media_type], [embeds], {"model": "m"}))

    assert isinstance(response, PartsResponse)
    parts = [np.frombuffer(message, np.uint8) for message in response.messages]
    assert [len(part) for part in parts if np.shares_memory(part, embeds.hidden_states)] == [100 * 400 * 2]
    assert int(response.headers["content-length"]) == sum(len(part) for part in parts)


def test_json_can_hold_plain_numbers(client: httpx.Client, reference: dict[str, Any]) -> None:
    document = encode(client, wire.JSON, encoding="float").json()

    assert document["hidden_states"]["dtype"] == "bfloat16"
    np.testing.assert_array_equal(
        np.array(document["hidden_states"]["data"], np.float32), reference["hidden_states"].float32()
    )
    assert document["attention_mask"]["data"] == reference["attention_mask"].array.tolist()


def test_tensor_binary_is_one_tensor_described_by_headers(client: httpx.Client) -> None:
    """As read by diffusers, utils/remote_utils.py."""
    body = {"prompts": ["a cat", "a dog"], "preset": "flux2-klein", "max_sequence_length": 64}
    expected = wire.unpack(encode(client, wire.MSGPACK, body).content)["hidden_states"]

    response = encode(client, wire.TENSOR, body)

    assert json.loads(response.headers["shape"]) == [2, 64, 96]
    assert response.headers["dtype"] == "bfloat16"
    assert_same(wire.unpack_tensor(response.content, response.headers), expected)


def test_tensor_binary_is_refused_where_only_a_mask_tells_rows_from_padding(client: httpx.Client) -> None:
    response = client.post("/encode", json=BODY, headers={"accept": wire.TENSOR})

    assert response.status_code == 406
    assert "mask" in response.json()["error"]["message"]


def test_the_safetensors_package_reads_our_files(client: httpx.Client, reference: dict[str, Any]) -> None:
    tensors = dict(safetensors.deserialize(encode(client, wire.SAFETENSORS).content))

    hidden_states = tensors["hidden_states"]
    assert (hidden_states["dtype"], hidden_states["shape"]) == ("BF16", list(reference["hidden_states"].array.shape))
    assert bytes(hidden_states["data"]) == bytes(reference["hidden_states"].tobytes())
    assert tensors["attention_mask"]["dtype"] == "BOOL"


def test_safetensors_metadata_holds_the_rest_as_strings(client: httpx.Client, reference: dict[str, Any]) -> None:
    document = wire.unpack_safetensors(encode(client, wire.SAFETENSORS).content)

    assert document["preset"] == "z-image"
    assert json.loads(document["num_tokens"]) == reference["num_tokens"]
    assert json.loads(document["truncated"]) == [False, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_that_of_the_numbers(client: httpx.Client, dtype: str) -> None:
    exact = wire.unpack(encode(client, wire.MSGPACK, BODY | {"dtype": "float32"}).content)["hidden_states"]

    found = wire.unpack(encode(client, wire.MSGPACK, BODY | {"dtype": dtype}).content)["hidden_states"]

    assert found.dtype == dtype
    np.testing.assert_allclose(found.float32(), exact.float32(), rtol=2**-8, atol=2**-10)  # bfloat16 keeps 8 bits


def test_msgpack_reply_is_readable_without_our_code(client: httpx.Client) -> None:
    document = msgpack.unpackb(encode(client, wire.MSGPACK).content)

    assert set(document) == REPLY_KEYS
    tensor = document["hidden_states"]
    assert set(tensor) == {"dtype", "shape", "data"}
    assert len(tensor["data"]) == 2 * np.prod(tensor["shape"])


def test_rows_beyond_a_prompt_are_zero_and_masked(reference: dict[str, Any]) -> None:
    hidden_states, mask = reference["hidden_states"].float32(), reference["attention_mask"].array

    assert mask.sum(axis=1).tolist() == reference["num_tokens"]
    assert (hidden_states[~mask] == 0).all()
    assert (np.abs(hidden_states[mask]).sum(axis=-1) > 0).all()


def test_a_request_may_be_msgpack(client: httpx.Client, reference: dict[str, Any]) -> None:
    for content_type in wire.MSGPACKS:
        response = client.post("/encode", content=msgpack.packb(BODY), headers={"content-type": content_type})
        assert_same(wire.unpack(response.content)["hidden_states"], reference["hidden_states"])


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        pytest.param(None, wire.MSGPACK, id="no header"),
        pytest.param("*/*", wire.MSGPACK, id="anything"),
        pytest.param("application/*", wire.MSGPACK, id="any application"),
        pytest.param("application/json", wire.JSON, id="by name"),
        pytest.param("APPLICATION/JSON; charset=utf-8", wire.JSON, id="case and parameters"),
        pytest.param("application/json, text/plain, */*", wire.JSON, id="a name wins over a wildcard"),
        pytest.param("application/json;q=0.5, application/x-safetensors;q=0.9", wire.SAFETENSORS, id="weights"),
        pytest.param("application/msgpack;q=0, */*;q=0.1", wire.X_MSGPACK, id="weight 0 excludes"),
        pytest.param("tensor/*", wire.TENSOR, id="any tensor"),
        pytest.param("application/json;q=1.5, tensor/binary;q=0.1", wire.TENSOR, id="a weight above 1 excludes"),
        pytest.param("application/json;q=1.0, tensor/binary;q=0.9", wire.JSON, id="a weight of 1 is the largest"),
        pytest.param("text/html, application/json;q=0.1", wire.JSON, id="what is not on offer is passed over"),
    ],
)
def test_accept_chooses_the_format(client: httpx.Client, accept: str | None, expected: str) -> None:
    request = client.build_request("POST", "/encode", json={"prompt": "a cat"})
    request.headers.pop("accept")
    if accept is not None:
        request.headers["accept"] = accept

    assert client.send(request).headers["content-type"] == expected


@pytest.mark.parametrize(
    "accept", ["text/html", "image/*", "*/*;q=0", "nonsense", "application/json;q=x", "*/*;q=1.001"]
)
def test_an_accept_header_without_any_of_our_formats_is_406(client: httpx.Client, accept: str) -> None:
    response = client.post("/encode", json={"prompt": "a cat"}, headers={"accept": accept})

    assert response.status_code == 406
    assert wire.MSGPACK in response.json()["error"]["hint"]
