"""GGUF's quantizations: numbers in blocks, each of which begins with its scale.

Three of them are MLX's affine quantization in another order; they are reordered without loss. The gguf package decodes
the others, at 50 to 180 million numbers a second.
Source: ggml, ggml-common.h, ggml-quants.c:dequantize_row_q4_0, _q4_1, _q8_0.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from encoder.checkpoint.tensors.encodings import dequantize
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.weights import Arrays

_AFFINE = {
    "Q4_0": Quantization("affine", 4, 32),
    "Q4_1": Quantization("affine", 4, 32),
    "Q8_0": Quantization("affine", 8, 32),
}
_NUMBERS_AT_ONCE = 2**24  # the decoder's temporaries are several times as large


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """Rows of blocks. The array `weight` has their bytes, (rows, bytes of a row) uint8."""

    label: str
    shape: tuple[int, ...]
    quantized: bool = True

    @property
    def mlx_quantization(self) -> Quantization | None:
        return _AFFINE.get(self.label)

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        if self.mlx_quantization is not None:
            return dequantize(self.pack(arrays), self.mlx_quantization, dtype)
        return self._decode_with_package(arrays["weight"], dtype)

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        rows, columns = self.shape
        blocks = arrays["weight"].reshape(rows, columns // 32, -1)  # (rows, blocks, bytes of a block)
        scales = _float16_at(blocks, 0)
        if self.label == "Q8_0":
            numbers, biases = blocks[..., 2:] ^ 0x80, -128 * scales  # signed to unsigned
            return {"weight": _words(numbers, rows), "scales": scales, "biases": biases}
        biases = _float16_at(blocks, 2) if self.label == "Q4_1" else -8 * scales
        halves = blocks[..., -16:]  # numbers 0 to 15 in the lower halves of the bytes, 16 to 31 in the upper ones
        numbers = mx.concatenate([halves & 15, halves >> 4], axis=-1)  # (rows, blocks, 32)
        pairs = numbers[..., ::2] | (numbers[..., 1::2] << 4)  # MLX keeps neighbours in one byte
        return {"weight": _words(pairs, rows), "scales": scales, "biases": biases}

    def _decode_with_package(self, blocks: mx.array, dtype: mx.Dtype) -> mx.array:
        """Decode some rows at a time. They are rounded before the next are decoded, which bounds the memory."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize as decode_blocks

        rows, columns = self.shape
        data, kind = np.asarray(blocks), GGMLQuantizationType[self.label]
        decoded = mx.zeros(self.shape, dtype)
        step = max(1, _NUMBERS_AT_ONCE // columns)
        for start in range(0, rows, step):
            with np.errstate(all="ignore"):  # the loader finds a scale that is NaN
                floats = decode_blocks(data[start : start + step], kind)
            decoded[start : start + step] = mx.array(floats).astype(dtype)
            mx.eval(decoded)
        return decoded


def _float16_at(blocks: mx.array, offset: int) -> mx.array:
    """The float16 at `offset` of every block, as (rows, blocks) float32."""
    return mx.contiguous(blocks[..., offset : offset + 2]).view(mx.float16).squeeze(-1).astype(mx.float32)


def _words(numbers: mx.array, rows: int) -> mx.array:
    return mx.contiguous(numbers).reshape(rows, -1).view(mx.uint32)
