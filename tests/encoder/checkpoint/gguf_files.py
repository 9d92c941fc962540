"""Writes checkpoints as GGUF files, with the gguf package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from encoder.checkpoint.files.demo_tokenizer import tokenizer_json
from tests.checkpoints import Array

DIMS = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
KINDS = gguf.GGMLQuantizationType
QUANTIZED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16"]  # that the package can write
RANDOM = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]  # that it can only read
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 8)


def write_gguf(
    file: Path,
    weights: Mapping[str, Array],
    kind: str = "F32",
    tokens: Mapping[str, Any] | None = None,
    architecture: str = "qwen3",
    part_tensors: int = 0,
    extra: Mapping[str, Array] | None = None,
    rope_theta: float | None = 1e6,
    prefix: str | None = None,
    **metadata: Any,
) -> dict[str, Array]:
    """Write the weights, the matrices among them as `kind`; what they stand for, by parameter name.

    With `part_tensors` in several files of so many tensors; with a `prefix` under Hugging Face's names behind it.
    `extra` are tensors under keys of their own.
    """
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=part_tensors)
    fields = {"embedding_length": 256, "feed_forward_length": 256, "block_count": 2, "context_length": 4096}
    fields |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 64}
    for key, value in fields.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    if rope_theta is not None:
        writer.add_float32(f"{architecture}.rope.freq_base", rope_theta)
    for key, value in metadata.items():
        add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}[
            type(value)
        ]
        add(key.replace("__", "."), value)
    write_tokens(writer, **(tokens or demo_tokens()))
    decoded = {}
    for name, weight in weights.items():
        key = f"{prefix}{name}" if prefix else NAMES.get_name(f"model.{name}", (".weight", ".bias"))
        assert key is not None
        stored, decoded[name] = encode_matrix(weight, kind) if weight.ndim == 2 else (weight, weight)
        writer.add_tensor(key, stored, raw_dtype=KINDS[kind] if weight.ndim == 2 and kind != "F32" else None)
    for key, array in {"output.weight": weights["embed_tokens.weight"], **(extra or {})}.items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def encode_matrix(weight: Array, kind: str) -> tuple[Array, Array]:
    if kind == "F32":
        return weight, weight
    if kind in RANDOM:
        block, size = gguf.GGML_QUANT_SIZES[KINDS[kind]]
        data = np.random.default_rng(len(weight)).integers(0, 256, (len(weight), 256 // block, size), np.uint8)
        data[..., :2] = data[..., -2:] = np.array([0, 0x10], np.uint8)  # wherever the scales stand: small and finite
        if kind in ("Q2_K", "Q4_K", "Q5_K"):
            data[..., 2:4] = data[..., -4:-2] = np.array([0, 0x10], np.uint8)
        stored = np.ascontiguousarray(data.reshape(len(weight), -1))
    else:
        stored = quantize(weight, KINDS[kind])
    return stored, dequantize(stored, KINDS[kind]).astype(np.float32)


def write_tokens(writer: gguf.GGUFWriter, tokens: list[str], types: list[int], merges: list[str], pad: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(merges)
    writer.add_pad_token_id(pad)


def demo_tokens() -> dict[str, Any]:
    return gguf_tokens(tokenizer_json())


def gguf_tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter makes of a tokenizer.json."""
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {content: token["id"] for content, token in added.items()}
    tokens = sorted(ids, key=lambda token: int(ids[token]))
    types = [3 if token in added and added[token]["special"] else 4 if token in added else 1 for token in tokens]
    merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {"tokens": tokens, "types": types, "merges": merges, "pad": ids.get("<|endoftext|>", 0)}
