"""Decoder layers of the packed pass in MLX's own operations, on a BLAS: where encoder/panels.c was not compiled.

- Weights are contiguous as [in, out], which the BLAS takes without a copy.
- Exponentials are polynomials in a few fused operations: MLX's own are computed one number at a time.
- Scores and weighted values are two operations for each prompt; all between them runs once over all prompts.

docs/decisions/0002-packed-forward-on-cpu.md has what each is worth.

Shape letters: T packed rows, D hidden size, H attention heads, K key-value heads, G = H / K, d head_dim, where H and K
are one stream's part.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.config import Qwen3Config
from encoder.filled_array import filled
from encoder.packed import Kind
from encoder.packed_weights import Matrix, Part
from encoder.packing import Look, Packed, plan_looks, turns
from encoder.pointwise import clamp, exp2, rotate, scale, swiglu

ROW_MULTIPLE = 4  # OpenBLAS multiplies whole groups of four rows; the rest runs through a slow kernel
SMALLEST = 1e-37  # sum of weights; only rows without keys have less
BLOCK_ROWS = 128  # of a matrix, turned at once
# log2 of weights that may be summed up as they are: a row of 4096, times values of up to 2^15, stays in float32.
BOUND = 100.0


class BlasBatch:
    """What attention needs to know of a batch.

    Attributes:
        real_rows: that have keys.
        looks: which rows look at which keys.
        rope: (T, 2, 2, d/2), cos and signed sin: halves of a head turn as a*cos - b*sin and b*cos + a*sin.
    """

    def __init__(self, packed: Packed, config: Qwen3Config) -> None:
        self.real_rows = packed.real_rows
        self.looks = plan_looks(packed.spans, config.num_attention_heads // config.num_key_value_heads)
        cos, sin = turns(packed, config)
        self.rope = mx.array(np.stack([cos, cos, -sin, sin], axis=1).reshape(len(cos), 2, 2, -1))


class BlasLayer:
    """One stream's part of a decoder layer."""

    def __init__(self, part: Part, config: Qwen3Config, threads: Executor) -> None:
        self._config = config
        self._q, self._kv = turn([part.q], threads), turn([part.k, part.v], threads)
        self._o, self._down = turn([part.o], threads), turn([part.down], threads)
        self._gate, self._up = turn([part.gate], threads), turn([part.up], threads)
        self._before_attention, self._before_mlp = mx.array(part.before_attention), mx.array(part.before_mlp)
        q_norm, k_norm = part.q_norm.reshape(2, -1), part.k_norm.reshape(2, -1)
        # What multiplies cos and what sin, (2, 2, d/2).
        self._q_norm, self._k_norm = (mx.array(np.stack([norm, norm[::-1]])) for norm in (q_norm, k_norm))
        # Turning mixes the two halves; a normed head has the length sqrt(d), so that its pairs have d in all.
        largest = config.head_dim * (np.abs(q_norm).max(axis=0) * np.abs(k_norm).max(axis=0)).max()
        self.bounded = bool(largest < BOUND)  # no score can leave ±BOUND, whatever the input
        # A product with a column is the fastest mean.
        self._mean = {size: mx.full((size, 1), 1 / size) for size in (config.hidden_size, config.head_dim)}
        mx.eval(self._mean)

    def attention(self, x: mx.array, batch: BlasBatch) -> mx.array:
        q, k, v = self._queries_keys_values(self._normed(x, self._before_attention), batch)
        return attend(q, k, v, batch.looks, self.bounded) @ self._o

    def mlp(self, x: mx.array) -> mx.array:
        h = self._normed(x, self._before_mlp)
        return swiglu(h @ self._gate, h @ self._up) @ self._down

    def _normed(self, x: mx.array, weight: mx.array) -> mx.array:
        """RMSNorm."""
        return scale(x, self._inverse_rms(x), weight)

    def _inverse_rms(self, x: mx.array) -> mx.array:
        return mx.rsqrt(mx.square(x) @ self._mean[x.shape[-1]] + self._config.rms_norm_eps)

    def _queries_keys_values(self, h: mx.array, batch: BlasBatch) -> tuple[mx.array, mx.array, mx.array]:
        """q (K, T, G, d), k (K, d, real T), v (K, real T, d+1), whose last column is 1 and adds up the weights."""
        d, groups = self._config.head_dim, self._config.num_attention_heads // self._config.num_key_value_heads
        real_rows, rope = batch.real_rows, batch.rope
        q = self._heads(h @ self._q, groups, rope * self._q_norm)
        if real_rows < len(h):
            h, rope = h[:real_rows], rope[:real_rows]
        k, v = mx.split(h @ self._kv, 2, axis=1)
        k = self._heads(k, 1, rope * self._k_norm)
        v = v.reshape(real_rows, -1, d).transpose(1, 0, 2)
        ones = mx.ones((*v.shape[:2], 1))
        return q, k.reshape(-1, real_rows, d).transpose(0, 2, 1), mx.concatenate([v, ones], axis=-1)

    def _heads(self, x: mx.array, groups: int, rope: mx.array) -> mx.array:
        """Norm and RoPE of each head: (T, K * G * d) to (K, T, G, d)."""
        d, rows = self._config.head_dim, len(x)
        factor = self._inverse_rms(x.reshape(-1, d)).reshape(rows, -1, groups, 1, 1)
        halves = x.reshape(rows, -1, groups, 2, d // 2).transpose(1, 0, 2, 3, 4)  # (K, T, G, 2, d/2)
        cos, sin = rope[None, :, None, 0], rope[None, :, None, 1]  # (1, T, 1, 2, d/2)
        turned = rotate(halves, halves[:, :, :, ::-1], factor.transpose(1, 0, 2, 3, 4), cos, sin)
        return turned.reshape(-1, rows, groups, d)


def attend(q: mx.array, k: mx.array, v: mx.array, looks: Sequence[Look], bounded: bool) -> mx.array:
    """q (K, T, G, d), k (K, d, real T), v (K, real T, d+1) to (T, K * G * d)."""
    heads, rows, groups, d = q.shape
    weighted = []
    for look in looks:
        scores = []
        for block in look.blocks:
            score = q[:, block.rows].reshape(heads, -1, d) @ k[:, :, block.keys]  # (K, R*G, N)
            if not bounded:
                score = score + look.hidden(block).reshape(score.shape[1:])
                score = clamp(score - score.max(axis=-1, keepdims=True))
            scores.append(score.flatten(1))
        weights = exp2(mx.concatenate(scores, axis=1)) * look.visible
        for block in look.blocks:
            length = block.keys.stop - block.keys.start
            weighted.append(weights[:, block.scores].reshape(heads, -1, length) @ v[:, block.keys])
    filling = rows - sum(piece.shape[1] for piece in weighted) // groups
    if filling:
        weighted.append(mx.zeros((heads, filling * groups, d + 1)))
    sums = mx.concatenate(weighted, axis=1).reshape(heads, rows, groups, d + 1).transpose(1, 0, 2, 3)
    return (sums[..., :d] / mx.maximum(sums[..., d:], SMALLEST)).reshape(rows, -1)


def turn(matrices: Sequence[Matrix], threads: Executor) -> mx.array:
    """Matrices (out, in), one after the other, as one contiguous (in, all outputs).

    By NumPy, in blocks that stay in a CPU's cache, on all CPUs: MLX takes four times as long, on one.
    """
    inputs, outputs = matrices[0].shape[1], sum(len(matrix) for matrix in matrices)

    def fill(memory: memoryview) -> None:
        turned: NDArray[Any] = np.frombuffer(memory, np.float32).reshape(inputs, outputs)

        def fill_block(rows: Matrix, start: int) -> None:
            turned[:, start : start + len(rows)] = rows.T

        end, blocks = 0, []
        for matrix in matrices:
            for start in range(0, len(matrix), BLOCK_ROWS):
                rows = matrix[start : start + BLOCK_ROWS]
                blocks.append(threads.submit(fill_block, rows, end + start))
            end += len(matrix)
        for block in blocks:
            block.result()

    return filled("F32", (inputs, outputs), inputs * outputs * 4, fill)


BLAS = Kind(ROW_MULTIPLE, BlasLayer, BlasBatch)
