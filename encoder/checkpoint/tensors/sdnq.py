"""SDNQ's formats, SD.Next's quantizer: integers and floats of 2 to 8 bits, in groups of a row.

The weight is `number * scale`, of unsigned numbers `number * scale + zero_point`. `svd_up @ svd_down` may be added, and
the sum may be rotated. config.json names the numbers, for all weights (`weights_dtype`) and for single ones
(`modules_dtype_dict`). For products of integers, matrices are stored transposed.
Source: SDNQ 0.2.8, common.py:dtype_dict, dequantizer.py:dequantize_weight, packed_int/pack.py, packed_float.py,
quantizer.py, quant_utils.py:build_hadamard_n4.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, Expected, check_arrays, check_groups
from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.dims import columns_of
from encoder.checkpoint.tensors.encodings import product
from encoder.checkpoint.tensors.grouped import Grouped, Groups, unpack_bits
from encoder.checkpoint.tensors.quantization_config import quantization_config, text_of
from encoder.checkpoint.tensors.small_floats import float8
from encoder.checkpoint.tensors.transformed import transformed
from encoder.checkpoint.tensors.unsupported import not_read
from encoder.checkpoint.tensors.weights import Arrays, StoredTensor
from encoder.errors import CheckpointError

_NATIVE = {"int8": "I8", "fp8": "F8_E4M3", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E4M3")
_EXPONENT_BITS = {2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3, 8: 4}  # of "fp4" and so on
# Of numbers that do not fit into bytes evenly, the first ones are in the low bits of a byte each. The others are in the
# bits above: for each of them, pieces of (byte, lowest bit in the byte, bits, lowest bit in the number).
_SPREAD: dict[int, tuple[tuple[tuple[int, int, int, int], ...], ...]] = {
    3: (
        *(((byte, 0, 3, 0),) for byte in range(3)),
        *(((byte, 3, 3, 0),) for byte in range(3)),
        ((0, 6, 2, 0), (2, 6, 1, 2)),
        ((1, 6, 2, 0), (2, 7, 1, 2)),
    ),
    5: (
        *(((byte, 0, 5, 0),) for byte in range(5)),
        ((0, 5, 3, 0), (3, 5, 2, 3)),
        ((1, 5, 3, 0), (4, 5, 2, 3)),
        ((2, 5, 3, 0), (4, 7, 1, 3), (3, 7, 1, 4)),
    ),
    6: (*(((byte, 0, 6, 0),) for byte in range(3)), ((2, 6, 2, 0), (1, 6, 2, 2), (0, 6, 2, 4))),
    7: (*(((byte, 0, 7, 0),) for byte in range(7)), tuple((6 - bit, 7, 1, bit) for bit in range(7))),
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """A kind of numbers, by SDNQ's name for it.

    Attributes:
        exponent: bits of the exponent of a float; None of integers.
    """

    name: str
    bits: int
    unsigned: bool
    exponent: int | None = None

    @classmethod
    def parse(cls, name: str) -> "Numbers | None":
        """None for a name that is not known, and for more than 8 bits."""
        if match := re.fullmatch(r"(u?)int([2-8])", name):
            return cls(name, int(match[2]), match[1] == "u")
        if match := re.fullmatch(r"(u?)fp([2-8])", name):
            bits = int(match[2])
            return cls(name, bits, match[1] == "u", _EXPONENT_BITS[bits])
        if match := re.fullmatch(r"float([2-8])_e(\d)m(\d)(?:fn)?(u?)", name):
            return cls(name, int(match[1]), match[4] == "u", int(match[2]))
        return None

    @property
    def stored_as(self) -> str:
        """The dtype in the file, as safetensors spells it."""
        return _NATIVE.get(self.name, "U8")

    def read(self, stored: mx.array) -> mx.array:
        """The numbers in the order of the file, at least as many as there are."""
        if self.stored_as.startswith("F8"):
            return float8(stored, self.stored_as)
        if self.bits == 8 and self.exponent is None:
            return stored
        codes = _unpack(stored, self.bits)
        if self.exponent is not None:
            return mx.array(_float_table(self), mx.float32)[codes]
        return codes if self.unsigned else codes.astype(mx.int32) - 2 ** (self.bits - 1)


def sdnq(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for a checkpoint of which config.json says that SDNQ made it.

    Errors: CheckpointError for numbers that are not known, a codebook, and arrays that do not fit each other.
    """
    described = quantization_config(hints)
    weight, scale = parts.get("weight"), parts.get("scale")
    if text_of(described, "quant_method") != "sdnq" or weight is None or scale is None:
        return None
    columns = columns_of(hints.dims, path) if hints.dims is not None else None
    transposed = len(scale.shape) == 2 and scale.shape[0] == 1
    rows = scale.shape[transposed] if len(scale.shape) in (2, 3) else 0
    if not columns or not rows:
        raise CheckpointError(f"{scale.file.name}: {scale.key} of shape {scale.shape} fits no matrix of {path}.")
    bits = weight.nbytes * 8 / (rows * columns)
    numbers = _numbers(weight.key, described, bits, unsigned="zero_point" in parts)
    if numbers is None or described.get("use_codebook") or described.get("use_codebook_scale"):
        raise not_read(weight, f"SDNQ as {bits:g} bits of {described.get('weights_dtype')!r:.40}, or with a codebook")
    arrays = take(parts, "weight", "scale", "scale_2", "zero_point", "zero_point_scale", "svd_up", "svd_down")
    _check(arrays, numbers, (rows, columns), transposed)
    encoding = Grouped(f"SDNQ {numbers.name}", partial(_read, numbers, (rows, columns), transposed))
    tensor = StoredTensor(f"{path}.weight", (rows, columns), encoding, arrays)
    return transformed(tensor, {}, _rotation(described, columns))


def _numbers(key: str, described: Mapping[str, Any], bits: float, *, unsigned: bool) -> Numbers | None:
    """The numbers of one weight. Integers have the bits that their bytes show, whatever config.json says of all."""
    own = described.get("modules_dtype_dict")
    named = own.items() if isinstance(own, dict) else ()
    name = next((name for name, keys in named if isinstance(keys, list) and key in keys), None)
    numbers = Numbers.parse(str(name or described.get("weights_dtype")))
    if numbers is None or (numbers.bits == bits and numbers.unsigned == unsigned):
        return numbers
    return Numbers.parse(f"{'u' if unsigned else ''}int{bits:g}") if numbers.exponent is None else None


def _rotation(described: Mapping[str, Any], columns: int) -> int | None:
    """Columns that are rotated together: the largest power of two that divides them, up to that of config.json."""
    size = described.get("hadamard_group_size")
    if not described.get("use_hadamard") or type(size) is not int:
        return None
    while size > 1 and columns % size:
        size //= 2
    return size


def _check(arrays: Parts, numbers: Numbers, shape: tuple[int, int], transposed: bool) -> None:
    """Compare dtypes and shapes. Errors: CheckpointError naming the array that does not fit."""
    rows, columns = shape
    weight, scale, label = arrays["weight"], arrays["scale"], f"SDNQ {numbers.name}"
    groups = 1 if transposed else scale.shape[1]
    grid = (1, rows) if transposed else (rows, groups, 1)[: len(scale.shape)]
    expected: Expected = {
        "weight": ((numbers.stored_as,), weight.shape),
        "scale": (_SCALE_DTYPES, grid),
    }
    if numbers.unsigned:
        expected["zero_point"] = (_SCALE_DTYPES, grid)
    for name in ("scale_2", "zero_point_scale"):
        if name in arrays:
            expected[name] = (FLOAT_DTYPES, (1,))
    if "svd_up" in arrays:
        rank = arrays["svd_up"].shape[arrays["svd_up"].shape[:1] == (rows,)] if len(arrays["svd_up"].shape) == 2 else 0
        turned = arrays["svd_up"].shape != (rows, rank)
        expected["svd_up"] = (FLOAT_DTYPES, (rank, rows) if turned else (rows, rank))
        expected["svd_down"] = (FLOAT_DTYPES, (columns, rank) if turned else (rank, columns))
    check_arrays(label, arrays, expected)
    check_groups(label, arrays["weight"], groups, columns)


def _read(numbers: Numbers, shape: tuple[int, int], transposed: bool, arrays: Arrays) -> Groups:
    rows, columns = shape
    found = numbers.read(arrays["weight"]).reshape(-1)[: rows * columns]
    found = found.reshape(columns, rows).T if transposed else found.reshape(rows, columns)
    scales = _scales(arrays["scale"], arrays.get("scale_2"), rows)
    offsets = _scales(arrays["zero_point"], arrays.get("zero_point_scale"), rows) if "zero_point" in arrays else None
    residual = None
    if "svd_up" in arrays:
        up, down = (arrays[name].astype(mx.float32) for name in ("svd_up", "svd_down"))
        turned = up.shape[0] != rows
        residual = product(up.T, down.T) if turned else product(up, down)
    return Groups(found, scales, offsets=offsets, residual=residual)


def _scales(values: mx.array, factor: mx.array | None, rows: int) -> mx.array:
    """(rows, groups) float32. Those in 8 bits have a factor."""
    scales = values.reshape(rows, -1)
    scales = float8(scales, "F8_E4M3") if values.dtype == mx.uint8 else scales.astype(mx.float32)
    return scales if factor is None else scales * factor.astype(mx.float32)


def _unpack(stored: mx.array, bits: int) -> mx.array:
    """Codes of `bits` bits from bytes, in the order of the file."""
    if bits not in _SPREAD:
        return unpack_bits(stored.reshape(1, -1), bits).reshape(-1)
    data, numbers = stored.reshape(-1, bits // (2 if bits == 6 else 1)), []
    for pieces in _SPREAD[bits]:
        number = mx.zeros(data.shape[:1], mx.uint8)
        for byte, shift, width, place in pieces:
            number = number | (((data[:, byte] >> shift) & (2**width - 1)) << place)
        numbers.append(number)
    return mx.stack(numbers, axis=-1).reshape(-1)


def _float_table(numbers: Numbers) -> list[float]:
    """The float that each code stands for. There is no infinity and no NaN."""
    assert numbers.exponent is not None
    mantissa = numbers.bits - numbers.exponent - (not numbers.unsigned)
    bias = 2 ** (numbers.exponent - 1) - 1
    table = []
    for code in range(2**numbers.bits):
        exponent, fraction = (code >> mantissa) % 2**numbers.exponent, (code % 2**mantissa) / 2**mantissa
        size = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        negative = not numbers.unsigned and code >> (numbers.bits - 1)
        table.append(-size if negative else size)
    return table
