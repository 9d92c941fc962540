"""Filling the model: every tensor in its place, or one error that names all that is wrong."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from encoder.checkpoint import load_weights, open_checkpoint
from encoder.checkpoint.loading.array_reader import ArrayReader
from encoder.checkpoint.tensors.expected import parameter_shapes
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.model import Qwen3
from tests.checkpoints import Array, write_checkpoint, write_pipeline, write_tensors
from tests.encoder.checkpoint.mlx_folders import write_quantized


def load(folder: Path, dtype: mx.Dtype = mx.float32, **options: Any) -> Qwen3:
    checkpoint = open_checkpoint(ModelOptions(str(folder)))
    model = Qwen3(checkpoint.config)
    load_weights(checkpoint, model, dtype, **options)
    return model


def parameters(model: Qwen3) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({}, id="single-file"),
        pytest.param({"shards": 3}, id="sharded"),
        pytest.param({"prefix": "model.language_model.", "nested": True}, id="vision-model"),
        pytest.param({"prefix": "", "attention_bias": True}, id="bare-keys-with-bias"),
        pytest.param({"tie_word_embeddings": False, "hidden_size": 24, "head_dim": 16}, id="untied-odd-dims"),
        pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"dtype": "float16"}, id="float16"),
    ],
)
def test_every_parameter_is_the_stored_tensor(tmp_path: Path, form: dict[str, Any]) -> None:
    """Bit for bit: float32 holds every bfloat16 and float16."""
    weights = write_checkpoint(tmp_path, **form)
    loaded = parameters(load(tmp_path))

    assert set(loaded) == set(weights)
    for name, array in loaded.items():
        np.testing.assert_array_equal(np.array(array), weights[name], err_msg=name)


def test_pipeline_folder_is_loaded(tmp_path: Path) -> None:
    """The same weights as from a plain folder."""
    weights = write_pipeline(tmp_path)

    np.testing.assert_array_equal(np.array(load(tmp_path).norm.weight), weights["norm.weight"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_tensors_at_unaligned_offsets_are_read(tmp_path: Path, dtype: str, widened: bool, shift: int) -> None:
    """The safetensors format does not ask for alignment: not of the header's length, and not of a tensor's offset."""
    write_checkpoint(tmp_path / "aligned", dtype=dtype)
    shutil.copytree(tmp_path / "aligned", tmp_path / "unaligned")
    misalign(tmp_path / "unaligned" / "model.safetensors", shift)
    compute_dtype = mx.float32 if widened else getattr(mx, dtype)
    expected = parameters(load(tmp_path / "aligned", compute_dtype))

    for name, array in parameters(load(tmp_path / "unaligned", compute_dtype)).items():
        assert mx.array_equal(array, expected[name]), name
    [aligned, unaligned] = [open_checkpoint(ModelOptions(str(tmp_path / n))) for n in ("aligned", "unaligned")]
    assert aligned.fingerprint == unaligned.fingerprint


def misalign(file: Path, shift: int) -> None:
    """Put a tensor of `shift` bytes that no encoder has before the others."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    header["visual.flags"] = {"dtype": "U8", "shape": [shift], "data_offsets": [0, shift]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(shift) + content[8 + length :])


def test_bfloat16_matrices_stay_so_where_that_is_asked_for(tmp_path: Path) -> None:
    """Norms are computed in float32, so they are widened."""
    weights = write_checkpoint(tmp_path, dtype="bfloat16")
    loaded = parameters(load(tmp_path, keep_bfloat16=True))

    assert {array.dtype for array in loaded.values() if array.ndim == 2} == {mx.bfloat16}
    assert {array.dtype for array in loaded.values() if array.ndim == 1} == {mx.float32}
    for name, array in loaded.items():
        np.testing.assert_array_equal(np.array(array.astype(mx.float32)), weights[name], err_msg=name)


def test_matrices_of_several_dtypes_all_become_the_compute_dtype(tmp_path: Path) -> None:
    """The CPU pass joins the matrices of k and v, which need one dtype for that."""
    weights = write_checkpoint(tmp_path, dtype="bfloat16")
    tensors = {f"model.{name}": array.astype(ml_dtypes.bfloat16) for name, array in weights.items()}
    name = "layers.0.self_attn.v_proj.weight"
    write_tensors(tmp_path, tensors | {f"model.{name}": weights[name]})

    assert {array.dtype for array in parameters(load(tmp_path, keep_bfloat16=True)).values()} == {mx.float32}


def test_weights_are_cast_to_the_compute_dtype(tmp_path: Path) -> None:
    """One dtype throughout, else the forward pass promotes to float32 half way."""
    write_checkpoint(tmp_path)

    assert {array.dtype for array in parameters(load(tmp_path, mx.bfloat16)).values()} == {mx.bfloat16}


def test_weights_quantized_anew_have_a_fingerprint_of_their_own(tmp_path: Path) -> None:
    """Their hidden states differ, and the disk cache knows a model by its fingerprint."""
    dims = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    write_checkpoint(tmp_path / "a", **dims)
    write_checkpoint(tmp_path / "b", **dims, seed=1)

    def fingerprints(folder: Path) -> list[str]:
        checkpoint = open_checkpoint(ModelOptions(str(folder)))
        loaded = [
            load_weights(checkpoint, Qwen3(checkpoint.config), mx.float32, quantize=quantize).fingerprint
            for quantize in ("none", "4", "8")
        ]
        assert loaded[0] == checkpoint.fingerprint
        return loaded

    found = fingerprints(tmp_path / "a") + fingerprints(tmp_path / "b")
    assert len(set(found)) == 6
    assert {len(fingerprint) for fingerprint in found} == {32}


def test_all_faults_are_named_in_one_error(tmp_path: Path) -> None:
    """Nobody should have to fix a checkpoint one message at a time."""
    weights = write_checkpoint(tmp_path)
    tensors: dict[str, Array] = {f"model.{name}": array for name, array in weights.items()}
    del tensors["model.layers.0.self_attn.q_norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
    tensors["model.layers.7.input_layernorm.weight"] = np.zeros(16, np.float32)
    write_tensors(tmp_path, tensors)

    with pytest.raises(CheckpointError) as error:
        open_checkpoint(ModelOptions(str(tmp_path)))
    message = str(error.value)
    assert "1 missing (layers.0.self_attn.q_norm.weight [8])" in message
    assert "1 misshapen (model.layers.1.mlp.up_proj.weight is [3, 5], expected [32, 16])" in message
    assert "1 extra (model.layers.7.input_layernorm.weight)" in message
    assert "\n" not in message


def test_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    """A checkpoint of another model has hundreds."""
    weights = write_checkpoint(tmp_path)
    write_tensors(tmp_path, {name: array for name, array in weights.items() if "layers.1." not in name})

    with pytest.raises(CheckpointError, match=r"11 missing \((layers.1.[^ ]+ \[.*?\], ){4}and 7 more\)"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_layers_that_are_not_loaded_may_be_missing(tmp_path: Path) -> None:
    """FLUX.2 klein needs 27 of 36: some files were cut there."""
    weights = write_checkpoint(tmp_path)
    write_tensors(tmp_path, {name: array for name, array in weights.items() if "layers.1." not in name})

    assert open_checkpoint(ModelOptions(str(tmp_path), num_layers=1))


@pytest.mark.parametrize(
    ("key", "cause"),
    [
        ("model.layers.0.mlp.experts.0.up_proj.weight", "mixture of experts"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "adapter that is not merged"),
        ("model.layers.0.self_attn.q_proj.mystery_scale", "quantized"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "another model"),
    ],
)
def test_likely_cause_of_extra_tensors_is_said(tmp_path: Path, key: str, cause: str) -> None:
    """It follows from their names."""
    write_checkpoint(tmp_path, extra={key: np.zeros(16, np.float32)})

    with pytest.raises(CheckpointError, match=f"1 extra .*{cause}"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize("attention_bias", [False, True])
def test_expected_shapes_are_those_of_the_model(attention_bias: bool) -> None:
    """Written down once more, since building a model of any dims would take memory."""
    dims = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50, "attention_bias": attention_bias}
    config = Qwen3Config.from_dict({**dims, **more, "attention_sinks": attention_bias})

    shapes = {name: array.shape for name, array in parameters(Qwen3(config)).items()}
    assert parameter_shapes(config, 2) == shapes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    """One NaN makes every hidden state NaN."""
    weights = write_checkpoint(tmp_path)
    weights["layers.1.mlp.down_proj.weight"][3, 5] = value
    write_tensors(tmp_path, weights)

    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight has NaN or infinity"):
        load(tmp_path)


def test_weight_that_overflows_the_compute_dtype_is_named(tmp_path: Path) -> None:
    """float16 ends at 65504."""
    weights = write_checkpoint(tmp_path)
    weights["norm.weight"][0] = 1e6
    write_tensors(tmp_path, weights)

    with pytest.raises(CheckpointError, match=r"norm.weight has NaN or infinity as mlx.core.float16"):
        load(tmp_path, mx.float16)


def test_progress_counts_the_stored_bytes_of_each_tensor_once_it_is_read(tmp_path: Path) -> None:
    """In memory they take twice as many here. Tensors that are not read do not count."""
    weights = write_checkpoint(tmp_path, shards=2, tie_word_embeddings=False, dtype="bfloat16")
    calls: list[tuple[int, int]] = []
    load(tmp_path, progress=lambda done, total: calls.append((done, total)))
    sizes = [2 * array.size for array in weights.values()]
    steps = [done - before for (before, _), (done, _) in pairwise([(0, 0), *calls])]

    assert sorted(steps) == sorted(sizes)
    assert {total for _, total in calls} == {sum(sizes)}


def test_tensors_are_read_in_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk is fastest from front to back. A header may list the tensors in any order."""
    write_checkpoint(tmp_path)
    list_backwards(tmp_path / "model.safetensors")
    places: list[tuple[Path, int]] = []
    read_floats = ArrayReader.read_floats

    def record(reader: ArrayReader, array: StoredArray, dtype: mx.Dtype) -> mx.array:
        places.append((array.file, array.offset))
        return read_floats(reader, array, dtype)

    monkeypatch.setattr(ArrayReader, "read_floats", record)
    load(tmp_path)
    stored = [tensor.arrays["weight"] for tensor in open_checkpoint(ModelOptions(str(tmp_path))).tensors_of(2)]

    assert places == sorted((array.file, array.offset) for array in stored)


def list_backwards(file: Path) -> None:
    """Reverse the order of the tensors in the header; the data stays where it is."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    encoded = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode()
    file.write_bytes(content[:8] + encoded.ljust(length) + content[8 + length :])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_memory_peaks_at_the_model(tmp_path: Path, dtype: mx.Dtype) -> None:
    """An 8 GB file must not need 24 GB for a moment."""
    weights = write_checkpoint(tmp_path, dtype="bfloat16", vocab_size=50_000, hidden_size=64, shards=2)
    sizes = [array.size for array in weights.values()]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    load(tmp_path, dtype)

    assert mx.get_peak_memory() - before < 1.02 * dtype.size * sum(sizes)


def test_decoding_leaves_no_buffers_in_the_cache_of_mlx(tmp_path: Path) -> None:
    """They would be the size of the file, for as long as the process lives."""
    write_quantized(tmp_path, {"bits": 4, "group_size": 64}, vocab_size=50_000)
    mx.clear_cache()
    model = load(tmp_path, mx.bfloat16, quantize="none")

    assert mx.get_cache_memory() < 100_000
    del model


def test_file_that_shrinks_before_it_is_read_is_named(tmp_path: Path) -> None:
    """Tensors are read later than headers; a download may restart in between."""
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])

    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        load_weights(checkpoint, Qwen3(checkpoint.config), mx.float32)


def test_failed_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Half a model would give plausible nonsense."""
    weights = write_checkpoint(tmp_path)
    weights["norm.weight"][0] = np.nan
    write_tensors(tmp_path, weights)
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))
    model = Qwen3(checkpoint.config)
    before = np.array(model.embed_tokens.weight)

    with pytest.raises(CheckpointError):
        load_weights(checkpoint, model, mx.float32)
    np.testing.assert_array_equal(np.array(model.embed_tokens.weight), before)
