"""Decoder layers as the text book has them, in float64, and random weights and batches to run them on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from encoder.qwen3.rows import Span

EPSILON = 1e-6
THETA = 1e4
Numbers = NDArray[np.float32]
Exact = NDArray[np.float64]


class Dims(NamedTuple):
    """Of a model."""

    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass
class Weights:
    """One layer's: matrices (outputs, inputs) and norms, float32; bfloat16 numbers where asked for."""

    q: Numbers
    k: Numbers
    v: Numbers
    o: Numbers
    gate: Numbers
    up: Numbers
    down: Numbers
    input_norm: Numbers
    post_attention_norm: Numbers
    q_norm: Numbers
    k_norm: Numbers

    @property
    def matrices(self) -> tuple[Numbers, ...]:
        """In the order of their fields."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


def random_numbers(*shape: int, seed: int = 0, bfloat16: bool = False) -> Numbers:
    """Standard normal; rounded to bfloat16, when asked for, but held as float32."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32) if bfloat16 else values


def bits(matrix: Numbers) -> NDArray[np.uint16]:
    """bfloat16 numbers as their bits."""
    return (matrix.view(np.uint32) >> 16).astype(np.uint16)


def random_weights(dims: Dims, seed: int, bfloat16: bool) -> Weights:
    """Weights whose layer keeps rows about as large as they are."""
    width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    size, inner = dims.hidden_size, dims.intermediate_size
    shapes = [
        (width, size),
        (kv_width, size),
        (kv_width, size),
        (size, width),
        (inner, size),
        (inner, size),
        (size, inner),
    ]
    matrices = []
    for number, shape in enumerate(shapes):
        matrix = random_numbers(*shape, seed=100 * seed + number) / np.float32(math.sqrt(shape[1]))
        matrices.append((matrix.view(np.uint32) & 0xFFFF0000).view(np.float32) if bfloat16 else matrix)
    random = np.random.default_rng(seed)
    lengths = (size, size, dims.head_dim, dims.head_dim)
    norms = [random.uniform(0.5, 1.5, length).astype(np.float32) for length in lengths]
    return Weights(*matrices, *norms)


def make_positions(spans: Sequence[Span], rows: int) -> NDArray[np.int32]:
    """Tokens and live rows count on from the start of their prompt."""
    positions = np.zeros(rows, np.int32)
    for span in spans:
        tokens = span.stop - span.start
        positions[span.start : span.stop] = np.arange(tokens)
        positions[span.live : span.live_stop] = tokens + np.arange(span.live_stop - span.live)
    return positions


def cos_sin(positions: NDArray[np.int32], head_dim: int) -> tuple[Numbers, Numbers]:
    """(rows, head_dim / 2) each."""
    angles = positions[:, None] / THETA ** (np.arange(0, head_dim, 2) / head_dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def run_layer(x: Exact, weights: Weights, dims: Dims, spans: Sequence[Span], cos: Numbers, sin: Numbers) -> Exact:
    """One layer over all rows, (rows, hidden_size)."""
    h = rms_norm(x, weights.input_norm)
    q, k, v = (exact(h, matrix).reshape(len(x), -1, dims.head_dim) for matrix in (weights.q, weights.k, weights.v))
    q = rotate(rms_norm(q, weights.q_norm), cos, sin)
    k = rotate(rms_norm(k, weights.k_norm), cos, sin)
    x = x + exact(attend(q, k, v, spans).reshape(len(x), -1), weights.o)
    h = rms_norm(x, weights.post_attention_norm)
    gate, up = exact(h, weights.gate), exact(h, weights.up)
    return x + exact(gate / (1 + np.exp(-gate)) * up, weights.down)


def attend(q: Exact, k: Exact, v: Exact, spans: Sequence[Span]) -> Exact:
    """(rows, heads, head_dim); rows that see nothing get zeros."""
    groups = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for span in spans:
        tokens = slice(span.start, span.stop)
        keys, values = k[tokens].repeat(groups, axis=1), v[tokens].repeat(groups, axis=1)
        visible = [(row, row - span.start + 1) for row in range(span.start, span.stop)]
        visible += [(row, len(keys)) for row in range(span.live, span.live_stop)]
        for row, count in visible:
            if count:
                scores = np.einsum("hd,khd->hk", q[row], keys[:count]) / math.sqrt(q.shape[2])
                shares = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[row] = np.einsum("hk,khd->hd", shares / shares.sum(axis=1, keepdims=True), values[:count])
    return out


def rotate(x: Exact, cos: Numbers, sin: Numbers) -> Exact:
    """RoPE on (rows, heads, head_dim)."""
    first, second = np.split(x, 2, axis=-1)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def rms_norm(x: Any, weight: Numbers) -> Exact:
    """On the last axis."""
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + EPSILON) * weight.astype(np.float64)


def exact(x: Any, matrix: Numbers) -> Exact:
    """x @ matrix.T in float64."""
    return x.astype(np.float64) @ matrix.T.astype(np.float64)
