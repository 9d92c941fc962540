"""Single files as ComfyUI holds them: every key form and quantization, to the hidden states of the plain weights."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from encoder import LAST_HIDDEN_STATE, TextEncoder
from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, write_checkpoint, write_tensors
from tests.encoder.checkpoint.comfyui_files import (
    Quantize,
    Stored,
    block_float8,
    float8,
    int8,
    mxfp8,
    nvfp4,
    write_file,
)

DIMS = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
PROMPTS = ["a cat", "a cat on a red sofa"]


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, NDArray[np.float32]]:
    return write_checkpoint(tmp_path / "plain", **DIMS)


def encode(source: Path) -> list[Array]:
    encoder = TextEncoder.open(ModelOptions(str(source), compute_dtype="float32"))
    return [embeds.hidden_states for embeds in encoder.encode(PROMPTS, LAST_HIDDEN_STATE, "float32")]


def assert_same_hidden_states(file: Path, folder: Path) -> None:
    for ours, expected in zip(encode(file), encode(folder), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("prefix", "rope_theta"),
    [
        pytest.param("model.", 1e6, id="text"),
        pytest.param("", 1e6, id="bare"),
        pytest.param("model.language_model.", 5e6, id="vision"),
        pytest.param("text_encoders.qwen3_4b.transformer.model.", 1e6, id="all-in-one"),
        pytest.param("conditioner.embedders.0.model.", 1e6, id="unheard-of"),
    ],
)
def test_file_alone_is_enough(tmp_path: Path, prefix: str, rope_theta: float) -> None:
    """Dims by shape, theta by family."""
    weights = write_checkpoint(tmp_path / "plain", rope_theta=rope_theta, **DIMS)
    others = {"model.visual.merger.norm.weight": np.ones(3, np.float32), "vae.scale": np.ones(2, np.float64)}
    if rope_theta == 1e6:
        del others["model.visual.merger.norm.weight"]
    file = write_file(tmp_path, {prefix + name: array for name, array in weights.items()} | others)
    config = open_checkpoint(ModelOptions(str(file))).config
    expected = open_checkpoint(ModelOptions(str(tmp_path / "plain"))).config

    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(config, name) == getattr(expected, name)
    assert (config.num_key_value_heads, config.head_dim) == (expected.num_key_value_heads, expected.head_dim)
    assert (config.rope_theta, config.rms_norm_eps) == (rope_theta, 1e-6)
    assert_same_hidden_states(file, tmp_path / "plain")


@pytest.mark.parametrize("name", ["qwen3vl_8b.safetensors", "Qwen3-VL-4B.safetensors", "krea2_qwen_3_vl.safetensors"])
def test_name_of_the_file_may_say_that_it_is_a_vision_model(tmp_path: Path, weights: Stored, name: str) -> None:
    """A text part that was cut out of a Qwen3-VL has another theta, and no tensor that shows it."""
    file = write_file(tmp_path, {f"model.{key}": array for key, array in weights.items()}, name)

    assert open_checkpoint(ModelOptions(str(file))).config.rope_theta == 5e6


E4M3, E5M2 = (ml_dtypes.float8_e4m3fn, 448.0), (ml_dtypes.float8_e5m2, 57344.0)
FORMATS = [
    pytest.param(float8(*E4M3, False, ()), "float8_e4m3fn", id="float8-cast"),
    pytest.param(float8(*E5M2, False, ()), "float8_e5m2", id="float8-e5m2-cast"),
    pytest.param(float8(*E4M3, False, ("scale_weight", "scale_input")), "float8_e4m3fn", id="float8-old"),
    pytest.param(
        float8(*E4M3, False, ("weight_scale", "input_scale"), format="float8_e4m3fn"), "float8_e4m3fn", id="float8-new"
    ),
    pytest.param(float8(*E5M2, False, ("weight_scale",), format="float8_e5m2"), "float8_e5m2", id="float8-e5m2"),
    pytest.param(float8(*E4M3, True, ("weight_scale",)), "float8_e4m3fn", id="ideogram"),
    pytest.param(block_float8, "float8_e4m3fn", id="qwen-blocks"),
    pytest.param(int8, "int8", id="int8"),
    pytest.param(nvfp4, "nvfp4", id="nvfp4"),
    pytest.param(mxfp8, "mxfp8", id="mxfp8"),
]


@pytest.mark.parametrize(("quantize", "label"), FORMATS)
def test_hidden_states_are_those_of_the_decoded_weights(
    tmp_path: Path, weights: Stored, quantize: Quantize, label: str
) -> None:
    """Bit for bit: what the numbers stand for is exact in float32."""
    tensors: Stored = {}
    decoded: Stored = {}
    for name, weight in weights.items():
        if "proj" in name:
            stored, decoded[f"model.{name}"] = quantize(f"model.{name.removesuffix('.weight')}", weight)
            tensors |= stored
        else:
            tensors[f"model.{name}"] = decoded[f"model.{name}"] = weight
    write_tensors(tmp_path / "plain", decoded)
    file = write_file(tmp_path, tensors | {"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)})

    assert open_checkpoint(ModelOptions(str(file))).quantization == label
    assert_same_hidden_states(file, tmp_path / "plain")


def test_formats_may_stand_in_the_header(tmp_path: Path, weights: Stored) -> None:
    """Newer converters write no comfy_quant tensors."""
    tensors: Stored = {}
    decoded: Stored = {}
    layers = {}
    for name, weight in weights.items():
        path = f"model.{name.removesuffix('.weight')}"
        if "mlp" in name:
            stored, decoded[f"{path}.weight"] = nvfp4(path, weight)
            tensors |= {key: array for key, array in stored.items() if not key.endswith("comfy_quant")}
            layers[path] = {"format": "nvfp4"}
        else:
            tensors[f"{path}.weight"] = decoded[f"{path}.weight"] = weight
    write_tensors(tmp_path / "plain", decoded)
    metadata = json.dumps({"format_version": "1.0", "layers": layers})

    assert_same_hidden_states(write_file(tmp_path, tensors, _quantization_metadata=metadata), tmp_path / "plain")


@pytest.mark.parametrize(
    ("note", "message"),
    [
        pytest.param(b'{"format": "svdquant_w4a4"}', "format 'svdquant_w4a4', which is not read", id="unknown"),
        pytest.param(
            b'{"format": "int8_tensorwise", "params": {"convrot": true, "convrot_groupsize": 32}}',
            "in blocks of 32 columns, expected a power of 4",
            id="rotated-by-params",
        ),
        pytest.param(b'{"linear_dtype": "int8"}', "expected the name of a format", id="no-format"),
        pytest.param(b"nvfp4", "cannot be read as JSON", id="no-json"),
        pytest.param(b"[1]", "expected an object", id="list"),
        pytest.param(b'{"format": "nvfp4"}', "expected bytes of nvfp4", id="other-format"),
    ],
)
def test_layer_that_cannot_be_decoded_is_named(tmp_path: Path, weights: Stored, note: bytes, message: str) -> None:
    """Some formats rotate or reorder the weights. Read without that, they are noise."""
    tensors = {f"model.{name}": array for name, array in weights.items()}
    stored, _ = int8("model.layers.1.mlp.up_proj", weights["layers.1.mlp.up_proj.weight"])
    stored["model.layers.1.mlp.up_proj.comfy_quant"] = np.frombuffer(note, np.uint8)

    with pytest.raises(CheckpointError, match=f"model.layers.1.mlp.up_proj.*{message}"):
        open_checkpoint(ModelOptions(str(write_file(tmp_path, tensors | stored))))


@pytest.mark.parametrize("place", ["beside", "folder-of-its-name", "given", "inside"])
def test_tokenizer_is_found(tmp_path: Path, weights: Stored, place: str) -> None:
    """ComfyUI's files come without one."""
    tensors = {f"model.{name}": array for name, array in weights.items()}
    content = (tmp_path / "plain" / "tokenizer.json").read_bytes()
    if place == "inside":
        tensors["tokenizer_json"] = np.frombuffer(content, np.uint8)
    file = write_file(tmp_path, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        target = {"beside": tmp_path, "folder-of-its-name": tmp_path / "qwen_3_4b", "given": tmp_path / "other"}
        (tmp_path / name).unlink()
        if place in target:
            target[place].mkdir(exist_ok=True)
            (target[place] / name).write_bytes((tmp_path / "plain" / name).read_bytes())
    given = {"tokenizer": str(tmp_path / "other")} if place == "given" else {}

    assert open_checkpoint(ModelOptions(str(file), **given)).tokenizer.vocab_size == 282


@pytest.mark.parametrize("place", ["", "qwen"])
def test_config_beside_a_file_counts_whatever_the_file_is_called(tmp_path: Path, weights: Stored, place: str) -> None:
    """Beside it, or in the folder of its name, where its tokenizer is looked for too."""
    file = write_file(tmp_path, {f"model.{name}": weight for name, weight in weights.items()}, "qwen.safetensors")
    write_checkpoint(tmp_path / "other", rope_theta=7e6, **DIMS)
    (tmp_path / place).mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "other" / name).rename(tmp_path / place / name)

    assert open_checkpoint(ModelOptions(str(file))).config.rope_theta == 7e6


def test_missing_tokenizer_of_an_unknown_vocabulary_is_asked_for(tmp_path: Path, weights: Stored) -> None:
    """Qwen3's own would give ids that the model does not have."""
    file = write_file(tmp_path, {f"model.{name}": array for name, array in weights.items()})
    (tmp_path / "tokenizer.json").unlink()

    with pytest.raises(CheckpointError, match="give its own with --tokenizer"):
        open_checkpoint(ModelOptions(str(file)))


def test_all_else_in_the_file_is_left_alone(tmp_path: Path, weights: Stored) -> None:
    """Denoiser, VAE, another text encoder, and what training leaves behind."""
    others = ("model.diffusion_model.x", "vae.x", "text_encoders.clip_l.transformer.text_model.x", "model_ema.decay")
    tensors = {f"text_encoders.qwen3_4b.transformer.model.{key}": array for key, array in weights.items()}
    file = write_file(tmp_path, tensors | dict.fromkeys(others, np.zeros((2, 2), np.float32)))

    assert_same_hidden_states(file, tmp_path / "plain")


def test_one_of_two_encoders_in_a_file_is_chosen(tmp_path: Path, weights: Stored) -> None:
    """Nothing says which of them is meant."""
    file = write_file(tmp_path, {f"{name}.{key}": weights[key] for key in weights for name in ("a", "b")})

    with pytest.raises(CheckpointError, match=r"several Qwen3 models; choose one: --component is one of a, b"):
        open_checkpoint(ModelOptions(str(file)))
    checkpoint = open_checkpoint(ModelOptions(str(file), component="b"))
    assert {tensor.key.partition(".")[0] for tensor in checkpoint.weights.tensors.values()} == {"b"}


@pytest.mark.parametrize("gone", ["embed_tokens.weight", "layers.0.self_attn.q_norm.weight"])
def test_file_of_another_model_is_refused(tmp_path: Path, weights: Stored, gone: str) -> None:
    """A folder of text encoders holds T5, CLIP and Mistral too."""
    tensors = {f"model.{name}": array for name, array in weights.items() if name != gone}

    with pytest.raises(CheckpointError, match=f"{gone}: found nothing.*Is this a Qwen3 encoder"):
        open_checkpoint(ModelOptions(str(write_file(tmp_path, tensors))))
