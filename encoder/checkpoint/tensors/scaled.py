"""Weights stored as 8-bit floats or integers, with a scale beside them.

The weight is number times scale. There is one scale for the tensor, for each row, or for each block:

float8, no scale           ComfyUI, a plain cast
weight_scale               ComfyUI: one number. Ideogram 4: one for each row
scale_weight               ComfyUI until 2025: one number
weight_scale_inv           Qwen's own FP8 repositories: one for each 128 x 128 block

Source: ComfyUI, comfy/utils.py:convert_old_quants, comfy/ops.py; mflux, ideogram4_transformer/fp8_linear.py;
transformers, integrations/finegrained_fp8.py.
"""

from dataclasses import dataclass

import mlx.core as mx

from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
NUMBERS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8"}
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Scaled:
    """`number * scale`, computed in float32."""

    label: str
    quantized: bool = True
    mlx_quantization: Quantization | None = None

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        numbers = self._numbers(arrays["weight"])
        if "scale" in arrays:
            numbers = numbers * _spread(arrays["scale"].astype(mx.float32), numbers.shape)
        return numbers.astype(dtype)

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        raise NotImplementedError(f"MLX has no layer for {self.label}")

    def _numbers(self, stored: mx.array) -> mx.array:
        if self.label == "float8_e4m3fn":
            return mx.from_fp8(stored, dtype=mx.float32)
        if self.label == "float8_e5m2":  # the upper half of a float16
            return (stored.astype(mx.uint16) << 8).view(mx.float16).astype(mx.float32)
        return stored.astype(mx.float32)


def scaled(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for a weight of 8-bit numbers. Errors: CheckpointError for a scale that does not fit the weight."""
    weight = parts.get("weight")
    if weight is None or weight.dtype not in NUMBERS:
        return None
    scales = [name for name in SCALES if name in parts]
    if weight.dtype == "I8" and not scales:
        return None
    arrays = take(parts, "weight")
    if scales:
        arrays["scale"] = parts.pop(scales[0])
        _check_scale(weight, arrays["scale"])
    return StoredTensor(f"{path}.weight", weight.shape, Scaled(NUMBERS[weight.dtype]), arrays)


def _check_scale(weight: StoredArray, scale: StoredArray) -> None:
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), weight.shape[:1], (*weight.shape[:1], 1)]
    if len(weight.shape) == 2:
        shapes.append((-(-weight.shape[0] // _BLOCK), -(-weight.shape[1] // _BLOCK)))
    if scale.shape not in shapes or scale.dtype not in ("F32", "BF16", "F16"):
        raise CheckpointError(
            f"{scale.file.name}: {scale.key} is {scale.dtype} {scale.shape}, expected float scales for a weight of "
            f"shape {weight.shape}: one, one for each row, or one for each {_BLOCK} x {_BLOCK} block."
        )


def _spread(scale: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The scale in a shape that broadcasts to a weight of `shape`."""
    if scale.size == 1:
        return scale.reshape(())
    if scale.size == shape[0]:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    blocks = mx.repeat(mx.repeat(scale, _BLOCK, axis=0), _BLOCK, axis=1)
    return blocks[: shape[0], : shape[1]]
