"""rope_theta in files as people have them: without a config, with half of one, and with a user who knows better."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from encoder.checkpoint import Checkpoint, open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import write_checkpoint
from tests.encoder.checkpoint.gguf_files import DIMS, write_gguf

HEAD_DIM = 8  # of write_checkpoint


def open_path(path: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(ModelOptions(str(path), **options))


def write_single_file(file: Path, prefix: str = "model.", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file without a config, beside a tokenizer."""
    weights = write_checkpoint(file.parent)
    save_file({prefix + name: array for name, array in weights.items()}, file, metadata)
    for name in ("config.json", "model.safetensors"):
        if file.name != name:
            (file.parent / name).unlink()
    return file


def write_mflux(root: Path, version: str, **extra: Any) -> Path:
    """What mflux-save writes: a pipeline's folders, with an index and no config."""
    weights = write_checkpoint(root / "text_encoder")
    metadata = {"quantization_level": "None", "mflux_version": version}
    save_file(weights | extra, root / "text_encoder" / "0.safetensors", metadata)
    index = {"metadata": metadata, "weight_map": dict.fromkeys(weights | extra, "0.safetensors")}
    (root / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "model.safetensors"):
        (root / "text_encoder" / name).unlink()
    for name in ("transformer", "vae"):
        (root / name).mkdir()
        save_file({"weight": np.zeros(1, np.float32)}, root / name / "0.safetensors", metadata)
    return root


def inv_freq(theta: float) -> Any:
    return (1 / theta ** (np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM)).astype(np.float32)


@pytest.mark.parametrize("theta", [1e6, 5e6])
def test_mflux_saves_the_frequencies(tmp_path: Path, theta: float) -> None:
    """In all its encoders: Z-Image, FLUX.2, Krea 2, Ideogram 4, Iris."""
    extra = {"rotary_emb.inv_freq": inv_freq(theta)}
    checkpoint = open_path(write_mflux(tmp_path, "0.24.0", **extra))

    assert checkpoint.config.rope_theta == theta
    assert checkpoint.origin.rope_theta == "it holds RoPE's frequencies"
    assert not any("rope_theta" in warning for warning in checkpoint.warnings)


def test_mflux_before_krea_2_has_qwen3_alone(tmp_path: Path) -> None:
    checkpoint = open_path(write_mflux(tmp_path, "0.12.0"))

    assert (checkpoint.config.rope_theta, checkpoint.warnings) == (1e6, ())


def test_mflux_folder_that_may_be_either_is_refused_until_the_user_says_which(tmp_path: Path) -> None:
    """Without the frequencies, with a transformer that has no name."""
    root = write_mflux(tmp_path / "pipeline", "0.24.0")

    with pytest.raises(CheckpointError, match=r"pipeline/text_encoder: has no config.*Give --rope-theta"):
        open_path(root)

    checkpoint = open_path(root, rope_theta=5e6)
    assert (checkpoint.config.rope_theta, checkpoint.origin.rope_theta) == (5e6, "--rope-theta")
    assert checkpoint.warnings == ()


def test_names_in_a_pipeline_tell_which_it_is(tmp_path: Path) -> None:
    root = write_mflux(tmp_path / "pipeline", "0.24.0")
    (root / "transformer" / "config.json").write_text('{"_class_name": "Krea2Transformer2DModel"}')
    shutil.copytree(root, tmp_path / "other")
    (tmp_path / "other" / "transformer" / "config.json").write_text('{"_class_name": "ZImageTransformer2DModel"}')

    krea, z_image = open_path(root), open_path(tmp_path / "other" / "text_encoder")

    assert (krea.config.rope_theta, z_image.config.rope_theta) == (5e6, 1e6)
    for checkpoint in (krea, z_image):
        assert checkpoint.origin.rope_theta.startswith("assumed: ")
        assert any("--rope-theta" in warning for warning in checkpoint.warnings)


@pytest.mark.parametrize("name", ["model.safetensors", "text_encoder.safetensors"])
def test_single_file_whose_name_says_nothing_is_refused(tmp_path: Path, name: str) -> None:
    file = write_single_file(tmp_path / "a" / "b" / name)
    (file.parent / "config.json").unlink(missing_ok=True)

    with pytest.raises(CheckpointError, match=rf"{name}: has no config.*Give --rope-theta"):
        open_path(file)


def test_single_file_says_it_by_its_name_its_folder_or_its_header(tmp_path: Path) -> None:
    named = write_single_file(tmp_path / "a" / "qwen_3_4b.safetensors")
    in_folder = write_single_file(tmp_path / "krea-2" / "text_encoders" / "te.safetensors")
    headed = write_single_file(tmp_path / "c" / "te.safetensors", metadata={"modelspec.architecture": "ideogram-4"})
    inside = write_single_file(tmp_path / "d" / "aio.safetensors", "text_encoders.qwen3vl_4b.transformer.model.")

    assert [open_path(file).config.rope_theta for file in (named, in_folder, headed, inside)] == [1e6, 5e6, 5e6, 5e6]


def test_config_without_a_theta_gives_the_default_and_a_warning(tmp_path: Path) -> None:
    """transformers computes with 10000 then, silently."""
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": None, "rope_theta": None}))
    checkpoint = open_path(tmp_path)

    assert (checkpoint.config.rope_theta, checkpoint.origin.rope_theta) == (1e4, "the default")
    assert any("config.json has no rope_theta" in warning for warning in checkpoint.warnings)


def test_what_the_user_gives_comes_before_a_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, rope_theta=1e6)
    checkpoint = open_path(tmp_path, rope_theta=5e6)

    assert checkpoint.config.rope_theta == 5e6
    assert any("as --rope-theta says" in warning for warning in checkpoint.warnings)
    assert checkpoint.fingerprint != open_path(tmp_path).fingerprint


def test_gguf_says_it_in_its_metadata(tmp_path: Path) -> None:
    """Without a freq_base, llama.cpp computes with 10000, for Qwen3-VL too."""
    weights = write_checkpoint(tmp_path / "plain", **DIMS)
    write_gguf(tmp_path / "model.gguf", weights)
    stated, given = open_path(tmp_path / "model.gguf"), open_path(tmp_path / "model.gguf", rope_theta=5e6)

    assert (stated.config.rope_theta, stated.origin.rope_theta) == (1e6, str(tmp_path / "model.gguf"))
    assert (given.config.rope_theta, given.origin.rope_theta) == (5e6, "--rope-theta")
    assert any("as --rope-theta says" in warning for warning in given.warnings)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3vl"])
def test_gguf_without_a_theta_gives_the_default_and_a_warning(tmp_path: Path, architecture: str) -> None:
    weights = write_checkpoint(tmp_path / "plain", **DIMS)
    write_gguf(tmp_path / "model.gguf", weights, architecture=architecture, rope_theta=None)
    checkpoint = open_path(tmp_path / "model.gguf")

    assert checkpoint.config.rope_theta == 1e4
    assert any("has no rope_theta" in warning for warning in checkpoint.warnings)
