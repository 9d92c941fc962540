"""Reads a GGUF model: config, tokenizer and tensors are all in its file, under llama.cpp's names.

llama.cpp permutes the rows of q_proj and k_proj for models whose RoPE rotates neighbouring elements. Qwen3's rotates
halves of a head, so its rows keep their order.
Source: llama.cpp, gguf-py/gguf/constants.py:MODEL_ARCH.QWEN3, convert_hf_to_gguf.py:Qwen3Model.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from encoder.checkpoint.checkpoint import Checkpoint, Origin, describe
from encoder.checkpoint.files.gguf_header import GgufHeader
from encoder.checkpoint.files.gguf_parts import read_gguf_headers
from encoder.checkpoint.files.gguf_rope import check_frequency_factors, gguf_rope_scaling
from encoder.checkpoint.files.gguf_tokenizer import tokenizer_from_metadata
from encoder.checkpoint.files.tokenizer_files import find_tokenizer
from encoder.checkpoint.readers.theta import config_from_tensors
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.encodings import FLOATS, Plain
from encoder.checkpoint.tensors.gguf_blocks import GgufBlocks
from encoder.checkpoint.tensors.keys import EncoderKeys, find_encoder
from encoder.checkpoint.tensors.rope_theta import RopeTheta, settle_rope_theta
from encoder.checkpoint.tensors.weights import StoredArray, StoredTensor, Weights
from encoder.errors import CheckpointError
from encoder.messages import shown
from encoder.pipeline.tokenizer import Tokenizer
from encoder.qwen3.config import Qwen3Config

ARCHITECTURES = ("qwen3", "qwen3vl")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE_LAYERS = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_UNUSED = ("output.", "rope_freqs.", "v.", "mm.")  # language model head, factors of one, and Ollama's vision tower
_NO_MODELS = {  # by general.type
    "mmproj": "the vision tower of a model",
    "imatrix": "statistics for quantizing a model",
    "vocab": "a vocabulary",
}
_FIELDS = {  # of config.json, and the GGUF key of each, which follows the architecture: `qwen3.embedding_length`
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}


def recognizes(request: Request) -> bool:
    """A file whose name ends in .gguf."""
    return request.is_file(".gguf")


def open_request(request: Request) -> Checkpoint:
    """Describe the checkpoint in a file. Errors: as of `open_gguf`."""
    return open_gguf(request.path, request)


def open_gguf(file: Path, request: Request) -> Checkpoint:
    """Describe the checkpoint in a GGUF file of any name, and in the other files where the model is split.

    Errors: CheckpointError when it is damaged, lacks a part, or is no Qwen3.
    """
    header = read_gguf_headers(file)
    _expect_model(header.metadata, file)
    keys = _find_keys([array.key for array in header.arrays], file, request.options.component)
    tensors = {name: _tensor(name, array) for array in header.arrays if (name := keys.names.get(array.key)) is not None}
    if "embed_tokens.weight" not in tensors or len(tensors["embed_tokens.weight"].shape) != 2:
        raise CheckpointError(
            f"{file}: has no matrix token_embd.weight, and general.architecture is "
            f"{shown(header.metadata.get('general.architecture'))}. Give the GGUF file of a Qwen3 or Qwen3-VL."
        )
    config, theta = _config(header, tensors, keys, file, request)
    check_frequency_factors(header.arrays, str(file))
    tokenizer = _tokenizer(header.metadata, config, file, request)
    origin = Origin("GGUF", f"the metadata of {file}", theta.source, tokenizer.source)
    return describe(request.name, config, Weights(tensors), tokenizer, origin, [*keys.warnings, *theta.warnings])


def _expect_model(metadata: dict[str, Any], file: Path) -> None:
    """Errors: CheckpointError for the other files that llama.cpp's tools write."""
    kind = "mmproj" if metadata.get("general.architecture") == "clip" else metadata.get("general.type")
    if kind == "adapter":
        raise CheckpointError(
            f"{file}: is a LoRA and no model. Give the model that it was trained on, and the LoRA beside it: "
            f"--model MODEL --lora {file}"
        )
    if isinstance(kind, str) and kind in _NO_MODELS:
        raise CheckpointError(f"{file}: holds {_NO_MODELS[kind]} and no model. Give the GGUF file of the model itself.")


def _find_keys(keys: list[str], file: Path, component: str | None) -> EncoderKeys:
    """The encoder's arrays, under llama.cpp's names or under Hugging Face's.

    ComfyUI's tools write GGUF with the keys of the safetensors file that they were given.
    """
    if any(key.endswith("self_attn.q_norm.weight") for key in keys):
        return find_encoder(keys, str(file), component)
    names = {key: name for key in keys if (name := parameter_name(key)) is not None}
    return EncoderKeys("", names, tuple(key for key in keys if key not in names and not key.startswith(_UNUSED)))


def _tokenizer(metadata: dict[str, Any], config: Qwen3Config, file: Path, request: Request) -> Tokenizer:
    """The tokenizer that the user named, else the file's own, else one beside it or Qwen3's where the file has none."""
    if request.options.tokenizer is None and "tokenizer.ggml.model" in metadata:
        return tokenizer_from_metadata(metadata, str(file))
    return find_tokenizer(request, [file.parent, file.parent / "tokenizer"], config.vocab_size)


def _config(
    header: GgufHeader, tensors: Mapping[str, StoredTensor], keys: EncoderKeys, file: Path, request: Request
) -> tuple[Qwen3Config, RopeTheta]:
    """The dims, and how rope_theta is known: from the metadata, or, where there are none, as of any file of tensors."""
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES and "token_embd.weight" in keys.names:  # else the names are Hugging Face's
        raise CheckpointError(
            f"{file}: general.architecture is {shown(architecture)}, expected 'qwen3' or 'qwen3vl'. Give the GGUF file "
            f"of a Qwen3 or Qwen3-VL."
        )
    if f"{architecture}.embedding_length" not in header.metadata:
        return config_from_tensors(file, header.arrays, tensors, keys.prefix, header.metadata, request)
    config = _config_of_metadata(header.metadata, architecture, tensors, file)
    stated = f"{architecture}.rope.freq_base" in header.metadata
    return settle_rope_theta(config, str(file), stated, request.options.rope_theta)


def _config_of_metadata(
    metadata: dict[str, Any], architecture: Any, tensors: Mapping[str, StoredTensor], file: Path
) -> Qwen3Config:
    fields = {field: _as_decimal(metadata.get(f"{architecture}.{key}")) for field, key in _FIELDS.items()}
    prefix = f"{architecture}.rope."
    rope = {key.removeprefix(prefix): _as_decimal(value) for key, value in metadata.items() if key.startswith(prefix)}
    config = Qwen3Config.from_dict(
        fields
        | {
            "model_type": "qwen3_vl_text" if architecture == "qwen3vl" else "qwen3",
            "vocab_size": tensors["embed_tokens.weight"].shape[0],
            "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
            "rope_theta": rope.get("freq_base", 10_000.0),  # llama.cpp's default
            "rope_scaling": gguf_rope_scaling(rope, str(file)),
        },
        str(file),
    )
    if rope.get("dimension_count", config.head_dim) != config.head_dim:
        raise CheckpointError(
            f"{file}: {prefix}dimension_count is {shown(rope['dimension_count'])}, expected all {config.head_dim} "
            f"numbers of a head."
        )
    return config


def _as_decimal(value: Any) -> Any:
    """The decimal number that a float32 was made from: 1e-6 is stored as 9.99999997e-7."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def parameter_name(key: str) -> str | None:
    """The parameter's name; None for an array that is not the encoder's."""
    match = _LAYER.fullmatch(key)
    if match is None:
        return f"layers.{key.removeprefix('blk.')}" if key.startswith("blk.") else _OUTSIDE_LAYERS.get(key)
    return f"layers.{match[1]}.{_MODULES.get(match[2], match[2])}.{match[3]}"


def _tensor(name: str, array: StoredArray) -> StoredTensor:
    if array.dtype in FLOATS:
        return StoredTensor(name, array.shape, Plain(FLOATS[array.dtype]), {"weight": array})
    if len(array.shape) != 2 or not array.nbytes:
        raise CheckpointError(
            f"{array.file}: {array.key} is {array.dtype} {array.shape}, expected floats, or a matrix that is not empty."
        )
    rows = replace(array, shape=(array.shape[0], array.nbytes // array.shape[0]))  # in bytes, as GgufBlocks takes it
    return StoredTensor(name, array.shape, GgufBlocks(array.dtype, array.shape), {"weight": rows})
