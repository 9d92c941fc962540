"""Writes weights as quantization libraries store them, with NumPy from the formats' descriptions.

A quantizer gets the path of a module and its weight; it returns what is stored, and the floats that this stands for.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.checkpoints import Array, write_json, write_tokenizer
from tests.encoder.checkpoint.comfyui_files import tile

Stored = dict[str, Array]
Floats = NDArray[np.float32]
Quantize = Callable[[str, Array], tuple[Stored, Floats]]

FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NF4 = (-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1)


def write_folders(
    folder: Path,
    weights: Mapping[str, Array],
    quantize: Quantize,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write the matrices of the layers quantized, in `folder / "quantized"`, and what they stand for in "decoded".

    Args:
        folder: holds "plain", as write_checkpoint wrote it.
        weights: by the names of parameters.
        quantize: of each matrix in a layer.
        config: added to config.json.
        metadata: of each quantized tensor, for the header.
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
        save_file(
            {key: np.array(array, order="C") for key, array in tensors.items()},
            folder / name / "model.safetensors",
            {f"model.{key}": json.dumps(metadata) for key in weights} if metadata else None,
        )
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


def packed_integers(bits: int, group_size: int, *, symmetric: bool, act_order: bool = False) -> Quantize:
    """compressed-tensors' pack-quantized. Without act-order it may still say -1 as the group of each column."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        rows, columns = weight.shape
        order = np.random.default_rng(0).permutation(columns) if act_order else np.arange(columns)
        numbers, scales, zeros, floats = in_groups(weight[:, order], group_size, 2**bits)
        if symmetric:
            zeros = np.full_like(zeros, 2 ** (bits - 1))
            wide = np.repeat(scales.astype(np.float32), group_size, axis=1)
            floats = (numbers - 2 ** (bits - 1)).astype(np.float32) * wide
        back = np.argsort(order)
        stored = {
            f"{path}.weight_packed": pack(numbers[:, back], bits),
            f"{path}.weight_scale": scales,
            f"{path}.weight_shape": np.array([rows, columns]),
        }
        if not symmetric:
            stored[f"{path}.weight_zero_point"] = pack(zeros.T, bits).T
            stored[f"{path}.weight_g_idx"] = (back // group_size if act_order else -np.ones(columns)).astype(np.int32)
        return stored, floats[:, back]

    return quantize


def bytes_with_zeros(path: str, weight: Array) -> tuple[Stored, Floats]:
    """compressed-tensors' int-quantized, one scale and one zero for each row."""
    numbers, scales, zeros, floats = in_groups(weight, weight.shape[1], 256)
    return {
        f"{path}.weight": (numbers - 128).astype(np.int8),
        f"{path}.weight_scale": scales,
        f"{path}.weight_zero_point": (zeros - 128).astype(np.int8),
        f"{path}.input_zero_point": np.zeros(1, np.int8),
    }, floats


def float8_groups(group_size: int) -> Quantize:
    """compressed-tensors' float-quantized, in groups along each row."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        groups = weight.reshape(weight.shape[0], -1, group_size)
        scales = (np.abs(groups).max(axis=-1) / 448).astype(ml_dtypes.bfloat16)
        wide = scales.astype(np.float32)[..., None]
        numbers = (groups / wide).astype(ml_dtypes.float8_e4m3fn)
        floats = (numbers.astype(np.float32) * wide).reshape(weight.shape)
        return {f"{path}.weight": numbers.reshape(weight.shape), f"{path}.weight_scale": scales}, floats

    return quantize


def _float4(weight: Array, scales: Array) -> tuple[NDArray[np.uint8], Floats]:
    """Codes of 4-bit floats, two in a byte from the lower half, and what they stand for times their scales."""
    groups = weight.reshape(*scales.shape, -1)
    codes = np.abs((groups / scales[..., None])[..., None] - FLOAT4).argmin(axis=-1)
    floats = (FLOAT4[codes] * scales[..., None]).reshape(weight.shape)
    codes = codes.reshape(weight.shape).astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, floats


def _nvfp4_scales(weight: Array, whole: float) -> tuple[Array, Floats]:
    """Scales of 16 numbers as float8, and as what they are together with the scale of the whole tensor."""
    largest = np.abs(weight.reshape(weight.shape[0], -1, 16)).max(axis=-1)
    scales = (largest / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    return scales, scales.astype(np.float32) * np.float32(whole)


def nvfp4_divided(path: str, weight: Array) -> tuple[Stored, Floats]:
    """compressed-tensors' nvfp4: the scale of the tensor is the divisor. A power of two, so that products are exact."""
    scales, total = _nvfp4_scales(weight, 2.0**-9)
    packed, floats = _float4(weight, total)
    return {
        f"{path}.weight_packed": packed,
        f"{path}.weight_scale": scales,
        f"{path}.weight_global_scale": np.array([2.0**9], np.float32),
        f"{path}.input_global_scale": np.array([3.0], np.float32),
    }, floats


def nvfp4_multiplied(path: str, weight: Array) -> tuple[Stored, Floats]:
    """ModelOpt's nvfp4."""
    scales, total = _nvfp4_scales(weight, 0.003)
    packed, floats = _float4(weight, total)
    return {
        f"{path}.weight": packed,
        f"{path}.weight_scale": scales,
        f"{path}.weight_scale_2": np.array(0.003, np.float32),
        f"{path}.input_scale": np.array(0.5, np.float32),
    }, floats


def nvfp4_tiled(path: str, weight: Array) -> tuple[Stored, Floats]:
    """torchao's NVFP4Tensor with swizzled scales."""
    scales, total = _nvfp4_scales(weight, 0.003)
    packed, floats = _float4(weight, total)
    tiles = tile(scales)
    return {
        f"{path}._weight_qdata": packed,
        f"{path}._weight_scale": tiles.reshape(-1, 16),
        f"{path}._weight_per_tensor_scale": np.array(0.003, np.float32),
    }, floats


def mxfp4(names: tuple[str, str]) -> Quantize:
    """Blocks of 32 with powers of two, as compressed-tensors and ModelOpt name the arrays."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        largest = np.abs(weight.reshape(weight.shape[0], -1, 32)).max(axis=-1)
        exponents = np.ceil(np.log2(largest / 6))
        packed, floats = _float4(weight, np.exp2(exponents).astype(np.float32))
        return {f"{path}.{names[0]}": packed, f"{path}.{names[1]}": (exponents + 127).astype(np.uint8)}, floats

    return quantize


def int4_row_pairs(path: str, weight: Array) -> tuple[Stored, Floats]:
    """ModelOpt's int4: the numbers of rows 0 and 1 in one byte. Columns are divided by pre_quant_scale before."""
    columns = np.exp2(np.random.default_rng(0).integers(-2, 3, weight.shape[1])).astype(np.float32)
    groups = (weight / columns).reshape(weight.shape[0], -1, 64)
    scales = (np.abs(groups).max(axis=-1) / 7).astype(np.float32)
    numbers = np.round(groups / scales[..., None])
    floats = (numbers.astype(np.float32) * scales[..., None]).reshape(weight.shape) * columns
    codes = numbers.reshape(weight.shape).astype(np.int8).view(np.uint8) & 15
    return {
        f"{path}.weight": codes[::2] | codes[1::2] << 4,
        f"{path}.weight_scale": scales,
        f"{path}.pre_quant_scale": columns.astype(ml_dtypes.bfloat16),
    }, floats


def quanto_bits(bits: int, group_size: int) -> Quantize:
    """quanto's integers: groups as rows, and the first, second, ... part of all rows in the bits of a byte."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        numbers, _, zeros, _ = in_groups(weight, group_size, 2**bits)
        groups = numbers.reshape(-1, group_size).astype(np.uint8)
        scales = np.random.default_rng(0).uniform(0.01, 0.02, (len(groups), 1)).astype(np.float32)
        shifts = zeros.reshape(-1, 1).astype(np.float32) * scales
        floats = (scales * groups - shifts).reshape(weight.shape)
        packed = np.zeros((len(groups) * bits // 8, group_size), np.uint8)
        for index, part in enumerate(np.split(groups, 8 // bits)):
            packed |= part << (bits * index)
        return {
            f"{path}.weight._data._data": packed,
            f"{path}.weight._scale": scales,
            f"{path}.weight._shift": shifts,
            f"{path}.input_scale": np.ones((), np.float32),
            f"{path}.output_scale": np.ones((), np.float32),
        }, floats

    return quantize


def quanto_bytes(path: str, weight: Array) -> tuple[Stored, Floats]:
    scales = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float32)
    numbers = np.round(weight / scales).astype(np.int8)
    stored = {f"{path}.weight._data": numbers, f"{path}.weight._scale": scales}
    return stored, numbers.astype(np.float32) * scales


def torchao_int8(group_size: int) -> Quantize:
    """torchao's IntxUnpackedToInt8Tensor with 4 bits in bytes."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        numbers, scales, zeros, floats = in_groups(weight, group_size, 16)
        return {
            f"{path}._weight_qdata": (numbers - 8).astype(np.int8),
            f"{path}._weight_scale": scales,
            f"{path}._weight_zero_point": (zeros - 8).astype(np.int8),
        }, floats

    return quantize


def torchao_blocks(path: str, weight: Array) -> tuple[Stored, Floats]:
    """torchao's Float8Tensor in blocks of 64 x 64."""
    rows, columns = weight.shape
    scales = np.random.default_rng(0).uniform(0.001, 0.002, (rows // 64, columns // 64)).astype(np.float32)
    wide = np.kron(scales, np.ones((64, 64), np.float32))
    numbers = (weight / wide).astype(ml_dtypes.float8_e4m3fn)
    stored = {f"{path}._weight_qdata": numbers, f"{path}._weight_scale": scales}
    return stored, numbers.astype(np.float32) * wide


def torchao_int4(path: str, weight: Array) -> tuple[Stored, Floats]:
    """torchao's Int4Tensor: signed numbers, and zeros in floats. Powers of two, so that products are exact."""
    numbers, _, zeros, _ = in_groups(weight, 32, 16)
    scales = np.full(zeros.shape, 2.0**-4, np.float32)
    offsets = ((8 - zeros) * scales).astype(np.float32)
    signed = numbers.reshape(*zeros.shape, 32) - 8
    floats = (signed * scales[..., None] + offsets[..., None]).astype(np.float32).reshape(weight.shape)
    codes = signed.reshape(weight.shape).astype(np.int8).view(np.uint8) & 15
    return {
        f"{path}._weight_qdata": (codes[:, ::2] | codes[:, 1::2] << 4).view(np.int8),
        f"{path}._weight_scale": scales.T,
        f"{path}._weight_zero_point": offsets.T,
    }, floats


def sdnq(bits: int, *, signed: bool = False, svd: bool = False) -> Quantize:
    """SDNQ's integers in groups of 32; of 5 bits in its own order."""

    def quantize(path: str, weight: Array) -> tuple[Stored, Floats]:
        numbers, scales, zeros, floats = in_groups(weight, 32, 2**bits)
        if signed:
            zeros = np.full_like(zeros, 2 ** (bits - 1))
        wide = scales.astype(np.float32)[..., None]
        offsets = -zeros.astype(np.float32) * scales.astype(np.float32)
        grouped = numbers.reshape((*wide.shape[:2], 32)) - (2 ** (bits - 1) if signed else 0)
        floats = grouped.astype(np.float32) * wide + (0 if signed else offsets[..., None])
        flat = numbers.reshape(-1).astype(np.uint8)
        stored: Stored = {
            f"{path}.weight": _spread_5_bits(flat) if bits == 5 else pack(flat, bits).view(np.uint8),
            f"{path}.scale": scales[..., None],
        }
        if not signed:
            stored[f"{path}.zero_point"] = offsets[..., None]
        if svd:  # powers of two, so that the product is exact in any order
            random = np.random.default_rng(0)
            up, down = np.zeros((weight.shape[0], 2), np.float32), np.zeros((2, weight.shape[1]), np.float32)
            up[:, 0], down[0] = 0.125, np.exp2(random.integers(-4, 0, weight.shape[1]))
            stored |= {f"{path}.svd_up": up, f"{path}.svd_down": down}
            floats = floats.reshape(weight.shape) + up @ down
        return stored, floats.reshape(weight.shape).astype(np.float32)

    return quantize


def _spread_5_bits(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of eight numbers, five in the low bits of a byte each, and the bits of the others above them."""
    eights = numbers.reshape(-1, 8)
    packed = eights[:, :5].copy()
    packed[:, :3] |= (eights[:, 5:] & 7) << 5
    packed[:, 3:] |= (eights[:, 5:7] >> 3) << 5
    packed[:, 3] |= (eights[:, 7] >> 4) << 7
    packed[:, 4] |= (eights[:, 7] >> 3 & 1) << 7
    return packed


def sdnq_transposed(path: str, weight: Array) -> tuple[Stored, Floats]:
    """SDNQ's int8 as it is stored for products of integers."""
    scales = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float32)
    numbers = np.round(weight / scales).astype(np.int8)
    return {f"{path}.weight": numbers.T, f"{path}.scale": scales.T}, numbers.astype(np.float32) * scales


def sdnq_float4(path: str, weight: Array) -> tuple[Stored, Floats]:
    scales = (np.abs(weight).max(axis=1, keepdims=True) / 6).astype(np.float32)
    packed, floats = _float4(weight, scales)
    return {f"{path}.weight": packed.reshape(-1), f"{path}.scale": scales}, floats
