"""Hugging Face and diffusers folders, whole and broken, opened without reading a tensor."""

import json
import os
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, TextEncoder
from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.tensors.expected import parameter_shapes
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from encoder.qwen3.config import Qwen3Config
from tests.checkpoints import Array, write_checkpoint, write_json, write_pipeline, write_tensors, write_tokenizer

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
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bf16.safetensors")
    shutil.copy(tmp_path / "model.bf16.safetensors", tmp_path / "model.fp16.safetensors")

    with pytest.raises(CheckpointError, match=r"which model.bf16.safetensors already has as .*or remove one"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        pytest.param(np.uint32, "U32", id="words-without-scales"),
        pytest.param(np.int8, "I8", id="int8"),
    ],
)
def test_numbers_that_nothing_explains_are_refused_by_name(tmp_path: Path, dtype: Any, stored: str) -> None:
    """Read as numbers they would give nonsense."""
    weights = write_checkpoint(tmp_path)
    tensors = {f"model.{name}": array for name, array in weights.items()}
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 4), dtype)
    write_tensors(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=rf"layers.0.mlp.up_proj.weight \({stored} .* is quantized by"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "is empty. Was the download interrupted", id="empty"),
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
        pytest.param("model.safetensors", "has no \\*.safetensors file", id="weights"),
        pytest.param("tokenizer.json", "has no tokenizer, and none lies beside it", id="tokenizer"),
    ],
)
def test_missing_file_is_named(tmp_path: Path, name: str, message: str) -> None:
    """Each is needed, and the message says which is not there."""
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink()

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_link_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    """A copy of the hub's cache without its blobs. Taken for absent, the config would be made up from the tensors."""
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("../blobs/5d6f")

    with pytest.raises(CheckpointError, match=rf"/{name}: is a link to \.\./blobs/5d6f, which does not exist"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".crdownload"])
def test_unfinished_download_is_named(tmp_path: Path, suffix: str) -> None:
    """Every downloader has an ending of its own."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / f"model.safetensors{suffix}")

    with pytest.raises(CheckpointError, match=rf"model.safetensors{suffix} is what a download has not finished"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_file_that_a_downloader_still_writes_is_refused(tmp_path: Path) -> None:
    """aria2 makes the file as large as it will be at once, so that its header looks whole and its weights are zeros."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.aria2").write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"model.safetensors.aria2 says that its download has not ended"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize("left", [0, 1])
def test_missing_shard_is_named_without_an_index(tmp_path: Path, left: int) -> None:
    """The files' own names say how many they are."""
    write_checkpoint(tmp_path, shards=2)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in ("model.safetensors.index.json", names[1 - left]):
        (tmp_path / name).unlink()

    for source in (tmp_path, tmp_path / names[left]):
        with pytest.raises(CheckpointError, match=f": {names[1 - left]} missing, of the model's files"):
            open_checkpoint(ModelOptions(str(source)))


@pytest.mark.parametrize("path", ["Qwen3", "acme/Qwen3", "snapshots/0abc", "models--acme--Qwen3/snapshots/0abc"])
def test_only_model_within_a_folder_is_found(tmp_path: Path, path: str) -> None:
    """Archives and downloads have a folder in the folder."""
    weights = write_checkpoint(tmp_path / path)

    assert open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors.keys() == weights.keys()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read is Linux's")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_error_of_a_disk_is_passed_on_with_the_files_name(tmp_path: Path, name: str) -> None:
    """Its remedy is not to fetch the file again. The memory of a process has no byte 0, and no other error to give."""
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/proc/self/mem")

    with pytest.raises(CheckpointError, match=rf"/{name}: cannot be read: Input/output error. Is its disk"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_file_of_another_user_is_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    """safetensors' writer lets nobody but its user read a file, and containers run as another."""
    write_checkpoint(tmp_path)
    (tmp_path / name).chmod(0)

    with pytest.raises(CheckpointError, match=rf"/{name}: cannot be read by the user with the id .*chmod a\+r"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_folder_that_may_not_be_read_is_passed_over(tmp_path: Path) -> None:
    """Every disk has a lost+found."""
    weights = write_checkpoint(tmp_path / "Qwen3")
    (tmp_path / "lost+found").mkdir(mode=0)

    assert open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors.keys() == weights.keys()


def test_config_without_weights_is_no_model_to_choose(tmp_path: Path) -> None:
    """sentence-transformers puts the settings of pooling beside the model's folder."""
    weights = write_checkpoint(tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    write_json(tmp_path / "1_Pooling" / "config.json", {"word_embedding_dimension": 16})

    assert open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors.keys() == weights.keys()


def test_folder_of_several_models_asks_for_one(tmp_path: Path) -> None:
    """Which of them is no guess to make."""
    for name in ("Qwen3-0.6B", "Qwen3-4B"):
        write_checkpoint(tmp_path / name)

    with pytest.raises(CheckpointError, match=r"has folders that do. Name one: Qwen3-0.6B, Qwen3-4B"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_more_layers_than_tensors_are_refused(tmp_path: Path) -> None:
    """Building a million layers to find them missing would never end."""
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"num_hidden_layers": 10**6})

    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 1,000,000 in .*config.json, but .* hold 24"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_half_a_slow_tokenizer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Old repositories have vocab.json and merges.txt only, and need both."""
    write_checkpoint(tmp_path, tokenizer=False)
    write_json(tmp_path / "vocab.json", {})

    with pytest.raises(CheckpointError, match=r"has vocab.json, expected tokenizer.json, or both"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize(
    ("pad_token", "expected"),
    [
        pytest.param("<|im_end|>", "<|im_end|>", id="string"),
        pytest.param({"content": "<|im_end|>", "special": True}, "<|im_end|>", id="object"),
        pytest.param({"__type": "AddedToken", "content": "<|im_end|>"}, "<|im_end|>", id="typed-object"),
        pytest.param("<|endoftext|>", "<|endoftext|>", id="qwen3s"),
        pytest.param(None, None, id="null"),
    ],
)
def test_another_padding_token_is_a_warning(tmp_path: Path, pad_token: object, expected: str | None) -> None:
    """Presets pad with their own, so what a fine-tuning tool wrote changes nothing; transformers has two spellings."""
    write_checkpoint(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": pad_token})
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))

    assert checkpoint.tokenizer.pad_token == expected
    warned = any("names the padding token '<|im_end|>'" in warning for warning in checkpoint.warnings)
    assert warned == (expected == "<|im_end|>")


def test_tokenizer_config_may_be_missing(tmp_path: Path) -> None:
    """tokenizer.json has all that a text needs."""
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()

    tokenizer = open_checkpoint(ModelOptions(str(tmp_path))).tokenizer

    assert tokenizer.tokenize("<|im_end|>", max_length=9) == ((258,), False)


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
        dims = {"vocab_size": 2**24, "intermediate_size": 2**24, "hidden_size": 1024, "num_hidden_layers": 1}
        config = json.loads((tmp_path / "config.json").read_text()) | dims
        write_json(tmp_path / "config.json", config)
        header: dict[str, Any] = {}
        end = 0
        for name, shape in parameter_shapes(Qwen3Config.from_dict(config), 1).items():
            start, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        return end

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


def test_hidden_files_are_no_weights(tmp_path: Path) -> None:
    """macOS writes `._NAME` beside NAME on file systems of others; notebooks keep old copies in a hidden folder."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "0.safetensors")
    (tmp_path / "._0.safetensors").write_bytes(bytes([0, 5, 22, 7, 0, 2, 0, 0]) + b"Mac OS X" + bytes(4072))
    shutil.copytree(tmp_path, tmp_path / ".ipynb_checkpoints")

    assert open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors["norm.weight"].file.name == "0.safetensors"


@pytest.mark.parametrize("component", [None, "mllm"])
def test_text_encoder_of_a_pipeline_is_found_under_any_name(tmp_path: Path, component: str | None) -> None:
    """OmniGen's pipelines call it mllm; model_index.json says what each folder is."""
    weights = write_pipeline(tmp_path)
    (tmp_path / "text_encoder").rename(tmp_path / "mllm")
    index = {"_class_name": "X", "mllm": ["transformers", "Qwen3VLForConditionalGeneration"], "vae": ["diffusers", "X"]}
    write_json(tmp_path / "model_index.json", index)

    checkpoint = open_checkpoint(ModelOptions(str(tmp_path), component=component))
    assert checkpoint.weights.tensors.keys() == weights.keys()


def test_pipeline_with_two_encoders_asks_for_one(tmp_path: Path) -> None:
    """A folder's name chooses, as the key's prefix does in one file."""
    write_pipeline(tmp_path)
    shutil.copytree(tmp_path / "text_encoder", tmp_path / "text_encoder_2")
    names = {name: ["transformers", "Qwen3Model"] for name in ("text_encoder", "text_encoder_2")}
    write_json(tmp_path / "model_index.json", {"_class_name": "X", **names})

    with pytest.raises(CheckpointError, match=r"several Qwen3 text encoders.*--component text_encoder.*text_encoder_2"):
        open_checkpoint(ModelOptions(str(tmp_path)))
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path), component="text_encoder_2"))
    assert "text_encoder_2" in checkpoint.origin.config


@pytest.mark.parametrize("name", ["../elsewhere", "..", "/etc"])
def test_pipelines_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """A pipeline is data from strangers."""
    write_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "pipeline").mkdir()
    write_json(tmp_path / "pipeline" / "model_index.json", {name: ["transformers", "Qwen3Model"]})

    with pytest.raises(CheckpointError, match="this diffusers pipeline has no text_encoder folder"):
        open_checkpoint(ModelOptions(str(tmp_path / "pipeline")))


def test_qwen3_is_found_beside_a_clip(tmp_path: Path) -> None:
    """Where model_index.json is missing, the configs say which text encoder is which."""
    weights = write_pipeline(tmp_path)
    (tmp_path / "model_index.json").unlink(missing_ok=True)
    (tmp_path / "text_encoder").rename(tmp_path / "text_encoder_2")
    (tmp_path / "text_encoder").mkdir()
    write_json(tmp_path / "text_encoder" / "config.json", {"model_type": "clip_text_model"})

    assert open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors.keys() == weights.keys()


def test_folder_of_the_hubs_cache_stands_for_its_snapshot(tmp_path: Path) -> None:
    """People copy `models--org--name`, which holds links into it."""
    folder = tmp_path / "models--acme--tiny"
    for commit in ("a" * 40, "b" * 40):
        write_checkpoint(folder / "snapshots" / commit)

    with pytest.raises(CheckpointError, match=r"with 2 snapshots. Give the id acme/tiny, or one folder"):
        open_checkpoint(ModelOptions(str(folder)))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    assert "b" * 40 in open_checkpoint(ModelOptions(str(folder))).origin.config


@pytest.mark.parametrize("prefix", ["_orig_mod.model.", "module.model.", "base_model.model.model.", "text_encoder."])
def test_any_wrappers_prefix_is_read(tmp_path: Path, prefix: str) -> None:
    """In a folder as in a single file."""
    weights = write_checkpoint(tmp_path, prefix=prefix, shards=2)

    assert open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors.keys() == weights.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS", id="pointer"),
        pytest.param(b"<!DOCTYPE html><html>", "web page", id="page"),
        pytest.param(b"PK\x03\x04archive/data.pkl", "pickle", id="pickle"),
        pytest.param(b"\x1f\x8b\x08\x00", "compressed", id="gzip"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(bytes(5000), "zeros", id="unfinished"),
        pytest.param(b'{"error": "not found"}', "JSON text", id="error-reply"),
        pytest.param(b"GGUF\x03\x00\x00\x00", "GGUF file", id="gguf"),
        pytest.param(b"Access is restricted.\nLog in.", "begins with 'Access is restricted. Log in.'", id="text"),
        pytest.param("caf\xe9 ".encode() * 99, "begins with 'caf\xe9", id="text-that-is-cut"),
    ],
)
def test_what_is_not_the_file_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    """The parser's own words would not help."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"model.safetensors: .*{message}[^\n]*$"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_unneeded_tensors_are_counted_in_a_warning(tmp_path: Path) -> None:
    """The head of a classifier, and a buffer of integers."""
    more = {"score\n.weight": np.zeros((1, 16), np.float32), "model.embed_tokens.position_ids": np.arange(10)}
    weights = write_checkpoint(tmp_path, extra=more)
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))

    assert checkpoint.weights.tensors.keys() == weights.keys()
    assert checkpoint.warnings == (
        r"a text encoder does not need, and does not read, 2 tensors (score\n.weight, model.embed_tokens.position_ids)",
    )


def test_norms_may_have_axes_of_length_one(tmp_path: Path) -> None:
    """Some converters make every tensor a matrix."""
    weights = write_checkpoint(tmp_path)
    write_tensors(tmp_path, {f"model.{name}": np.atleast_2d(array) for name, array in weights.items()})

    shapes = {
        name: tensor.shape for name, tensor in open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors.items()
    }
    assert shapes == {name: array.shape for name, array in weights.items()}


def test_doubles_are_read_as_the_nearest_floats(tmp_path: Path) -> None:
    """NumPy's default, which MLX's GPUs do not have."""
    write_checkpoint(tmp_path / "floats")
    weights = write_checkpoint(tmp_path / "doubles")
    write_tensors(tmp_path / "doubles", {f"model.{name}": array.astype(np.float64) for name, array in weights.items()})

    def hidden_states(name: str) -> Array:
        encoder = TextEncoder.open(ModelOptions(str(tmp_path / name)))
        return encoder.encode(["a cat"], LAST_HIDDEN_STATE, "float32")[0].hidden_states

    np.testing.assert_array_equal(hidden_states("doubles"), hidden_states("floats"))
    too_large = {f"model.{name}": array.astype(np.float64) * 1e300 for name, array in weights.items()}
    write_tensors(tmp_path / "doubles", too_large)
    with pytest.raises(CheckpointError, match="has NaN or infinity"):
        hidden_states("doubles")


def test_fused_matrices_are_named_as_such(tmp_path: Path) -> None:
    """Inference engines save what they computed with."""
    weights = write_checkpoint(tmp_path)
    fused = {f"model.{name}": array for name, array in weights.items() if "gate_proj" not in name}
    write_tensors(tmp_path, {key.replace("up_proj", "gate_up_proj"): array for key, array in fused.items()})

    with pytest.raises(CheckpointError, match=r"It seems to be stored with fused matrices"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_other_number_of_layers_is_said(tmp_path: Path) -> None:
    """A config that belongs to another size of the model."""
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"num_hidden_layers": 3})

    with pytest.raises(CheckpointError, match=r"It has tensors of 2 layers, and num_hidden_layers is 3"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_tied_weights_may_be_kept_under_the_heads_name(tmp_path: Path) -> None:
    """safetensors' writers keep one name of a shared tensor. With tie_word_embeddings false it is another matrix."""
    weights = write_checkpoint(tmp_path)
    tensors = {f"model.{name}": array for name, array in weights.items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_tensors(tmp_path, tensors)
    config = json.loads((tmp_path / "config.json").read_text())

    write_json(tmp_path / "config.json", config | {"tie_word_embeddings": True})
    assert open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors["embed_tokens.weight"].key == "lm_head.weight"
    write_json(tmp_path / "config.json", config | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"has no embed_tokens, and its lm_head.weight is another matrix"):
        open_checkpoint(ModelOptions(str(tmp_path)))
