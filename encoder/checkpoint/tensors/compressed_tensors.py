"""compressed-tensors' formats, as llm-compressor saves them for vLLM.

pack-quantized              weight_packed, integers of 1 to 8 bits in words of 32; weight_shape
int-, float-, naive-        weight, 8 bits; weight_scale, of the tensor, its rows, groups in a row, or square blocks
nvfp4-, mxfp4-, mxfp6-pack  weight_packed, floats in bytes
mxfp8                       weight, weight_scale: scaled.py

The weight is `(number - weight_zero_point) * weight_scale`. Packed integers and packed zero points have 2^(bits - 1)
added to them. The library computes it in the dtype of the scales; here it is computed in float32.
Source: compressed-tensors 0.20.1, compressors/pack_quantized/helpers.py, nvfp4/base.py, naive_quantized/base.py,
quantization/lifecycle/forward.py:_dequantize.
"""

import struct
from functools import partial
from math import ceil

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, ONE_NUMBER, Expected, check_arrays, check_groups
from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.float_blocks import mxfp4_tensor, mxfp6_tensor, nvfp4_tensor
from encoder.checkpoint.tensors.grouped import Grouped, Groups, affine_of_mlx, as_words, is_in_order, unpack_bits
from encoder.checkpoint.tensors.quantization_config import quantization_config
from encoder.checkpoint.tensors.scaled import NUMBERS, scaled_tensor
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError

_ACTIVATIONS = ("input_global_scale", "input_zero_point", "output_zero_point")


def compressed_tensors(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for `weight_packed`, and for 8-bit numbers with a zero point or in groups along a row.

    Errors: CheckpointError for arrays that do not fit each other, and for transforms that the layers' inputs need, too.
    """
    packed, weight, scale = (parts.get(name) for name in ("weight_packed", "weight", "weight_scale"))
    if scale is None:
        return None
    _check_transforms(scale, hints)
    take(parts, *_ACTIVATIONS)
    if packed is not None:
        return _packed(path, parts, packed, scale, hints)
    if weight is not None and weight.dtype in NUMBERS and len(weight.shape) == 2:
        return _numbers(path, parts, weight, scale)
    return None


def _check_transforms(scale: StoredArray, hints: Hints) -> None:
    transforms = quantization_config(hints).get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise CheckpointError(
            f"{scale.file.name}: {scale.key} is rotated, as transform_config in config.json says, which is not undone "
            f"here. Take a file that is not rotated, or the model as it was before."
        )


def _packed(path: str, parts: Parts, packed: StoredArray, scale: StoredArray, hints: Hints) -> StoredTensor | None:
    if packed.dtype == "I32" and "weight_shape" in parts:
        return _integers(path, parts, hints)
    if packed.dtype != "U8" or len(packed.shape) != 2 or len(scale.shape) != 2:
        return None
    del parts["weight_packed"], parts["weight_scale"]
    whole = parts.pop("weight_global_scale", None)
    if whole is not None:
        return nvfp4_tensor(path, packed, scale, whole, divides=True)
    is_mxfp6 = packed.shape[1] * 8 == scale.shape[1] * 32 * 6
    return (mxfp6_tensor if is_mxfp6 else mxfp4_tensor)(path, packed, scale)


def _integers(path: str, parts: Parts, hints: Hints) -> StoredTensor:
    """The tensor of packed integers, which are taken out of the parts."""
    names = {"weight": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point", "g_idx": "weight_g_idx"}
    arrays = {role: parts.pop(name) for role, name in names.items() if name in parts}
    rows, columns = _read_shape(parts.pop("weight_shape"))
    bits = _bits(arrays["weight"], columns, hints)
    label = f"compressed-tensors int{bits}"
    shape = arrays["scales"].shape
    groups = shape[1] if len(shape) == 2 else 1
    whole = shape in ONE_NUMBER
    expected: Expected = {
        "weight": (("I32",), (rows, ceil(columns * bits / 32))),
        "scales": (FLOAT_DTYPES, shape if whole else (rows, groups)),
    }
    if "zeros" in arrays and arrays["zeros"].dtype == "I32":
        expected["zeros"] = (("I32",), (ceil(rows * bits / 32), groups))
    elif "zeros" in arrays:  # until 2025
        expected["zeros"] = (("I8",), shape if whole else (rows, groups))
    if "g_idx" in arrays:
        expected["g_idx"] = (("I32",), (columns,))
    check_arrays(label, arrays, expected)
    if is_in_order(label, arrays, groups, columns):
        arrays.pop("g_idx", None)
    has_mlx = "g_idx" not in arrays and not whole
    encoding = Grouped(
        label,
        partial(_read_integers, bits, (rows, columns)),
        affine_of_mlx(bits, columns // groups) if has_mlx else None,
    )
    return StoredTensor(f"{path}.weight", (rows, columns), encoding, as_words(arrays))


def _read_integers(bits: int, shape: tuple[int, int], arrays: Arrays) -> Groups:
    rows, columns = shape
    half = 2 ** (bits - 1)
    zeros = arrays.get("zeros")
    if zeros is None:
        zeros = mx.array([[half]])
    elif zeros.dtype == mx.uint32:
        zeros = unpack_bits(zeros.T, bits)[:, :rows].T
    else:
        zeros = zeros.astype(mx.int32).reshape(-1, arrays["scales"].shape[-1]) + half
    numbers = unpack_bits(arrays["weight"], bits)[:, :columns]
    return Groups(numbers, _matrix(arrays["scales"]), zeros, group_of_column=arrays.get("g_idx"))


def _numbers(path: str, parts: Parts, weight: StoredArray, scale: StoredArray) -> StoredTensor | None:
    """The tensor of 8-bit numbers, where the scheme `scaled` does not know it."""
    rows, columns = weight.shape
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == rows else 1
    if "weight_zero_point" not in parts:
        if groups == 1 or rows == 1 or columns % groups or scale.dtype not in FLOAT_DTYPES:
            return None
        return scaled_tensor(path, parts, (1, columns // groups))
    if weight.dtype != "I8":
        return None
    label = "compressed-tensors int8"
    names = {"weight": "weight", "scales": "weight_scale", "zeros": "weight_zero_point"}
    arrays = {role: parts.pop(name) for role, name in names.items()}
    shape = scale.shape if scale.shape in ONE_NUMBER else (rows, groups)
    check_arrays(label, arrays, {"scales": (FLOAT_DTYPES, shape), "zeros": (("I8",), shape)})
    check_groups(label, weight, groups, columns)
    return StoredTensor(f"{path}.weight", (rows, columns), Grouped(label, _read_bytes), arrays)


def _read_bytes(arrays: Arrays) -> Groups:
    return Groups(arrays["weight"], _matrix(arrays["scales"]), _matrix(arrays["zeros"]))


def _matrix(scales: mx.array) -> mx.array:
    """(rows, groups); of one scale for the whole tensor (1, 1)."""
    return scales.reshape(1, 1) if scales.size == 1 else scales


def _read_shape(array: StoredArray) -> tuple[int, int]:
    """Rows and columns from the array `weight_shape`."""
    item = {"I64": "q", "I32": "i"}.get(array.dtype)
    if item is None or array.shape != (2,):
        raise CheckpointError(f"{array.file.name}: {array.key} is {array.dtype} {array.shape}, expected two integers.")
    rows, columns = struct.unpack(f"<2{item}", array.read_bytes(16))
    if not 0 < rows < 2**31 or not 0 < columns < 2**31:
        raise CheckpointError(f"{array.file.name}: {array.key} is {rows} x {columns}, expected the shape of a matrix.")
    return rows, columns


def _bits(packed: StoredArray, columns: int, hints: Hints) -> int:
    """Bits of a number, from the words that a row takes. config.json must not say otherwise.

    Older versions of the library left bits at the end of a word unused where a number did not fit, which is not read.
    """
    words = packed.shape[-1] if packed.shape else 0
    bits = next((bits for bits in range(1, 9) if ceil(columns * bits / 32) == words), None)
    groups = quantization_config(hints).get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    schemes = [scheme.get("weights") for scheme in groups.values() if isinstance(scheme, dict)]
    stated = {scheme.get("num_bits") for scheme in schemes if isinstance(scheme, dict)}
    if bits is None or (stated and bits not in stated):
        said = f", and config.json says {', '.join(map(str, stated))} bits" if stated else ""
        raise CheckpointError(
            f"{packed.file.name}: {packed.key} has {words} words for {columns} columns{said}, expected numbers of 1 to "
            f"8 bits without gaps between them. Take a file of 4 or 8 bits, or the model as it was before."
        )
    return bits
