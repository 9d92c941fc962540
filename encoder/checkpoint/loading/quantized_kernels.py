"""Whether the active device can compute with quantized weights: MLX has no list of its kernels, so they are tried.

MLX 0.32.4 with CUDA refuses some combinations of bits, group size and dtype only when a product runs (6 bits in groups
of 128 in float32: `cuGraphAddKernelNode failed`), which must not happen to the first prompt. What is tried is compiled,
on an H100 40 to 80 s for each quantization, and kept in MLX's cache for the next start.
"""

import logging
from functools import lru_cache
from typing import Any

import mlx.core as mx

from encoder.checkpoint.tensors.quantization import Quantization

log = logging.getLogger(__name__)

_ROWS = (1, 16, 256)  # few rows and many run through different kernels


def has_kernel(quantization: Quantization, dtype: mx.Dtype, shape: tuple[int, ...], *, lookup: bool) -> bool:
    """Whether a product with a weight of this shape runs, or, for an embedding, a lookup in it.

    Args:
        quantization: of the weight.
        dtype: of everything else.
        shape: of the weight, (rows, columns).
        lookup: whether rows are looked up and not multiplied.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return True  # slow loops, for all of them
    return _runs(quantization, dtype, (min(shape[0], _ROWS[-1]), shape[1]) if lookup else shape, lookup)


@lru_cache(maxsize=256)
def _runs(quantization: Quantization, dtype: mx.Dtype, shape: tuple[int, ...], lookup: bool) -> bool:
    rows, columns = shape
    log.info("trying %s on this device; where its kernels must be compiled first, a minute", quantization.label)
    options: dict[str, Any] = {
        "group_size": quantization.group_size,
        "bits": quantization.bits,
        "mode": quantization.mode,
    }
    weight = mx.zeros((rows, columns * quantization.bits // 32), mx.uint32)
    groups = (rows, columns // quantization.group_size)
    scales = mx.zeros(groups, dtype if quantization.has_biases else mx.uint8)
    biases = mx.zeros(groups, dtype) if quantization.has_biases else None
    try:
        if lookup:
            mx.eval(mx.dequantize(weight, scales, biases, **options))
        else:
            for count in _ROWS:
                mx.eval(mx.quantized_matmul(mx.zeros((count, columns), dtype), weight, scales, biases, **options))
    except (RuntimeError, ValueError) as error:
        log.info("this device has no kernel for %s in %s with %s: %s", quantization.label, shape, dtype, error)
        return False
    return True
