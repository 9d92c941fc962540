"""Quantizes as ComfyUI's newer files are: rotated (ConvRot), columns scaled (AWQ), in 4 and 6 bits.

Each function returns what is stored, and in float64 what it stands for, decoded from the formats' descriptions: with
the whole Hadamard matrix, and number by number where the place of a number matters.
"""

import json
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoints import Array
from tests.encoder.checkpoint.comfyui_files import Quantize, Stored, nvfp4

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)


def hadamard(size: int) -> Array:
    """The Kronecker power of H4 of this size, normalised."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, H4)
    return matrix / np.sqrt(size)


def rotate(weight: Array, block: int) -> Array:
    rows, columns = weight.shape
    return (weight.astype(np.float64).reshape(rows, columns // block, block) @ hadamard(block)).reshape(rows, columns)


def note(**fields: Any) -> Array:
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def int8_convrot(block: int = 256, whole: bool = False, dtype: Any = np.float32, **fields: Any) -> Quantize:
    """int8_tensorwise with convrot: one scale for each row, or for the tensor, as `dtype`."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Array]:
        rotated = rotate(weight, block)
        scale = (np.abs(rotated).max(axis=None if whole else 1, keepdims=not whole) / 127).astype(dtype)
        numbers = np.clip(np.round(rotated / scale.astype(np.float64)), -127, 127).astype(np.int8)
        said = fields or {"convrot": True, "convrot_groupsize": block}
        stored = {
            f"{path}.weight": numbers,
            f"{path}.weight_scale": scale,
            f"{path}.comfy_quant": note(**{"format": "int8_tensorwise", **said}),
        }
        return stored, rotate(numbers.astype(np.float64) * scale.astype(np.float64), block)

    return quantize


def pack_int4(numbers: Array) -> Array:
    """Two numbers in a byte, the first in the lower half."""
    codes = numbers.astype(np.int64) & 15
    return (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8).view(np.int8)


def convrot_w4a4(path: str, weight: Array) -> tuple[Stored, Array]:
    rotated = rotate(weight, 64)
    scale = (np.abs(rotated).max(axis=1) / 7).astype(np.float32)
    numbers = np.clip(np.round(rotated / scale[:, None]), -7, 7)
    numbers[:, 0] = -8  # which no quantizer writes, and every reader knows
    stored = {
        f"{path}.weight": pack_int4(numbers),
        f"{path}.weight_scale": scale,
        f"{path}.comfy_quant": note(format="convrot_w4a4", convrot_groupsize=64, linear_dtype="int8"),
    }
    return stored, rotate(numbers * scale[:, None].astype(np.float64), 64)


def w4a8(
    bits: int = 4, group_size: int = 16, codebook: bool = True, correction: bool = False, float8: bool = True
) -> Quantize:
    """asym_w4a8_int8: random codes and scales, since only the decoding matters."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Array]:
        rows, columns = weight.shape
        random = np.random.default_rng(len(path) + rows)
        codes = random.integers(0, 2**bits, (rows, columns))
        levels = np.sort(random.uniform(-1, 1, 16)).astype(np.float32) if codebook else None
        reach = 127 if codebook else 127 / 2 ** (bits - 1)  # the largest level times this is at the end of int8
        relative = random.uniform(0.5, 1.2, (rows, columns // group_size)) * reach
        stored_relative = relative.astype(ml_dtypes.float8_e4m3fn if float8 else np.float32)
        channel = (random.uniform(0.5, 1, rows) * np.abs(weight).max(axis=1) / 127).astype(np.float32)
        stored: Stored = {
            f"{path}.weight": _pack_codes(codes, bits),
            f"{path}.weight_s_rel": stored_relative.view(np.uint8) if float8 and codebook else stored_relative,
            f"{path}.weight_s_channel": channel,
            f"{path}.comfy_quant": note(format="asym_w4a8_int8", group_size=group_size, convrot_groupsize=16),
        }
        values = (codes - 2 ** (bits - 1)).astype(np.float32)
        if levels is not None:
            stored[f"{path}.weight_codebook"], values = levels, levels[codes]
        spread = np.repeat(stored_relative.astype(np.float32), group_size, axis=1)
        decoded = np.clip(np.round(values * spread), -127, 127) * channel[:, None].astype(np.float64)
        if correction:
            added = random.standard_normal((columns // group_size, rows)).astype(ml_dtypes.bfloat16) * 0.01
            stored[f"{path}.weight_correction"] = added.astype(ml_dtypes.bfloat16)
            decoded += np.repeat(stored[f"{path}.weight_correction"].astype(np.float64).T, group_size, axis=1)
        return stored, rotate(decoded, 16)

    return quantize


def _pack_codes(codes: Array, bits: int) -> Array:
    """The lower four bits of all columns, two in a byte; with 6 bits the upper two follow, four in a byte."""
    rows, columns = codes.shape
    packed = np.zeros((rows, columns * bits // 8), np.uint8)
    for column in range(columns):
        packed[:, column // 2] |= ((codes[:, column] & 15) << 4 * (column % 2)).astype(np.uint8)
        if bits == 6:
            packed[:, columns // 2 + column // 4] |= (codes[:, column] >> 4 << 2 * (column % 4)).astype(np.uint8)
    return packed.view(np.int8)


def awq_w4a16(path: str, weight: Array) -> tuple[Stored, Array]:
    groups = weight.reshape(len(weight), -1, 64)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    scales = ((high - low) / 15).astype(ml_dtypes.bfloat16)
    zeros = (low + 8 * scales.astype(np.float32)).astype(ml_dtypes.bfloat16)
    exact_scales, exact_zeros = (array.astype(np.float64)[..., None] for array in (scales, zeros))
    numbers = np.clip(np.round((groups - exact_zeros) / exact_scales + 8), 0, 15)
    stored = {
        f"{path}.weight": pack_int4(numbers.reshape(weight.shape)),
        f"{path}.weight_scale": scales.T,
        f"{path}.weight_zeros": zeros.T,
        f"{path}.comfy_quant": note(format="awq_w4a16", group_size=64),
    }
    return stored, ((numbers - 8) * exact_scales + exact_zeros).reshape(weight.shape)


def nvfp4_awq(block: int | None = None) -> Quantize:
    """nvfp4 with the column scales of AWQ, and, for some, rotated as well."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Array]:
        scales = np.random.default_rng(0).uniform(0.5, 2, weight.shape[1]).astype(ml_dtypes.bfloat16)
        smooth = weight / scales.astype(np.float32)
        stored, decoded = nvfp4(path, (rotate(smooth, block) if block else smooth).astype(np.float32))
        stored[f"{path}.pre_quant_scale"] = scales
        if block:
            stored[f"{path}.comfy_quant"] = note(format="nvfp4", convrot=True, convrot_groupsize=block)
        exact = decoded.astype(np.float64)
        return stored, (rotate(exact, block) if block else exact) * scales.astype(np.float64)

    return quantize
