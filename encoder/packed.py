"""Qwen3's forward pass on a CPU: rows packed without padding, spread over several MLX streams.

Gives what encoder/qwen3.py gives, which stays the reference. What is different, and why, was measured in
docs/decisions/0002-packed-forward-on-cpu.md:

- The rows of all prompts stand one after the other, so no padding is computed. Live padding rows see the real tokens of
  their own prompt and are seen by nobody, so they have queries and no keys.
- Each stream has a part of the heads and of the MLP, and a BLAS with one thread: no thread waits for another inside a
  matrix product, only twice in a layer where the parts are added up.
- Weights are [in, out] and contiguous, and the norms' weights are multiplied into them.
- Exponentials are polynomials in a few fused operations: MLX's own are computed one number at a time.

Shape letters: T packed rows, D hidden size, H attention heads, K key-value heads, G = H / K, d head_dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from encoder.config import Qwen3Config
from encoder.pointwise import exp2, rotate, swiglu
from encoder.qwen3 import DecoderLayer, Qwen3, rope_periods
from encoder.types import Job, Tap

ROW_MULTIPLE = 4  # OpenBLAS multiplies whole groups of four rows; the rest runs through a slow kernel
QUERY_BLOCK = 128  # queries that share one product with the keys before them, so that long prompts skip half of it
NEVER = -1e9  # log2 of the weight of a key that may not be seen


class Span(NamedTuple):
    """Where one job's rows stand in the packed order: its real tokens, and its live padding rows."""

    real: slice
    live: slice


@dataclass(frozen=True, slots=True)
class Packed:
    """All rows of a batch: the real rows of every job, then the live rows of every job, then filling.

    Attributes:
        input_ids, position_ids: (T,) int32.
        spans: of each job.
        real_rows: of all jobs, rounded up; keys and values are computed for these alone.
    """

    input_ids: mx.array
    position_ids: mx.array
    spans: list[Span]
    real_rows: int


def pack(jobs: Sequence[Job], pad_token_id: int) -> Packed:
    """Put the rows of all jobs in one line."""
    input_ids: list[int] = []
    positions: list[int] = []
    starts = []
    for job in jobs:
        starts.append(len(input_ids))
        input_ids += job.input_ids
        positions += range(len(job.input_ids))
    real_rows = len(input_ids)
    spans = []
    for job, start in zip(jobs, starts, strict=True):
        live = range(len(job.input_ids), job.computed_rows)
        spans.append(Span(slice(start, start + len(job.input_ids)), slice(len(input_ids), len(input_ids) + len(live))))
        input_ids += [pad_token_id] * len(live)
        positions += live if job.pad_position is None else [job.pad_position] * len(live)
    filling = -len(input_ids) % ROW_MULTIPLE or (ROW_MULTIPLE if not input_ids else 0)
    return Packed(
        mx.array(np.array(input_ids + [pad_token_id] * filling, dtype=np.int32)),
        mx.array(np.array(positions + [0] * filling, dtype=np.int32)),
        spans,
        max(1, -(-real_rows // ROW_MULTIPLE)) * ROW_MULTIPLE,
    )


class Part(NamedTuple):
    """One stream's part of a layer's weights, each [in, out]."""

    q: mx.array
    k: mx.array
    v: mx.array
    o: mx.array
    gate: mx.array
    up: mx.array
    down: mx.array
    q_norm: mx.array  # (2, d/2), with the scale of the scores, for exponentials to the base 2
    k_norm: mx.array  # (2, d/2)


def count_streams(config: Qwen3Config, cpus: int) -> int:
    """The largest number of equal parts that heads and MLP can be cut into, up to one for each CPU."""
    return max(
        n for n in range(1, cpus + 1) if config.num_key_value_heads % n == 0 and config.intermediate_size % n == 0
    )


class PackedQwen3:
    """The weights of a loaded Qwen3, cut and laid out for a CPU. The model's layers are empty afterwards.

    Args:
        model: loaded, in float32.
        streams: parts to cut it into; create and run on one thread.
    """

    def __init__(self, model: Qwen3, streams: int) -> None:
        self.config = model.config
        self.model = model
        self.streams = [mx.new_stream(mx.cpu) for _ in range(streams)]
        self.layers: list[list[Part]] = []
        while model.layers:  # one at a time, so that no more than one layer is in memory twice
            self.layers.append(_cut(model.layers.pop(0), self.config, streams))

    def hidden_states_at(
        self, taps: Sequence[Tap], jobs: Sequence[Job], pad_token_id: int
    ) -> dict[Tap, list[mx.array]]:
        """For each tap, the computed rows of each job, (computed_rows, D). No layer after the deepest tap runs."""
        packed = pack(jobs, pad_token_id)
        masks = Masks(packed.spans)
        cos, sin = _rope_tables(packed.position_ids, self.config)
        x = self.model.embed_tokens(packed.input_ids)  # (T, D)
        copies = [x] * len(self.streams)  # each stream adds up its own: cheaper than waiting for another's
        wanted = {tap.depth for tap in taps}
        outputs = {0: x}
        for depth, parts in enumerate(self.layers[: max(wanted)], start=1):
            copies = self._layer(copies, parts, packed, masks, cos, sin)
            self.model.layers_run += 1
            if depth in wanted:
                outputs[depth] = copies[0]
        return {tap: [self._rows(outputs[tap.depth], span, tap) for span in packed.spans] for tap in taps}

    def _layer(
        self, copies: list[mx.array], parts: list[Part], packed: Packed, masks: "Masks", cos: mx.array, sin: mx.array
    ) -> list[mx.array]:
        attended = []
        for stream, x, part in zip(self.streams, copies, parts, strict=True):
            with mx.stream(stream):
                attended.append(self._attention(self._normed(x), part, packed, masks, cos, sin) @ part.o)
        copies = self._add(copies, attended)
        expanded = []
        for stream, x, part in zip(self.streams, copies, parts, strict=True):
            with mx.stream(stream):
                h = self._normed(x)
                expanded.append(swiglu(h @ part.gate, h @ part.up) @ part.down)
        return self._add(copies, expanded)

    def _add(self, copies: list[mx.array], parts: list[mx.array]) -> list[mx.array]:
        added = []
        for stream, x in zip(self.streams, copies, strict=True):
            with mx.stream(stream):
                for part in parts:
                    x = x + part
                added.append(x)
        return added

    def _normed(self, x: mx.array) -> mx.array:
        """RMSNorm without its weight, which is in the matrices that follow."""
        return x * _inverse_rms(x, self.config.rms_norm_eps)

    def _attention(
        self, h: mx.array, part: Part, packed: Packed, masks: "Masks", cos: mx.array, sin: mx.array
    ) -> mx.array:
        """(T, D) to (T, heads of this part * d)."""
        d, real = self.config.head_dim, packed.real_rows
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        q = self._heads(h @ part.q, part.q_norm, cos, sin)  # (T, heads, d)
        k = self._heads(h[:real] @ part.k, part.k_norm, cos[:real], sin[:real])
        q = q.reshape(len(h), -1, groups, d).transpose(1, 0, 2, 3)  # (K, T, G, d)
        k = k.transpose(1, 2, 0)  # (K, d, T)
        v = (h[:real] @ part.v).reshape(real, -1, d).transpose(1, 0, 2)  # (K, T, d)
        v = mx.concatenate([v, mx.ones((*v.shape[:2], 1))], axis=-1)  # the last column adds up the weights
        blocks = [
            _attend(q[:, rows], k[:, :, keys], v[:, keys], masks.causal(rows, keys)) for rows, keys in masks.blocks
        ]
        filling = len(h) - masks.rows
        out = mx.concatenate([*blocks, mx.zeros((q.shape[0], filling, groups, d))], axis=1)
        return out.transpose(1, 0, 2, 3).reshape(len(h), -1)  # (T, K * G * d)

    def _heads(self, x: mx.array, norm: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Norm and RoPE of each head: (T, heads * d) to (T, heads, d)."""
        d = self.config.head_dim
        heads = x.reshape(len(x), -1, d)
        factor = _inverse_rms(heads, self.config.rms_norm_eps)[..., None]  # (T, heads, 1, 1)
        halves = heads.reshape(len(x), -1, 2, d // 2)
        turned = rotate(halves, halves[:, :, ::-1], factor, cos * norm, sin * norm[::-1])
        return turned.reshape(heads.shape)

    def _rows(self, x: mx.array, span: Span, tap: Tap) -> mx.array:
        rows = mx.concatenate([x[span.real], x[span.live]]) if span.live.start < span.live.stop else x[span.real]
        return self.model.norm(rows) if tap.normed else rows


class Masks:
    """Which rows look at which keys, in blocks that follow the packed order.

    Real rows look at the real rows up to themselves, live rows at all real rows of their job.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.blocks: list[tuple[slice, slice]] = []
        for span in spans:
            for start in range(span.real.start, span.real.stop, QUERY_BLOCK):
                stop = min(start + QUERY_BLOCK, span.real.stop)
                self.blocks.append((slice(start, stop), slice(span.real.start, stop)))
        self.blocks += [(span.live, span.real) for span in spans if span.live.start < span.live.stop]
        self.rows = self.blocks[-1][0].stop if self.blocks else 0
        self._triangles: dict[tuple[int, int], mx.array] = {}

    def causal(self, rows: slice, keys: slice) -> mx.array | None:
        """(rows, 1, keys) to add to the scores; None where every row sees every key."""
        count, length = rows.stop - rows.start, keys.stop - keys.start
        if rows.stop > keys.stop or count == 1:
            return None
        if (count, length) not in self._triangles:
            hidden = np.triu(np.full((count, length), NEVER, np.float32), k=length - count + 1)
            self._triangles[count, length] = mx.array(hidden[:, None])
        return self._triangles[count, length]


def _attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
    """q (K, R, G, d), k (K, d, N), v (K, N, d+1) to (K, R, G, d)."""
    heads, rows, groups, d = q.shape
    if k.shape[-1] == 0:
        return mx.zeros(q.shape)
    scores = q.reshape(heads, rows * groups, d) @ k  # (K, R*G, N)
    if mask is not None:
        scores = (scores.reshape(heads, rows, groups, -1) + mask).reshape(scores.shape)
    weighted = exp2(scores - scores.max(axis=-1, keepdims=True)) @ v  # (K, R*G, d+1)
    return (weighted[..., :d] / weighted[..., d:]).reshape(q.shape)


def _inverse_rms(x: mx.array, eps: float) -> mx.array:
    """1 / sqrt(mean(x^2) + eps) over the last axis; a product with ones is the fastest sum."""
    size = x.shape[-1]
    squares = mx.square(x).reshape(-1, size) @ mx.full((size, 1), 1 / size)
    return mx.rsqrt(squares + eps).reshape(*x.shape[:-1], 1)


def _rope_tables(position_ids: mx.array, config: Qwen3Config) -> tuple[mx.array, mx.array]:
    """cos and signed sin, (T, 1, 2, d/2): halves of a head turn as a*cos - b*sin and b*cos + a*sin."""
    frequencies = 1 / rope_periods(config.rope_theta, config.head_dim)
    angles = (position_ids[:, None].astype(mx.float32) * frequencies)[:, None, None]  # (T, 1, 1, d/2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([cos, cos], axis=2), mx.concatenate([-sin, sin], axis=2)


def _cut(layer: DecoderLayer, config: Qwen3Config, streams: int) -> list[Part]:
    """The parts of one layer's weights, evaluated."""
    attention, mlp, d = layer.self_attn, layer.mlp, config.head_dim
    scale = math.log2(math.e) / math.sqrt(d)
    q_norm, k_norm = (attention.q_norm.weight * scale).reshape(2, d // 2), attention.k_norm.weight.reshape(2, d // 2)
    into = [
        (projection.weight * norm.weight).T
        for projection, norm in (
            (attention.q_proj, layer.input_layernorm),
            (attention.k_proj, layer.input_layernorm),
            (attention.v_proj, layer.input_layernorm),
            (mlp.gate_proj, layer.post_attention_layernorm),
            (mlp.up_proj, layer.post_attention_layernorm),
        )
    ]
    q, k, v, gate, up = ([mx.contiguous(x) for x in mx.split(w, streams, axis=1)] for w in into)
    o, down = ([mx.contiguous(x) for x in mx.split(w.weight.T, streams)] for w in (attention.o_proj, mlp.down_proj))
    parts = [
        Part(q=q[i], k=k[i], v=v[i], o=o[i], gate=gate[i], up=up[i], down=down[i], q_norm=q_norm, k_norm=k_norm)
        for i in range(streams)
    ]
    mx.eval(parts)
    return parts
