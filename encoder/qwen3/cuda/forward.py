"""Qwen3's forward pass on a CUDA GPU: rows packed without padding, seven operations for each layer.

Gives what encoder/qwen3/model.py gives, which stays the reference. The differences, with their measurements in
docs/decisions/0005-fused-forward-on-cuda.md:

- The rows of all prompts are concatenated, so no padding is computed and there are no masks. Live padding rows see the
  real tokens of their own prompt, and no row sees them.
- q, k and v are one matrix product, gate and up another; each residual is added inside a product. The norms' weights
  are multiplied into the matrices, so a product takes the rows before their norm.
- Everything between two products is one kernel (encoder/qwen3/cuda/kernels/__init__.py).
- MLX traces a layer once for each shape, and the host hands over a few layers at a time: for one prompt, describing
  the pass takes the host nearly as long as computing it takes the GPU.

Shape letters: T packed rows, D hidden size, H attention heads, K key-value heads, d head_dim, F intermediate size.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from encoder.qwen3.cuda.kernels import Kernels
from encoder.qwen3.cuda.pack import Packed, pack_and_fill, round_rows
from encoder.qwen3.model import DecoderLayer, Qwen3
from encoder.qwen3.rope import Rope
from encoder.types import COMMON_WINDOW, Job, Rows, Tap

# Without CUDA graphs the host needs a fifth less time for a short prompt. MLX reads this when it first uses the GPU.
os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")

LAYERS_AT_ONCE = 4  # handed over together: the GPU computes them while the host describes the next ones
LAYERS_BEGUN = 8  # handed over by `begin`: the GPU computes them while the host takes the results of another batch
# Rows times layers that the host may be ahead of the GPU, in this pass and those before: each holds 100 KB of memory
# with Qwen3-4B's dims.
MAX_ROWS_AHEAD = 16384
MAX_HANDED_OVER = 16  # handed-over states to look at: that many, of fewer than 256 rows each, are never too far ahead
MAX_WARMUP_ROWS = 4096  # a first pass of more rows takes the time of the pass itself, so warming it up saves little


class FusedLayer(NamedTuple):
    """One layer's weights; the matrices are [in, out] views of memory that is laid out [out, in]."""

    qkv: mx.array
    q_norm: mx.array
    k_norm: mx.array
    o: mx.array
    gate_up: mx.array
    down: mx.array


class FusedForward:
    """The forward pass with joined weights. Takes the model's layers over: they are gone from it afterwards.

    Create and run on one thread.

    Args:
        model: loaded; no biases, no attention sinks, nothing quantized.
        kernels: for the model's config and dtype.
    """

    name = "cuda kernels"

    def __init__(self, model: Qwen3, kernels: Kernels) -> None:
        self.config = model.config
        self.model = model
        self.kernels = kernels
        self._layer = _make_layer(kernels)
        self.layers: list[FusedLayer] = []
        self._layers_by_shape: dict[tuple[int, int], Callable[..., mx.array]] = {}  # by rows and query blocks
        # The rows after each hand-over, oldest first, of this pass and those before.
        self.handed_over: deque[mx.array] = deque(maxlen=MAX_HANDED_OVER)
        while model.layers:  # one at a time, so that no more than one layer is in memory twice
            self.layers.append(_join(model.layers.pop(0)))
            mx.clear_cache()  # else MLX keeps the memory that the layer was read into

    def __call__(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> Mapping[Tap, Rows]:
        return self.begin(jobs, taps).finish()

    def begin(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> "FusedPass":
        """Hand the first LAYERS_BEGUN layers over to the GPU."""
        begun = FusedPass(self, pack_and_fill(jobs), taps)
        begun.run_to(LAYERS_BEGUN)
        return begun

    def count_rows(self, lengths: Sequence[int]) -> int:
        return round_rows(sum(lengths))

    def warmup_sizes(self, max_rows: int) -> Sequence[int]:
        largest = min(max(max_rows, COMMON_WINDOW), MAX_WARMUP_ROWS)
        return sorted({round_rows(rows) for rows in range(1, largest + 1)})

    def layer_for(self, rows: int, query_blocks: int) -> Callable[..., mx.array]:
        """One decoder layer as a function of rows, cosines and sines, query blocks and weights, traced for this shape.

        One traced function for each shape: MLX searches all shapes of one function linearly.
        """
        if not self.kernels.traceable:
            return self._layer
        if (rows, query_blocks) not in self._layers_by_shape:
            # Not a method: the pass would be in a cycle, and a service that replaces its model could not free it.
            self._layers_by_shape[rows, query_blocks] = mx.compile(self._layer)
        return self._layers_by_shape[rows, query_blocks]

    def hand_over(self, x: mx.array) -> None:
        """Let the GPU compute the rows x, (T, D), and everything that they depend on."""
        mx.async_eval(x)
        self.handed_over.append(x)

    def wait_for_gpu(self) -> None:
        """Return when the host is no more than MAX_ROWS_AHEAD ahead: what is handed over holds memory."""
        while sum(map(len, self.handed_over)) * LAYERS_AT_ONCE > MAX_ROWS_AHEAD:
            mx.eval(self.handed_over.popleft())


class FusedPass:
    """One pass: the layers handed over so far, and the hidden states taken on the way."""

    def __init__(self, forward: FusedForward, packed: Packed, taps: Sequence[Tap]) -> None:
        self._forward = forward
        self._packed = packed
        self._taps = taps
        self._wanted = {tap.depth for tap in taps}
        self._deepest = max(self._wanted)
        self._cos_sin = _cos_sin(packed.position_ids, forward.config.rope)
        self._run_layer = forward.layer_for(len(packed.input_ids), len(packed.query_blocks))
        self._x = forward.model.embed_tokens(packed.input_ids)  # (T, D)
        self._outputs = {0: self._x}
        self._depth = 0  # layers described so far

    def run_to(self, depth: int) -> None:
        """Describe the layers up to `depth`, but none after the deepest tap, and hand them over in groups."""
        for layer in self._forward.layers[self._depth : min(depth, self._deepest)]:
            if self._depth % LAYERS_AT_ONCE == 0:
                self._forward.wait_for_gpu()
            self._x = self._run_layer(self._x, self._cos_sin, self._packed.query_blocks, *layer)  # (T, D)
            self._depth += 1
            self._forward.model.layers_run += 1
            if self._depth in self._wanted:
                self._outputs[self._depth] = self._x
            if self._depth % LAYERS_AT_ONCE == 0:
                self._forward.hand_over(self._x)

    def finish(self) -> dict[Tap, list[mx.array]]:
        """For each tap, the computed rows of each job, (computed_rows, D). No layer after the deepest tap runs."""
        self.run_to(self._deepest)
        self._forward.wait_for_gpu()
        norm, outputs = self._forward.model.norm, self._outputs
        states = {tap: norm(outputs[tap.depth]) if tap.normed else outputs[tap.depth] for tap in self._taps}
        return {tap: [rows[span] for span in self._packed.spans] for tap, rows in states.items()}


def _cos_sin(position_ids: mx.array, rope: Rope) -> mx.array:
    """(T, d) float32: the cosine of RoPE's angle for each pair of a head, then the sine."""
    angles = position_ids[:, None].astype(mx.float32) * mx.array(rope.frequencies)
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1) * rope.attention_factor


def _make_layer(kernels: Kernels) -> Callable[..., mx.array]:
    """One decoder layer as a function of rows, cosines and sines, query blocks and weights."""

    def run_layer(x: mx.array, cos_sin: mx.array, query_blocks: mx.array, *weights: mx.array) -> mx.array:
        layer = FusedLayer(*weights)
        qkv = kernels.finish_heads(x, x @ layer.qkv, layer.q_norm, layer.k_norm, cos_sin)  # (T, (H+2K)*d)
        x = mx.addmm(x, kernels.attend(qkv, query_blocks), layer.o)  # (T, D)
        return mx.addmm(x, kernels.swiglu(x, x @ layer.gate_up), layer.down)

    return run_layer


def _join(layer: DecoderLayer) -> FusedLayer:
    """One layer's weights, evaluated."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = FusedLayer(
        qkv=_join_projections(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=attention.q_norm.weight,
        k_norm=attention.k_norm.weight,
        o=attention.o_proj.weight.T,
        gate_up=_join_projections(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight.T,
    )
    mx.eval(joined)
    return joined


def _join_projections(norm: nn.RMSNorm, *projections: nn.Linear) -> mx.array:
    """One matrix, (D, all outputs), with the norm's weight multiplied into it in float32."""
    scale = norm.weight.astype(mx.float32)
    return mx.concatenate([(p.weight * scale).astype(p.weight.dtype) for p in projections]).T
