"""Decoder layers of the packed pass by kernels/c/panels.c: an attention or an MLP is one operation.

docs/decisions/0009-half-a-layer-at-once.md has what that is worth.
"""

from concurrent.futures import Executor
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.panels import address_of, lay, operation
from encoder.qwen3.cpu.panels_library import Attention, Batch, Mlp
from encoder.qwen3.cpu.rows import Packed, turns
from encoder.qwen3.cpu.shards import Part

MOST_HEAD_DIM = 512  # that kernels/c/panels.c has room for


class PanelsPart(NamedTuple):
    """One stream's part of a decoder layer: what rows are multiplied with, and what that points to."""

    attention: mx.array
    mlp: mx.array
    kept: Any


class PanelsLayers:
    """Keep it, and its parts, until all that they made is evaluated: MLX does not know what else is read."""

    row_multiple = 1

    def __init__(self, config: Qwen3Config) -> None:
        self._config = config
        self._batch = Batch()  # all attentions point to it
        self._arrays: list[Any] = []  # and it to these

    def lay(self, part: Part, threads: Executor) -> PanelsPart:
        config = self._config
        stacks = [part.q, part.k, part.v], [part.o], [part.gate, part.up], [part.down]
        matrices = [lay(stack, threads) for stack in stacks]
        norms = [np.array(norm) for norm in (part.before_attention, part.q_norm, part.k_norm, part.before_mlp)]
        qkv, o, gate_up, down = (address_of(matrix) for matrix in matrices)
        before_attention, q_norm, k_norm, before_mlp = (norm.ctypes.data for norm in norms)
        attention = Attention(
            qkv=qkv,
            o=o,
            norm=before_attention,
            q_norm=q_norm,
            k_norm=k_norm,
            epsilon=config.rms_norm_eps,
            heads=len(part.q) // config.head_dim,
            kv_heads=len(part.k) // config.head_dim,
            head_dim=config.head_dim,
        )
        mlp = Mlp(gate_up=gate_up, down=down, norm=before_mlp, epsilon=config.rms_norm_eps)
        size = config.hidden_size
        kept = matrices, norms, attention
        return PanelsPart(operation(size, attention, self._batch), operation(size, mlp), kept)

    def start(self, packed: Packed) -> None:
        spans = [(span.real.start, span.real.stop, span.live.start, span.live.stop) for span in packed.spans]
        self._arrays = [np.array(spans, np.int32), *turns(packed, self._config)]
        batch = self._batch
        batch.spans, batch.cos, batch.sin = (array.ctypes.data for array in self._arrays)
        batch.span_count, batch.real_rows = len(spans), packed.real_rows

    def attention(self, part: PanelsPart, x: mx.array) -> mx.array:
        return x @ part.attention

    def mlp(self, part: PanelsPart, x: mx.array) -> mx.array:
        return x @ part.mlp
