"""Weights stored as 8-bit floats or integers, with a scale beside them.

The weight is number times scale. There is one scale for the tensor, for each row, or for each block:

float8, no scale           ComfyUI, a plain cast
weight_scale               ComfyUI, ModelOpt: one number. Ideogram 4: one for each row, others for each group of a row
scale_weight               ComfyUI until 2025: one number
weight_scale_inv           Qwen's own FP8 repositories: one for each 128 x 128 block, or of `weight_block_size`

A scale is a float, or in 8 bits a power of two: F8_E8M0, which OCP's mxfp8 has for each 32 numbers of a row.

Source: ComfyUI, comfy/utils.py:convert_old_quants, comfy/ops.py; mflux, ideogram4_transformer/fp8_linear.py;
transformers, integrations/finegrained_fp8.py; OCP Microscaling Formats (MX) 1.0.
"""

from dataclasses import dataclass, replace

import mlx.core as mx

from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.encodings import FLOATS
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.quantization_config import quantization_config
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError

Block = tuple[int, int]  # rows and columns that share a scale

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
NUMBERS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8"}
_USUAL_BLOCK, _MX_BLOCK = (128, 128), (1, 32)


@dataclass(frozen=True, slots=True)
class Scaled:
    """`number * scale`, computed in float32.

    Attributes:
        kind: of the numbers, one of the values of NUMBERS.
        block: rows and columns that share a scale, where there is neither one scale nor one for each row.
    """

    kind: str
    block: Block = _USUAL_BLOCK
    quantized: bool = True
    mlx_quantization: Quantization | None = None

    @property
    def label(self) -> str:
        rows, columns = self.block
        return self.kind if self.block == _USUAL_BLOCK else f"{self.kind} in blocks of {rows} x {columns}"

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        numbers = self._numbers(arrays["weight"])
        if "scale" in arrays:
            numbers = numbers * _spread(_floats(arrays["scale"]), numbers.shape, self.block)
        return numbers.astype(dtype)

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        raise NotImplementedError(f"MLX has no layer for {self.label}")

    def _numbers(self, stored: mx.array) -> mx.array:
        if self.kind == "float8_e4m3fn":
            return mx.from_fp8(stored, dtype=mx.float32)
        if self.kind == "float8_e5m2":  # the upper half of a float16
            return (stored.astype(mx.uint16) << 8).view(mx.float16).astype(mx.float32)
        return stored.astype(mx.float32)


def scaled(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for a weight of 8-bit numbers. Errors: CheckpointError for a scale that does not fit the weight."""
    weight = parts.get("weight")
    if weight is not None and weight.dtype == "U8" and "weight_scale" in parts and "mflux_version" in hints.metadata:
        parts["weight"] = weight = replace(weight, dtype="F8_E4M3")  # so MLX holds it: mflux's Ideogram 4
    if weight is None or weight.dtype not in NUMBERS:
        return None
    if weight.dtype == "I8" and not any(name in parts for name in SCALES):
        return None
    return scaled_tensor(path, parts, _stated_block(hints), is_cast=not quantization_config(hints))


def scaled_tensor(path: str, parts: Parts, block: Block | None = None, *, is_cast: bool = False) -> StoredTensor:
    """The tensor of a weight and its scale, which are taken out of `parts`.

    Args:
        path: of the module.
        parts: its arrays; there is a weight among them.
        block: rows and columns that share a scale, where the file says so.
        is_cast: whether the numbers may have no scale.
    Errors: CheckpointError for other numbers than of 8 bits, and for a scale that is missing or does not fit them.
    """
    arrays = take(parts, "weight")
    weight = arrays["weight"]
    if weight.dtype not in NUMBERS:
        raise CheckpointError(
            f"{weight.file.name}: {weight.key} is {weight.dtype} {weight.shape}, expected {', '.join(NUMBERS)}, as "
            f"the file says that it is quantized to 8 bits."
        )
    scales = [name for name in SCALES if name in parts]
    if not scales and not is_cast:
        raise CheckpointError(
            f"{weight.file.name}: {weight.key} is {weight.dtype} and has no scale beside it, expected one of "
            f"{', '.join(SCALES)}, as the file says that it is quantized. Is the checkpoint complete?"
        )
    if not scales:
        return StoredTensor(f"{path}.weight", weight.shape, Scaled(NUMBERS[weight.dtype]), arrays)
    arrays["scale"] = parts.pop(scales[0])
    block = _fitting_block(weight, arrays["scale"], block)
    return StoredTensor(f"{path}.weight", weight.shape, Scaled(NUMBERS[weight.dtype], block), arrays)


def _stated_block(hints: Hints) -> Block | None:
    """`weight_block_size` of config.json, as transformers writes it for its fine-grained FP8."""
    block = quantization_config(hints).get("weight_block_size")
    if block is None:
        return None
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return block[0], block[1]
    raise CheckpointError(
        f"config.json: weight_block_size of quantization_config is {block!r:.80}, expected rows and columns of a block."
    )


def _fitting_block(weight: StoredArray, scale: StoredArray, stated: Block | None) -> Block:
    """The block that the scale's shape means.

    Errors: CheckpointError when it is neither one scale, nor one for each row, nor one for each block.
    """
    shape = weight.shape
    whole: list[tuple[int, ...]] = [(), (1,), (1, 1), shape[:1], (*shape[:1], 1)]
    block = stated or (_MX_BLOCK if scale.dtype == "U8" else _USUAL_BLOCK)
    if scale.dtype in (*FLOATS, "F8_E8M0") and scale.shape in whole:
        return _USUAL_BLOCK
    if scale.dtype in (*FLOATS, "F8_E8M0", "U8") and len(shape) == 2:
        groups = scale.shape[1] if len(scale.shape) > 1 and scale.shape[0] == shape[0] else 0
        if stated is None and scale.dtype != "U8" and groups and shape[1] % groups == 0:
            block = (1, shape[1] // groups)
        down, across = _grid(shape, block)
        if scale.shape in ((down, across), (down, across, 1), (down, 1, across, 1)):  # the last as ModelOpt writes it
            return block
    raise CheckpointError(
        f"{scale.file.name}: {scale.key} is {scale.dtype} {scale.shape}, expected float scales for a weight of shape "
        f"{shape}: one, one for each row, or one for each {block[0]} x {block[1]} block."
    )


def _grid(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Blocks down and across; the last ones may be cut off."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _floats(scale: mx.array) -> mx.array:
    """Scales as float32. Those of 8 bits are exponents of two; 255, which is NaN, becomes infinity for the loader."""
    if scale.dtype != mx.uint8:
        return scale.astype(mx.float32)
    bits = scale.astype(mx.uint32) << 23
    return mx.where(scale == 0, mx.array(0x00400000, mx.uint32), bits).view(mx.float32)  # 2 ** -127 is subnormal


def _spread(scale: mx.array, shape: tuple[int, ...], block: Block) -> mx.array:
    """The scale in a shape that broadcasts to a weight of `shape`."""
    if scale.size == 1:
        return scale.reshape(())
    if scale.shape in (shape[:1], (*shape[:1], 1)):
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    rows, columns = min(block[0], shape[0]), min(block[1], shape[1])  # a file may state a block of any size
    blocks = mx.repeat(mx.repeat(scale.reshape(_grid(shape, block)), rows, axis=0), columns, axis=1)
    return blocks[: shape[0], : shape[1]]
