"""GPTQ's weights as AutoGPTQ, GPTQModel and AutoRound store them: 2, 3, 4 or 8 bits.

The matrix is transposed, and its words run along the columns. The weight is `(number - zero) * scale`. GPTQ's kernels
compute it in float16; here it is computed in float32. With act-order the columns of a group are not neighbours: `g_idx`
has the group of each. In the first version of the format a stored zero is one less than the zero; in the others it is
the zero.
Source: GPTQModel f4c327a, nn_modules/qlinear/__init__.py:dequantize_weight,
utils/model.py:convert_gptq_v1_to_v2_format_module; AutoRound b9f3d00, inference/backend.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, Expected, check_arrays
from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.grouped import Grouped, Groups, affine_of_mlx, as_words, is_in_order, unpack_bits
from encoder.checkpoint.tensors.quantization_config import quantization_config, text_of
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError

_BITS = (2, 3, 4, 8)
_WORD_OF_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_FIRST_VERSION = {  # by what config.json calls the format: whether stored zeros are one less
    "gptq": True,
    "gptq_v2": False,
    "auto_round": False,
    "auto_round:auto_gptq": True,
    "auto_round:gptqmodel": True,
    "auto_round:exllamav2": False,
    "auto_round:tritonv2": False,
}


def gptq(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for `qweight` with words along the columns.

    Errors: CheckpointError for arrays that do not fit, and where config.json does not name the version of the format.
    """
    weight, scales, zeros = (parts.get(name) for name in ("qweight", "scales", "qzeros"))
    if weight is None or scales is None or zeros is None or weight.shape[1:] != scales.shape[1:]:
        return None
    words, rows = weight.shape
    groups = scales.shape[0]
    bits = zeros.shape[-1] * 32 // rows if zeros.shape and rows else 0
    if bits not in _BITS:
        return None
    columns = words * 32 // bits
    label = f"GPTQ {bits}-bit"
    arrays = {"weight": parts.pop("qweight")} | take(parts, "qzeros", "scales", "g_idx")
    expected: Expected = {
        "weight": (("I32",), (columns * bits // 32, rows)),
        "scales": (FLOAT_DTYPES, (groups, rows)),
        "qzeros": (("I32",), (groups, rows * bits // 32)),
    }
    if "g_idx" in arrays:
        expected["g_idx"] = (("I32",), (columns,))
    check_arrays(label, arrays, expected)
    if is_in_order(label, arrays, groups, columns):
        arrays.pop("g_idx", None)
    first_version = _is_first_version(quantization_config(hints), weight)
    mlx_quantization = None if "g_idx" in arrays else affine_of_mlx(bits, columns // groups)
    encoding = Grouped(label, partial(_read, bits, first_version), mlx_quantization)
    return StoredTensor(f"{path}.weight", (rows, columns), encoding, as_words(arrays))


def _is_first_version(described: Mapping[str, Any], weight: StoredArray) -> bool:
    method = text_of(described, "quant_method")
    name = text_of(described, "checkpoint_format", "packing_format", "format") or method
    if name not in _FIRST_VERSION:
        raise CheckpointError(
            f"{weight.file.name}: {weight.key} is in a form of GPTQ that config.json calls {name[:80]!r}, expected "
            f"quantization_config.checkpoint_format to be one of {', '.join(_FIRST_VERSION)}."
        )
    return _FIRST_VERSION[name]


def _read(bits: int, first_version: bool, arrays: Arrays) -> Groups:
    words, zeros = arrays["weight"], arrays["qzeros"]
    if first_version and bits in _WORD_OF_ONES:  # in whole words, as the ones were taken off: a carry undoes a borrow
        zeros = unpack_bits(zeros + mx.array(_WORD_OF_ONES[bits], mx.uint32), bits)
    elif first_version:
        zeros = (unpack_bits(zeros, bits) + 1) & (2**bits - 1)
    else:
        zeros = unpack_bits(zeros, bits)
    numbers = unpack_bits(words.T, bits)
    return Groups(numbers, arrays["scales"].T, zeros.T, group_of_column=arrays.get("g_idx"))
