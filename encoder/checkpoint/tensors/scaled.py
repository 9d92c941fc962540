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

from encoder.checkpoint.tensors.array_checks import is_per_row
from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.encodings import FLOATS, OnlyDecoded
from encoder.checkpoint.tensors.quantization_config import quantization_config
from encoder.checkpoint.tensors.small_floats import EXPONENTS, FLOAT8, float8
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError

Block = tuple[int, int]  # rows and columns that share a scale

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
NUMBERS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8"}  # names for people
_USUAL_BLOCK, _MX_BLOCK = (128, 128), (1, 32)


@dataclass(frozen=True, slots=True)
class Scaled(OnlyDecoded):
    """`number * scale`, computed in float32.

    Attributes:
        dtype: of the numbers, one of the keys of NUMBERS.
        block: rows and columns that share a scale, where there is neither one scale nor one for each row.
    """

    dtype: str
    block: Block = _USUAL_BLOCK
    quantized: bool = True

    @property
    def label(self) -> str:
        rows, columns = self.block
        return NUMBERS[self.dtype] + ("" if self.block == _USUAL_BLOCK else f" in blocks of {rows} x {columns}")

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        stored = arrays["weight"]
        numbers = float8(stored, self.dtype) if self.dtype in FLOAT8 else stored.astype(mx.float32)
        if "scale" in arrays:
            numbers = numbers * _spread(arrays["scale"], numbers.shape, self.block)
        return numbers.astype(dtype)


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
        return StoredTensor(f"{path}.weight", weight.shape, Scaled(weight.dtype), arrays)
    arrays["scale"] = parts.pop(scales[0])
    block = _fitting_block(weight, arrays["scale"], block)
    return StoredTensor(f"{path}.weight", weight.shape, Scaled(weight.dtype, block), arrays)


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
    block = stated or (_MX_BLOCK if scale.dtype == "U8" else _USUAL_BLOCK)
    if scale.dtype in (*FLOATS, "F8_E8M0") and is_per_row(scale.shape, shape):
        return _USUAL_BLOCK
    if scale.dtype in (*FLOATS, *EXPONENTS) and len(shape) == 2:
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


def _spread(scale: mx.array, shape: tuple[int, ...], block: Block) -> mx.array:
    """The scale as float32, in a shape that broadcasts to a weight of `shape`."""
    scale = float8(scale, "F8_E8M0") if scale.dtype == mx.uint8 else scale.astype(mx.float32)
    if scale.size == 1:
        return scale.reshape(())
    if scale.shape in (shape[:1], (*shape[:1], 1)):
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    rows, columns = min(block[0], shape[0]), min(block[1], shape[1])  # a file may state a block of any size
    blocks = mx.repeat(mx.repeat(scale.reshape(_grid(shape, block)), rows, axis=0), columns, axis=1)
    return blocks[: shape[0], : shape[1]]
