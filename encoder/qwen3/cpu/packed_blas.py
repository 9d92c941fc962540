"""Decoder layers of the packed pass in MLX's own operations, on a BLAS: where kernels/c/panels.c was not compiled.

- Weights are contiguous as [in, out], which the BLAS takes without a copy.
- Exponentials are polynomials in a few fused operations: MLX's own are computed one number at a time.
- Scores and weighted values are two operations for each prompt; all between them runs once over all prompts.

docs/decisions/0002-packed-forward-on-cpu.md has what each is worth.

Shape letters: T packed rows, D hidden size, H attention heads, K key-value heads, G = H / K, d head_dim, where H and K
are one stream's part.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.checkpoint.loading.filled_array import filled
from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.pointwise import clamp, exp2, rotate, scale, swiglu
from encoder.qwen3.cpu.rows import Look, Packed, plan_looks, turns
from encoder.qwen3.cpu.shards import Matrix, Part

SMALLEST = 1e-37  # sum of weights; only rows without keys have less
BLOCK_ROWS = 128  # of a matrix, turned at once
# log2 of weights that may be summed up as they are: a row of 4096, times values of up to 2^15, stays in float32.
BOUND = 100.0


class BlasPart(NamedTuple):
    """One stream's part of a decoder layer.

    Attributes:
        q, kv, o, gate, up, down: (in, out); kv has k, then v.
        before_attention, before_mlp: (D,), the norms' weights.
        q_norm, k_norm: (2, 2, d/2), what multiplies cos and what sin; q's has the scale of the scores, in log2.
        bounded: whether no score can leave ±BOUND, whatever the input.
    """

    q: mx.array
    kv: mx.array
    o: mx.array
    gate: mx.array
    up: mx.array
    down: mx.array
    before_attention: mx.array
    before_mlp: mx.array
    q_norm: mx.array
    k_norm: mx.array
    bounded: bool


class BlasLayers:
    """As encoder/qwen3/cpu/forward.py asks for them."""

    row_multiple = 4  # OpenBLAS multiplies whole groups of four rows; the rest runs through a slow kernel

    def __init__(self, config: Qwen3Config) -> None:
        self._config = config
        # A product with a column is the fastest mean.
        self._mean = {size: mx.full((size, 1), 1 / size) for size in (config.hidden_size, config.head_dim)}
        mx.eval(self._mean)

    def lay(self, part: Part, threads: Executor) -> BlasPart:
        q_norm, k_norm = part.q_norm.reshape(2, -1), part.k_norm.reshape(2, -1)
        # Turning mixes the two halves; a normed head has the length sqrt(d), so that its pairs have d in all.
        largest = self._config.head_dim * (np.abs(q_norm).max(axis=0) * np.abs(k_norm).max(axis=0)).max()
        return BlasPart(
            q=turn([part.q], threads),
            kv=turn([part.k, part.v], threads),
            o=turn([part.o], threads),
            gate=turn([part.gate], threads),
            up=turn([part.up], threads),
            down=turn([part.down], threads),
            before_attention=mx.array(part.before_attention),
            before_mlp=mx.array(part.before_mlp),
            q_norm=mx.array(np.stack([q_norm, q_norm[::-1]])),
            k_norm=mx.array(np.stack([k_norm, k_norm[::-1]])),
            bounded=bool(largest < BOUND),
        )

    def start(self, packed: Packed) -> None:
        self._real_rows = packed.real_rows
        self._looks = plan_looks(packed.spans, self._config.num_attention_heads // self._config.num_key_value_heads)
        cos, sin = turns(packed, self._config)
        # (T, 2, 2, d/2), cos and signed sin: halves of a head turn as a*cos - b*sin and b*cos + a*sin.
        self._rope = mx.array(np.stack([cos, cos, -sin, sin], axis=1).reshape(len(cos), 2, 2, -1))

    def attention(self, part: BlasPart, x: mx.array) -> mx.array:
        q, k, v = self._queries_keys_values(part, self._normed(x, part.before_attention))
        return attend(q, k, v, self._looks, part.bounded) @ part.o

    def mlp(self, part: BlasPart, x: mx.array) -> mx.array:
        h = self._normed(x, part.before_mlp)
        return swiglu(h @ part.gate, h @ part.up) @ part.down

    def _normed(self, x: mx.array, weight: mx.array) -> mx.array:
        """RMSNorm."""
        return scale(x, self._inverse_rms(x), weight)

    def _inverse_rms(self, x: mx.array) -> mx.array:
        return mx.rsqrt(mx.square(x) @ self._mean[x.shape[-1]] + self._config.rms_norm_eps)

    def _queries_keys_values(self, part: BlasPart, h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q (K, T, G, d), k (K, d, real T), v (K, real T, d+1), whose last column is 1 and adds up the weights."""
        d, groups = self._config.head_dim, self._config.num_attention_heads // self._config.num_key_value_heads
        real_rows, rope = self._real_rows, self._rope
        q = self._heads(h @ part.q, groups, rope * part.q_norm)
        if real_rows < len(h):
            h, rope = h[:real_rows], rope[:real_rows]
        k, v = mx.split(h @ part.kv, 2, axis=1)
        k = self._heads(k, 1, rope * part.k_norm)
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
