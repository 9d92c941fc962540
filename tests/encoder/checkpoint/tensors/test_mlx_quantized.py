"""Checkpoints that MLX has quantized: written by mlx's own functions, read back to the same hidden states."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, TextEncoder
from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, quantize_with_mlx, write_checkpoint, write_json, write_tensors
from tests.encoder.checkpoint.mlx_folders import DIMS, write_quantized

PROMPTS = ["a cat", "a cat on a red sofa, photographed from above"]

MODES = [
    pytest.param({"bits": 4, "group_size": 64}, id="affine-4"),
    pytest.param({"bits": 8, "group_size": 32, "mode": "affine"}, id="affine-8"),
    pytest.param({"bits": 3, "group_size": 128}, id="affine-3"),
    pytest.param({"bits": 6, "group_size": 64}, id="affine-6"),
    pytest.param({"bits": 4, "group_size": 32, "mode": "mxfp4"}, id="mxfp4"),
    pytest.param({"bits": 8, "group_size": 32, "mode": "mxfp8"}, id="mxfp8"),
    pytest.param({"bits": 4, "group_size": 16, "mode": "nvfp4"}, id="nvfp4"),
]


def write_plain(folder: Path, weights: Mapping[str, Array]) -> None:
    write_checkpoint(folder, **DIMS)
    write_tensors(folder, {f"model.{name}": array.astype(np.float32) for name, array in weights.items()})


def encode(folder: Path, **options: Any) -> list[Array]:
    encoder = TextEncoder.open(ModelOptions(str(folder), compute_dtype="float32", **options))
    return [embeds.hidden_states for embeds in encoder.encode(PROMPTS, LAST_HIDDEN_STATE, "float32")]


@pytest.mark.parametrize("quantization", MODES)
def test_hidden_states_are_those_of_the_decoded_weights(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """Bit for bit: a CPU computes with what the quantized numbers stand for."""
    write_plain(tmp_path / "plain", write_quantized(tmp_path / "quantized", quantization))

    for quantized, plain in zip(encode(tmp_path / "quantized"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(quantized, plain)


@pytest.mark.parametrize("quantization", MODES)
def test_kept_quantized_the_hidden_states_are_the_same(tmp_path: Path, quantization: dict[str, Any]) -> None:
    """MLX's quantized products against its float32 ones: they add in another order."""
    write_plain(tmp_path / "plain", write_quantized(tmp_path / "quantized", quantization))
    kept = encode(tmp_path / "quantized", quantize="keep")

    for quantized, plain in zip(kept, encode(tmp_path / "plain"), strict=True):
        np.testing.assert_allclose(quantized, plain, atol=2e-4)


def test_kept_weights_take_the_memory_of_the_file(tmp_path: Path) -> None:
    """A quantized checkpoint is chosen to save memory."""
    write_quantized(tmp_path, {"bits": 4, "group_size": 64})
    kept = TextEncoder.open(ModelOptions(str(tmp_path), quantize="keep", compute_dtype="bfloat16")).info
    decoded = TextEncoder.open(ModelOptions(str(tmp_path), quantize="none", compute_dtype="bfloat16")).info

    assert kept.parameter_bytes < 0.3 * decoded.parameter_bytes
    assert kept.quantization == "affine 4-bit in groups of 64"
    assert decoded.quantization == "affine 4-bit in groups of 64, decoded"
    assert kept.fingerprint == decoded.fingerprint


def test_layers_may_differ_from_each_other(tmp_path: Path) -> None:
    """mlx-lm's mixed recipes give some layers more bits, and leave others plain."""
    weights = write_checkpoint(tmp_path, **DIMS)
    overrides = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64},
        "model.layers.1.self_attn.v_proj": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
        "model.embed_tokens": False,
    }
    config = json.loads((tmp_path / "config.json").read_text())
    quantization: dict[str, Any] = {"bits": 4, "group_size": 64}
    write_json(tmp_path / "config.json", config | {"quantization": quantization | overrides})
    arrays, decoded = {}, {}
    for name, weight in weights.items():
        own = overrides.get(f"model.{name.removesuffix('.weight')}", quantization)
        some, values = quantize_with_mlx({name: weight}, own) if own else ({name: weight}, {name: weight})
        arrays |= some
        decoded |= values
    write_tensors(tmp_path, {f"model.{name}": array for name, array in arrays.items()}, shards=3)
    write_plain(tmp_path / "plain", decoded)

    assert open_checkpoint(ModelOptions(str(tmp_path))).quantization == (
        "affine 4-bit in groups of 64, affine 8-bit in groups of 64, nvfp4"
    )
    for quantized, plain in zip(encode(tmp_path), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(quantized, plain)


def test_mflux_folder_is_read_without_a_config(tmp_path: Path) -> None:
    """mflux writes numbered files, the bits in their headers, and no config.json."""
    weights = write_checkpoint(tmp_path / "dims", **DIMS)
    arrays, decoded = quantize_with_mlx(weights, {"bits": 8, "group_size": 64})
    inner = tmp_path / "saved" / "text_encoder"
    inner.mkdir(parents=True)
    metadata = {"quantization_level": "8", "mflux_version": "0.13.0"}
    for number, names in enumerate((list(arrays)[::2], list(arrays)[1::2])):
        mx.save_safetensors(
            str(inner / f"{number}.safetensors"), {name: mx.array(arrays[name]) for name in names}, metadata
        )
    (tmp_path / "saved" / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dims" / name).rename(tmp_path / "saved" / "tokenizer" / name)
    write_plain(tmp_path / "plain", decoded)

    for quantized, plain in zip(encode(tmp_path / "saved"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(quantized, plain)


def test_bits_follow_from_the_dims_where_nobody_names_them(tmp_path: Path) -> None:
    """Some uploads lose the quantization of config.json."""
    write_plain(tmp_path / "plain", write_quantized(tmp_path, {"bits": 8, "group_size": 32}))
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {key: config[key] for key in config if not key.startswith("quantization")})

    for quantized, plain in zip(encode(tmp_path), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(quantized, plain)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        pytest.param({"bits": 8, "group_size": 64}, "has scales of shape", id="other-bits"),
        pytest.param({"bits": 4, "group_size": 32}, "has scales of shape", id="other-groups"),
        pytest.param({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "has scales of shape", id="other-mode"),
        pytest.param({"bits": 7}, "is no quantization of MLX", id="unknown-bits"),
        pytest.param({"mode": "gguf"}, "is no quantization of MLX", id="unknown-mode"),
        pytest.param({"mode": ["affine"]}, "is no quantization of MLX", id="nonsense"),
        pytest.param({"bits": 4, "group_size": 10**30}, "is no quantization of MLX", id="absurd"),
    ],
)
def test_quantization_that_does_not_fit_the_arrays_is_refused(
    tmp_path: Path, quantization: dict[str, Any], message: str
) -> None:
    """Weights decoded by another quantization are plausible nonsense."""
    write_quantized(tmp_path, {"bits": 4, "group_size": 64})
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"quantization": quantization})

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """One of them spoils a group of weights."""
    write_quantized(tmp_path, {"bits": 4, "group_size": 64})
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(tensors, dict)
    key = "model.layers.1.mlp.up_proj.scales"
    tensors[key] = mx.full(tensors[key].shape, float("nan"), mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)

    for quantize in ("keep", "none"):
        with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.scales has NaN or infinity"):
            encode(tmp_path, quantize=quantize)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("quantize", ["keep", "none"])
def test_8_bit_scale_that_is_not_finite_is_refused(tmp_path: Path, mode: str, negative: bool, quantize: str) -> None:
    """Kept scales are integers to MLX. NaN is 0xFF in a power of two; in nvfp4, whose scales have a sign, 0x7F too."""
    write_quantized(tmp_path, {"mode": mode})
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(tensors, dict)
    scales = tensors["model.layers.1.mlp.up_proj.scales"]
    scales[-1, -1] = 0x7F if mode == "nvfp4" and not negative else 0xFF
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)

    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight has NaN or infinity"):
        encode(tmp_path, quantize=quantize)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_largest_finite_8_bit_scale_is_accepted(tmp_path: Path, mode: str) -> None:
    """The next larger one is NaN."""
    write_quantized(tmp_path, {"mode": mode})
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(tensors, dict)
    tensors["model.layers.1.mlp.up_proj.scales"][-1, -1] = 0xFE
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)

    assert TextEncoder.open(ModelOptions(str(tmp_path), quantize="keep")).info.quantization == mode


def test_fingerprint_follows_the_quantization_and_not_the_files(tmp_path: Path) -> None:
    """The same numbers in three files are the same checkpoint; in other groups they are another."""
    write_quantized(tmp_path / "a", {"bits": 4, "group_size": 64})
    write_quantized(tmp_path / "b", {"bits": 4, "group_size": 64}, shards=3)
    write_quantized(tmp_path / "c", {"bits": 4, "group_size": 32})
    a, b, c = (open_checkpoint(ModelOptions(str(tmp_path / name))).fingerprint for name in "abc")

    assert a == b != c
