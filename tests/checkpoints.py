"""Writes tiny random Qwen3 checkpoints, as Hugging Face folders, with NumPy and the safetensors library."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from encoder.checkpoint.files.demo_files import CONFIG, demo_files

Array = NDArray[Any]
RopePlace = Literal["rope_parameters", "rope_theta", "rope_scaling"]

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_checkpoint(
    folder: Path,
    *,
    num_hidden_layers: int = 2,
    hidden_size: int = 16,
    intermediate_size: int = 32,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 8,
    vocab_size: int | None = None,
    attention_bias: bool = False,
    rms_norm_eps: float = 1e-6,
    rope: RopePlace = "rope_parameters",
    rope_theta: float = 1e6,
    tie_word_embeddings: bool = True,
    prefix: str = "model.",
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    nested: bool = False,
    extra: Mapping[str, Array] | None = None,
    tokenizer: bool = True,
) -> dict[str, NDArray[np.float32]]:
    """Write a checkpoint with random weights and the demo's tokenizer.

    Args:
        folder: made if it is not there.
        vocab_size: None means the tokenizer's.
        rope: where config.json holds the theta.
        tie_word_embeddings: False adds an `lm_head.weight`.
        prefix: of every key of the encoder.
        shards: files that the tensors are dealt out to; more than one get an index.
        dtype: of the stored tensors.
        seed: equal seeds and dims give equal weights.
        nested: whether the dims stand under `text_config`, as in Qwen3-VL.
        extra: tensors to add under their full key.
        tokenizer: False leaves the tokenizer's files out.
    Returns:
        the stored weights by the model's parameter names, as float32.
    """
    vocab_size = vocab_size or CONFIG["vocab_size"]
    width, kv_width = num_attention_heads * head_dim, num_key_value_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocab_size, hidden_size),
        "norm.weight": (hidden_size,),
    }
    for index in range(num_hidden_layers):
        layer = f"layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden_size,),
            f"{layer}.post_attention_layernorm.weight": (hidden_size,),
            f"{layer}.self_attn.q_norm.weight": (head_dim,),
            f"{layer}.self_attn.k_norm.weight": (head_dim,),
            f"{layer}.mlp.gate_proj.weight": (intermediate_size, hidden_size),
            f"{layer}.mlp.up_proj.weight": (intermediate_size, hidden_size),
            f"{layer}.mlp.down_proj.weight": (hidden_size, intermediate_size),
        }
        for name, shape in {
            "q_proj": (width, hidden_size),
            "k_proj": (kv_width, hidden_size),
            "v_proj": (kv_width, hidden_size),
            "o_proj": (hidden_size, width),
        }.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if attention_bias:
                shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]

    random = np.random.default_rng(seed)
    stored = {name: _random_weight(random, name, shape).astype(_DTYPES[dtype]) for name, shape in shapes.items()}
    tensors: dict[str, Array] = {prefix + name: array for name, array in stored.items()}
    if not tie_word_embeddings:
        tensors["lm_head.weight"] = _random_weight(random, "lm_head", (vocab_size, hidden_size)).astype(_DTYPES[dtype])
    tensors |= extra or {}

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "attention_bias": attention_bias,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 4096,
        "model_type": "qwen3_vl_text" if nested else "qwen3",
        "num_attention_heads": num_attention_heads,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "rms_norm_eps": rms_norm_eps,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        **_rope_fields(rope, rope_theta),
    }
    write_json(folder / "config.json", {"model_type": "qwen3_vl", "text_config": config} if nested else config)
    write_tensors(folder, tensors, shards)
    if tokenizer:
        write_tokenizer(folder)
    return {name: array.astype(np.float32) for name, array in stored.items()}


def write_pipeline(
    folder: Path, tokenizer_folder: str = "tokenizer", **checkpoint: Any
) -> dict[str, NDArray[np.float32]]:
    """Write a diffusers pipeline folder around a checkpoint; arguments and result as of `write_checkpoint`."""
    weights = write_checkpoint(folder / "text_encoder", tokenizer=False, **checkpoint)
    write_tokenizer(folder / tokenizer_folder)
    write_json(
        folder / "model_index.json", {"_class_name": "ZImagePipeline", "text_encoder": ["transformers", "Qwen3Model"]}
    )
    return weights


def write_tensors(folder: Path, tensors: Mapping[str, Array], shards: int = 1) -> None:
    """Write model.safetensors, or that many shards and their index in its place."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        dealt = {key: tensors[key] for key in list(tensors)[shard::shards]}
        save_file(dealt, folder / file_name)
        weight_map |= dict.fromkeys(dealt, file_name)
    total_size = sum(array.nbytes for array in tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )


def quantize_with_mlx(
    weights: Mapping[str, Array], quantization: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Quantize every matrix with mlx's own function, from bfloat16 as mlx-lm does.

    Returns:
        what is stored, under `….weight`, `….scales` and `….biases`, and what it stands for, in float32.
    """
    stored, decoded = {}, {}
    options: dict[str, Any] = {"mode": "affine", **quantization}
    for name, weight in weights.items():
        if weight.ndim != 2:
            stored[name] = weight.astype(ml_dtypes.bfloat16)
            decoded[name] = stored[name].astype(np.float32)
            continue
        parts = mx.quantize(mx.array(weight).astype(mx.bfloat16), **options)
        path = name.removesuffix(".weight")
        stored |= {
            f"{path}.{role}": _from_mlx(part) for role, part in zip(("weight", "scales", "biases"), parts, strict=False)
        }
        decoded[name] = np.array(mx.dequantize(*_float32_biases(parts), **options, dtype=mx.float32))
    return stored, decoded


def _float32_biases(parts: Sequence[mx.array]) -> list[mx.array]:
    return [part.astype(mx.float32) if part.dtype == mx.bfloat16 else part for part in parts]


def _from_mlx(array: mx.array) -> Array:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def write_tokenizer(folder: Path) -> None:
    """Write the demo's tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _tokenizer_files().items():
        (folder / name).write_bytes(content)


@cache
def _tokenizer_files() -> dict[str, bytes]:
    """The demo's, made once: making them makes its weights too."""
    files = demo_files()
    return {name: files[name] for name in ("tokenizer.json", "tokenizer_config.json")}


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2))


def _random_weight(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    if len(shape) == 1 and name.endswith("norm.weight"):
        return random.uniform(0.5, 1.5, shape)  # ones would hide a norm that is left out
    return np.asarray(random.standard_normal(shape) / np.sqrt(shape[-1]))


def _rope_fields(place: RopePlace, theta: float) -> dict[str, Any]:
    match place:
        case "rope_parameters":
            return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        case "rope_theta":
            return {"rope_theta": theta, "rope_scaling": None}
        case "rope_scaling":
            return {"rope_scaling": {"rope_type": "default", "rope_theta": theta}}
