"""Writing a checkpoint in MLX's format: the copy gives the same hidden states as the original."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, TextEncoder
from encoder.checkpoint import convert_checkpoint, open_checkpoint
from encoder.checkpoint.loading import convert
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, write_checkpoint
from tests.encoder.checkpoint.gguf_files import write_gguf

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
    assert converted.tokenizer.pad_token_id == original.tokenizer.pad_token_id
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    for ours, expected in zip(encode(tmp_path / "b"), encode(tmp_path / "a"), strict=True):
        np.testing.assert_array_equal(ours, expected)


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


def test_quantization_that_mlx_has_is_kept(tmp_path: Path) -> None:
    """Q8_0 becomes 8-bit affine; its scales are rounded from float16 to bfloat16."""
    weights = write_checkpoint(tmp_path / "a", **DIMS)
    write_gguf(tmp_path / "model.gguf", weights, "Q8_0")
    convert_checkpoint(open_checkpoint(ModelOptions(str(tmp_path / "model.gguf"))), tmp_path / "b")

    assert open_checkpoint(ModelOptions(str(tmp_path / "b"))).quantization == "affine 8-bit in groups of 32"
    for ours, expected in zip(encode(tmp_path / "b"), encode(tmp_path / "model.gguf"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=0.1)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
    ],
)
def test_scaled_rope_stays(tmp_path: Path, scaling: dict[str, Any]) -> None:
    """Without it the copy would be another model."""
    write_checkpoint(tmp_path / "a", rope="rope_theta")
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"rope_scaling": scaling}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    original = open_checkpoint(ModelOptions(str(tmp_path / "a")))
    convert_checkpoint(original, tmp_path / "b")

    assert open_checkpoint(ModelOptions(str(tmp_path / "b"))).config.rope == original.config.rope
    assert json.loads((tmp_path / "b" / "config.json").read_text())["rope_scaling"].items() >= scaling.items()


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
