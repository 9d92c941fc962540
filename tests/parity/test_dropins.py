"""Clients as they are on PyPI, pointed at our service: diffusers' remote text encoder step, and torch.load."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest

from app import wire
from app.reply import torch_file
from app.routes.dropins.chat import Chat
from app.wire import Tensor
from tests.conftest import RunningServer, run_server

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers: make test-parity")

import safetensors.torch  # noqa: E402
from diffusers.modular_pipelines.flux2.encoders import Flux2RemoteTextEncoderStep  # noqa: E402
from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein import Flux2KleinAutoBlocks  # noqa: E402

pytestmark = pytest.mark.parity

# Pixels between 0 and 1 after two steps in float32, as in test_diffusers.py; in bfloat16 about ten of its steps.
SAME_PICTURE = {"float32": 1e-4, "bfloat16": 5e-2}
PROMPT = "a red fox in deep snow"


@pytest.fixture(scope="module")
def encoder_server(qwen3_folder: Path) -> Iterator[RunningServer]:
    """The service on the checkpoint that the pipelines have."""
    with run_server(model=str(qwen3_folder), compute_dtype="float32") as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def address(encoder_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the step looks, as a user would set it."""
    monkeypatch.setattr(Flux2RemoteTextEncoderStep, "REMOTE_URL", f"{encoder_server.url}/predict")
    return Flux2RemoteTextEncoderStep.REMOTE_URL


def klein(**text: Any) -> Any:
    """A modular FLUX.2 klein of tiny random components; with the remote step where it gets no text encoder."""
    torch.manual_seed(0)
    blocks = Flux2KleinAutoBlocks()
    if not text:
        blocks.sub_blocks["text_encoder"] = Flux2RemoteTextEncoderStep()
    pipeline = blocks.init_pipeline()
    pipeline.update_components(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLFlux2(
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=256,
            axes_dims_rope=[4, 4, 4, 4],
            guidance_embeds=False,
        ),
        **text,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def text(qwen3_folder: Path) -> dict[str, Any]:
    """What the pipeline would hold itself."""
    return {
        "text_encoder": transformers.Qwen3ForCausalLM.from_pretrained(qwen3_folder, dtype=torch.float32).eval(),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(qwen3_folder),
    }


def paint(pipeline: Any, prompt: Any) -> np.ndarray[Any, Any]:
    settings = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "np", "output": "images"}
    return np.asarray(pipeline(prompt=prompt, generator=torch.manual_seed(0), **settings), np.float32)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(PROMPT, id="string"),
        pytest.param([PROMPT, "a blue boat 🛶"], id="list"),
        pytest.param(None, id="none"),
    ],
)
def test_the_remote_step_paints_the_picture_of_the_pipeline_s_own_encoder(
    address: str, monkeypatch: pytest.MonkeyPatch, text: dict[str, Any], prompt: Any
) -> None:
    """In float32 on both sides, which the address can ask for."""
    monkeypatch.setattr(Flux2RemoteTextEncoderStep, "REMOTE_URL", f"{address}?dtype=float32")
    own, remote = klein(**text), klein()

    expected, found, other = paint(own, prompt), paint(remote, prompt), paint(remote, "an oak")

    np.testing.assert_allclose(found, expected, atol=SAME_PICTURE["float32"])
    assert np.abs(other[0] - expected[0]).max() > 10 * SAME_PICTURE["float32"]  # the prompt matters to this denoiser


def test_the_remote_step_paints_in_bfloat16_as_it_is_shipped(address: str, text: dict[str, Any]) -> None:
    own, remote = klein(**text), klein()
    remote.to(torch.bfloat16)

    np.testing.assert_allclose(paint(remote, PROMPT), paint(own, PROMPT), atol=SAME_PICTURE["bfloat16"])


def test_the_remote_step_hands_on_our_bits(address: str, encoder_server: RunningServer) -> None:
    """What the pipeline computes with is what /encode answers, bit for bit."""
    body = {"prompts": [PROMPT, ""], "preset": "flux2-klein"}
    ours = wire.unpack(httpx.post(f"{encoder_server.url}/encode", json=body, timeout=60).content)["hidden_states"]

    step = Flux2RemoteTextEncoderStep().init_pipeline()
    embeds = step(prompt=[PROMPT, ""], output="prompt_embeds")

    assert (embeds.dtype, tuple(embeds.shape)) == (torch.bfloat16, (2, 512, 3 * 16))
    np.testing.assert_array_equal(embeds.view(torch.uint16).numpy(), ours.array)


def test_trainers_concatenate_one_prompt_at_a_time(address: str) -> None:
    """As examples/dreambooth/train_dreambooth_lora_flux2.py does: status 200 exactly, torch.load's own defaults."""
    embeds = []
    for prompt in (PROMPT, ""):
        headers = {"Authorization": "Bearer None", "Content-Type": "application/json"}
        response = httpx.post(address, json={"prompt": prompt}, headers=headers, timeout=60)
        assert response.status_code == 200
        embeds.append(torch.load(io.BytesIO(response.content)))

    assert torch.cat(embeds, dim=0).shape == (2, 512, 3 * 16)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 512, 96), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_loads_our_files_bit_for_bit(dtype: str, shape: tuple[int, ...], weights_only: bool) -> None:
    kind = torch.uint32 if dtype == "float32" else torch.uint16
    bits = np.arange(np.prod(shape), dtype=str(kind).removeprefix("torch.")).reshape(shape) * np.uint16(259)
    array = bits if dtype == "bfloat16" else bits.view(dtype)

    loaded = torch.load(io.BytesIO(torch_file.pack(Tensor(array, dtype))), weights_only=weights_only)

    assert (loaded.dtype, tuple(loaded.shape)) == (getattr(torch, dtype), shape)
    assert loaded.is_contiguous()
    np.testing.assert_array_equal(loaded.view(kind).numpy(), bits)


def test_torch_loads_our_files_from_disk_and_maps_them(tmp_path: Path) -> None:
    file = tmp_path / "embeds.pt"
    file.write_bytes(torch_file.pack(Tensor(np.arange(6, dtype=np.float32).reshape(2, 3), "float32")))

    for options in ({}, {"map_location": "cpu"}, {"mmap": True}):
        assert torch.equal(torch.load(file, weights_only=True, **options), torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sdnext_reads_te_in_its_own_dtype(encoder_server: RunningServer, dtype: str) -> None:
    """The lines of SD.Next's modules/sd_te_remote.py, after its request."""
    url = f"{encoder_server.url}/te?preset=flux2-klein&dtype={dtype}"
    response = httpx.post(url, json=[PROMPT], headers={"Content-Type": "application/json"}, timeout=300)
    shape = json.loads(response.headers["shape"])
    tensor = torch.frombuffer(bytearray(response.content), dtype=getattr(torch, dtype)).reshape(shape)

    assert tuple(tensor.shape) == (1, 512, 3 * 16)
    assert tensor.isfinite().all()


def test_sglang_s_tensors_load_with_safetensors(encoder_server: RunningServer) -> None:
    """`load(data)["t"]`, as sglang's post_training/utils.py reads them."""
    url = f"{encoder_server.url}/sglang/encode?preset=flux2-klein"
    response = httpx.post(url, json={"prompt": PROMPT, "negative_prompt": ""}, timeout=60)
    output = msgpack.unpackb(response.content)["encoder_output"]

    for name in ("prompt_embeds", "negative_prompt_embeds"):
        tensor = safetensors.torch.load(output[name]["data"])["t"]
        assert (str(tensor.dtype), list(tensor.shape)) == (output[name]["dtype"], output[name]["shape"])
        assert tuple(tensor.shape) == (1, 512, 3 * 16)


CHATS = [
    Chat("a cat"),
    Chat("a cat", enable_thinking=False),
    Chat("\n a cat ", system="Be\nliteral."),
    Chat("a cat", thinking="first\nthen"),
    Chat("a cat", thinking="\n\nfirst\n\n", assistant="\n\nYes."),
    Chat("a cat", assistant="Yes."),
    Chat("a cat", assistant="<think>\nhm\n</think>\n\nYes.", enable_thinking=False),
    Chat("a cat", thinking="one </think> two <think> three", assistant="a </think> b"),
    Chat("", system="s", thinking="t", assistant="a", enable_thinking=False),
]


@pytest.mark.parametrize("chat", CHATS, ids=[str(number) for number in range(len(CHATS))])
def test_our_chat_is_qwen3_s_template(qwen3_folder: Path, chat: Chat) -> None:
    """Messages as heylookitsanllm builds them from the parts of a structured request."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen3_folder)
    content = (f"<think>\n{chat.thinking}\n</think>\n" if chat.thinking else "") + chat.assistant
    messages = [{"role": "system", "content": chat.system}] if chat.system else []
    messages += [{"role": "user", "content": chat.user}]
    messages += [{"role": "assistant", "content": content}] if content else []

    expected = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=chat.enable_thinking
    )

    assert chat.text == expected
