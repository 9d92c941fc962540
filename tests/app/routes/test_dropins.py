"""What the routes for foreign clients share, and the two that answer with one bare tensor: /predict and /te."""

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app import wire
from app.wire import Tensor
from tests.app.reply.torch_file_reader import read_torch_file
from tests.app.running import MANY, ONE_BY_ONE, abandoned_request, assert_equal, encode, metric, wait_for
from tests.conftest import RunningServer, Start

# A body of each protocol, as its clients send it.
PREDICT: Any = {"prompt": ["a cat"]}
TE: Any = ["a cat"]
SGLANG: Any = {"prompt": "a cat", "negative_prompt": "", "seed": 1, "generator_device": "cuda", "width": 1024}
HIDDEN_STATES: Any = {
    "input": "a cat",
    "model": "qwen3-4b",
    "layer": -2,
    "max_length": 512,
    "encoding_format": "base64",
}
STRUCTURED: Any = {"user_prompt": "a cat", "model": "qwen3-4b"}
DROP_INS = [
    pytest.param("/predict", PREDICT, id="predict"),
    pytest.param("/te", TE, id="te"),
    pytest.param("/sglang/encode", SGLANG, id="sglang"),
    pytest.param("/v1/hidden_states", HIDDEN_STATES, id="hidden_states"),
    pytest.param("/v1/hidden_states/structured", STRUCTURED, id="structured"),
]
SECRET = "hf_SECRET"


@pytest.mark.parametrize(("path", "body"), DROP_INS)
def test_headers_and_metrics_are_those_of_encode(client: httpx.Client, path: str, body: object) -> None:
    labels = {"route": path, "status": "200"}
    answered = metric(client, "qwen3_encoder_requests_total", **labels)
    encoded = metric(client, "qwen3_encoder_inference_seconds_count")

    response = client.post(path, json=body)

    assert response.status_code == 200, response.text
    for name in ("x-request-id", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time", "x-cache"):
        assert name in response.headers
    assert metric(client, "qwen3_encoder_requests_total", **labels) == answered + 1
    assert metric(client, "qwen3_encoder_inference_seconds_count") > encoded


@pytest.mark.parametrize(("path", "body"), DROP_INS)
@pytest.mark.parametrize("token", [SECRET, "None"])
def test_a_hugging_face_token_is_ignored_and_never_logged(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, path: str, body: object, token: str
) -> None:
    """diffusers sends the user's token to whatever address it is given, and the word None where there is none."""
    caplog.set_level(logging.DEBUG)

    response = client.post(path, json=body, headers={"authorization": f"Bearer {token}"})
    client.get("/livez")  # by its answer the first line is in the log

    assert response.status_code == 200
    assert f"POST {path} 200" in caplog.text
    assert f"Bearer {token}" not in caplog.text
    assert SECRET not in caplog.text


def test_with_a_key_configured_the_drop_ins_ask_for_it(start_server: Start) -> None:
    """Without a model loaded: nothing is looked at before the key."""
    with start_server(api_key="correct horse") as server:
        statuses = {
            httpx.post(server.url + parameter.values[0], headers={"authorization": "Bearer None"}).status_code
            for parameter in DROP_INS
        }

    assert statuses == {401}


@pytest.mark.parametrize(("path", "body"), [case for case in DROP_INS if case.id != "te"])
def test_fields_that_we_do_not_know_are_ignored(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Clients of these routes were written for servers that ignored them."""
    known, more = (client.post(path, json=body | extra) for extra in ({}, {"future_option": {"a": 1}}))

    assert more.status_code == 200
    assert len(more.content) == len(known.content)


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        pytest.param("/predict", {}, "prompt", id="predict without a prompt"),
        pytest.param("/predict", {"prompt": 5}, "prompt", id="predict number"),
        pytest.param("/predict", {"prompt": ["a", None]}, "prompt[1]", id="predict null in a list"),
        pytest.param("/predict", {"prompt": []}, "prompts", id="predict no prompts"),
        pytest.param("/predict", ["a"], "body", id="predict list"),
        pytest.param("/te", {"prompt": "a"}, "body", id="te object"),
        pytest.param("/te", [1], "[0]", id="te number"),
        pytest.param("/te?preset=sdxl", ["a"], "sdxl", id="te unknown preset"),
        pytest.param("/te?dtype=int8", ["a"], "dtype", id="te unknown dtype"),
        pytest.param("/sglang/encode", {"prompt": ["a"]}, "prompt", id="sglang list"),
        pytest.param("/sglang/encode", {"prompt": "a", "image_path": ["/etc/passwd"]}, "image_path", id="sglang image"),
        pytest.param("/sglang/encode", {"prompt": "a", "video_path": "/a.mp4"}, "video_path", id="sglang video"),
        pytest.param("/v1/hidden_states", {}, "input", id="hidden_states without input"),
        pytest.param("/v1/hidden_states", {"input": ["a", "b"]}, "one", id="hidden_states of two texts"),
        pytest.param("/v1/hidden_states", {"input": []}, "one", id="hidden_states of none"),
        pytest.param("/v1/hidden_states", {"input": "a", "layer": 36}, "35", id="hidden_states layer"),
        pytest.param("/v1/hidden_states", {"input": "a", "layer": True}, "layer", id="hidden_states layer of bool"),
        pytest.param("/v1/hidden_states", {"input": "a", "max_length": 0}, "max_length", id="hidden_states window"),
        pytest.param("/v1/hidden_states", {"input": "a", "encoding_format": "x"}, "base64", id="hidden_states format"),
        pytest.param("/v1/hidden_states/structured", {"input": "a"}, "user_prompt", id="structured without a prompt"),
    ],
)
def test_what_no_client_sends_is_422(client: httpx.Client, path: str, body: object, word: str) -> None:
    response = client.post(path, json=body)

    assert response.status_code == 422
    assert word in response.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), DROP_INS)
def test_a_form_is_415_as_everywhere(client: httpx.Client, path: str, body: object) -> None:
    """Any web page may post one."""
    response = client.post(path, content=json.dumps(body), headers={"content-type": "text/plain"})

    assert response.status_code == 415


@pytest.mark.parametrize(("path", "body"), [("/predict", {"prompt": MANY}), ("/te", MANY)], ids=["predict", "te"])
def test_a_client_that_leaves_frees_its_place(start_server: Start, path: str, body: object) -> None:
    with start_server(**ONE_BY_ONE, predict_preset="last-hidden-state") as server:
        server.wait_until_ready()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            with abandoned_request(server.url + path, body):
                wait_for(lambda: metric(client, "qwen3_encoder_queued_prompts") > 0)
            wait_for(lambda: metric(client, "qwen3_encoder_queued_prompts") == 0)
            prompts_run = metric(client, "qwen3_encoder_prompts_total")

    assert prompts_run < len(MANY)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        pytest.param("a cat", ["a cat"], id="trainer"),
        pytest.param(["a cat", "a dog"], ["a cat", "a dog"], id="modular step"),
        pytest.param([""], [""], id="modular step without a prompt"),
        pytest.param("", [""], id="empty"),
        pytest.param(None, [""], id="null"),
    ],
)
def test_predict_answers_flux2_s_embeds_as_a_torch_file(
    client: httpx.Client, prompt: object, prompts: list[str]
) -> None:
    response = client.post("/predict", json={"prompt": prompt}, headers={"authorization": "Bearer None"})

    assert response.status_code == 200
    found = read_torch_file(response.content)
    assert found.array.shape == (len(prompts), 512, 3 * 32)
    assert_equal(found, encode(client, {"prompts": prompts, "preset": "flux2-klein"}))


def test_predict_s_preset_is_a_setting_and_the_address_wins(client: httpx.Client, start_server: Start) -> None:
    with start_server(predict_preset="ollama/flux2-klein") as server:
        server.wait_until_ready()
        by_setting, by_address = (
            read_torch_file(httpx.post(server.url + path, json=PREDICT, timeout=60).content)
            for path in ("/predict", "/predict?preset=z-image&dtype=float32")
        )

    assert_equal(by_setting, encode(client, {"prompt": "a cat", "preset": "ollama/flux2-klein"}))
    assert_equal(by_address, encode(client, {"prompt": "a cat", "preset": "z-image", "dtype": "float32"}))


@pytest.mark.parametrize("path", ["/predict?preset=z-image", "/te?preset=z-image"])
def test_rows_that_only_a_mask_could_tell_apart_are_refused(client: httpx.Client, path: str) -> None:
    """A preset that cuts its padding gives prompts of two lengths, and these protocols have no mask."""
    body = ["a cat", "a cat on a red sofa"] if path.startswith("/te") else {"prompt": ["a cat", "a cat on a red sofa"]}

    response = client.post(path, json=body)

    assert response.status_code == 406
    assert "mask" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "prompts"),
    [pytest.param(["a cat", "a dog"], ["a cat", "a dog"], id="list"), pytest.param("a cat", ["a cat"], id="string")],
)
def test_te_answers_bytes_and_their_shape(client: httpx.Client, body: object, prompts: list[str]) -> None:
    """Read as SD.Next does: json.loads(headers["shape"]), and the bytes in a dtype that the client assumes."""
    response = client.post("/te?preset=flux2-klein", json=body)

    shape = tuple(json.loads(response.headers["shape"]))
    assert response.headers["dtype"] == "bfloat16"
    assert_equal(
        Tensor.frombytes(response.content, "bfloat16", shape),
        encode(client, {"prompts": prompts, "preset": "flux2-klein"}),
    )


def test_te_answers_in_the_dtype_that_its_client_assumes(client: httpx.Client) -> None:
    response = client.post("/te?dtype=float16", json=TE)

    found = np.frombuffer(response.content, np.float16).reshape(json.loads(response.headers["shape"]))
    assert_equal(Tensor(found, "float16"), encode(client, {"prompt": "a cat", "dtype": "float16"}))


def test_te_uses_the_server_s_default_preset(client: httpx.Client, start_server: Start) -> None:
    with start_server(default_preset="z-image") as server:
        server.wait_until_ready()
        response = httpx.post(f"{server.url}/te", json=TE, timeout=60)

    assert_equal(
        wire.unpack_tensor(response.content, response.headers), encode(client, {"prompt": "a cat", "preset": "z-image"})
    )


def test_a_torch_file_is_a_format_of_encode_too(client: httpx.Client) -> None:
    body = {"prompt": "a cat", "preset": "flux2-klein", "max_sequence_length": 32}

    response = client.post("/encode", json=body, headers={"accept": "application/x-pytorch"})

    assert_equal(read_torch_file(response.content), encode(client, body))


def test_presets_of_a_file_are_served_and_listed(start_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('[mine]\nbase = "flux2-klein"\nmax_sequence_length = 48\naliases = ["my/klein"]\n')
    with start_server(presets=file, default_preset="my/klein", predict_preset="mine") as server:
        server.wait_until_ready()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            listed = client.get("/presets").json()
            shapes = [encode(client, {"prompt": "a cat"} | named).array.shape for named in ({}, {"preset": "mine"})]
            predicted = read_torch_file(client.post("/predict", json=PREDICT).content)

    assert listed["default_preset"] == "my/klein"
    assert listed["presets"][-1]["name"] == "mine"
    assert listed["presets"][-1]["source"] == "my.toml"
    assert listed["presets"][-1]["fits"]
    assert {*shapes, predicted.array.shape} == {(1, 48, 96)}


def test_the_api_description_has_the_drop_ins(server: RunningServer) -> None:
    described = server.app.openapi()["paths"]

    for parameter in DROP_INS:
        operation = described[parameter.values[0]]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]
        assert {"200", "401", "406", "413", "415", "422", "429", "503"} <= set(operation["responses"])
