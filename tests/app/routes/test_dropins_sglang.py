"""SGLang-diffusion's `POST /encode`, under /sglang."""

from typing import Any

import httpx
import msgpack
import numpy as np
import safetensors

from app import wire
from app.wire import Tensor
from tests.app.running import assert_equal, encode
from tests.conftest import Start


def sglang_encode(client: httpx.Client, body: dict[str, Any], path: str = "/sglang/encode") -> dict[str, Any]:
    response = client.post(path, json=body, headers={"accept": "application/msgpack"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/msgpack"
    document = msgpack.unpackb(response.content)
    assert isinstance(document, dict)
    return document


def deserialize(value: dict[str, Any]) -> Tensor:
    """As SGLang's own utils read a tensor: the safetensors file in `data`, its tensor `t`."""
    assert value["__tensor__"] is True
    [(name, stored)] = safetensors.deserialize(value["data"])
    assert (name, stored["shape"]) == ("t", value["shape"])
    dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "BOOL": "bool"}[stored["dtype"]]
    assert value["dtype"] == f"torch.{dtype}"
    return Tensor.frombytes(bytes(stored["data"]), dtype, tuple(stored["shape"]))


def test_the_reply_has_sglang_s_fields(client: httpx.Client) -> None:
    document = sglang_encode(client, {"prompt": "a cat", "negative_prompt": "blurry"})

    assert set(document) == {"request_id", "prompt", "encoder_output", "inference_time_s"}
    assert document["prompt"] == "a cat"
    assert document["inference_time_s"] >= 0
    assert set(document["encoder_output"]) == {
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_attention_mask",
    }


def test_the_request_id_is_that_of_the_header(client: httpx.Client) -> None:
    response = client.post("/sglang/encode", json={"prompt": "a cat"}, headers={"x-request-id": "job-42"})

    assert msgpack.unpackb(response.content)["request_id"] == response.headers["x-request-id"] == "job-42"


def test_prompt_and_negative_are_encoded_each_by_itself(client: httpx.Client) -> None:
    """Encoded together, the shorter would be padded to the longer."""
    path = "/sglang/encode?preset=z-image"
    body = {"prompt": "a cat on a red sofa", "negative_prompt": ""}

    output = sglang_encode(client, body, path)["encoder_output"]

    for side, prompt in (("", "a cat on a red sofa"), ("negative_", "")):
        expected = encode(client, {"prompt": prompt, "preset": "z-image"})
        assert_equal(deserialize(output[f"{side}prompt_embeds"]), expected)
        mask = deserialize(output[f"{side or 'prompt_'}attention_mask"])
        np.testing.assert_array_equal(mask.array, np.ones((1, expected.array.shape[1]), bool))


def test_a_negative_is_encoded_by_the_preset_that_belongs_to_it(client: httpx.Client) -> None:
    """DreamLite marks its prompt, and not its negative."""
    body = {"prompt": "a cat", "negative_prompt": "a cat"}

    output = sglang_encode(client, body, "/sglang/encode?preset=dreamlite")["encoder_output"]

    expected = encode(client, {"prompt": "a cat", "preset": "dreamlite-negative"})
    assert_equal(deserialize(output["negative_prompt_embeds"]), expected)


def test_without_a_negative_there_is_none(client: httpx.Client) -> None:
    for body in ({"prompt": "a cat"}, {"prompt": "a cat", "negative_prompt": None}):
        assert set(sglang_encode(client, body)["encoder_output"]) == {"prompt_embeds", "prompt_attention_mask"}


def test_what_concerns_no_text_encoder_is_accepted(client: httpx.Client) -> None:
    body = {
        "prompt": "a cat",
        "negative_prompt": None,
        "seed": 7,
        "generator_device": "cuda",
        "width": 1024,
        "height": 1024,
        "num_frames": None,
        "fps": None,
        "image_path": None,
        "video_path": None,
        "suppress_logs": True,
        "extra_sampling_params": {"guidance_scale": 4.0},
    }

    assert sglang_encode(client, body)["prompt"] == "a cat"


def test_the_preset_is_the_server_s_default(client: httpx.Client, start_server: Start) -> None:
    with start_server(default_preset="z-image") as server, httpx.Client(base_url=server.url, timeout=60) as other:
        server.wait_until_ready()
        output = sglang_encode(other, {"prompt": "a cat"})["encoder_output"]

    assert_equal(deserialize(output["prompt_embeds"]), encode(client, {"prompt": "a cat", "preset": "z-image"}))


def test_our_own_encode_is_untouched(client: httpx.Client) -> None:
    """A body of a prompt alone could be meant for either; the path says which."""
    own = client.post("/encode", json={"prompt": "a cat"}, headers={"accept": "application/msgpack"})

    assert isinstance(wire.unpack(own.content)["hidden_states"], Tensor)
