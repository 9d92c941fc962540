"""AWQ's weights as AutoAWQ and GPTQModel store them in the layout "gemm".

The matrix is transposed, and a word holds eight neighbours of a row, in the order 0 2 4 6 1 3 5 7. The weight is
`(number - zero) * scale`. AutoAWQ's kernels compute it in float16; here it is computed in float32.
Source: AutoAWQ 88e4c76, utils/packing_utils.py:dequantize_gemm, modules/linear/gemm.py:WQLinear_GEMM.from_linear.
"""

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, Expected, check_arrays, check_groups
from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.grouped import Grouped, Groups, affine_of_mlx, as_words
from encoder.checkpoint.tensors.weights import Arrays, StoredTensor

_IN_WORD = 8  # numbers of 4 bits in 32
_FROM_WORD = (0, 4, 1, 5, 2, 6, 3, 7)  # where in the word the eight rows are


def awq(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for `qweight` whose words run along the rows. Errors: CheckpointError for arrays that do not fit."""
    weight, scales = parts.get("qweight"), parts.get("scales")
    if weight is None or scales is None or len(weight.shape) != 2 or len(scales.shape) != 2:
        return None
    (columns, words), (groups, rows) = weight.shape, scales.shape
    if words * _IN_WORD != rows:
        return None
    label = "AWQ 4-bit"
    arrays = {"weight": parts.pop("qweight")} | take(parts, "qzeros", "scales")
    check_groups(label, arrays["weight"], groups, columns)
    expected: Expected = {"weight": (("I32",), (columns, words)), "scales": (FLOAT_DTYPES, (groups, rows))}
    if "qzeros" in arrays:
        expected["qzeros"] = (("I32",), (groups, words))
    check_arrays(label, arrays, expected)
    encoding = Grouped(label, _read, affine_of_mlx(4, columns // groups))
    return StoredTensor(f"{path}.weight", (rows, columns), encoding, as_words(arrays))


def _read(arrays: Arrays) -> Groups:
    zeros = _unpack(arrays["qzeros"]) if "qzeros" in arrays else mx.array([[8]])
    return Groups(_unpack(arrays["weight"]), arrays["scales"].T, zeros)


def _unpack(words: mx.array) -> mx.array:
    """(n, rows / 8) words to (rows, n) numbers."""
    by_row = mx.contiguous(words.T)  # (rows / 8, n)
    numbers = [((by_row >> (4 * place)) & 15).astype(mx.uint8) for place in _FROM_WORD]
    return mx.stack(numbers, axis=1).reshape(-1, words.shape[0])
