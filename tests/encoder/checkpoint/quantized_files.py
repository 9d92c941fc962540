"""Writes weights as quantization libraries store them, with NumPy from the formats' descriptions.

A quantizer gets the path of a module and its weight; it returns what is stored, and the floats that this stands for.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import Array, write_json, write_tensors, write_tokenizer

Stored = dict[str, Array]
Floats = NDArray[np.float32]
Quantize = Callable[[str, Array], tuple[Stored, Floats]]

NF4 = (-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1)


def write_folders(
    folder: Path, weights: Mapping[str, Array], quantize: Quantize, config: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write the matrices of the layers quantized, in `folder / "quantized"`, and what they stand for in "decoded".

    Args:
        folder: holds "plain", as write_checkpoint wrote it.
        weights: by the names of parameters.
        quantize: of each matrix in a layer.
        config: added to config.json.
    """
    stored: Stored = {}
    decoded: Stored = {}
    for name, weight in weights.items():
        if "proj" in name:
            tensors, decoded[f"model.{name}"] = quantize(f"model.{name.removesuffix('.weight')}", weight)
            stored |= tensors
        else:
            stored[f"model.{name}"] = decoded[f"model.{name}"] = weight
    plain = json.loads((folder / "plain" / "config.json").read_text())
    for name, tensors in (("quantized", stored), ("decoded", decoded)):
        write_tokenizer(folder / name)
        write_json(folder / name / "config.json", plain | (config if name == "quantized" else {}))
        write_tensors(folder / name, {key: np.ascontiguousarray(array) for key, array in tensors.items()})
    return folder / "quantized", folder / "decoded"


def in_groups(
    weight: Array, group_size: int, levels: int
) -> tuple[NDArray[np.int64], Array, NDArray[np.int64], Floats]:
    """Numbers in [0, levels), scales in float16, zeros, and the floats that they stand for; groups along the rows."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group_size, group_size)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    scales = ((high - low) / (levels - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, levels - 1).astype(np.int64)
    wide = scales.astype(np.float32)[..., None]
    numbers = np.clip(np.round(groups / wide) + zeros[..., None], 0, levels - 1).astype(np.int64)
    floats = (numbers - zeros[..., None]).astype(np.float32) * wide
    return numbers.reshape(rows, columns), scales, zeros, floats.reshape(rows, columns)


def pack(numbers: Array, bits: int) -> NDArray[np.int32]:
    """Numbers of `bits` bits one after the other along the last axis, from the lowest bit of each word of 32 bits."""
    in_bits = (np.asarray(numbers)[..., None] >> np.arange(bits)) & 1
    stream = in_bits.reshape(*numbers.shape[:-1], -1).astype(np.uint8)
    stream = np.concatenate([stream, np.zeros((*stream.shape[:-1], -stream.shape[-1] % 32), np.uint8)], axis=-1)
    return np.ascontiguousarray(np.packbits(stream, axis=-1, bitorder="little")).view(np.int32)


def bitsandbytes_4bit(table: tuple[float, ...] = NF4, kind: str = "nf4", nested: bool = False) -> Quantize:
    """Blocks of 64 of the flattened matrix. Nested: their scales are 8-bit numbers in blocks of 256."""
    code = np.array(table, np.float32)

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        blocks = weight.reshape(-1, 64).astype(np.float32)
        absmax = np.abs(blocks).max(axis=1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        stored: Stored = {f"{path}.weight.quant_map": code, f"{path}.weight.absmax": absmax}
        if nested:
            offset = float(absmax.mean())
            padded = np.pad(absmax - np.float32(offset), (0, -absmax.size % 256)).reshape(-1, 256)
            nested_absmax = np.abs(padded).max(axis=1)
            nested_code = np.linspace(-1, 1, 256).astype(np.float32)
            numbers = np.abs(padded[..., None] / nested_absmax[:, None, None] - nested_code).argmin(axis=-1)
            stored |= {
                f"{path}.weight.absmax": numbers.reshape(-1)[: absmax.size].astype(np.uint8),
                f"{path}.weight.nested_absmax": nested_absmax,
                f"{path}.weight.nested_quant_map": nested_code,
            }
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            absmax = (nested_code[numbers] * nested_absmax[:, None]).reshape(-1)[: absmax.size] + np.float32(offset)
        numbers = np.abs((blocks / absmax[:, None])[..., None] - code).argmin(axis=-1)
        flat = numbers.reshape(-1).astype(np.uint8)
        stored[f"{path}.weight"] = (flat[::2] << 4 | flat[1::2])[:, None]
        text = json.dumps(state).encode()
        stored[f"{path}.weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
        return stored, (code[numbers] * absmax[:, None]).reshape(weight.shape)

    return quantize


def llm_int8(path: str, weight: Array) -> tuple[Stored, Floats]:
    scb = np.abs(weight).max(axis=1).astype(np.float32)
    numbers = np.round(weight * 127 / scb[:, None]).astype(np.int8)
    stored = {f"{path}.weight": numbers, f"{path}.SCB": scb, f"{path}.weight_format": np.zeros((), np.uint8)}
    return stored, numbers.astype(np.float32) * (scb / np.float32(127))[:, None]


def awq(group_size: int) -> Quantize:
    """Words along the rows: row 0 in the lowest bits, then rows 2, 4, 6, 1, 3, 5 and 7."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        numbers, scales, zeros, floats = in_groups(weight, group_size, 16)

        def words(values: Array) -> Array:
            return pack(values.T.reshape(values.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]], 4)[..., 0]

        return {
            f"{path}.qweight": words(numbers),
            f"{path}.qzeros": words(zeros),
            f"{path}.scales": scales.T,
        }, floats

    return quantize


def gptq(bits: int, group_size: int, *, first_version: bool = True, act_order: bool = False) -> Quantize:
    """Words along the columns. Act-order: groups of columns that were sorted by some importance."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        columns = weight.shape[1]
        order = np.random.default_rng(0).permutation(columns) if act_order else np.arange(columns)
        numbers, scales, zeros, floats = in_groups(weight[:, order], group_size, 2**bits)
        back = np.argsort(order)
        return {
            f"{path}.qweight": pack(numbers[:, back], bits).T,
            f"{path}.qzeros": pack((zeros - first_version).T, bits),
            f"{path}.scales": scales.T,
            f"{path}.g_idx": (back // group_size).astype(np.int32),
        }, floats[:, back]

    return quantize
