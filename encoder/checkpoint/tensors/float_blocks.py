"""Blocks of 4- and 6-bit floats along each row, with an 8-bit scale each: NVIDIA's nvfp4, and OCP's mxfp4 and mxfp6.

Numbers follow each other from the lowest bit of a byte, and scales are in the order of the blocks. ComfyUI has another
order of both (see comfy_blocks.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, Expected, check_arrays
from encoder.checkpoint.tensors.encodings import MlxQuantized
from encoder.checkpoint.tensors.grouped import Grouped, Groups, unpack_bits
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.small_floats import EXPONENTS, float4_e2m1, float6_e2m3, float8
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor

_NVFP4_BLOCK, _MX_BLOCK = 16, 32


def nvfp4_tensor(
    path: str, weight: StoredArray, scales: StoredArray | None, whole: StoredArray | None, *, divides: bool
) -> StoredTensor:
    """A weight whose blocks have float8 scales, and which has one float32 scale as a whole.

    Args:
        path: of the module.
        weight: (rows, columns / 2) bytes.
        scales: (rows, columns / 16) F8_E4M3.
        whole: one float.
        divides: whether the scales are divided by `whole`, or multiplied.
    Errors: CheckpointError for arrays that do not fit each other.
    """
    rows, columns = _shape(weight, 4, _NVFP4_BLOCK)
    arrays = {"weight": weight} | {role: array for role, array in (("scales", scales), ("whole", whole)) if array}
    whole_shape = whole.shape if whole is not None and whole.shape in ((), (1,)) else (1,)
    check_arrays(
        "nvfp4",
        arrays,
        {
            "weight": (("U8",), (rows, columns // 2)),
            "scales": (("F8_E4M3",), (rows, columns // _NVFP4_BLOCK)),
            "whole": (FLOAT_DTYPES, whole_shape),
        },
    )
    return StoredTensor(f"{path}.weight", (rows, columns), Grouped("nvfp4", partial(_read_nvfp4, divides)), arrays)


def mxfp4_tensor(path: str, weight: StoredArray, scales: StoredArray) -> StoredTensor:
    """A weight of (rows, columns / 2) bytes with exponents of (rows, columns / 32). Errors: as of `nvfp4_tensor`."""
    rows, columns = _shape(weight, 4, _MX_BLOCK)
    arrays = {"weight": weight, "scales": scales}
    expected: Expected = {
        "weight": (("U8",), (rows, columns // 2)),
        "scales": (EXPONENTS, (rows, columns // _MX_BLOCK)),
    }
    check_arrays("mxfp4", arrays, expected)
    arrays = {  # which is MLX's own order
        "weight": replace(weight, dtype="U32", shape=(rows, columns // 8)),
        "scales": replace(scales, dtype="U8"),
    }
    return StoredTensor(f"{path}.weight", (rows, columns), MlxQuantized(Quantization("mxfp4", 4, 32)), arrays)


def mxfp6_tensor(path: str, weight: StoredArray, scales: StoredArray) -> StoredTensor:
    """A weight of E2M3, (rows, columns * 3 / 4) bytes, with exponents. Errors: as of `nvfp4_tensor`."""
    rows, columns = _shape(weight, 6, _MX_BLOCK)
    arrays = {"weight": weight, "scales": scales}
    expected: Expected = {
        "weight": (("U8",), (rows, columns * 3 // 4)),
        "scales": (EXPONENTS, (rows, columns // _MX_BLOCK)),
    }
    check_arrays("mxfp6", arrays, expected)
    return StoredTensor(f"{path}.weight", (rows, columns), Grouped("mxfp6", _read_mxfp6), arrays)


def _shape(weight: StoredArray, bits: int, block: int) -> tuple[int, int]:
    """Rows and columns, cut off to whole blocks."""
    rows, data = weight.shape if len(weight.shape) == 2 else (0, 0)
    return rows, data * 8 // bits // block * block


def _check_mx(label: str, arrays: Mapping[str, StoredArray], stored: tuple[int, int], columns: int) -> None:
    scales = (stored[0], columns // _MX_BLOCK)
    check_arrays(label, arrays, {"weight": (("U8",), stored), "scales": (EXPONENTS, scales)})


def _read_nvfp4(divides: bool, arrays: Arrays) -> Groups:
    scales, whole = float8(arrays["scales"], "F8_E4M3"), arrays["whole"].astype(mx.float32)
    scales = scales / whole if divides else scales * whole
    return Groups(float4_e2m1(unpack_bits(arrays["weight"], 4)), scales)


def _read_mxfp6(arrays: Arrays) -> Groups:
    return Groups(float6_e2m3(unpack_bits(arrays["weight"], 6)), float8(arrays["scales"], "F8_E8M0"))
