"""Files changed at random, in every format: each is opened, or refused with an error of one line, at once.

HOSTILE_ROUNDS=560 changes 10,000 files in place of some hundreds, HOSTILE_SEED others.
"""

import itertools
import json
import os
import random
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from encoder import BUILT_IN, EncoderError, read_presets
from encoder.checkpoint import load_weights, open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import Lora, ModelOptions
from encoder.qwen3.model import Qwen3
from tests.checkpoints import write_checkpoint, write_json, write_pipeline, write_tensors
from tests.encoder.checkpoint.comfyui_files import nvfp4, write_file
from tests.encoder.checkpoint.comfyui_transformed import awq_w4a16, int8_convrot, nvfp4_awq, w4a8
from tests.encoder.checkpoint.gguf_files import DIMS, write_gguf
from tests.encoder.checkpoint.lora_files import kohya, make_pairs, peft, write_gguf_lora, write_lora, write_peft
from tests.encoder.checkpoint.mlx_folders import write_quantized
from tests.encoder.checkpoint.mutations import mutate
from tests.encoder.checkpoint.ollama_store import Store
from tests.encoder.checkpoint.quantized_files import (
    awq,
    bitsandbytes_4bit,
    gptq,
    llm_int8,
    nvfp4_divided,
    packed_integers,
    quanto_bits,
    sdnq,
    torchao_int8,
    write_folders,
)
from tests.encoder.checkpoint.readers.test_theta import inv_freq, write_mflux

ROUNDS, SEED = int(os.environ.get("HOSTILE_ROUNDS", "40")), int(os.environ.get("HOSTILE_SEED", "0"))
MAX_SECONDS, MAX_BYTES = 5, 500 * 10**6  # of the processor, and of memory beyond what the process had before
MAX_MESSAGE = 2000  # characters
Writer = Callable[[Path], tuple[str, list[Path]]]  # writes a checkpoint; what opens it, and the files to change


def folder(path: Path) -> tuple[str, list[Path]]:
    write_checkpoint(path, shards=2)
    return str(path), [path / name for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")]


def mlx_folder(path: Path) -> tuple[str, list[Path]]:
    write_quantized(path, {"bits": 4, "group_size": 64})
    return str(path), [path / "config.json", path / "model.safetensors"]


def comfyui(path: Path) -> tuple[str, list[Path]]:
    tensors = {f"model.{name}": weight for name, weight in write_checkpoint(path / "plain", **DIMS).items()}
    for key in [key for key in tensors if "mlp" in key]:
        tensors |= nvfp4(key.removesuffix(".weight"), tensors[key])[0]
    file = write_file(path, tensors)
    return str(file), [file]


def comfyui_transformed(path: Path) -> tuple[str, list[Path]]:
    """Each layer in another format, each format with its own arrays and note."""
    quantizers = itertools.cycle([int8_convrot(16), w4a8(), w4a8(bits=6, codebook=False), awq_w4a16, nvfp4_awq(16)])
    tensors = {f"model.{name}": weight for name, weight in write_checkpoint(path / "plain", **DIMS).items()}
    for key in [key for key in tensors if "proj" in key]:
        tensors |= next(quantizers)(key.removesuffix(".weight"), tensors[key])[0]
    file = write_file(path, tensors)
    return str(file), [file]


def quantizers(path: Path) -> tuple[str, list[Path]]:
    """Each matrix by another quantizer."""
    weights = write_checkpoint(path / "plain", **DIMS)
    of_layers = itertools.cycle(
        [
            bitsandbytes_4bit(nested=True),
            llm_int8,
            awq(16),
            gptq(4, 32, act_order=True),
            packed_integers(4, 32, symmetric=False, act_order=True),
            nvfp4_divided,
            quanto_bits(4, 32),
        ]
    )
    config = {"quantization_config": {"quant_method": "gptq"}}
    quantized, _ = write_folders(path, weights, lambda *weight: next(of_layers)(*weight), config)
    return str(quantized), [quantized / "config.json", quantized / "model.safetensors"]


def sdnq_folder(path: Path) -> tuple[str, list[Path]]:
    config = {"quantization_config": {"quant_method": "sdnq", "weights_dtype": "uint4", "modules_dtype_dict": {}}}
    quantized, _ = write_folders(path, write_checkpoint(path / "plain", **DIMS), sdnq(4, svd=True), config)
    return str(quantized), [quantized / "config.json", quantized / "model.safetensors"]


def torchao(path: Path) -> tuple[str, list[Path]]:
    metadata = {"_type": "IntxUnpackedToInt8Tensor", "_data": {}}
    quantized, _ = write_folders(path, write_checkpoint(path / "plain", **DIMS), torchao_int8(32), {}, metadata)
    return str(quantized), [quantized / "model.safetensors"]


def gguf(path: Path) -> tuple[str, list[Path]]:
    file = path / "model.gguf"
    write_gguf(file, write_checkpoint(path / "plain", **DIMS), "Q8_0")
    return str(file), [file]


def ollama(path: Path) -> tuple[str, list[Path]]:
    store = Store(path)
    store.add_json()
    store.add_weights(lambda name: "int4", "one-blob")
    return "ollama:z-image-turbo", [store.write_manifest()]


def pipeline(path: Path) -> tuple[str, list[Path]]:
    write_pipeline(path, nested=True, prefix="model.language_model.")
    small = ("model_index.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json")
    return str(path), [path / name for name in small]


def declared_tokens(path: Path) -> tuple[str, list[Path]]:
    write_checkpoint(path)
    write_json(path / "added_tokens.json", {"<|extra|>": 270})
    write_json(path / "special_tokens_map.json", {"pad_token": "<|extra|>", "additional_special_tokens": ["<a>"]})
    names = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.json")
    return str(path), [path / name for name in names]


def single_file(path: Path) -> tuple[str, list[Path]]:
    weights = write_checkpoint(path)
    tensors = {f"base_model.model.model.{name}": weight for name, weight in weights.items()}
    file = write_file(path, tensors, "qwen3_4b.safetensors", mflux_version="0.17", quantization_level="4")
    (path / "model.safetensors").unlink()
    return str(file), [file, path / "config.json"]


def mflux(path: Path) -> tuple[str, list[Path]]:
    """No config: rope_theta follows from a tensor."""
    root = write_mflux(path / "pipeline", "0.24.0", **{"rotary_emb.inv_freq": inv_freq(5e6)})
    return str(root), [root / "text_encoder" / "0.safetensors", root / "text_encoder" / "model.safetensors.index.json"]


def scaled_rope(path: Path) -> tuple[str, list[Path]]:
    write_checkpoint(path, rope="rope_theta")
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5, "beta_fast": 16}
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", config | {"rope_scaling": {"rope_type": "yarn", "truncate": False} | yarn})
    return str(path), [path / "config.json"]


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Fails a test whose peak of memory is far above that of all before it."""
    before = peak_bytes()
    yield
    assert peak_bytes() - before < MAX_BYTES


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize(
    "write",
    [
        *(folder, mlx_folder, comfyui, comfyui_transformed, quantizers, sdnq_folder, torchao),
        *(gguf, ollama, pipeline, declared_tokens, single_file),
        *(mflux, scaled_rope),
    ],
    ids=lambda f: f.__name__,
)
def test_changed_file_is_opened_or_refused(tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback of a library, no wait, no memory; the seed is fixed, so that a failure can be repeated."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source, files = write(tmp_path)
    for_each_change(files, lambda: open_and_load(ModelOptions(source)))


@pytest.mark.parametrize("kind", ["peft", "kohya", "gguf"])
def test_changed_lora_is_merged_or_refused(tmp_path: Path, kind: str) -> None:
    pairs = make_pairs(write_checkpoint(tmp_path / "base"))
    if kind == "peft":
        source = write_peft(tmp_path / "lora", peft(pairs), alpha_pattern={"q_proj": 3}, use_rslora=True)
        files = [source / "adapter_config.json", source / "adapter_model.safetensors"]
    elif kind == "kohya":
        source = write_lora(tmp_path / "lora.safetensors", kohya(pairs), lora_adapter_metadata='{"lora_alpha": 3}')
        files = [source]
    else:
        source = write_gguf_lora(tmp_path / "lora.gguf", pairs)
        files = [source]
    options = ModelOptions(str(tmp_path / "base"), loras=(Lora(str(source)),))
    for_each_change(files, lambda: open_and_load(options))


def test_changed_presets_are_read_or_refused(tmp_path: Path) -> None:
    """TOML of a stranger, or of an editor that broke it."""
    file = tmp_path / "mine.toml"
    file.write_text(
        '[mine]\nbase = "flux2-klein"\nlayers = [-2, 8]\nmax_sequence_length = 300\nprefix = "<|im_start|>user\\n"\n'
        '[other]\nbase = "mine"\nhidden_states = [3]\nnegative = "mine"\npadding = "zero"\nhidden_size = 2560\n'
    )
    for_each_change([file], lambda: read_presets(file, BUILT_IN))


def for_each_change(files: list[Path], use: Callable[[], object]) -> None:
    """Change a file, use what it is a part of, and put it back, for some rounds."""
    rng = random.Random(SEED)
    for _ in range(ROUNDS):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(mutate(file, rng))
        started, message = time.process_time(), ""
        try:
            use()
        except EncoderError as error:
            message = str(error)
        file.write_bytes(content)
        assert time.process_time() - started < MAX_SECONDS
        assert message.isprintable() and len(message) < MAX_MESSAGE


def open_and_load(options: ModelOptions) -> None:
    checkpoint = open_checkpoint(options)
    checkpoint.tokenizer.tokenize("a cat on a red sofa", max_length=64)
    load_weights(checkpoint, Qwen3(checkpoint.config), mx.float32)


def test_a_hundred_thousand_tensors_are_refused_at_once(tmp_path: Path) -> None:
    """The fingerprint would read a sample of each."""
    write_checkpoint(tmp_path)
    extra = {f"layers.0.{number}.weight": np.zeros(0, np.float32) for number in range(100_000)}
    write_tensors(tmp_path, extra)
    started = time.process_time()

    with pytest.raises(CheckpointError, match="holds 100,000 tensors, expected at most 16,384"):
        open_checkpoint(ModelOptions(str(tmp_path)))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("in_array", [False, True])
def test_a_gguf_header_of_gigabytes_is_refused_at_once(tmp_path: Path, in_array: bool) -> None:
    """The file has them, as holes that take no space; they were read into memory, text after text."""
    file, piece, count = tmp_path / "model.gguf", 2**24, 128
    with file.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 if in_array else count))
        if in_array:
            stream.write(struct.pack("<Q1sIIQ", 1, b"a", 9, 8, count))
        for number in range(count):
            head = struct.pack("<Q", piece)
            stream.write(head if in_array else struct.pack("<Q3sI", 3, b"%03d" % number, 8) + head)
            stream.seek(piece, os.SEEK_CUR)
        stream.truncate(stream.tell())

    with pytest.raises(CheckpointError, match=r"a text (claims|of) 16,777,216 bytes"):
        open_checkpoint(ModelOptions(str(file)))
