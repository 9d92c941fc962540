"""NVIDIA ModelOpt's formats: nvfp4, mxfp4 and integers of 4 bits in bytes, and 8-bit numbers with scaled columns.

weight U8, weight_scale F8_E4M3, weight_scale_2    nvfp4: `number * weight_scale * weight_scale_2`
weight U8, weight_scale U8                         mxfp4
weight U8, weight_scale of floats                  int4: the numbers of two neighbouring rows in a byte
weight of 8 bits, pre_quant_scale                  scaled.py, columns scaled

Only config.json, or hf_quant_config.json beside it, tells ModelOpt's nvfp4 from ComfyUI's, which has the same arrays in
another order. ModelOpt's float8 without pre_quant_scale is that of others, too.
Source: nvidia-modelopt 0.47.0, torch/export/quant_utils.py:to_quantized_weight, pack_int4_in_uint8,
torch/quantization/qtensor/nvfp4_tensor.py.
"""

import mlx.core as mx

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, check_arrays, check_groups
from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.float_blocks import mxfp4_tensor, nvfp4_tensor
from encoder.checkpoint.tensors.grouped import Grouped, Groups, affine_of_mlx, unpack_bits
from encoder.checkpoint.tensors.quantization_config import quantization_config, text_of
from encoder.checkpoint.tensors.scaled import NUMBERS, scaled_tensor
from encoder.checkpoint.tensors.small_floats import EXPONENTS
from encoder.checkpoint.tensors.transformed import transformed
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor


def modelopt(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for a checkpoint of which config.json says that ModelOpt made it.

    Errors: CheckpointError for arrays that do not fit each other.
    """
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    if text_of(quantization_config(hints), "quant_method") != "modelopt" or weight is None or scale is None:
        return None
    if weight.dtype == "U8" and len(weight.shape) == 2:
        return transformed(_four_bits(path, parts, weight, scale), parts)
    if weight.dtype not in NUMBERS:
        return None
    return transformed(scaled_tensor(path, parts), parts)


def _four_bits(path: str, parts: Parts, weight: StoredArray, scale: StoredArray) -> StoredTensor:
    whole = take(parts, "weight", "weight_scale", "weight_scale_2").get("weight_scale_2")
    if scale.dtype == "F8_E4M3":
        return nvfp4_tensor(path, weight, scale, whole, divides=False)
    if scale.dtype in EXPONENTS:
        return mxfp4_tensor(path, weight, scale)
    # Here weight_scale_2 is that of a float8 to which kernels round the weight again.
    label = "ModelOpt int4"
    rows, columns = weight.shape[0] * 2, weight.shape[1]
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    arrays = {"weight": weight, "scales": scale}
    check_arrays(label, arrays, {"scales": (FLOAT_DTYPES, (rows, groups))})
    check_groups(label, arrays["weight"], groups, columns)
    encoding = Grouped(label, _read_int4, affine_of_mlx(4, columns // groups))
    return StoredTensor(f"{path}.weight", (rows, columns), encoding, arrays)


def _read_int4(arrays: Arrays) -> Groups:
    pairs = unpack_bits(arrays["weight"].T, 4)  # (columns, rows)
    return Groups((pairs ^ 8).T, arrays["scales"], mx.array([[8]]))  # from two's complement to 8 more
