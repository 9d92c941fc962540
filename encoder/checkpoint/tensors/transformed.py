"""Weights that were transformed before they were quantized, so that outliers cost less: rotated, or columns scaled.

ConvRot     each block of columns is multiplied by a Hadamard matrix, a Kronecker power of H4, which is its own inverse
AWQ         each column is divided by a number, `pre_quant_scale`, by which the layer's input is multiplied

ComfyUI multiplies the layer's input by the scales, and then rotates it. Here both are undone in the weight.
Source: ComfyUI, comfy/ops.py:mixed_precision_ops; comfy-kitchen, tensor/int8_utils.py; stable-diffusion.cpp,
docs/int8_convrot.md.
"""

from dataclasses import dataclass
from math import isqrt

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import is_per_row
from encoder.checkpoint.tensors.assemble import Parts, take
from encoder.checkpoint.tensors.encodings import FLOATS, OnlyDecoded
from encoder.checkpoint.tensors.weights import Arrays, Encoding, StoredTensor
from encoder.errors import CheckpointError

ROW_SCALE, COLUMN_SCALE = "row_scale", "column_scale"  # roles of arrays
_NUMBERS_AT_ONCE = 2**20  # so that the steps of a rotation stay in the CPU's cache


@dataclass(frozen=True, slots=True)
class Transformed(OnlyDecoded):
    """The numbers of `inner`, rotated back, times `row_scale`, times `column_scale`, in float32.

    A rotation mixes the columns of a row, so the scale of a row can follow it: integers are rotated without rounding.
    """

    inner: Encoding
    rotation: int | None
    columns_are_scaled: bool
    quantized: bool = True

    @property
    def label(self) -> str:
        rotated = f" rotated in blocks of {self.rotation}" if self.rotation else ""
        return self.inner.label + rotated + (" with scaled columns" if self.columns_are_scaled else "")

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        own = (ROW_SCALE, COLUMN_SCALE)
        numbers = self.inner.decode({role: array for role, array in arrays.items() if role not in own}, mx.float32)
        rows, columns = numbers.shape
        row_scales, column_scales = (
            arrays[role].astype(mx.float32).reshape(shape) if role in arrays else None
            for role, shape in zip(own, [(-1, 1), (1, -1)], strict=True)
        )
        decoded = mx.zeros((rows, columns), dtype)
        step = max(1, _NUMBERS_AT_ONCE // max(1, columns))
        for start in range(0, rows, step):  # each part is rounded before the next is made, which bounds the memory
            part = numbers[start : start + step]
            if self.rotation:
                part = unrotate(part, self.rotation)
            if row_scales is not None:
                part = part * (row_scales if row_scales.size == 1 else row_scales[start : start + step])
            if column_scales is not None:
                part = part * column_scales
            decoded[start : start + step] = part.astype(dtype)
            mx.eval(decoded)
        return decoded


def unrotate(numbers: mx.array, block: int) -> mx.array:
    """Rotate each block of columns by the normalised Hadamard matrix of that size, a power of 4.

    The matrix is H4 ⊗ H4 ⊗ …, and H4 x = (sum of x) - 2 (x reversed), so each factor takes additions alone. All but the
    last product, by a power of two, is exact for integers.

    Args:
        numbers: (rows, columns) float32, the columns a multiple of `block`.
        block: columns that are mixed with each other.
    """
    rotated, stride = numbers, 1
    while stride < block:
        fours = rotated.reshape(-1, 4, stride)
        rotated = fours.sum(axis=1, keepdims=True) - 2 * fours[:, ::-1]
        stride *= 4
    return rotated.reshape(numbers.shape) * (1 / isqrt(block))


def is_rotation(block: int) -> bool:
    """Whether there is a Hadamard matrix of this size: a power of 4, from 4."""
    return block >= 4 and block & (block - 1) == 0 and block.bit_length() % 2 == 1


def transformed(tensor: StoredTensor, parts: Parts, rotation: int | None = None) -> StoredTensor:
    """The tensor whose rotation, and the `pre_quant_scale` among `parts`, are undone; the tensor itself without them.

    Errors: CheckpointError for blocks that are no power of 4 or do not divide the columns, and for other scales than
        one for each column.
    """
    scales = take(parts, "pre_quant_scale").get("pre_quant_scale")
    if rotation is None and scales is None and ROW_SCALE not in tensor.arrays:
        return tensor
    where, columns = f"{tensor.file.name}: {tensor.key}", tensor.shape[-1]
    if rotation is not None and (len(tensor.shape) != 2 or not is_rotation(rotation) or columns % rotation):
        raise CheckpointError(
            f"{where} has shape {tensor.shape} and is rotated (convrot) in blocks of {rotation:,} columns, expected a "
            f"power of 4 that divides the columns. Take another file of this model."
        )
    arrays = dict(tensor.arrays)
    if "scale" in arrays and is_per_row(arrays["scale"].shape, tensor.shape) and arrays["scale"].dtype in FLOATS:
        arrays[ROW_SCALE] = arrays.pop("scale")  # of 8-bit numbers: it can follow the rotation
    if scales is not None:
        if scales.dtype not in FLOATS or scales.shape not in ((columns,), (1, columns)) or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{scales.file.name}: {scales.key} is {scales.dtype} {scales.shape}, expected a float for each of "
                f"{columns:,} columns."
            )
        arrays[COLUMN_SCALE] = scales
    encoding = Transformed(tensor.encoding, rotation, scales is not None)
    return StoredTensor(tensor.name, tensor.shape, encoding, arrays)
