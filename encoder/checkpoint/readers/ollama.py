"""Reads models from Ollama's store, where they lie: the text encoder of an image model, a language model, and GGUF.

Each tensor is a blob, which is a small safetensors file. Quantized weights have had two forms:

until February 2026    three blobs, each with the key `data`; layers `….weight`, `….weight_scale`, `….weight_qbias`
since then             one blob with the keys `….weight`, `….weight.scale`, `….weight.bias`, `quant_type` in its header

Both are what `mlx.core.quantize` returns, under other names.
Source: ollama, x/imagegen/weights.go before a0407d07f, x/create/quantize.go, x/mlxrunner/model/root.go.
"""

import re
from dataclasses import replace
from pathlib import Path

from encoder.checkpoint.checkpoint import Checkpoint, Origin, describe
from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import TOKENIZER_FILE, TOKENIZER_FILES
from encoder.checkpoint.files.ollama_store import (
    ADAPTER,
    GGUF,
    JSON,
    TENSOR,
    Layer,
    check_digest,
    manifest_file,
    read_layers,
)
from encoder.checkpoint.files.safetensors_header import read_header
from encoder.checkpoint.files.tokenizer_build import build_tokenizer
from encoder.checkpoint.files.tokenizer_files import open_named_tokenizer
from encoder.checkpoint.readers.gguf import open_gguf
from encoder.checkpoint.readers.gguf_adapter import open_gguf_adapter
from encoder.checkpoint.readers.loras import merge_adapter
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.assemble import Hints, assemble
from encoder.checkpoint.tensors.mlx_quantized import mlx_quantized
from encoder.checkpoint.tensors.rope_theta import settle_rope_theta
from encoder.checkpoint.tensors.weights import StoredArray, Weights
from encoder.errors import CheckpointError
from encoder.options import Lora
from encoder.pipeline.tokenizer import Tokenizer
from encoder.qwen3.config import Qwen3Config, states_rope_theta

PREFIX = "ollama:"
COMPONENT = "text_encoder/"
_SINGLE_KEY = "data"
_BITS = {"int4": 4, "q4": 4, "fp4": 4, "int8": 8, "q8": 8, "fp8": 8, "nvfp4": 4, "mxfp4": 4, "mxfp8": 8}
_ROLES = {
    "scale": "scales",
    "qbias": "biases",
    "bias": "biases",
    "global_scale": "global_scale",
    "scale_2": "global_scale",
}
_BESIDE_WEIGHT = re.compile(r"(?P<path>.+)\.weight[._](?P<role>scale|qbias|bias|global_scale|scale_2)")


def recognizes(request: Request) -> bool:
    """`ollama:` and a name, or the bare name of a model that the store has."""
    if request.source.startswith(PREFIX):
        return True
    manifest = manifest_file(request.source)
    return manifest is not None and manifest.is_file()


def open_request(request: Request) -> Checkpoint:
    """Describe a model of the store.

    Errors: CheckpointError when the store does not have the model, or the model is damaged or no Qwen3.
    """
    manifest = manifest_file(request.source.removeprefix(PREFIX))
    if manifest is None or not manifest.is_file():
        where = manifest or "a name like ollama:z-image-turbo:latest"
        raise CheckpointError(f"{request.name}: is no model of Ollama's store, expected {where}. Pull it first.")
    layers = read_layers(manifest)
    gguf = next((layer for layer in layers if layer.media_type == GGUF), None)
    checkpoint = _open_tensors(layers, request) if gguf is None else open_gguf(gguf.blob, request)
    for layer in layers:
        if layer.media_type == ADAPTER:
            checkpoint = merge_adapter(checkpoint, open_gguf_adapter(layer.blob), Lora(f"adapter of {request.name}"))
    return replace(checkpoint, weights=replace(checkpoint.weights, check_file=check_digest))


def _open_tensors(layers: list[Layer], request: Request) -> Checkpoint:
    files = {layer.name: layer.blob for layer in layers if layer.media_type == JSON}
    component = COMPONENT if f"{COMPONENT}config.json" in files else ""
    if f"{component}config.json" not in files:
        raise CheckpointError(f"{request.name}: has no {COMPONENT}config.json among its layers. Is it a Qwen3 model?")
    config_file = files[f"{component}config.json"]
    raw_config, config_from = read_json_object(config_file), f"{component}config.json of {request.name}"
    dims = Qwen3Config.from_dict(raw_config, f"{config_file} ({component}config.json)")
    stated, given = states_rope_theta(raw_config), request.options.rope_theta
    config, theta = settle_rope_theta(dims, config_from, stated, given)
    blobs = [layer for layer in layers if layer.media_type == TENSOR and layer.name.startswith(component)]
    named: list[tuple[str, StoredArray]] = []
    bits: dict[str, int] = {}
    for layer in blobs:
        header = read_header(layer.blob)
        for array in header.arrays:
            own_key = layer.name if array.key == _SINGLE_KEY else array.key
            key = _mlx_key(own_key.removeprefix(component))  # newer blobs leave the component out
            named.append((key, array))
            bits |= _declared_bits(key, array.key, header.metadata)
    assembled = assemble(named, (mlx_quantized,), Hints(dims=config, bits=bits), request.name, None)
    tokenizer = _open_tokenizer(files, request)
    origin = Origin("Ollama's tensors", config_from, theta.source, tokenizer.source)
    return describe(
        request.name, config, Weights(assembled.tensors), tokenizer, origin, [*assembled.warnings, *theta.warnings]
    )


def _mlx_key(key: str) -> str:
    """The key that MLX would give the array: `….scales` and `….biases` beside `….weight`."""
    match = _BESIDE_WEIGHT.fullmatch(key)
    return f"{match['path']}.{_ROLES[match['role']]}" if match else key


def _declared_bits(key: str, own_key: str, metadata: dict[str, str]) -> dict[str, int]:
    """The bits of a weight by the path of its module in the file, where the blob names its type; else empty."""
    quant_type = metadata.get(f"{own_key}.quant_type") or metadata.get("quant_type") or ""
    bits = _BITS.get(quant_type.lower())
    return {key.removesuffix(".weight"): bits} if bits and key.endswith(".weight") else {}


def _open_tokenizer(files: dict[str, Path], request: Request) -> Tokenizer:
    if request.options.tokenizer is not None:
        return open_named_tokenizer(request.options.tokenizer, request.options.cache_dir)
    for folder in ("tokenizer/", ""):
        if f"{folder}{TOKENIZER_FILE}" in files:
            found = [name for name in TOKENIZER_FILES if f"{folder}{name}" in files]
            return build_tokenizer({name: files[f"{folder}{name}"] for name in found})
    raise CheckpointError(f"{request.name}: has no tokenizer.json among its layers. Give one with --tokenizer.")
