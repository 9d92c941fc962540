"""Weights quantized by ComfyUI's own library, read as it decodes them itself. Needs `pip install comfy-kitchen`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder import LAST_HIDDEN_STATE, ModelOptions, TextEncoder
from tests.checkpoints import Array, write_checkpoint, write_tokenizer

pytest.importorskip("comfy_kitchen")

from comfy_kitchen.tensor import QuantizedTensor, TensorCoreAWQW4A16Layout

pytestmark = pytest.mark.parity

DIMS: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
CONVROT = {"convrot": True, "convrot_groupsize": 256}
ROTATED_ROWS = {"is_weight": True, "per_channel": True, **CONVROT}
FORMATS = [
    pytest.param("TensorCoreFP8Layout", {}, {"format": "float8_e4m3fn"}, id="float8"),
    pytest.param("TensorWiseINT8Layout", {}, {"format": "int8_tensorwise"}, id="int8"),
    pytest.param("TensorWiseINT8Layout", {"per_channel": True}, {"format": "int8_tensorwise"}, id="int8-rows"),
    pytest.param("TensorWiseINT8Layout", ROTATED_ROWS, {"format": "int8_tensorwise", **CONVROT}, id="int8-convrot"),
    pytest.param("TensorCoreNVFP4Layout", {}, {"format": "nvfp4"}, id="nvfp4"),
    pytest.param("TensorCoreMXFP8Layout", {}, {"format": "mxfp8"}, id="mxfp8"),
    pytest.param("TensorCoreConvRotW4A4Layout", {}, {"format": "convrot_w4a4"}, id="w4a4"),
    pytest.param("AsymW4A8Int8Layout", {}, {"format": "asym_w4a8_int8"}, id="w4a8"),
    pytest.param("AsymW4A8Int8Layout", {"codebook": False}, {"format": "asym_w4a8_int8"}, id="w4a8-uniform"),
    pytest.param("AsymW4A8Int8Layout", {"symmetric": False}, {"format": "asym_w4a8_int8"}, id="w4a8-asymmetric"),
    pytest.param(
        "AsymW4A8Int8Layout",
        {"group_size": 32, "convrot_groupsize": 64},
        {"format": "asym_w4a8_int8", "group_size": 32, "convrot_groupsize": 64},
        id="w4a8-other-groups",
    ),
]


def encode(source: Path) -> list[Array]:
    encoder = TextEncoder.open(ModelOptions(str(source), compute_dtype="float32"))
    return [embeds.hidden_states for embeds in encoder.encode(["a cat", "a red sofa"], LAST_HIDDEN_STATE, "float32")]


def assert_close(file: Path, folder: Path) -> None:
    """To 1e-5 of the largest: the library rotates by a product in float32."""
    for ours, expected in zip(encode(file), encode(folder), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def note(fields: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(("layout", "options", "fields"), FORMATS)
def test_hidden_states_are_those_of_the_weights_as_the_library_decodes_them(
    tmp_path: Path, layout: str, options: dict[str, Any], fields: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path / "plain", **DIMS)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for key, weight in plain.items():
        if "proj" not in key:
            stored[key] = weight
            continue
        quantized = QuantizedTensor.from_float(weight, layout, **options)
        stored |= {name: array.contiguous() for name, array in quantized.state_dict(key).items()}
        stored[f"{key.removesuffix('weight')}comfy_quant"] = note(fields)
        plain[key] = quantized.dequantize().contiguous()
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    save_file(stored, tmp_path / "qwen_3_4b.safetensors")
    write_tokenizer(tmp_path)

    assert_close(tmp_path / "qwen_3_4b.safetensors", tmp_path / "plain")


def test_awq_is_decoded_as_by_the_library(tmp_path: Path) -> None:
    """The library decodes it and does not write it."""
    write_checkpoint(tmp_path / "plain", **DIMS)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for key, weight in plain.items():
        if "proj" not in key:
            stored[key] = weight
            continue
        rows, columns = weight.shape
        packed = torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8)
        scale, zeros = (torch.rand(columns // 64, rows, generator=generator) * 0.01 for _ in range(2))
        params = TensorCoreAWQW4A16Layout.Params(
            scale=scale, zeros=zeros, group_size=64, orig_dtype=torch.float32, orig_shape=(rows, columns)
        )
        plain[key] = TensorCoreAWQW4A16Layout.dequantize(packed, params).contiguous()
        path = key.removesuffix("weight")
        stored |= {key: packed, f"{path}weight_scale": scale, f"{path}weight_zeros": zeros}
        stored[f"{path}comfy_quant"] = note({"format": "awq_w4a16", "group_size": 64})
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    save_file(stored, tmp_path / "qwen_3_4b.safetensors")
    write_tokenizer(tmp_path)

    assert_close(tmp_path / "qwen_3_4b.safetensors", tmp_path / "plain")
