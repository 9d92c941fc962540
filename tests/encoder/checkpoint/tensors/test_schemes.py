"""What quantization libraries store, to the hidden states of the floats that it stands for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, TextEncoder
from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.loading.array_reader import ArrayReader
from encoder.checkpoint.tensors.encodings import dequantize
from encoder.checkpoint.tensors.weights import StoredTensor
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, quantize_with_mlx, write_checkpoint, write_json
from tests.encoder.checkpoint import quantized_files as files
from tests.encoder.checkpoint.quantized_files import (
    Quantize,
    awq,
    bitsandbytes_4bit,
    gptq,
    packed_integers,
    write_folders,
)

DIMS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
FP4 = (0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25, 0, -0.0052, -0.6667, -1, -0.3333, -0.5, -0.1667, -0.25)
GPTQ_V2 = {"checkpoint_format": "gptq_v2"}


def described(method: str, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **fields}}


COMPRESSED = described("compressed-tensors")
FORMATS = [
    pytest.param(bitsandbytes_4bit(), described("bitsandbytes"), "bitsandbytes nf4", id="nf4"),
    pytest.param(bitsandbytes_4bit(nested=True), {}, "bitsandbytes nf4", id="nf4-double"),
    pytest.param(bitsandbytes_4bit(FP4, "fp4"), {}, "bitsandbytes fp4", id="fp4"),
    pytest.param(files.llm_int8, described("bitsandbytes"), "bitsandbytes int8", id="llm-int8"),
    pytest.param(awq(64), described("awq", version="gemm"), "AWQ 4-bit", id="awq"),
    pytest.param(awq(16), {}, "AWQ 4-bit", id="awq-small-groups"),
    pytest.param(gptq(4, 32), described("gptq"), "GPTQ 4-bit", id="gptq"),
    pytest.param(gptq(4, 64, act_order=True), described("gptq"), "GPTQ 4-bit", id="gptq-act-order"),
    pytest.param(gptq(2, 32), described("gptq"), "GPTQ 2-bit", id="gptq-2"),
    pytest.param(gptq(3, 64), described("gptq", checkpoint_format="gptq"), "GPTQ 3-bit", id="gptq-3"),
    pytest.param(gptq(8, 32), described("gptq"), "GPTQ 8-bit", id="gptq-8"),
    pytest.param(gptq(4, 32, first_version=False), described("gptq", **GPTQ_V2), "GPTQ 4-bit", id="gptq-v2"),
    pytest.param(
        gptq(4, 32), described("auto-round", packing_format="auto_round:auto_gptq"), "GPTQ 4-bit", id="auto-round"
    ),
    pytest.param(packed_integers(4, 32, symmetric=True), COMPRESSED, "compressed-tensors int4", id="ct-int4"),
    pytest.param(packed_integers(4, 64, symmetric=False), COMPRESSED, "compressed-tensors int4", id="ct-int4-zeros"),
    pytest.param(
        packed_integers(4, 32, symmetric=False, act_order=True), {}, "compressed-tensors int4", id="ct-act-order"
    ),
    pytest.param(packed_integers(8, 128, symmetric=True), {}, "compressed-tensors int8", id="ct-int8"),
    pytest.param(packed_integers(3, 64, symmetric=False), {}, "compressed-tensors int3", id="ct-int3"),
    pytest.param(files.bytes_with_zeros, COMPRESSED, "compressed-tensors int8", id="ct-bytes"),
    pytest.param(files.float8_groups(32), COMPRESSED, "float8_e4m3fn in blocks of 1 x 32", id="ct-float8-groups"),
    pytest.param(files.nvfp4_divided, COMPRESSED, "nvfp4", id="ct-nvfp4"),
    pytest.param(files.mxfp4(("weight_packed", "weight_scale")), COMPRESSED, "mxfp4", id="ct-mxfp4"),
    pytest.param(files.nvfp4_multiplied, described("modelopt"), "nvfp4", id="modelopt-nvfp4"),
    pytest.param(files.mxfp4(("weight", "weight_scale")), described("modelopt"), "mxfp4", id="modelopt-mxfp4"),
    pytest.param(
        files.int4_row_pairs, described("modelopt"), "ModelOpt int4 with scaled columns", id="modelopt-int4-awq"
    ),
    pytest.param(files.quanto_bits(4, 128), {}, "quanto int4", id="quanto-int4"),
    pytest.param(files.quanto_bits(2, 32), {}, "quanto int2", id="quanto-int2"),
    pytest.param(files.quanto_bytes, {}, "int8", id="quanto-int8"),
    pytest.param(files.sdnq(4), described("sdnq", weights_dtype="uint4"), "SDNQ uint4", id="sdnq-uint4"),
    pytest.param(files.sdnq(4, svd=True), described("sdnq", weights_dtype="uint4"), "SDNQ uint4", id="sdnq-svd"),
    pytest.param(
        files.sdnq(5, signed=True), described("sdnq", weights_dtype="uint4"), "SDNQ int5", id="sdnq-int5-dynamic"
    ),
    pytest.param(files.sdnq_transposed, described("sdnq", weights_dtype="int8"), "SDNQ int8", id="sdnq-transposed"),
    pytest.param(
        files.sdnq_float4, described("sdnq", weights_dtype="float4_e2m1fn"), "SDNQ float4_e2m1fn", id="sdnq-float4"
    ),
]
TORCHAO = [
    pytest.param(files.torchao_int8(32), "IntxUnpackedToInt8Tensor", "torchao IntxUnpackedToInt8Tensor", id="int8"),
    pytest.param(files.torchao_blocks, "Float8Tensor", "torchao Float8Tensor", id="float8"),
    pytest.param(files.torchao_int4, "Int4Tensor", "torchao Int4Tensor", id="int4"),
    pytest.param(files.nvfp4_tiled, "NVFP4Tensor", "nvfp4", id="nvfp4"),
]


@pytest.fixture
def weights(tmp_path: Path) -> Mapping[str, Array]:
    return write_checkpoint(tmp_path / "plain", **DIMS)


def encode(folder: Path) -> Array:
    encoder = TextEncoder.open(ModelOptions(str(folder), compute_dtype="float32", quantize="none"))
    [embeds] = encoder.encode(["a cat on a red sofa"], LAST_HIDDEN_STATE, "float32")
    return embeds.hidden_states


@pytest.mark.parametrize(("quantize", "config", "label"), FORMATS)
def test_hidden_states_are_those_of_the_decoded_weights(
    tmp_path: Path, weights: Mapping[str, Array], quantize: Quantize, config: dict[str, Any], label: str
) -> None:
    """Bit for bit: a number times its scale is rounded once in float32, here as by the writer."""
    quantized, decoded = write_folders(tmp_path, weights, quantize, config)

    assert open_checkpoint(ModelOptions(str(quantized))).quantization == label
    np.testing.assert_array_equal(encode(quantized), encode(decoded))


@pytest.mark.parametrize(("quantize", "kind", "label"), TORCHAO)
def test_class_of_a_torchao_tensor_stands_in_the_header(
    tmp_path: Path, weights: Mapping[str, Array], quantize: Quantize, kind: str, label: str
) -> None:
    """The same names of arrays mean other numbers in each class."""
    metadata = {"_type": kind, "_data": {"is_swizzled_scales": True}}
    quantized, decoded = write_folders(tmp_path, weights, quantize, described("torchao"), metadata)

    assert open_checkpoint(ModelOptions(str(quantized))).quantization == label
    np.testing.assert_array_equal(encode(quantized), encode(decoded))


@pytest.mark.parametrize(
    ("quantize", "config"),
    [
        pytest.param(awq(64), {}, id="awq"),
        pytest.param(gptq(2, 32), described("gptq"), id="gptq-2"),
        pytest.param(gptq(4, 128), described("gptq"), id="gptq-4"),
        pytest.param(gptq(8, 64), described("gptq"), id="gptq-8"),
        pytest.param(packed_integers(4, 32, symmetric=True), {}, id="ct-int4"),
        pytest.param(packed_integers(8, 64, symmetric=False), {}, id="ct-int8-zeros"),
        pytest.param(files.quanto_bits(4, 32), {}, id="quanto"),
        pytest.param(files.mxfp4(("weight_packed", "weight_scale")), {}, id="mxfp4"),
    ],
)
def test_what_mlx_has_too_is_packed_for_it_without_loss(
    tmp_path: Path, weights: Mapping[str, Array], quantize: Quantize, config: dict[str, Any]
) -> None:
    """`scale * number + bias` is rounded twice, `(number - zero) * scale` once: equal to the last bits."""
    quantized, _ = write_folders(tmp_path, weights, quantize, config)
    tensor = open_checkpoint(ModelOptions(str(quantized))).weights.tensors["layers.1.self_attn.q_proj.weight"]
    quantization = tensor.encoding.mlx_quantization
    assert quantization is not None
    arrays = read(tensor)

    packed = dequantize(tensor.encoding.pack(arrays), quantization, mx.float32)
    np.testing.assert_allclose(
        np.array(packed), np.array(tensor.encoding.decode(arrays, mx.float32)), rtol=0, atol=2e-7
    )


def read(tensor: StoredTensor) -> dict[str, mx.array]:
    with ArrayReader() as reader:
        return {role: reader.read(array) for role, array in tensor.arrays.items()}


DAMAGED = [
    pytest.param(
        bitsandbytes_4bit(), {}, {"weight": np.zeros((9, 1), np.uint8)}, "weight is U8 .9,., expected", id="nf4"
    ),
    pytest.param(bitsandbytes_4bit(), {}, {"weight.absmax": None}, "has no absmax beside it", id="nf4-no-absmax"),
    pytest.param(
        bitsandbytes_4bit(),
        {},
        {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape": [9, "x"]}', np.uint8)},
        "expected the shape of a matrix",
        id="nf4-state",
    ),
    pytest.param(
        bitsandbytes_4bit(),
        {},
        {"weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)},
        "cannot be read as JSON",
        id="nf4-no-json",
    ),
    pytest.param(
        files.llm_int8, {}, {"weight_format": np.array(2, np.uint8)}, "order of a GPU's kernel", id="llm-int8"
    ),
    pytest.param(awq(64), {}, {"qzeros": np.zeros((2, 9), np.int32)}, r"qzeros is I32 \(2, 9\), expected", id="awq"),
    pytest.param(
        gptq(4, 64), {}, {}, "config.json calls '', expected quantization_config.checkpoint_format", id="gptq"
    ),
    pytest.param(
        gptq(4, 64),
        described("gptq"),
        {"g_idx": np.full(128, 9, np.int32)},
        "expected 128 from 0 to 1",
        id="gptq-groups",
    ),
    pytest.param(
        packed_integers(4, 32, symmetric=True),
        {},
        {"weight_shape": np.array([128, 2**40])},
        "expected the shape of a matrix",
        id="ct-shape",
    ),
    pytest.param(
        packed_integers(4, 32, symmetric=True),
        described("compressed-tensors", config_groups={"a": {"weights": {"num_bits": 8}}}),
        {},
        "config.json says 8 bits",
        id="ct-bits",
    ),
    pytest.param(
        packed_integers(4, 32, symmetric=True),
        described("compressed-tensors", transform_config={"config_groups": {"R1": {}}}),
        {},
        "is rotated, as transform_config",
        id="ct-rotated",
    ),
    pytest.param(
        files.nvfp4_divided, {}, {"weight_scale": np.ones((128, 8), np.float16)}, "expected F8_E4M3", id="nvfp4"
    ),
    pytest.param(files.quanto_bits(4, 128), {}, {"weight._shift": None}, "has no shifts beside it", id="quanto"),
    pytest.param(files.torchao_int4, described("torchao"), {}, "the header does not say how", id="torchao"),
    pytest.param(files.sdnq(4), described("sdnq", weights_dtype="uint4", use_codebook=True), {}, "codebook", id="sdnq"),
]


@pytest.mark.parametrize(("quantize", "config", "changes", "message"), DAMAGED)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path,
    weights: Mapping[str, Array],
    quantize: Quantize,
    config: dict[str, Any],
    changes: dict[str, Array | None],
    message: str,
) -> None:
    def damage(path: str, weight: Array) -> tuple[dict[str, Array], Array]:
        stored, floats = quantize(path, weight)
        if path.endswith("layers.1.self_attn.q_proj"):
            stored |= {f"{path}.{part}": array for part, array in changes.items() if array is not None}
            stored = {key: array for key, array in stored.items() if changes.get(key[len(path) + 1 :], 0) is not None}
        return stored, floats

    quantized, _ = write_folders(tmp_path, weights, damage, config)

    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(ModelOptions(str(quantized)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantize", "name", "content"),
    [
        (files.nvfp4_multiplied, "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}),
        (files.sdnq(4), "quantization_config.json", {"quant_method": "sdnq", "weights_dtype": "uint4"}),
        (gptq(4, 32), "quantize_config.json", {"bits": 4, "group_size": 32, "checkpoint_format": "gptq"}),
    ],
)
def test_quantization_may_stand_in_a_file_of_its_own(
    tmp_path: Path, weights: Mapping[str, Array], quantize: Quantize, name: str, content: dict[str, Any]
) -> None:
    """ModelOpt, SDNQ and GPTQ have written it there."""
    quantized, decoded = write_folders(tmp_path, weights, quantize, {})
    write_json(quantized / name, content)

    np.testing.assert_array_equal(encode(quantized), encode(decoded))


def test_metal_layers_of_transformers_are_those_of_mlx(tmp_path: Path, weights: Mapping[str, Array]) -> None:
    """They call the biases qbiases."""

    def quantize(path: str, weight: Array) -> tuple[dict[str, Array], Array]:
        stored, decoded = quantize_with_mlx({f"{path}.weight": weight}, {"bits": 4, "group_size": 64})
        return {key.replace(".biases", ".qbiases"): array for key, array in stored.items()}, decoded[f"{path}.weight"]

    config = described("metal", bits=4, group_size=64)
    quantized, decoded = write_folders(tmp_path, weights, quantize, config)

    np.testing.assert_array_equal(encode(quantized), encode(decoded))
