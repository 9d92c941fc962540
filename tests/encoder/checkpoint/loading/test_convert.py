"""Writing a checkpoint in MLX's format: the copy gives the same hidden states as the original."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, TextEncoder
from encoder.checkpoint import convert_checkpoint, open_checkpoint
from encoder.checkpoint.files.safetensors_header import read_header
from encoder.checkpoint.loading import convert
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, quantize_with_mlx, write_checkpoint, write_json, write_tensors
from tests.encoder.checkpoint.comfyui_files import Quantize, Stored, block_float8, float8, mxfp8, nvfp4, write_file
from tests.encoder.checkpoint.comfyui_transformed import int8_convrot
from tests.encoder.checkpoint.gguf_files import write_gguf

Write = Callable[[Path], Path]  # writes a checkpoint, and returns what opens it

DIMS = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


def encode(source: Path, **options: Any) -> list[Array]:
    encoder = TextEncoder.open(ModelOptions(str(source), compute_dtype="float32", **options))
    return [embeds.hidden_states for embeds in encoder.encode(["a cat", "a red sofa"], LAST_HIDDEN_STATE, "float32")]


@pytest.mark.parametrize("shard_bytes", [10**9, 10**5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_checkpoint_stays_the_same(
    tmp_path: Path, dtype: str, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has the same fingerprint with any number of shards. The language model head is left out."""
    monkeypatch.setattr(convert, "SHARD_BYTES", shard_bytes)
    write_checkpoint(tmp_path / "a", **DIMS, dtype=dtype, tie_word_embeddings=False)
    original = open_checkpoint(ModelOptions(str(tmp_path / "a")))
    convert_checkpoint(original, tmp_path / "b")
    converted = open_checkpoint(ModelOptions(str(tmp_path / "b")))

    assert converted.fingerprint == original.fingerprint
    assert converted.tokenizer.pad_token == original.tokenizer.pad_token
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    for ours, expected in zip(encode(tmp_path / "b"), encode(tmp_path / "a"), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_tokens_declared_beside_tokenizer_json_are_kept(tmp_path: Path) -> None:
    """The copy's tokenizer.json has all of them, with their flags."""
    write_checkpoint(tmp_path / "a", **DIMS, vocab_size=290)
    extra = ["<loc>", {"content": "<pad>", "lstrip": True}]
    settings = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": extra, "pad_token": "<pad>"}
    write_json(tmp_path / "a" / "tokenizer_config.json", settings)
    original = open_checkpoint(ModelOptions(str(tmp_path / "a"))).tokenizer
    convert_checkpoint(open_checkpoint(ModelOptions(str(tmp_path / "a"))), tmp_path / "b")
    converted = open_checkpoint(ModelOptions(str(tmp_path / "b"))).tokenizer

    text = "a  <loc>  <pad><|im_end|> <think>"
    assert converted.tokenize(text, max_length=99) == original.tokenize(text, max_length=99)
    assert (converted.vocab_size, converted.pad_token) == (original.vocab_size, original.pad_token) == (284, "<pad>")


@pytest.mark.parametrize("quantize", ["4", "8", "mxfp4", "mxfp8", "nvfp4"])
def test_converting_and_quantizing_on_load_are_the_same(tmp_path: Path, quantize: str) -> None:
    """A user can try a quantization on load, and then convert once."""
    write_checkpoint(tmp_path / "a", **DIMS)
    convert_checkpoint(open_checkpoint(ModelOptions(str(tmp_path / "a"))), tmp_path / "b", quantize)

    assert "4-bit" in str(open_checkpoint(ModelOptions(str(tmp_path / "b"))).quantization) if quantize == "4" else True
    for ours, expected in zip(
        encode(tmp_path / "b", quantize="keep"), encode(tmp_path / "a", quantize=quantize), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def mlx(bits: int, dtype: str, mode: str = "affine") -> Write:
    """MLX's format, scales and biases stored in `dtype` with more digits than bfloat16 has."""

    def write(folder: Path) -> Path:
        weights = write_checkpoint(folder / "plain", **DIMS)
        stored, _ = quantize_with_mlx(weights, {"bits": bits, "mode": mode})
        for key in [key for key in stored if key.endswith(("scales", "biases")) and mode == "affine"]:
            digits = 1 + np.random.default_rng(0).uniform(0, 0.01, stored[key].shape)
            stored[key] = (stored[key].astype(np.float32) * digits).astype(dtype)
        write_tensors(folder / "plain", {f"model.{key}": array for key, array in stored.items()})
        config = json.loads((folder / "plain" / "config.json").read_text())
        write_json(folder / "plain" / "config.json", config | {"quantization": {"bits": bits, "mode": mode}})
        return folder / "plain"

    return write


def gguf(kind: str) -> Write:
    def write(folder: Path) -> Path:
        write_gguf(folder / "model.gguf", write_checkpoint(folder / "plain", **DIMS), kind)
        return folder / "model.gguf"

    return write


def comfyui(quantize: Quantize) -> Write:
    """A file whose matrices are quantized and whose norms are float32."""

    def write(folder: Path) -> Path:
        tensors: Stored = {}
        for name, weight in write_checkpoint(folder / "plain", **DIMS).items():
            path = f"model.{name.removesuffix('.weight')}"
            tensors |= quantize(path, weight)[0] if "proj" in name else {f"model.{name}": weight}
        return write_file(folder, tensors)

    return write


EXACT = [
    pytest.param(mlx(4, "float32"), "affine 4-bit in groups of 64", id="mlx-float32"),
    pytest.param(mlx(8, "float16"), "affine 8-bit in groups of 64", id="mlx-float16"),
    pytest.param(mlx(4, "bfloat16"), "affine 4-bit in groups of 64", id="mlx-bfloat16"),
    pytest.param(mlx(8, "", "mxfp8"), "mxfp8", id="mlx-mxfp8"),
    pytest.param(gguf("Q8_0"), "affine 8-bit in groups of 32", id="Q8_0"),
    pytest.param(gguf("Q4_0"), "affine 4-bit in groups of 32", id="Q4_0"),
    pytest.param(gguf("Q4_1"), "affine 4-bit in groups of 32", id="Q4_1"),
    pytest.param(gguf("Q4_K"), None, id="Q4_K"),
    pytest.param(comfyui(mxfp8), "mxfp8", id="comfyui-mxfp8"),
    pytest.param(comfyui(nvfp4), None, id="comfyui-nvfp4"),
    pytest.param(comfyui(int8_convrot()), None, id="int8-convrot"),
    pytest.param(comfyui(float8(ml_dtypes.float8_e4m3fn, 448, False, ("weight_scale",))), None, id="float8-scaled"),
    pytest.param(comfyui(float8(ml_dtypes.float8_e4m3fn, 448, False, ())), None, id="float8-cast"),
    pytest.param(comfyui(block_float8), None, id="float8-blocks"),
]


@pytest.mark.parametrize(("write", "kept"), EXACT)
def test_copy_gives_the_hidden_states_of_the_original(tmp_path: Path, write: Write, kept: str | None) -> None:
    """Bit for bit in float32, whatever the stored quantization and the dtype of its scales."""
    source = write(tmp_path)
    original = open_checkpoint(ModelOptions(str(source)))
    convert_checkpoint(original, tmp_path / "copy")
    copy = open_checkpoint(ModelOptions(str(tmp_path / "copy")))

    assert copy.quantization == kept
    assert copy.dtype == original.dtype
    for ours, expected in zip(encode(tmp_path / "copy"), encode(source), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("write", "suffix", "dtype"),
    [
        pytest.param(mlx(4, "float32"), "up_proj.scales", "F32", id="float32-scales"),
        pytest.param(gguf("Q8_0"), "up_proj.scales", "F16", id="gguf-scales"),
        pytest.param(comfyui(float8(ml_dtypes.float8_e4m3fn, 448, False, ())), "up_proj.weight", "BF16", id="float8"),
        pytest.param(comfyui(int8_convrot()), "up_proj.weight", "F32", id="int8-convrot"),
        pytest.param(comfyui(int8_convrot()), "norm.weight", "F32", id="norms"),
    ],
)
def test_floats_are_written_as_narrow_as_they_are(tmp_path: Path, write: Write, suffix: str, dtype: str) -> None:
    """float32 where it is needed, and only there."""
    convert_checkpoint(open_checkpoint(ModelOptions(str(write(tmp_path)))), tmp_path / "copy")
    header = read_header(tmp_path / "copy" / "model.safetensors")

    assert {array.dtype for array in header.arrays if array.key.endswith(suffix)} == {dtype}


def test_decoded_weights_can_be_rounded_to_the_checkpoints_dtype(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half the size. The log says so where nothing is rounded."""
    checkpoint = open_checkpoint(ModelOptions(str(comfyui(int8_convrot())(tmp_path))))
    convert_checkpoint(checkpoint, tmp_path / "exact")
    convert_checkpoint(checkpoint, tmp_path / "rounded", "none")
    header = read_header(tmp_path / "rounded" / "model.safetensors")

    assert {array.dtype for array in header.arrays if "proj" in array.key} == {"BF16"}
    [warning] = [message for message in caplog.messages if "MLX has no form for 14 of 24 tensors" in message]
    assert "--quantize none writes bfloat16" in warning


def test_random_weights_stay_marked(tmp_path: Path) -> None:
    """The demo is no less random when it is converted."""
    convert_checkpoint(open_checkpoint(ModelOptions("demo", cache_dir=tmp_path)), tmp_path / "b")

    assert open_checkpoint(ModelOptions(str(tmp_path / "b"))).random_weights


def test_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    """Nobody wants two checkpoints in one folder."""
    write_checkpoint(tmp_path / "a")

    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(open_checkpoint(ModelOptions(str(tmp_path / "a"))), tmp_path / "a")


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path) -> None:
    """The next start would open half a checkpoint."""
    write_checkpoint(tmp_path / "a")
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path / "a")))
    (tmp_path / "a" / "model.safetensors").unlink()

    with pytest.raises(CheckpointError):
        convert_checkpoint(checkpoint, tmp_path / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_disk_that_is_too_small_is_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 8 GB are written."""
    write_checkpoint(tmp_path / "a")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 100})())

    with pytest.raises(CheckpointError, match=r"are needed, and 0.0 GB are free"):
        convert_checkpoint(open_checkpoint(ModelOptions(str(tmp_path / "a"))), tmp_path / "b")


def test_plain_weights_in_memory_are_not_copied(tmp_path: Path) -> None:
    """A 16 GB checkpoint is converted on a machine of 8 GB: no more than one shard is held."""
    write_checkpoint(tmp_path / "a", **DIMS, vocab_size=20_000)
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path / "a")))
    mx.clear_cache()
    before = mx.get_active_memory()
    convert_checkpoint(checkpoint, tmp_path / "b")

    assert mx.get_active_memory() - before < 10**6
