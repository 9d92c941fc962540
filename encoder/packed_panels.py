"""Decoder layers of the packed pass by encoder/panels.c: an attention or an MLP is one operation.

docs/decisions/0008-matrices-as-panels.md has what that is worth.
"""

from concurrent.futures import Executor

import mlx.core as mx
import numpy as np

from encoder.config import Qwen3Config
from encoder.packed import Kind
from encoder.packed_weights import Part
from encoder.packing import Packed, turns
from encoder.panels import address_of, lay, operation
from encoder.panels_library import Attention, Batch, Mlp

MOST_HEAD_DIM = 512  # that encoder/panels.c has room for


class PanelsBatch:
    """What the library is told of a batch. Keep it until its operations are evaluated: they point to it."""

    def __init__(self, packed: Packed, config: Qwen3Config) -> None:
        spans = [(span.real.start, span.real.stop, span.live.start, span.live.stop) for span in packed.spans]
        self._arrays = np.array(spans, np.int32), *turns(packed, config)
        addresses = [array.ctypes.data for array in self._arrays]
        self.fields = Batch(*addresses, len(spans), packed.real_rows)


class PanelsLayer:
    """One stream's part of a decoder layer. Keep it, too, until its operations are evaluated."""

    def __init__(self, part: Part, config: Qwen3Config, threads: Executor) -> None:
        self._size = config.hidden_size
        matrices = [
            lay(stacked, threads) for stacked in ([part.q, part.k, part.v], [part.o], [part.gate, part.up], [part.down])
        ]
        norms = [np.array(norm) for norm in (part.before_attention, part.q_norm, part.k_norm, part.before_mlp)]
        self._kept = matrices, norms
        qkv, o, gate_up, down = (address_of(matrix) for matrix in matrices)
        before_attention, q_norm, k_norm, before_mlp = (norm.ctypes.data for norm in norms)
        heads, kv_heads = len(part.q) // config.head_dim, len(part.k) // config.head_dim
        epsilon = config.rms_norm_eps
        self._attention = Attention(qkv, o, before_attention, q_norm, k_norm, epsilon, heads, kv_heads, config.head_dim)
        self._mlp = operation(self._size, Mlp(gate_up, down, before_mlp, epsilon))
        mx.eval(self._mlp)

    def attention(self, x: mx.array, batch: PanelsBatch) -> mx.array:
        return x @ operation(self._size, self._attention, batch.fields)

    def mlp(self, x: mx.array) -> mx.array:
        return x @ self._mlp


PANELS = Kind(1, PanelsLayer, PanelsBatch)
