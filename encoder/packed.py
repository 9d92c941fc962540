"""Qwen3's forward pass on a CPU: rows packed without padding, spread over several MLX streams.

Gives what encoder/qwen3.py gives, which stays the reference. What is different, and why, was measured in
docs/decisions/0002-packed-forward-on-cpu.md:

- The rows of all prompts stand one after the other, so no padding is computed. Live padding rows see the real tokens of
  their own prompt and are seen by nobody, so they have queries and no keys.
- Each stream has a part of the heads and of the MLP, and a BLAS with one thread: no thread waits for another inside a
  matrix product, only twice in a layer where the parts are added up.
- Weights are [in, out], laid out as panels where their library is at hand.
- Exponentials are polynomials in a few fused operations: MLX's own are computed one number at a time.

Shape letters: T packed rows, D hidden size, H attention heads, K key-value heads, G = H / K, d head_dim.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

from encoder.config import Qwen3Config
from encoder.packed_weights import Layer, Part, cut, turn
from encoder.packing import Look, Span, pack, plan_looks
from encoder.panels import lay
from encoder.pointwise import add, clamp, exp2, rotate, scale, swiglu
from encoder.qwen3 import Qwen3, rope_periods
from encoder.types import Job, Tap

BLAS_ROW_MULTIPLE = 4  # OpenBLAS multiplies whole groups of four rows; the rest runs through a slow kernel
SMALLEST = 1e-37  # sum of weights; only rows without keys have less
State = tuple[mx.array, mx.array]  # a stream's own sum of all so far, (T, D), and its square


class PackedQwen3:
    """The weights of a loaded Qwen3, cut and laid out for a CPU. The model's layers are empty afterwards.

    Args:
        model: loaded, in float32; with panels its matrices may be bfloat16, all of a layer.
        streams: parts to cut it into; create and run on one thread.
        as_panels: whether to lay out the matrices for encoder/panels.c.
    """

    def __init__(self, model: Qwen3, streams: int, as_panels: bool) -> None:
        self.config = model.config
        self.model = model
        self.streams = [mx.new_stream(mx.cpu) for _ in range(streams)]
        self.row_multiple = 1 if as_panels else BLAS_ROW_MULTIPLE
        self.layers: list[Layer] = []
        with ThreadPoolExecutor(streams) as threads:
            while model.layers:  # one at a time, so that no more than one layer is in memory twice
                self.layers.append(cut(model.layers.pop(0), self.config, streams, lay if as_panels else turn, threads))
                mx.clear_cache()
        # A product with a column is the fastest mean.
        self._mean = {size: mx.full((size, 1), 1 / size) for size in (self.config.hidden_size, self.config.head_dim)}
        mx.eval(self._mean)

    def hidden_states_at(
        self, taps: Sequence[Tap], jobs: Sequence[Job], pad_token_id: int
    ) -> dict[Tap, list[mx.array]]:
        """For each tap, the computed rows of each job, (computed_rows, D). No layer after the deepest tap runs."""
        packed = pack(jobs, pad_token_id, self.row_multiple)
        looks = plan_looks(packed.spans, self.config.num_attention_heads // self.config.num_key_value_heads)
        rope = _rope_table(packed.position_ids, self.config)
        x = self.model.embed_tokens(packed.input_ids).astype(mx.float32)  # (T, D)
        states = [(x, mx.square(x))] * len(self.streams)  # each stream has its own: cheaper than waiting for another's
        wanted = {tap.depth for tap in taps}
        outputs = {0: x}
        for depth, layer in enumerate(self.layers[: max(wanted)], start=1):
            states = self._layer(states, layer, packed.real_rows, looks, rope)
            self.model.layers_run += 1
            if depth in wanted:
                outputs[depth] = states[0][0]
        return {tap: [self._rows(outputs[tap.depth], span, tap) for span in packed.spans] for tap in taps}

    def _layer(
        self, states: list[State], layer: Layer, real_rows: int, looks: Sequence[Look], rope: mx.array
    ) -> list[State]:
        attended = []
        for stream, state, part in zip(self.streams, states, layer.parts, strict=True):
            with mx.stream(stream):
                h = self._normed(*state, layer.before_attention)
                q, k, v = self._queries_keys_values(h, part, layer, real_rows, rope)
                attended.append(_attend(q, k, v, looks, layer.bounded) @ part.o)
        states = self._add(states, attended)
        expanded = []
        for stream, state, part in zip(self.streams, states, layer.parts, strict=True):
            with mx.stream(stream):
                h = self._normed(*state, layer.before_mlp)
                expanded.append(swiglu(h @ part.gate, h @ part.up) @ part.down)
        return self._add(states, expanded)

    def _add(self, states: list[State], parts: list[mx.array]) -> list[State]:
        added = []
        for stream, (x, _) in zip(self.streams, states, strict=True):
            with mx.stream(stream):
                added.append(add(x, parts))
        return added

    def _normed(self, x: mx.array, square: mx.array, weight: mx.array) -> mx.array:
        """RMSNorm."""
        return scale(x, self._inverse_rms(square), weight)

    def _inverse_rms(self, square: mx.array) -> mx.array:
        return mx.rsqrt(square @ self._mean[square.shape[-1]] + self.config.rms_norm_eps)

    def _queries_keys_values(
        self, h: mx.array, part: Part, layer: Layer, real_rows: int, rope: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """q (K, T, G, d), k (K, d, real T), v (K, real T, d+1), whose last column is 1 and adds up the weights."""
        d, groups = self.config.head_dim, self.config.num_attention_heads // self.config.num_key_value_heads
        q = self._heads(h @ part.q, groups, rope * layer.q_norm)
        if real_rows < len(h):
            h, rope = h[:real_rows], rope[:real_rows]
        k, v = mx.split(h @ part.kv, 2, axis=1)
        k = self._heads(k, 1, rope * layer.k_norm)
        v = v.reshape(real_rows, -1, d).transpose(1, 0, 2)
        ones = mx.ones((*v.shape[:2], 1))
        return q, k.reshape(-1, real_rows, d).transpose(0, 2, 1), mx.concatenate([v, ones], axis=-1)

    def _heads(self, x: mx.array, groups: int, rope: mx.array) -> mx.array:
        """Norm and RoPE of each head: (T, K * G * d) to (K, T, G, d)."""
        d, rows = self.config.head_dim, len(x)
        factor = self._inverse_rms(mx.square(x).reshape(-1, d)).reshape(rows, -1, groups, 1, 1)
        halves = x.reshape(rows, -1, groups, 2, d // 2).transpose(1, 0, 2, 3, 4)  # (K, T, G, 2, d/2)
        cos, sin = rope[None, :, None, 0], rope[None, :, None, 1]  # (1, T, 1, 2, d/2)
        turned = rotate(halves, halves[:, :, :, ::-1], factor.transpose(1, 0, 2, 3, 4), cos, sin)
        return turned.reshape(-1, rows, groups, d)

    def _rows(self, x: mx.array, span: Span, tap: Tap) -> mx.array:
        rows = mx.concatenate([x[span.real], x[span.live]]) if span.live.start < span.live.stop else x[span.real]
        return self.model.norm(rows) if tap.normed else rows


def _attend(q: mx.array, k: mx.array, v: mx.array, looks: Sequence[Look], bounded: bool) -> mx.array:
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


def _rope_table(position_ids: mx.array, config: Qwen3Config) -> mx.array:
    """(T, 2, 2, d/2), cos and signed sin: halves of a head turn as a*cos - b*sin and b*cos + a*sin."""
    frequencies = 1 / rope_periods(config.rope_theta, config.head_dim)
    angles = position_ids[:, None].astype(mx.float32) * frequencies  # (T, d/2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.stack([cos, cos, -sin, sin], axis=1).reshape(-1, 2, 2, config.head_dim // 2)
