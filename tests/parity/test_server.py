"""The same comparison through HTTP: what a frontend reads from the reply equals what transformers computes.

The replies are decoded here by hand, as a client without our code would.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load

from tests.conftest import run_server
from tests.reference import relative_error

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")

pytestmark = pytest.mark.parity

CLOSE = 1e-4  # as in test_diffusers.py: float32 on both sides
HALF = 2**-8  # bfloat16 keeps 8 bits: at most half a unit in the last, of the number itself

PROMPTS = ["a red fox 🦊 in deep snow", "", "\n一只红色的狐狸"]
KLEIN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TO_512 = {"padding": "max_length", "max_length": 512, "truncation": True}


@pytest.fixture(scope="module")
def model_server(qwen3_folder: Path) -> Iterator[str]:
    """Where a service answers that has loaded the checkpoint."""
    with run_server(model=str(qwen3_folder)) as server:
        server.wait_until_ready()
        yield server.url


@pytest.fixture(scope="module")
def model(qwen3_folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(qwen3_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(qwen3_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(qwen3_folder)


def their_hidden_states(model: Any, tokenizer: Any, texts: list[str], **padding: Any) -> tuple[Any, NDArray[np.bool_]]:
    """(N+1, B, L, D) and the mask (B, L)."""
    inputs = tokenizer(texts, return_tensors="pt", **padding)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    return torch.stack(output.hidden_states).numpy(), inputs.attention_mask.bool().numpy()


def post(url: str, route: str, **request: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_], dict[str, Any]]:
    """Hidden states as float32, the mask, and the whole reply."""
    response = httpx.post(f"{url}{route}", json=request, timeout=120)
    assert response.status_code == 200, response.text
    reply = msgpack.unpackb(response.content)
    return decode(reply["hidden_states"]), decode(reply["attention_mask"]), reply


def decode(tensor: dict[str, Any]) -> NDArray[Any]:
    """dtype, shape and little-endian bytes to an array."""
    match tensor["dtype"]:
        case "bfloat16":
            flat = (np.frombuffer(tensor["data"], "<u2").astype("<u4") << 16).view("<f4")
        case name:
            flat = np.frombuffer(tensor["data"], {"float32": "<f4", "float16": "<f2", "bool": "?"}[name])
    return flat.reshape(tensor["shape"])


def test_flux2_klein_over_http_equals_transformers(model_server: str, model: Any, tokenizer: Any) -> None:
    """All 512 rows of every prompt, three layers side by side."""
    states, mask = their_hidden_states(model, tokenizer, [KLEIN.format(p) for p in PROMPTS], **TO_512)
    hidden_states, attention_mask, reply = post(
        model_server, "/encode", prompts=PROMPTS, preset="flux2-klein", dtype="float32"
    )

    assert relative_error(hidden_states, np.concatenate([states[9], states[18], states[27]], axis=-1)) < CLOSE
    assert np.array_equal(attention_mask, mask)
    assert reply["num_tokens"] == mask.sum(axis=1).tolist()
    assert reply["usage"]["layers_run"] == 27


def test_z_image_over_http_equals_transformers(model_server: str, model: Any, tokenizer: Any) -> None:
    """Real rows of every prompt; behind the shorter ones stand zeros that the mask tells apart."""
    states, mask = their_hidden_states(model, tokenizer, [CHAT.format(p) for p in PROMPTS], padding=True)
    hidden_states, attention_mask, _ = post(model_server, "/encode", prompts=PROMPTS, preset="z-image", dtype="float32")

    assert np.array_equal(attention_mask, mask)
    assert relative_error(hidden_states[mask], states[-2][mask]) < CLOSE
    assert not hidden_states[~mask].any()


def test_request_without_preset_gives_the_last_hidden_state(model_server: str, model: Any, tokenizer: Any) -> None:
    """As `model(**tokenizer(prompt)).last_hidden_state`."""
    prompt = PROMPTS[0]
    states, mask = their_hidden_states(model, tokenizer, [prompt])
    hidden_states, attention_mask, _ = post(model_server, "/encode", prompt=prompt, dtype="float32")

    assert relative_error(hidden_states, states[-1]) < CLOSE
    assert np.array_equal(attention_mask, mask)


def test_every_hidden_state_over_http_equals_transformers(model_server: str, model: Any, tokenizer: Any) -> None:
    """All that /encode_layers can give, in one reply."""
    states, _ = their_hidden_states(model, tokenizer, PROMPTS[:1])
    every = list(range(len(states)))
    stacked, _, _ = post(
        model_server, "/encode_layers", prompt=PROMPTS[0], hidden_states=every, combine="stack", dtype="float32"
    )
    joined, _, _ = post(model_server, "/encode_layers", prompt=PROMPTS[0], hidden_states=every, dtype="float32")

    for k, state in enumerate(states):
        assert relative_error(stacked[:, k], state) < CLOSE, f"hidden state {k}"
    assert np.array_equal(joined, np.concatenate(list(stacked.swapaxes(0, 1)), axis=-1))


def test_layers_over_http_are_one_below_hidden_states(model_server: str) -> None:
    """Both numberings exist in the field; a mistake between them gives a plausible picture of another prompt."""
    request = {"prompt": PROMPTS[0], "preset": "flux2-klein"}
    by_layer, _, first = post(model_server, "/encode_layers", layers=[8, 17, 26], **request)
    by_state, _, second = post(model_server, "/encode_layers", hidden_states=[9, 18, 27], **request)
    by_preset, _, third = post(model_server, "/encode", **request)

    assert by_layer.shape == by_state.shape == by_preset.shape == (1, 512, 48)
    assert first["hidden_states"]["data"] == second["hidden_states"]["data"] == third["hidden_states"]["data"]


def test_default_reply_is_the_float32_reply_in_bfloat16(model_server: str) -> None:
    """Half the bytes, rounded once."""
    half, _, reply = post(model_server, "/encode", prompts=PROMPTS, preset="z-image")
    full, _, _ = post(model_server, "/encode", prompts=PROMPTS, preset="z-image", dtype="float32")

    assert reply["hidden_states"]["dtype"] == "bfloat16"
    assert (np.abs(half - full) <= HALF * np.abs(full)).all()


def test_safetensors_reply_holds_the_same_numbers(model_server: str) -> None:
    """Whoever has safetensors at hand needs no msgpack."""
    full, mask, _ = post(model_server, "/encode", prompts=PROMPTS, preset="z-image", dtype="float32")
    response = httpx.post(
        f"{model_server}/encode",
        json={"prompts": PROMPTS, "preset": "z-image", "dtype": "float32"},
        headers={"Accept": "application/x-safetensors"},
        timeout=120,
    )
    tensors = load(response.content)

    assert np.array_equal(tensors["hidden_states"], full)
    assert np.array_equal(tensors["attention_mask"].astype(bool), mask)


def test_long_prompt_over_http_is_truncated_as_by_the_tokenizer(model_server: str, model: Any, tokenizer: Any) -> None:
    """A caller learns that the end was cut, and still gets what the reference pipeline gets."""
    prompt = "a lighthouse over a stormy sea, oil on canvas, " * 60
    states, mask = their_hidden_states(model, tokenizer, [CHAT.format(prompt)], **TO_512)
    hidden_states, _, reply = post(model_server, "/encode", prompt=prompt, preset="z-image", dtype="float32")

    assert reply["truncated"] == [True] and mask.all()
    assert relative_error(hidden_states, states[-2]) < CLOSE
