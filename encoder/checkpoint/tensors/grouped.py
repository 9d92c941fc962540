"""Numbers of a few bits that share scales in groups along each row. Most quantizers store weights so.

A weight is `(number - zero) * scale + offset`. The quantizers differ in where the bits of a number are and in the order
of their arrays; each has a function that brings the arrays into the order of the weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from encoder.checkpoint.tensors.array_checks import check_groups
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.weights import Arrays, StoredArray
from encoder.errors import CheckpointError

_MLX_BITS = (2, 4, 8)  # those whose numbers do not straddle bytes
_MLX_GROUPS = (32, 64, 128)
_MAX_COLUMNS = 2**20


@dataclass(frozen=True, slots=True)
class Groups:
    """The arrays of a weight of shape (rows, columns), in its order.

    Attributes:
        numbers: (rows, columns), of any dtype.
        scales: (rows, groups).
        zeros: (rows, groups), or broadcast to it; None means 0.
        offsets: (rows, groups); None means 0.
        residual: (rows, columns), added to the weight; None means 0.
        group_of_column: (columns,) integers, where the columns of a group are not neighbours.
    """

    numbers: mx.array
    scales: mx.array
    zeros: mx.array | None = None
    offsets: mx.array | None = None
    residual: mx.array | None = None
    group_of_column: mx.array | None = None


@dataclass(frozen=True, slots=True)
class Grouped:
    """A weight of numbers in groups.

    Attributes:
        label: name for people.
        read: brings the stored arrays into the order of the weight, unevaluated.
        mlx_quantization: MLX's equal; None where it has none. Only for integers from 0, with zeros or offsets.
    """

    label: str
    read: Callable[[Arrays], Groups]
    mlx_quantization: Quantization | None = None
    quantized: bool = True

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        groups = self.read(arrays)
        rows, columns = groups.numbers.shape
        numbers = groups.numbers.astype(mx.float32)
        if groups.group_of_column is None:
            numbers = numbers.reshape(rows, groups.scales.shape[1], -1)  # (rows, groups, columns of a group)
        if groups.zeros is not None:
            numbers = numbers - _spread(groups.zeros, groups)
        weight = numbers * _spread(groups.scales, groups)
        if groups.offsets is not None:
            weight = weight + _spread(groups.offsets, groups)
        weight = weight.reshape(rows, columns)
        if groups.residual is not None:
            weight = weight + groups.residual
        return weight.astype(dtype)

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        assert self.mlx_quantization is not None
        groups = self.read(arrays)
        scales = groups.scales.astype(mx.float32)
        if groups.offsets is not None:
            biases = groups.offsets
        else:
            assert groups.zeros is not None
            biases = mx.broadcast_to(-groups.zeros.astype(mx.float32) * scales, scales.shape)
        return {"weight": _pack_bits(groups.numbers, self.mlx_quantization.bits), "scales": scales, "biases": biases}


def affine_of_mlx(bits: int, group_size: int) -> Quantization | None:
    """MLX's quantization of these bits and groups, None where it has none or packs its numbers in another way."""
    return Quantization("affine", bits, group_size) if bits in _MLX_BITS and group_size in _MLX_GROUPS else None


def unpack_bits(packed: mx.array, bits: int) -> mx.array:
    """Numbers of 1 to 8 bits that follow each other without a gap, the first in the lowest bits.

    Args:
        packed: (rows, n), words or bytes of whole rows.
    Returns:
        (rows, at least as many as there are whole numbers) uint8; behind them are zeros.
    """
    rows = packed.shape[0]
    data = mx.contiguous(packed).view(mx.uint8).reshape(rows, -1)
    data = mx.pad(data, [(0, 0), (0, -data.shape[1] % bits)])
    eights = data.reshape(rows, -1, bits)  # the bytes of eight numbers
    numbers = []
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        number = eights[..., byte] >> shift
        if shift + bits > 8:
            number = number | (eights[..., byte + 1] << (8 - shift))
        numbers.append(number & (2**bits - 1))
    return mx.stack(numbers, axis=-1).reshape(rows, -1)


def as_words(arrays: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """The arrays, those of signed words as unsigned ones: the bits of several numbers have no sign."""
    return {role: replace(array, dtype="U32") if array.dtype == "I32" else array for role, array in arrays.items()}


def is_in_order(label: str, arrays: Mapping[str, StoredArray], groups: int, columns: int) -> bool:
    """Whether the columns of each group are neighbours. Reads the array "g_idx", the group of each column.

    Errors: CheckpointError where there is none and groups are not whole, or a column is in a group that has no scale.
    """
    order = arrays.get("g_idx")
    if order is None or not groups:
        check_groups(label, arrays["weight"], groups, columns)
        return True
    found = np.frombuffer(order.read_bytes(4 * _MAX_COLUMNS), np.int32)
    whole = columns % groups == 0
    if whole and (found == -1).all():  # compressed-tensors, where columns are in order
        return True
    if found.size != columns or np.any(found < 0) or np.any(found >= groups):
        raise CheckpointError(
            f"{order.file.name}: {order.key} names groups of {label}, expected {columns} from 0 to {groups - 1}."
        )
    return whole and bool((found == np.arange(columns) // (columns // groups)).all())


def _spread(values: mx.array, groups: Groups) -> mx.array:
    """One value for each group as float32, in a shape that broadcasts to the numbers."""
    values = values.astype(mx.float32)
    if groups.group_of_column is None:
        return values[..., None]
    if values.size == 1:
        return values
    # As MLX does this on a CPU, it takes several times as long.
    return mx.array(np.take(np.asarray(values), np.asarray(groups.group_of_column), axis=1))


def _pack_bits(numbers: mx.array, bits: int) -> mx.array:
    """MLX's words of 32 bits: (rows, columns) uint8 to (rows, columns * bits / 32) uint32."""
    rows = numbers.shape[0]
    in_byte = numbers.reshape(rows, -1, 8 // bits)
    packed = in_byte[..., 0]
    for index in range(1, 8 // bits):
        packed = packed | (in_byte[..., index] << (index * bits))
    return mx.contiguous(packed).view(mx.uint32)
