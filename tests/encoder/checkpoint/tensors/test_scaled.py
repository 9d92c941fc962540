"""8-bit numbers with scales of every kind: floats and powers of two, one, per row, per block of any size."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from encoder import LAST_HIDDEN_STATE, TextEncoder
from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.tensors.scaled import Scaled
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, write_checkpoint, write_json, write_tensors

DIMS = {"hidden_size": 256, "intermediate_size": 192, "head_dim": 32}  # k_proj has 64 rows
E4M3, E5M2, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu


def encode(source: Path) -> list[Array]:
    encoder = TextEncoder.open(ModelOptions(str(source), compute_dtype="float32"))
    return [embeds.hidden_states for embeds in encoder.encode(["a cat", "a red sofa"], LAST_HIDDEN_STATE, "float32")]


def write(
    folder: Path, block: tuple[int, int], name: str, dtype: Any, numbers: Any = E4M3, as_bytes: bool = False
) -> dict[str, Array]:
    """A plain folder, and beside it the same weights in 8 bits with a scale for each block. Returns what is stored."""
    weights = write_checkpoint(folder / "stored", **DIMS)
    write_checkpoint(folder / "plain", **DIMS)
    stored: dict[str, Array] = {}
    plain: dict[str, Array] = {}
    for key, weight in weights.items():
        if "proj" not in key:
            stored[f"model.{key}"] = plain[f"model.{key}"] = weight
            continue
        rows, columns = weight.shape
        down, across = -(-rows // block[0]), -(-columns // block[1])
        scale = np.random.default_rng(0).uniform(0.01, 0.02, (down, across)).astype(dtype)
        spread = np.kron(scale.astype(np.float32), np.ones(block, np.float32))[:rows, :columns]
        stored[f"model.{key}"] = (weight / spread).astype(numbers)
        stored[f"model.{key.removesuffix('weight')}{name}"] = scale.view(np.uint8) if as_bytes else scale
        plain[f"model.{key}"] = stored[f"model.{key}"].astype(np.float32) * spread
    write_tensors(folder / "stored", stored)
    write_tensors(folder / "plain", plain)
    return stored


def state_block(folder: Path, block: Any) -> None:
    """Say the size of a block in config.json, as transformers does."""
    config = json.loads((folder / "config.json").read_text())
    described = {"quant_method": "fp8", "weight_block_size": block}
    write_json(folder / "config.json", config | {"quantization_config": described})


@pytest.mark.parametrize(
    ("block", "name", "dtype", "stated"),
    [
        pytest.param((128, 128), "weight_scale_inv", np.float32, None, id="qwen"),
        pytest.param((128, 128), "weight_scale_inv", E8M0, [128, 128], id="deepseek-powers-of-two"),
        pytest.param((128, 128), "weight_scale_inv", ml_dtypes.bfloat16, [128, 128], id="bfloat16"),
        pytest.param((64, 32), "weight_scale_inv", np.float32, [64, 32], id="64x32"),
        pytest.param((64, 4), "weight_scale_inv", np.float16, [64, 4], id="one-row-of-as-many-blocks-as-rows"),
        pytest.param((48, 80), "weight_scale_inv", np.float32, [48, 80], id="cut-off-blocks"),
        pytest.param((1, 32), "weight_scale", E8M0, None, id="mxfp8"),
        pytest.param((1, 32), "weight_scale_inv", E8M0, [1, 32], id="mxfp8-stated"),
        pytest.param((1, 256), "weight_scale", E8M0, None, id="rows-of-powers-of-two"),
        pytest.param((1, 64), "weight_scale", np.float32, None, id="groups-of-a-row"),
    ],
)
def test_hidden_states_are_those_of_the_decoded_weights(
    tmp_path: Path, block: tuple[int, int], name: str, dtype: Any, stated: list[int] | None
) -> None:
    write(tmp_path, block, name, dtype)
    if stated:
        state_block(tmp_path / "stored", stated)

    for ours, expected in zip(encode(tmp_path / "stored"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("numbers", [E5M2, np.int8])
def test_numbers_of_other_kinds_have_the_same_scales(tmp_path: Path, numbers: Any) -> None:
    write(tmp_path, (64, 64), "weight_scale_inv", np.float32, numbers)
    state_block(tmp_path / "stored", [64, 64])

    for ours, expected in zip(encode(tmp_path / "stored"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_scales_may_have_more_axes(tmp_path: Path) -> None:
    """ModelOpt keeps an axis for the rows and for the columns of a block."""
    tensors = write(tmp_path, (128, 128), "weight_scale", np.float32)
    deeper = {key: array[:, None, :, None] if key.endswith("scale") else array for key, array in tensors.items()}
    write_tensors(tmp_path / "stored", deeper)

    for ours, expected in zip(encode(tmp_path / "stored"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_missing_scale_is_refused_where_the_config_speaks_of_one(tmp_path: Path) -> None:
    """Without it, the weights are noise. A plain cast to float8 has none, and no config that says fp8."""
    tensors = write(tmp_path, (128, 128), "weight_scale_inv", np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    write_tensors(tmp_path / "stored", tensors)
    open_checkpoint(ModelOptions(str(tmp_path / "stored")))
    state_block(tmp_path / "stored", [128, 128])

    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight is F8_E4M3 and has no scale beside it"):
        open_checkpoint(ModelOptions(str(tmp_path / "stored")))


def test_exponents_may_be_plain_bytes(tmp_path: Path) -> None:
    """As libraries store them that do not know the dtype."""
    write(tmp_path, (1, 32), "weight_scale", E8M0, as_bytes=True)

    for ours, expected in zip(encode(tmp_path / "stored"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_float8_may_be_plain_bytes_where_mflux_saved_it(tmp_path: Path) -> None:
    """MLX has no dtype for it. One scale for each row, in the file of a pipeline that has no config.json."""
    stored = write(tmp_path, (1, 4096), "weight_scale", np.float32)
    for key, array in stored.items():
        if array.dtype == E4M3:
            stored[key] = array.view(np.uint8)
            stored[f"{key}_scale"] = stored[f"{key}_scale"][:, 0]
    (tmp_path / "stored" / "model.safetensors").unlink()
    save_file(stored, tmp_path / "stored" / "0.safetensors", {"mflux_version": "0.24.0"})

    for ours, expected in zip(encode(tmp_path / "stored"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_every_exponent_is_a_power_of_two() -> None:
    """Down to 2 ** -127, which is subnormal. 255 is NaN, and becomes infinity, which the loader refuses."""
    exponents = np.arange(256, dtype=np.uint8)
    arrays = {"weight": mx.array(np.ones((256, 1), np.int8)), "scale": mx.array(exponents.reshape(256, 1))}
    decoded = np.array(Scaled("I8").decode(arrays, mx.float32))

    np.testing.assert_array_equal(decoded[:255, 0], exponents[:255].view(E8M0).astype(np.float32))
    assert np.isinf(decoded[255, 0])


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        pytest.param([64, 64], r"is F32 \(2, 2\), expected .* one for each 64 x 64 block", id="other-size"),
        pytest.param([2**60, 2**60], r"for each 1152921504606846976 x 1152921504606846976 block", id="absurd"),
        pytest.param([0, 128], r"weight_block_size of quantization_config is \[0, 128\]", id="zero"),
        pytest.param("128", "weight_block_size of quantization_config is '128'", id="text"),
        pytest.param([128] * 5000, r"is \[128, 128, .* expected rows and columns", id="long"),
    ],
)
def test_scale_of_another_block_is_refused(tmp_path: Path, stated: Any, message: str) -> None:
    """In one line."""
    write(tmp_path, (128, 128), "weight_scale_inv", np.float32)
    state_block(tmp_path / "stored", stated)

    with pytest.raises(CheckpointError, match=message) as refusal:
        open_checkpoint(ModelOptions(str(tmp_path / "stored")))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz])
def test_float8_of_another_kind_is_named(tmp_path: Path, dtype: Any) -> None:
    """Its bytes mean half of what those of float8_e4m3fn mean."""
    write(tmp_path, (128, 128), "weight_scale_inv", np.float32, dtype)
    state_block(tmp_path / "stored", [128, 128])

    with pytest.raises(CheckpointError, match=r"proj.weight .* quantized by float8 of AMD's older GPUs \(e.m.fnuz\)"):
        open_checkpoint(ModelOptions(str(tmp_path / "stored")))
