"""ComfyUI's quantizations: nvfp4 and mxfp8 in blocks, which only its files have, and scaled 8-bit numbers.

A layer's format is written in a tensor `comfy_quant`, JSON as bytes, or in the header under `_quantization_metadata`.
Block scales are in the order in which NVIDIA's tensor cores read them: tiles of 128 rows and 4 columns.
Source: comfy-kitchen 7d86acf, float_utils.py:to_blocked, backends/eager/quantization.py; ComfyUI, comfy/ops.py.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.encodings import dequantize
from encoder.checkpoint.tensors.keys import parameter_name
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.scaled import scaled
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError

_BLOCKS = {"nvfp4": Quantization("nvfp4", 4, 16), "mxfp8": Quantization("mxfp8", 8, 32)}
_SCALED = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_MAX_JSON_BYTES = 4096
_TILE_ROWS, _TILE_COLUMNS = 128, 4


@dataclass(frozen=True, slots=True)
class ComfyBlocks:
    """Blocks along each row, each with an 8-bit scale. nvfp4 also has a float32 scale for the whole tensor."""

    quantization: Quantization
    shape: tuple[int, ...]
    quantized: bool = True

    @property
    def label(self) -> str:
        return self.quantization.label

    @property
    def mlx_quantization(self) -> Quantization | None:
        return self.quantization if self.quantization.mode == "mxfp8" else None

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        packed = self.pack(arrays)
        if "global_scale" in arrays:
            packed["global_scale"] = arrays["global_scale"]
        return dequantize(packed, self.quantization, dtype)

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        data = arrays["weight"]
        if self.quantization.mode == "nvfp4":
            data = (data << 4) | (data >> 4)  # MLX keeps the first of two numbers in the lower half of a byte
        rows, columns = self.shape
        scales = untile(arrays["scales"], rows, columns // self.quantization.group_size)
        return {"weight": data.view(mx.uint32), "scales": scales}


def comfy_quant(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for a module whose format the file names.

    Errors: CheckpointError for a format that is not supported, or arrays that do not fit it.
    """
    note, weight = parts.pop("comfy_quant", None), parts.get("weight")
    layer = _parse_layer(note) if note is not None else _layers(hints.metadata.get("_quantization_metadata")).get(path)
    if layer is None or weight is None:
        return None
    name, where = layer.get("format"), f"{weight.file.name}: {weight.key}"
    options = layer.get("params")
    rotated = any(isinstance(fields, dict) and fields.get("convrot") for fields in (layer, options))
    rotated = rotated or "pre_quant_scale" in parts
    if name in _SCALED and not rotated:
        return scaled(path, parts, hints)
    if name not in _BLOCKS or rotated:
        raise CheckpointError(
            f"{where} has ComfyUI's format {layer!r:.200}, expected one of {', '.join([*_SCALED, *_BLOCKS])}, and "
            f"neither rotated (convrot) nor with pre_quant_scale. Take another file of this model."
        )
    return _blocks(f"{path}.weight", take(parts, "weight", "weight_scale", "weight_scale_2"), _BLOCKS[name], where)


def untile(scales: mx.array, rows: int, columns: int) -> mx.array:
    """Scales in row-major order, (rows, columns), from tiles of 128 x 4, the last of which are padded."""
    down, across = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    tiles = scales.reshape(down, across, 32, 4, _TILE_COLUMNS)  # row 32 * i + j of a tile is at [j, i]
    ordered = tiles.transpose(0, 3, 2, 1, 4).reshape(down * _TILE_ROWS, across * _TILE_COLUMNS)
    return ordered[:rows, :columns]


def _blocks(name: str, parts: Parts, quantization: Quantization, where: str) -> StoredTensor:
    weight, scales = parts["weight"], parts.get("weight_scale")
    per_byte = 8 // quantization.bits
    if len(weight.shape) != 2 or weight.dtype not in ("U8", "F8_E4M3") or weight.shape[1] * per_byte % 64:
        raise CheckpointError(f"{where} is {weight.dtype} {weight.shape}, expected bytes of {quantization.label}.")
    shape = (weight.shape[0], weight.shape[1] * per_byte)
    groups = shape[1] // quantization.group_size
    padded = -(-shape[0] // _TILE_ROWS) * _TILE_ROWS * -(-groups // _TILE_COLUMNS) * _TILE_COLUMNS
    if scales is None or scales.nbytes != padded:
        found = "none" if scales is None else f"{scales.nbytes:,}"
        raise CheckpointError(f"{where} has {found} bytes of scales, expected {padded:,} for {quantization.label}.")
    arrays = {"weight": weight, "scales": scales}
    if "weight_scale_2" in parts:
        arrays["global_scale"] = parts["weight_scale_2"]
    if (quantization.mode == "nvfp4") != ("global_scale" in arrays):
        raise CheckpointError(f"{where}: weight_scale_2 belongs to nvfp4, and to no other format.")
    return StoredTensor(name, shape, ComfyBlocks(quantization, shape), arrays)


def _parse_layer(note: StoredArray) -> dict[str, Any]:
    return _parse(note.read_bytes(_MAX_JSON_BYTES), f"{note.file.name}: {note.key}")


@lru_cache(maxsize=4)
def _layers(metadata: str | None) -> dict[str, dict[str, Any]]:
    """The header's description of each layer, by the path of the module."""
    if metadata is None:
        return {}
    layers = _parse(metadata.encode(), "_quantization_metadata").get("layers", {})
    if not isinstance(layers, dict):
        raise CheckpointError(f"_quantization_metadata: layers is {layers!r:.80}, expected an object.")
    named = {parameter_name(f"{key}.weight"): layer for key, layer in layers.items()}
    return {
        name.removesuffix(".weight"): layer if isinstance(layer, dict) else {"format": layer}
        for name, layer in named.items()
        if name is not None
    }


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text.rstrip(b"\0"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {value!r:.80}, expected an object.")
    return value
