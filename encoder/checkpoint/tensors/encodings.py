"""Encodings that several formats share: plain floats, and the quantizations of MLX."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.weights import Arrays
from encoder.types import DType

FLOATS: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # as safetensors spells them


def product(left: mx.array, right: mx.array) -> mx.array:
    """The matrix product of two matrices in float32, (rows, inner) and (inner, columns).

    By NumPy: on a GPU MLX multiplies in TF32 by default, which has 10 bits of mantissa.
    """
    with np.errstate(all="ignore"):  # the loader finds what is too large for a float
        return mx.array(np.asarray(left.astype(mx.float32)) @ np.asarray(right.astype(mx.float32)))


class OnlyDecoded:
    """The half of an `Encoding` for which MLX has no form: it is decoded, never packed."""

    __slots__ = ()

    @property
    def mlx_quantization(self) -> Quantization | None:
        """None."""
        return None

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        """Never called, see `Encoding.pack`."""
        raise NotImplementedError(f"MLX has no form of {self}")


@dataclass(frozen=True, slots=True)
class Plain(OnlyDecoded):
    """Floats, stored as they are."""

    label: DType
    quantized: bool = False

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        return arrays["weight"].astype(dtype)


@dataclass(frozen=True, slots=True)
class Doubles(OnlyDecoded):
    """Floats of 64 bits, stored as bytes: the last axis has the eight of each number. MLX has none on a GPU."""

    label: str = "float64"
    quantized: bool = False

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        numbers = np.array(arrays["weight"]).view(np.float64)[..., 0]
        with np.errstate(all="ignore"):  # the loader finds what is too large for a float
            return mx.array(numbers.astype(np.float32)).astype(dtype)


@dataclass(frozen=True, slots=True)
class MlxQuantized:
    """In MLX's layout, as `mlx.core.quantize` returns it: `weight`, `scales`, and in mode affine `biases`.

    A `global_scale`, one for the tensor or one for each row, multiplies the result. MLX's layers have none, so a tensor
    with a global scale must be decoded.
    """

    quantization: Quantization
    global_scale: bool = False
    quantized: bool = True

    @property
    def label(self) -> str:
        return self.quantization.label

    @property
    def mlx_quantization(self) -> Quantization | None:
        return None if self.global_scale else self.quantization

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        return dequantize(arrays, self.quantization, dtype)

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        return dict(arrays)


def dequantize(arrays: Arrays, quantization: Quantization, dtype: mx.Dtype) -> mx.array:
    """`scale * q + bias`, computed in float32 and rounded once, to `dtype`.

    In bfloat16, MLX's default, the products themselves would be rounded.
    """
    scales, biases = arrays["scales"], arrays.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    decoded = mx.dequantize(
        arrays["weight"],
        scales,
        biases,
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
        dtype=mx.float32,
    )
    if "global_scale" in arrays:
        decoded = decoded * arrays["global_scale"].astype(mx.float32).reshape(-1, 1)
    return decoded.astype(dtype)
