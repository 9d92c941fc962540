"""Writes single files as ComfyUI holds them, quantized with NumPy and ml_dtypes from the formats' descriptions."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.checkpoints import Array, write_tokenizer

Stored = dict[str, Array]
E4M3 = ml_dtypes.float8_e4m3fn
Quantize = Callable[[str, Array], tuple[Stored, Array]]  # key and weight to what is stored, and what it stands for


def write_file(
    folder: Path, tensors: Mapping[str, Array], name: str = "qwen_3_4b.safetensors", **metadata: str
) -> Path:
    write_tokenizer(folder)
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, folder / name, metadata or None)
    return folder / name


def float8(dtype: Any, limit: float, rows: bool, names: tuple[str, ...], **note: Any) -> Quantize:
    """Quantizes to 8 bits with one scale, or one for each row, named names[0]. The other names are arrays beside it."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Array]:
        scale = np.abs(weight).max(axis=1 if rows else None, keepdims=rows).astype(np.float32) / limit
        numbers = (weight / scale).astype(dtype)
        stored = {f"{path}.weight": numbers}
        if names:
            stored[f"{path}.{names[0]}"] = scale.reshape(-1) if rows else scale.reshape(())
        else:
            scale = np.float32(1)
            stored[f"{path}.weight"] = numbers = weight.astype(dtype)
        stored |= {f"{path}.{name}": np.ones((), np.float32) for name in names[1:]}
        if note:
            stored[f"{path}.comfy_quant"] = np.frombuffer(json.dumps(note).encode(), np.uint8)
        return stored, numbers.astype(np.float32) * scale

    return quantize


def int8(path: str, weight: Array) -> tuple[Stored, Array]:
    scale = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / 127
    numbers = np.round(weight / scale).astype(np.int8)
    note = np.frombuffer(json.dumps({"format": "int8_tensorwise", "per_row": True}).encode(), np.uint8)
    stored = {f"{path}.weight": numbers, f"{path}.weight_scale": scale, f"{path}.comfy_quant": note}
    return stored, numbers.astype(np.float32) * scale


def block_float8(path: str, weight: Array) -> tuple[Stored, Array]:
    """As Qwen's own FP8 repositories: a scale for each 128 x 128 block, the last ones cut off."""
    rows, columns = weight.shape
    scale = np.random.default_rng(0).uniform(0.01, 0.02, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
    spread = np.kron(scale, np.ones((128, 128), np.float32))[:rows, :columns]
    numbers = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
    return {f"{path}.weight": numbers, f"{path}.weight_scale_inv": scale}, numbers.astype(np.float32) * spread


def float8_blocks(name: str, block: tuple[int, int] | None, stated: int | None = None) -> Quantize:
    """The names of convert_to_quant: a scale for each row, or for each block, as float8 or int8."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Array]:
        rows, columns = weight.shape
        high, wide = block or (1, columns)
        down, across = -(-rows // high), -(-columns // wide)
        scale = np.random.default_rng(0).uniform(0.01, 0.02, (down, across)).astype(np.float32)
        spread = np.kron(scale, np.ones((high, wide), np.float32))[:rows, :columns]
        numbers = np.round(weight / spread).astype(np.int8) if "int8" in name else (weight / spread).astype(E4M3)
        note = {"format": name} | ({"group_size": stated} if stated else {})
        stored = {
            f"{path}.weight": numbers,
            f"{path}.weight_scale": scale[..., None]
            if name.endswith("3d")
            else scale.reshape(-1)
            if wide == columns
            else scale,
            f"{path}.comfy_quant": np.frombuffer(json.dumps(note).encode(), np.uint8),
        }
        return stored, numbers.astype(np.float32) * spread

    return quantize


def tile(scales: Array) -> Array:
    """Where cuBLAS wants the scale of row r and column c; the rest of the last tiles is zero."""
    rows, columns = scales.shape
    down, across = -(-rows // 128), -(-columns // 4)
    tiled = np.zeros(down * across * 512, scales.dtype)
    for row in range(rows):
        for column in range(columns):
            start = 512 * (row // 128 * across + column // 4)
            tiled[start + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scales[row, column]
    return tiled.reshape(down * 128, across * 4)


def nvfp4(path: str, weight: Array) -> tuple[Stored, Array]:
    rows, columns = weight.shape
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    blocks = weight.reshape(rows, columns // 16, 16)
    whole = np.float32(np.abs(weight).max() / (448 * 6))
    scales = (np.abs(blocks).max(axis=-1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    total = scales.astype(np.float32)[..., None] * whole
    codes = (
        np.abs(blocks[..., None] / total[..., None] - values).argmin(axis=-1).reshape(rows, columns).astype(np.uint8)
    )
    stored = {
        f"{path}.weight": codes[:, ::2] << 4 | codes[:, 1::2],
        f"{path}.weight_scale": tile(scales),
        f"{path}.weight_scale_2": np.array(whole),
        f"{path}.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8),
    }
    exact = values[codes].reshape(blocks.shape) * scales.astype(np.float32)[..., None] * whole
    return stored, exact.reshape(rows, columns)


def mxfp8(path: str, weight: Array) -> tuple[Stored, Array]:
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // 32, 32)
    exponents = np.ceil(np.log2(np.abs(blocks).max(axis=-1) / 448)) + 127
    numbers = (blocks / np.exp2(exponents - 127)[..., None]).astype(ml_dtypes.float8_e4m3fn)
    stored = {
        f"{path}.weight": numbers.reshape(rows, columns),
        f"{path}.weight_scale": tile(exponents.astype(np.uint8)).view(ml_dtypes.float8_e8m0fnu),
        f"{path}.comfy_quant": np.frombuffer(b'{"format": "mxfp8"}', np.uint8),
    }
    decoded = numbers.astype(np.float32) * np.exp2(exponents - 127).astype(np.float32)[..., None]
    return stored, decoded.reshape(rows, columns)
