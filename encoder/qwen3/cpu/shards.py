"""A decoder layer's weights, cut into a part for each stream of the packed pass on a CPU."""

import math
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.rows import Numbers
from encoder.qwen3.model import DecoderLayer

Matrix = NDArray[Any]  # float32, or bfloat16's bits as uint16


class Part(NamedTuple):
    """One stream's part of a layer's weights.

    Attributes:
        q, k, v, o, gate, up, down: (out, in), where they lie in the checkpoint's tensors.
        before_attention, before_mlp: (D,), the norms' weights.
        q_norm: (d,), with the scale of the scores, in log2.
        k_norm: (d,).
    """

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    before_attention: Numbers
    before_mlp: Numbers
    q_norm: Numbers
    k_norm: Numbers


def count_streams(config: Qwen3Config, cpus: int) -> int:
    """The largest number of equal parts that heads and MLP can be cut into, up to one for each CPU."""
    return max(
        n for n in range(1, cpus + 1) if config.num_key_value_heads % n == 0 and config.intermediate_size % n == 0
    )


def cut(layer: DecoderLayer, config: Qwen3Config, streams: int) -> list[Part]:
    """One layer's weights for so many streams: heads and the MLP's inner numbers, shared out."""
    attention, mlp = layer.self_attn, layer.mlp
    by_outputs = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
    by_inputs = attention.o_proj, mlp.down_proj
    q, k, v, gate, up = (np.split(_numbers(projection), streams) for projection in by_outputs)
    o, down = (np.split(_numbers(projection), streams, axis=1) for projection in by_inputs)
    scale = np.float32(math.log2(math.e) / math.sqrt(config.head_dim))
    norms = (
        _numbers(layer.input_layernorm),
        _numbers(layer.post_attention_layernorm),
        _numbers(attention.q_norm) * scale,
        _numbers(attention.k_norm),
    )
    return [Part(q[i], k[i], v[i], o[i], gate[i], up[i], down[i], *norms) for i in range(streams)]


def _numbers(module: nn.Module) -> Matrix:
    """A module's weight, where it lies."""
    weight = module.weight
    return np.array(weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight, copy=False)
