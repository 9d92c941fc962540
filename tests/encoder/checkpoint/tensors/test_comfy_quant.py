"""ComfyUI's formats against what their descriptions say, decoded in float64; and what is refused."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, TextEncoder
from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.tensors.transformed import unrotate
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, write_checkpoint, write_tensors
from tests.encoder.checkpoint.comfyui_files import Quantize, Stored, float8_blocks, int8, nvfp4, write_file
from tests.encoder.checkpoint.comfyui_transformed import (
    awq_w4a16,
    convrot_w4a4,
    hadamard,
    int8_convrot,
    note,
    nvfp4_awq,
    rotate,
    w4a8,
)

DIMS = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Any]:
    return write_checkpoint(tmp_path / "plain", **DIMS)


def encode(source: Path) -> list[Array]:
    encoder = TextEncoder.open(ModelOptions(str(source), compute_dtype="float32"))
    return [embeds.hidden_states for embeds in encoder.encode(["a cat", "a red sofa"], LAST_HIDDEN_STATE, "float32")]


def quantized(weights: Stored, quantize: Quantize, part: str = "proj") -> tuple[Stored, Stored]:
    """The tensors of a file whose matrices are quantized, and what they stand for, in float32."""
    tensors: Stored = {}
    decoded: Stored = {}
    for name, weight in weights.items():
        key = f"model.{name}"
        if part in name:
            stored, exact = quantize(key.removesuffix(".weight"), weight)
            tensors |= stored
            decoded[key] = exact.astype(np.float32)
        else:
            tensors[key] = decoded[key] = weight
    return tensors, decoded


ROUNDED_ONCE = [
    pytest.param(int8_convrot(), "int8 rotated in blocks of 256", id="int8-convrot"),
    pytest.param(int8_convrot(64), "int8 rotated in blocks of 64", id="int8-convrot-64"),
    pytest.param(int8_convrot(4, whole=True), "int8 rotated in blocks of 4", id="int8-convrot-one-scale"),
    pytest.param(int8_convrot(dtype=np.float16), "int8 rotated in blocks of 256", id="int8-convrot-float16-scales"),
    pytest.param(int8_convrot(convrot=True), "int8 rotated in blocks of 256", id="int8-convrot-256-by-default"),
    pytest.param(
        int8_convrot(16, params={"convrot": True, "convrot_groupsize": 16}),
        "int8 rotated in blocks of 16",
        id="int8-convrot-by-params",
    ),
    pytest.param(
        int8_convrot(format=None, convrot=True, per_row=True), "int8 rotated in blocks of 256", id="int8-fast"
    ),
    pytest.param(convrot_w4a4, "int4 rotated in blocks of 64", id="w4a4"),
    pytest.param(w4a8(), "w4a8 in groups of 16 rotated in blocks of 16", id="w4a8"),
    pytest.param(w4a8(codebook=False), "w4a8 in groups of 16 rotated in blocks of 16", id="w4a8-uniform"),
    pytest.param(w4a8(group_size=64, float8=False), "w4a8 in groups of 64 rotated in blocks of 16", id="w4a8-64"),
    pytest.param(w4a8(bits=6, codebook=False), "w6a8 in groups of 16 rotated in blocks of 16", id="w6a8"),
]
ROUNDED_IN_STEPS = [
    pytest.param(w4a8(correction=True), "w4a8 in groups of 16 rotated in blocks of 16", id="w4a8-asymmetric"),
    pytest.param(awq_w4a16, "awq_w4a16 in groups of 64", id="awq"),
    pytest.param(nvfp4_awq(), "nvfp4 with scaled columns", id="nvfp4-awq"),
    pytest.param(nvfp4_awq(16), "nvfp4 rotated in blocks of 16 with scaled columns", id="nvfp4-awq-convrot"),
]
SCALED = [
    pytest.param(float8_blocks("float8_e4m3fn_rowwise", None), "float8_e4m3fn", id="rows"),
    pytest.param(float8_blocks("float8_e4m3fn_blockwise", (64, 64)), "float8_e4m3fn in blocks of 64 x 64", id="64"),
    pytest.param(
        float8_blocks("float8_e4m3fn_blockwise", (48, 48), 48), "float8_e4m3fn in blocks of 48 x 48", id="48-stated"
    ),
    pytest.param(
        float8_blocks("float8_e4m3fn_block3d", (1, 32), 32), "float8_e4m3fn in blocks of 1 x 32", id="groups-of-a-row"
    ),
    pytest.param(float8_blocks("int8_blockwise", (128, 128)), "int8", id="int8"),
]


@pytest.mark.parametrize(("quantize", "label"), ROUNDED_ONCE + SCALED)
def test_hidden_states_are_those_of_the_exact_weights(
    tmp_path: Path, weights: Stored, quantize: Quantize, label: str
) -> None:
    """Bit for bit: integers are rotated without rounding, and rounded once, when they are scaled."""
    tensors, decoded = quantized(weights, quantize)
    write_tensors(tmp_path / "plain", decoded)
    file = write_file(tmp_path, tensors)

    assert open_checkpoint(ModelOptions(str(file))).quantization == label
    for ours, expected in zip(encode(file), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("quantize", "label"), ROUNDED_IN_STEPS)
def test_hidden_states_are_close_where_scales_follow_each_other(
    tmp_path: Path, weights: Stored, quantize: Quantize, label: str
) -> None:
    """Each product is rounded to float32, so a weight is off by some 1e-7 of it."""
    tensors, decoded = quantized(weights, quantize)
    write_tensors(tmp_path / "plain", decoded)
    file = write_file(tmp_path, tensors)

    assert open_checkpoint(ModelOptions(str(file))).quantization == label
    for ours, expected in zip(encode(file), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("block", [4, 16, 64, 256, 1024])
def test_rotation_is_the_product_with_the_hadamard_matrix(block: int) -> None:
    """And its own inverse."""
    numbers = np.random.default_rng(0).integers(-127, 128, (3, 2048)).astype(np.float32)
    rotated = unrotate(mx.array(numbers), block)

    np.testing.assert_array_equal(np.array(rotated), rotate(numbers, block))
    np.testing.assert_array_equal(np.array(unrotate(rotated, block)), numbers)
    np.testing.assert_allclose(hadamard(block) @ hadamard(block), np.eye(block), atol=1e-12)


def test_embedding_can_be_rotated(tmp_path: Path, weights: Stored) -> None:
    """Comfy-Org's int8_convrot text encoders quantize it too."""
    tensors, decoded = quantized(weights, int8_convrot(), "embed_tokens")
    write_tensors(tmp_path / "plain", decoded)

    for ours, expected in zip(encode(write_file(tmp_path, tensors)), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_rotation_is_part_of_the_fingerprint(tmp_path: Path, weights: Stored) -> None:
    """Equal bytes that are read in two ways are two checkpoints."""
    tensors, _ = quantized(weights, int8_convrot())
    rotated = open_checkpoint(ModelOptions(str(write_file(tmp_path, tensors))))
    for key in [key for key in tensors if key.endswith("comfy_quant")]:
        tensors[key] = note(format="int8_tensorwise")
    plain = open_checkpoint(ModelOptions(str(write_file(tmp_path, tensors))))

    assert plain.fingerprint != rotated.fingerprint


@pytest.mark.parametrize("stored", [np.zeros(29, np.uint8), np.zeros(0, np.uint8), np.frombuffer(b" \n\0", np.uint8)])
@pytest.mark.parametrize("name", ["embed_tokens", "norm", "layers.0.mlp.up_proj"])
def test_empty_note_is_no_note(tmp_path: Path, weights: Stored, name: str, stored: Array) -> None:
    """Comfy-Org's own qwen3vl_32b_nvfp4_awq has one of NUL bytes beside its embedding."""
    tensors = {f"model.{key}": array for key, array in weights.items()} | {f"model.{name}.comfy_quant": stored}

    for ours, expected in zip(encode(write_file(tmp_path, tensors)), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("stored", [note(format="nvfp4"), note(format="of tomorrow"), np.frombuffer(b"{", np.uint8)])
def test_note_on_plain_floats_is_ignored_with_a_warning(
    tmp_path: Path, weights: Stored, stored: Array, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools that put floats back in place of quantized weights leave the notes."""
    notes = {f"model.layers.{index}.mlp.up_proj.comfy_quant": stored for index in (0, 1)}
    file = write_file(tmp_path, {f"model.{key}": array for key, array in weights.items()} | notes)

    for ours, expected in zip(encode(file), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)
    [warning] = {r.getMessage() for r in caplog.records if "comfy_quant" in r.getMessage()}
    assert "2 x qwen_3_4b.safetensors: a note (comfy_quant) on plain floats" in warning


def changed(stored: Stored, **parts: Array | None) -> Stored:
    """One layer's arrays with some replaced; None leaves one out."""
    replaced = {key: parts.get(key.rpartition(".")[2], array) for key, array in stored.items()}
    return {key: array for key, array in replaced.items() if array is not None}


W4A8 = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 16}
REFUSED = [
    pytest.param(int8_convrot(), {"comfy_quant": note(format="int4_of_tomorrow")}, "int4_of_tomorrow", id="unknown"),
    pytest.param(int8_convrot(), {"comfy_quant": note(format=3)}, "expected the name of a format", id="number-as-name"),
    pytest.param(int8_convrot(), {"comfy_quant": note(format="x" * 9000)}, "xxx.*not read here", id="long-name"),
    pytest.param(
        int8_convrot(),
        {"comfy_quant": note(format="int8_tensorwise", convrot=True, convrot_groupsize=128)},
        "blocks of 128 columns, expected a power of 4 that divides",
        id="no-power-of-4",
    ),
    pytest.param(
        convrot_w4a4,
        {"comfy_quant": note(format="convrot_w4a4", convrot_groupsize=1024)},
        "blocks of 1,024 columns, expected a power of 4 that divides",
        id="wider-than-the-rows",
    ),
    pytest.param(
        int8_convrot(),
        {"comfy_quant": note(format="int8_tensorwise", convrot=True, convrot_groupsize=10**30)},
        "convrot_groupsize is 1000.*expected a number of columns",
        id="absurd-block",
    ),
    pytest.param(
        int8_convrot(),
        {"comfy_quant": note(format="int8_tensorwise", convrot=True, convrot_groupsize=[256])},
        r"convrot_groupsize is \[256\], expected a number",
        id="block-is-a-list",
    ),
    pytest.param(
        int8_convrot(), {"weight_scale": np.ones((3, 1), np.float32)}, r"is F32 \(3, 1\), expected", id="int8-scale"
    ),
    pytest.param(int8_convrot(), {"weight": np.zeros((512, 128), np.uint8)}, "expected F8_E4M3", id="no-8-bits"),
    pytest.param(nvfp4, {"weight_scale_2": None}, "as weight_scale_2 none, expected one float", id="nvfp4-no-scale-2"),
    pytest.param(
        nvfp4, {"weight_scale_2": np.ones((512, 1), np.float32)}, r"as weight_scale_2 F32 \(512, 1\)", id="nvfp4-rows"
    ),
    pytest.param(nvfp4, {"weight_scale": np.zeros(5, np.uint8)}, "has 5 bytes of scales", id="nvfp4-scales"),
    pytest.param(nvfp4, {"weight_scale": np.zeros((512, 16), np.int8)}, "bytes of scales .I8.", id="nvfp4-integers"),
    pytest.param(nvfp4, {"weight_scale": None}, "has no scales", id="nvfp4-no-scales"),
    pytest.param(
        nvfp4_awq(),
        {"pre_quant_scale": np.ones(3, np.float32)},
        r"pre_quant_scale is F32 \(3,\), .* 256",
        id="awq-short",
    ),
    pytest.param(nvfp4_awq(), {"pre_quant_scale": np.ones(256, np.int32)}, "pre_quant_scale is I32", id="awq-integers"),
    pytest.param(convrot_w4a4, {"weight_scale": None}, "weight_scale nothing, expected BF16", id="w4a4-no-scale"),
    pytest.param(
        convrot_w4a4, {"weight_scale": np.ones((4, 512), np.float32)}, "expected .* of shape .512,.", id="w4a4-groups"
    ),
    pytest.param(convrot_w4a4, {"weight": np.zeros(65536, np.int8)}, "expected bytes of convrot_w4a4", id="w4a4-flat"),
    pytest.param(w4a8(), {"weight_s_rel": None}, "weight_s_rel nothing", id="w4a8-no-scales"),
    pytest.param(w4a8(), {"weight_s_channel": None}, "weight_s_channel nothing", id="w4a8-no-scale"),
    pytest.param(w4a8(), {"weight_codebook": np.ones(15, np.float32)}, "weight_codebook F32 .15,.", id="w4a8-codebook"),
    pytest.param(
        w4a8(), {"comfy_quant": note(**{**W4A8, "group_size": 24})}, "in groups of 24", id="w4a8-other-group-size"
    ),
    pytest.param(w4a8(), {"weight": np.zeros(147456, np.int8)}, "expected bytes of asym_w4a8_int8", id="w4a8-repacked"),
    pytest.param(awq_w4a16, {"weight_zeros": None}, "weight_zeros nothing", id="awq-no-zeros"),
    pytest.param(
        awq_w4a16,
        {"weight_scale": np.ones((512, 4), np.float32)},
        r"expected .* of shape \(4, 512\)",
        id="awq-transposed",
    ),
    pytest.param(
        float8_blocks("float8_e4m3fn_blockwise", (64, 64)),
        {"comfy_quant": note(format="float8_e4m3fn_blockwise", group_size=2**40)},
        "group_size is 1099511627776, expected a number",
        id="absurd-group",
    ),
    pytest.param(
        float8_blocks("float8_e4m3fn_blockwise", (64, 64)),
        {"comfy_quant": note(format="float8_e4m3fn_blockwise", group_size=32)},
        r"is F32 \(8, 4\), expected .* one for each 32 x 32 block",
        id="other-group",
    ),
    pytest.param(
        float8_blocks("float8_e4m3fn_rowwise", None), {"weight_scale": None}, "has no scale beside it", id="no-scale"
    ),
]


@pytest.mark.parametrize(("quantize", "parts", "message"), REFUSED)
def test_layer_that_cannot_be_decoded_is_named(
    tmp_path: Path, weights: Stored, quantize: Quantize, parts: dict[str, Array | None], message: str
) -> None:
    """In one line."""
    tensors = {f"model.{name}": array for name, array in weights.items() if f"model.{name}" != f"{LAYER}.weight"}
    stored, _ = quantize(LAYER, weights[f"{LAYER.removeprefix('model.')}.weight"])
    file = write_file(tmp_path, tensors | changed(stored, **parts))

    with pytest.raises(CheckpointError, match=message) as refusal:
        open_checkpoint(ModelOptions(str(file)))
    assert LAYER in str(refusal.value)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 700


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        pytest.param("model.", "model.", id="same"),
        pytest.param(
            "text_encoders.qwen3_4b.transformer.model.", "text_encoders.qwen3_4b.transformer.model.", id="all"
        ),
        pytest.param("conditioner.0.model.", "conditioner.0.model.", id="unheard-of"),
        pytest.param("conditioner.0.model.", "", id="left-out"),
        pytest.param("model.", "model.language_model.", id="another"),
    ],
)
def test_notes_in_the_header_are_found_under_any_prefix(
    tmp_path: Path, weights: Stored, prefix: str, said: str
) -> None:
    """Without its note, a rotated weight would be read as noise."""
    tensors, decoded = quantized(weights, int8_convrot(64))
    write_tensors(tmp_path / "plain", decoded)
    layers = {
        said + key.removeprefix("model.").removesuffix(".comfy_quant"): json.loads(tensors.pop(key).tobytes())
        for key in list(tensors)
        if key.endswith("comfy_quant")
    }
    renamed = {prefix + key.removeprefix("model."): array for key, array in tensors.items()}
    file = write_file(tmp_path, renamed, _quantization_metadata=json.dumps({"layers": layers}))

    for ours, expected in zip(encode(file), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_integers_that_the_header_leaves_out_are_refused(tmp_path: Path, weights: Stored) -> None:
    """Nothing says whether they are rotated."""
    tensors, _ = quantized(weights, int8_convrot(64))
    tensors = {key: array for key, array in tensors.items() if not key.endswith("comfy_quant")}
    layers = {"model.layers.0.mlp.up_proj": {"format": "int8_tensorwise"}}
    file = write_file(tmp_path, tensors, _quantization_metadata=json.dumps({"layers": layers}))

    with pytest.raises(CheckpointError, match="is I8 and has no entry in _quantization_metadata"):
        open_checkpoint(ModelOptions(str(file)))


def test_layer_that_no_block_fits_is_not_rotated(
    tmp_path: Path, weights: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools that leave narrow layers as they are may mark them all the same. It is a guess, so it is said."""
    tensors, decoded = quantized(weights, int8)
    write_tensors(tmp_path / "plain", decoded)
    said = note(format="int8_tensorwise", convrot=True, convrot_groupsize=1024)
    file = write_file(tmp_path, tensors | {key: said for key in tensors if key.endswith("comfy_quant")})

    for ours, expected in zip(encode(file), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert any("14 x qwen_3_4b.safetensors: a layer is marked as rotated" in message for message in caplog.messages)


def test_integers_of_a_rotated_file_are_not_read_without_their_note(tmp_path: Path, weights: Stored) -> None:
    """A tool that saves a file anew may drop the notes; nothing but the name is left to show it."""
    tensors, _ = quantized(weights, int8_convrot(64))
    tensors = {key: array for key, array in tensors.items() if not key.endswith("comfy_quant")}
    file = write_file(tmp_path, tensors, "qwen_3_4b_int8_convrot.safetensors")

    with pytest.raises(CheckpointError, match=r"is I8 and has no note .* name says that its weights are rotated"):
        open_checkpoint(ModelOptions(str(file)))


def test_file_without_any_note_has_plain_integers(tmp_path: Path, weights: Stored) -> None:
    """As tools wrote them before there were notes."""
    tensors, decoded = quantized(weights, int8)
    write_tensors(tmp_path / "plain", decoded)
    file = write_file(tmp_path, {key: array for key, array in tensors.items() if not key.endswith("comfy_quant")})

    for ours, expected in zip(encode(file), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)
