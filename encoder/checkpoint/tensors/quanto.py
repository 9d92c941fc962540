"""optimum-quanto's formats, as its `save_pretrained` and diffusers write them.

weight._data                          8-bit integers or floats; times `weight._scale`, one for each row
weight._data._data, weight._shift     integers of 2 or 4 bits: `number * scale - shift`, or `(number - shift) * scale`
                                      where shifts are integers

Groups of a row follow each other as rows of their own. The bytes hold the first, second, ... part of all rows.
Source: optimum-quanto 0.2.7, tensor/packed.py, tensor/grouped.py, tensor/qbits.py:QBitsDequantizer, tensor/qbytes.py.
"""

from functools import partial
from math import prod

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, check_arrays
from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.dims import columns_of
from encoder.checkpoint.tensors.grouped import Grouped, Groups, affine_of_mlx
from encoder.checkpoint.tensors.scaled import scaled_tensor
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError


def quanto(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for `weight._data` and `weight._data._data`. Errors: CheckpointError for arrays that do not fit."""
    if "weight._scale" not in parts:
        return None
    take(parts, "input_scale", "output_scale")
    if "weight._data" in parts:
        renamed = {"weight": parts.pop("weight._data"), "weight_scale": parts.pop("weight._scale")}
        return scaled_tensor(path, renamed)
    if "weight._data._data" not in parts:
        return None
    names = {"weight": "weight._data._data", "scales": "weight._scale", "shifts": "weight._shift"}
    return _packed(path, {role: parts.pop(name) for role, name in names.items() if name in parts}, hints)


def _packed(path: str, arrays: dict[str, StoredArray], hints: Hints) -> StoredTensor:
    weight, scales, shifts = arrays["weight"], arrays["scales"], arrays.get("shifts")
    groups, (packed, group_size) = prod(scales.shape), weight.shape if len(weight.shape) == 2 else (0, 0)
    bits = next((bits for bits in (4, 2) if -(-groups * bits // 8) == packed), 0)
    label = f"quanto int{bits}"
    columns = columns_of(hints.dims, path) if hints.dims is not None else None
    if not bits or not group_size or columns is None or columns % group_size or groups * group_size % columns:
        expected = "config.json, which says it" if columns is None else f"whole groups of {group_size}"
        raise CheckpointError(
            f"{weight.file.name}: {weight.key} of shape {weight.shape} is a matrix of {columns or 'unknown'} columns "
            f"for {groups} scales of quanto, expected {expected}."
        )
    kinds = ("I8",) if shifts is not None and shifts.dtype == "I8" else FLOAT_DTYPES
    check_arrays(
        label,
        arrays,
        {"weight": (("U8",), weight.shape), "scales": (FLOAT_DTYPES, (groups, 1)), "shifts": (kinds, (groups, 1))},
    )
    rows = groups * group_size // columns
    encoding = Grouped(label, partial(_read, bits, (rows, columns // group_size)), affine_of_mlx(bits, group_size))
    return StoredTensor(f"{path}.weight", (rows, columns), encoding, arrays)


def _read(bits: int, shape: tuple[int, int], arrays: Arrays) -> Groups:
    data, (rows, groups) = arrays["weight"], shape
    parts = [(data >> (bits * index)) & (2**bits - 1) for index in range(8 // bits)]
    numbers = mx.concatenate(parts)[: rows * groups].reshape(rows, -1)
    scales, shifts = arrays["scales"].reshape(shape), arrays["shifts"].reshape(shape)
    if shifts.dtype == mx.int8:
        return Groups(numbers, scales, zeros=shifts)
    return Groups(numbers, scales, offsets=-shifts.astype(mx.float32))
