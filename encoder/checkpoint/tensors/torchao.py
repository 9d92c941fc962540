"""torchao's formats, as transformers saves them in safetensors files: `_weight_qdata`, `_weight_scale` and others.

The header names the class of each tensor:

Int8Tensor, IntxUnpackedToInt8Tensor  `(qdata - zero_point) * scale`, in blocks of rows and columns
Float8Tensor                          `qdata * scale`, in blocks
MXTensor                              8-bit floats with exponents for every 32
NVFP4Tensor                           4-bit floats with float8 scales for every 16, and one scale of the tensor
Int4Tensor                            `qdata * scale + zero_point`, two signed numbers in a byte

MX and NVFP4 have their scales in tiles where the header says `is_swizzled_scales`. Int4Tensor has them transposed.
Source: torchao 0.18.0, prototype/safetensors/safetensors_support.py, quantization/quantize_/workflows,
prototype/mx_formats/mx_tensor.py, nvfp4_tensor.py; FBGEMM, int4_row_quantize_zp, which makes Int4Tensor's numbers.
"""

import json
from functools import partial
from typing import Any

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, Expected, check_arrays, check_groups
from encoder.checkpoint.tensors.assemble import Hints, Parts
from encoder.checkpoint.tensors.comfy_blocks import tiled_nbytes, untile
from encoder.checkpoint.tensors.grouped import Grouped, Groups, affine_of_mlx, unpack_bits
from encoder.checkpoint.tensors.small_floats import EXPONENTS, FLOAT8, float4_e2m1, float8
from encoder.checkpoint.tensors.transformed import transformed
from encoder.checkpoint.tensors.unsupported import not_read
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError

_PREFIX = "_weight_"
_BLOCKS = {"Int8Tensor": "I8", "IntxUnpackedToInt8Tensor": "I8", "Float8Tensor": "F8"}  # class: numbers


def torchao(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for `_weight_qdata`. Errors: CheckpointError for another class, and for arrays that do not fit it."""
    qdata = parts.get(f"{_PREFIX}qdata")
    if qdata is None:
        return None
    kind, fields = _described(qdata, hints)
    arrays = {name.removeprefix(_PREFIX): parts.pop(name) for name in list(parts) if name.startswith(_PREFIX)}
    arrays["weight"] = arrays.pop("qdata")
    columns_scaled = {"pre_quant_scale": arrays.pop("act_pre_scale")} if "act_pre_scale" in arrays else {}
    for name in [name for name in arrays if name.startswith("act_")]:  # of the layer's input
        del arrays[name]
    if "scale" not in arrays or len(qdata.shape) != 2:
        kind = f"{kind} of shape {qdata.shape}"
    tensor = _read_kind(path, arrays, kind, swizzled=fields.get("is_swizzled_scales") is True)
    return transformed(tensor, columns_scaled)


def _read_kind(path: str, arrays: Parts, kind: str, *, swizzled: bool) -> StoredTensor:
    qdata = arrays["weight"]
    if kind in _BLOCKS:
        return _blocks(path, arrays, kind)
    if kind == "MXTensor" and qdata.dtype in FLOAT8:
        return _tiled(path, arrays, swizzled, 32, qdata.shape[1])
    if kind == "NVFP4Tensor":
        return _tiled(path, arrays, swizzled, 16, qdata.shape[1] * 2)
    if kind == "Int4Tensor":
        return _int4(path, arrays)
    raise not_read(qdata, f"torchao as {kind[:80]}")


def _described(qdata: StoredArray, hints: Hints) -> tuple[str, dict[str, Any]]:
    """The name of the tensor's class and its fields, from the header."""
    key = qdata.key.removesuffix(f"{_PREFIX}qdata") + "weight"
    try:
        described = json.loads(hints.metadata.get(key, ""))
        return str(described["_type"]), dict(described["_data"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{qdata.file.name}: {qdata.key} is quantized by torchao, and the header does not say how under {key}."
        ) from error


def _blocks(path: str, arrays: Parts, kind: str) -> StoredTensor:
    scale, (rows, columns) = arrays["scale"], arrays["weight"].shape
    down, across = scale.shape if len(scale.shape) == 2 else (1, 1)
    whole = scale.shape if scale.shape in ((), (1,)) else (down, across)
    if not down or not across or rows % down or columns % across:
        raise CheckpointError(
            f"{scale.file.name}: {scale.key} has shape {scale.shape}, expected a scale for each block of a weight of "
            f"shape {(rows, columns)}."
        )
    numbers = ("I8",) if _BLOCKS[kind] == "I8" else FLOAT8
    expected: Expected = {
        "weight": (numbers, (rows, columns)),
        "scale": (FLOAT_DTYPES, whole),
    }
    if "zero_point" in arrays:
        expected["zero_point"] = (("I8", *FLOAT_DTYPES), whole)
    label = f"torchao {kind}"
    check_arrays(label, arrays, expected)
    return StoredTensor(
        f"{path}.weight", (rows, columns), Grouped(label, partial(_read_blocks, arrays["weight"].dtype)), arrays
    )


def _read_blocks(dtype: str, arrays: Arrays) -> Groups:
    numbers = arrays["weight"] if dtype == "I8" else float8(arrays["weight"], dtype)

    def each_row(values: mx.array) -> mx.array:
        matrix = values.reshape(values.shape if values.ndim == 2 else (1, 1))
        return matrix if matrix.size == 1 else mx.repeat(matrix, numbers.shape[0] // matrix.shape[0], axis=0)

    zeros = arrays.get("zero_point")
    return Groups(numbers, each_row(arrays["scale"]), None if zeros is None else each_row(zeros))


def _tiled(path: str, arrays: Parts, swizzled: bool, block: int, columns: int) -> StoredTensor:
    """A tensor of MXTensor, or of NVFP4Tensor."""
    scale, rows, groups, is_nvfp4 = arrays["scale"], arrays["weight"].shape[0], columns // block, block == 16
    label = "nvfp4" if is_nvfp4 else "mxfp8"
    if columns % block or (swizzled and scale.nbytes != tiled_nbytes(rows, groups)):
        raise CheckpointError(
            f"{scale.file.name}: {scale.key} has {scale.nbytes:,} bytes, expected tiles of scales for a {label} weight "
            f"of shape {(rows, columns)}."
        )
    check_arrays(
        label,
        arrays,
        {
            "weight": (("U8",) if is_nvfp4 else FLOAT8, arrays["weight"].shape),
            "scale": (("F8_E4M3",) if is_nvfp4 else EXPONENTS, scale.shape if swizzled else (rows, groups)),
        },
    )
    if "per_tensor_scale" in arrays:
        check_arrays(label, arrays, {"per_tensor_scale": (FLOAT_DTYPES, ())})
    read = partial(_read_tiled, arrays["weight"].dtype, swizzled, (rows, groups))
    return StoredTensor(f"{path}.weight", (rows, columns), Grouped(label, read), arrays)


def _read_tiled(dtype: str, swizzled: bool, shape: tuple[int, int], arrays: Arrays) -> Groups:
    codes = untile(arrays["scale"], *shape) if swizzled else arrays["scale"]
    if dtype in FLOAT8:
        return Groups(float8(arrays["weight"], dtype), float8(codes, "F8_E8M0"))
    scales = float8(codes, "F8_E4M3")
    if "per_tensor_scale" in arrays:
        scales = arrays["per_tensor_scale"].astype(mx.float32) * scales
    return Groups(float4_e2m1(unpack_bits(arrays["weight"], 4)), scales)


def _int4(path: str, arrays: Parts) -> StoredTensor:
    label = "torchao Int4Tensor"
    rows, columns = arrays["weight"].shape[0], arrays["weight"].shape[1] * 2
    groups = arrays["scale"].shape[0] if arrays["scale"].shape else 0
    expected: Expected = {
        "weight": (("I8", "U8"), arrays["weight"].shape),
        "scale": (FLOAT_DTYPES, (groups, rows)),
        "zero_point": (FLOAT_DTYPES, (groups, rows)),
    }
    check_arrays(label, arrays, expected)
    check_groups(label, arrays["weight"], groups, columns)
    encoding = Grouped(label, _read_int4, affine_of_mlx(4, columns // groups))
    return StoredTensor(f"{path}.weight", (rows, columns), encoding, arrays)


def _read_int4(arrays: Arrays) -> Groups:
    scales, zeros = arrays["scale"].T.astype(mx.float32), arrays["zero_point"].T.astype(mx.float32)
    numbers = unpack_bits(arrays["weight"], 4) ^ 8  # from two's complement to 8 more
    return Groups(numbers, scales, offsets=zeros - 8 * scales)
