"""Whether the active device can compute with quantized weights. MLX does not list its kernels, so they are tried.

MLX 0.32.4 with CUDA refuses some combinations of bits, group size and dtype only when a product runs (6 bits in groups
of 128 in float32: `cuGraphAddKernelNode failed`). That must not happen to the first prompt. A trial compiles the
kernel, which takes 40 to 80 s for each quantization on an H100; MLX's cache keeps it for the next start.
"""

import logging
from functools import lru_cache
from typing import Any

import mlx.core as mx

from encoder.checkpoint.tensors.quantization import Quantization

log = logging.getLogger(__name__)

_ROWS = (1, 16, 256)  # MLX has different kernels for few rows and for many


def has_kernel(quantization: Quantization, dtype: mx.Dtype, shape: tuple[int, ...], *, lookup: bool) -> bool:
    """Whether a product with a weight of this shape runs; for an embedding, whether a lookup does.

    Args:
        quantization: of the weight.
        dtype: of the activations, the scales and the biases.
        shape: of the weight, (rows, columns).
        lookup: whether the weight is an embedding.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return True  # MLX has slow loops for every quantization
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
