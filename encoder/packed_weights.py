"""The weights of a decoder layer as the packed pass on a CPU wants them.

Matrices are [in, out], cut into a part for each stream: as panels where their library is at hand, else contiguous.
NumPy turns those in blocks that stay in a CPU's cache, on all CPUs: MLX takes four times as long, on one.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from encoder.config import Qwen3Config
from encoder.filled_array import filled
from encoder.qwen3 import DecoderLayer

Matrix = NDArray[Any]  # float32, or bfloat16's bits as uint16
# Makes of matrices (out, in), one after the other, one (in, all outputs).
Lay = Callable[[Sequence[Matrix], Executor], mx.array]

BLOCK_ROWS = 128
# log2 of weights that may be summed up as they are: a row of 4096, times values of up to 2^15, stays in float32.
BOUND = 100.0


class Part(NamedTuple):
    """One stream's part of a layer's weights, each [in, out]."""

    q: mx.array
    kv: mx.array  # k, then v
    o: mx.array
    gate: mx.array
    up: mx.array
    down: mx.array


class Layer(NamedTuple):
    """A decoder layer, cut.

    Attributes:
        parts: one for each stream.
        before_attention, before_mlp: (D,), the norms' weights.
        q_norm, k_norm: (2, 2, d/2), what multiplies cos and what sin; q's has the scale of the scores, in log2.
        bounded: whether no score can leave ±BOUND, whatever the input.
    """

    parts: list[Part]
    before_attention: mx.array
    before_mlp: mx.array
    q_norm: mx.array
    k_norm: mx.array
    bounded: bool


def count_streams(config: Qwen3Config, cpus: int) -> int:
    """The largest number of equal parts that heads and MLP can be cut into, up to one for each CPU."""
    return max(
        n for n in range(1, cpus + 1) if config.num_key_value_heads % n == 0 and config.intermediate_size % n == 0
    )


def cut(layer: DecoderLayer, config: Qwen3Config, streams: int, lay: Lay, threads: Executor) -> Layer:
    """One layer's weights for so many streams, evaluated."""
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v = (
        np.split(_numbers(projection), streams) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    gate, up = (np.split(_numbers(projection), streams) for projection in (mlp.gate_proj, mlp.up_proj))
    o, down = (np.split(_numbers(projection), streams, axis=1) for projection in (attention.o_proj, mlp.down_proj))
    parts = [
        Part(
            q=lay([q[i]], threads),
            kv=lay([k[i], v[i]], threads),
            o=lay([o[i]], threads),
            gate=lay([gate[i]], threads),
            up=lay([up[i]], threads),
            down=lay([down[i]], threads),
        )
        for i in range(streams)
    ]
    scale = math.log2(math.e) / math.sqrt(config.head_dim)
    q_norm, k_norm = (_numbers(norm).reshape(2, -1) for norm in (attention.q_norm, attention.k_norm))
    q_norm = q_norm * np.float32(scale)
    # Turning mixes the two halves; a normed head has the length sqrt(d), so that its pairs have d in all.
    largest = config.head_dim * (np.abs(q_norm).max(axis=0) * np.abs(k_norm).max(axis=0)).max()
    return Layer(
        parts,
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        mx.array(np.stack([q_norm, q_norm[::-1]])),
        mx.array(np.stack([k_norm, k_norm[::-1]])),
        bool(largest < BOUND),
    )


def _numbers(module: nn.Module) -> Matrix:
    """A module's weight, where it lies."""
    weight = module.weight
    return np.array(weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight, copy=False)


def turn(matrices: Sequence[Matrix], threads: Executor) -> mx.array:
    """Matrices (out, in), one after the other, as one contiguous (in, all outputs)."""
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
