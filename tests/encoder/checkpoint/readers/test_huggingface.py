"""Hugging Face and diffusers folders, whole and broken, opened without reading a tensor."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import write_checkpoint, write_json, write_pipeline, write_tensors, write_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({}, id="single-file"),
        pytest.param({"shards": 3}, id="sharded"),
        pytest.param({"prefix": ""}, id="bare-keys"),
        pytest.param({"prefix": "model.language_model.", "nested": True, "shards": 2}, id="vision-model"),
        pytest.param({"tie_word_embeddings": False}, id="untied"),
        pytest.param({"rope": "rope_theta"}, id="top-level-theta"),
        pytest.param({"rope": "rope_scaling"}, id="theta-in-rope-scaling"),
    ],
)
def test_folder_is_opened_in_every_form(tmp_path: Path, form: dict[str, Any]) -> None:
    """Same weights, same checkpoint, however they are laid out."""
    weights = write_checkpoint(tmp_path, **form)
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))

    assert set(checkpoint.weights.tensors) == set(weights)
    assert checkpoint.config.rope_theta == 1e6
    assert checkpoint.name == str(tmp_path)
    assert checkpoint.revision is None
    assert checkpoint.quantization is None
    assert not checkpoint.random_weights


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_most_weights(tmp_path: Path, dtype: str) -> None:
    """Some converters leave the norms in float32."""
    write_checkpoint(tmp_path, dtype=dtype, extra={"model.norm.weight": np.ones(16, np.float32)})

    assert open_checkpoint(ModelOptions(str(tmp_path))).dtype == dtype


@pytest.mark.parametrize("tokenizer_folder", ["tokenizer", "processor", "text_encoder"])
def test_pipeline_folder_is_opened(tmp_path: Path, tokenizer_folder: str) -> None:
    """diffusers puts the tokenizer beside the encoder; processor-based pipelines call the folder otherwise."""
    weights = write_pipeline(tmp_path, tokenizer_folder)

    assert set(open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors) == set(weights)
    assert set(open_checkpoint(ModelOptions(str(tmp_path / "text_encoder"))).weights.tensors) == set(weights)


def test_pipeline_without_a_text_encoder_is_refused(tmp_path: Path) -> None:
    """Fine-tunes are often published with the transformer alone."""
    write_json(tmp_path / "model_index.json", {"_class_name": "ZImagePipeline", "text_encoder": [None, None]})

    with pytest.raises(CheckpointError, match="no text_encoder folder"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """Unpickling runs code that came with the file."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"has pytorch_model.bin.*not read.*save_pretrained"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_files_without_an_index_are_read_together(tmp_path: Path) -> None:
    """mflux and some converters write no index."""
    weights = write_checkpoint(tmp_path, shards=3)
    (tmp_path / INDEX).unlink()

    assert set(open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors) == set(weights)


def test_shard_that_holds_nothing_of_the_encoder_may_be_missing(tmp_path: Path) -> None:
    """Only the files needed are downloaded; a vision tower's shard is not."""
    weights = write_checkpoint(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["visual.patch_embed.proj.weight"] = "model-vision.safetensors"
    write_json(tmp_path / INDEX, index)

    assert set(open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors) == set(weights)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    """An interrupted copy is the usual cause."""
    write_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors missing, but named in"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_tensor_that_is_not_in_its_file_is_named(tmp_path: Path) -> None:
    """The index and the shards are from different uploads."""
    write_checkpoint(tmp_path, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.layers.9.input_layernorm.weight"] = "model-00001-of-00002.safetensors"
    write_json(tmp_path / INDEX, index)

    with pytest.raises(CheckpointError, match=r"model.layers.9.input_layernorm.weight.*model-00001-of-00002"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None, "a\\b", "."]
)
def test_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: object) -> None:
    """A checkpoint is data from strangers."""
    write_checkpoint(tmp_path, shards=2)
    write_json(tmp_path / INDEX, {"weight_map": {"model.norm.weight": name}})

    with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors"])
def test_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    """Half-written by a converter that was stopped."""
    write_checkpoint(tmp_path, shards=2)
    write_json(tmp_path / INDEX, {"weight_map": weight_map})

    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    """Which one is right, nobody can know."""
    write_checkpoint(tmp_path, extra={"norm.weight": np.ones(16, np.float32)})

    with pytest.raises(CheckpointError, match=r"which model.safetensors already has as"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        pytest.param(np.uint32, "U32", id="words-without-scales"),
        pytest.param(np.int8, "I8", id="int8"),
        pytest.param(np.float64, "F64", id="double"),
    ],
)
def test_numbers_that_nothing_explains_are_refused_by_name(tmp_path: Path, dtype: Any, stored: str) -> None:
    """Read as numbers they would give nonsense."""
    weights = write_checkpoint(tmp_path)
    tensors = {f"model.{name}": array for name, array in weights.items()}
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 4), dtype)
    write_tensors(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=f"layers.0.mlp.up_proj.weight has dtype {stored}"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "cannot be read as JSON", id="empty"),
        pytest.param('{"hidden_size": 16', "cannot be read as JSON", id="cut-off"),
        pytest.param("[1, 2]", "holds a JSON list, expected an object", id="list"),
        pytest.param("[" * 100_000, "cannot be read as JSON", id="deeply-nested"),
        pytest.param('{"hidden_size": ' + "9" * 10_000 + "}", "cannot be read as JSON", id="absurd-number"),
        pytest.param("\xff\xfe", "cannot be read as JSON", id="not-utf-8"),
        pytest.param(" " * (17 * 2**20), "expected at most", id="huge"),
    ],
)
def test_damaged_config_is_named(tmp_path: Path, content: str, message: str) -> None:
    """No traceback from a JSON parser."""
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))

    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("config.json", "config.json: does not exist", id="config"),
        pytest.param("model.safetensors", "has no \\*.safetensors file", id="weights"),
        pytest.param("tokenizer.json", "has no tokenizer.json", id="tokenizer"),
    ],
)
def test_missing_file_is_named(tmp_path: Path, name: str, message: str) -> None:
    """Each is needed, and the message says which is not there."""
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink()

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_slow_tokenizer_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Old repositories have vocab.json and merges.txt only."""
    write_checkpoint(tmp_path, tokenizer=False)
    write_json(tmp_path / "vocab.json", {})

    with pytest.raises(CheckpointError, match=r"has vocab.json, but no tokenizer.json.*AutoTokenizer"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_more_layers_than_tensors_are_refused(tmp_path: Path) -> None:
    """Building a million layers to find them missing would never end."""
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"num_hidden_layers": 10**6})

    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 1,000,000, but the files hold 24 tensors"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("pad_token", "expected"),
    [
        pytest.param("<|im_end|>", 258, id="string"),
        pytest.param({"content": "<|im_end|>", "special": True}, 258, id="object"),
        pytest.param(None, 256, id="null"),
        pytest.param(7, 256, id="nonsense"),
    ],
)
def test_padding_token_is_read_from_the_tokenizer_config(tmp_path: Path, pad_token: object, expected: int) -> None:
    """transformers has written it as a string and as an object."""
    write_checkpoint(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": pad_token})

    assert open_checkpoint(ModelOptions(str(tmp_path))).tokenizer.pad_token_id == expected


def test_tokenizer_config_may_be_missing(tmp_path: Path) -> None:
    """Only the padding token is read from it."""
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()

    assert open_checkpoint(ModelOptions(str(tmp_path))).tokenizer.pad_token_id == 256


def test_opening_reads_no_tensor(tmp_path: Path, write_sparse: Callable[[Path], int]) -> None:
    """`inspect` explains a checkpoint of any size at once."""
    size = write_sparse(tmp_path / "model.safetensors")
    write_tokenizer(tmp_path)
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))

    assert sum(tensor.nbytes for tensor in checkpoint.weights.tensors.values()) == size > 100 * 2**30


@pytest.fixture
def write_sparse(tmp_path: Path) -> Callable[[Path], int]:
    """Writes a checkpoint of 128 GiB of zeros that takes no room on disk, and returns its size in bytes."""

    def write(file: Path) -> int:
        write_checkpoint(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        write_json(tmp_path / "config.json", config | {"vocab_size": 2**24, "num_hidden_layers": 1})
        nbytes = 2**24 * 4096 * 2
        header = json.dumps(
            {"embed_tokens.weight": {"dtype": "BF16", "shape": [2**24, 4096], "data_offsets": [0, nbytes]}}
        ).encode()
        with file.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + nbytes)
        return nbytes

    return write


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would be waited for, and a folder cannot be read."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "old.safetensors").mkdir()

    assert (
        open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors["norm.weight"].file.name == "weights.safetensors"
    )
