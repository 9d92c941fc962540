"""Qwen3's forward pass on a CUDA GPU: rows packed without padding, seven operations for each layer.

Gives what encoder/qwen3/model.py gives, which stays the reference. What is different, and why, was measured in
docs/decisions/0005-fused-forward-on-cuda.md:

- The rows of all prompts stand one after the other, so no padding is computed and there are no masks. Live padding rows
  see the real tokens of their own prompt and are seen by nobody.
- q, k and v are one matrix product, gate and up another; what is added to the rows is added inside a product. The
  norms' weights are multiplied into the matrices, so that a product takes the rows as they are.
- All between two products is one kernel (encoder/qwen3/cuda/kernels/__init__.py).
- The host describes a layer once for each shape, and hands over a few layers at a time: one prompt takes it nearly as
  long as the GPU.

Shape letters: T packed rows, D hidden size, H attention heads, K key-value heads, d head_dim, F intermediate size.
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cuda.kernels import TILE_ROWS, Kernels
from encoder.qwen3.model import DecoderLayer, Qwen3, rope_periods
from encoder.types import COMMON_WINDOW, Job, Rows, Tap

# Without CUDA graphs a short prompt takes the host a fifth less; MLX looks at this when it first uses the GPU.
os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")

FEWEST_ROWS = 16  # keeps matrix products on their fast kernels
STEPS = 16  # sizes of a pass between one power of two and the next
TILES_STEP = 8  # passes of more tiles have a multiple of so many: each shape is described by itself
LAYERS_AT_ONCE = 4  # the GPU starts on these while the host goes on to the next
LAYERS_MEANWHILE = 8  # that the GPU has when the host turns to something else
# Rows times layers that the host may be ahead, in this pass and the one before: each holds 100 KB with Qwen3-4B's dims.
ROWS_AHEAD = 16384
LARGEST_FIRST = 4096  # rows of a pass before the first request; larger ones take longer than what they would spare
HANDED_OVER = 16  # times that are looked at for this: so many of fewer than 256 rows each are never too far ahead


@dataclass(frozen=True, slots=True)
class Packed:
    """All rows of a batch, job after job, then filling.

    Attributes:
        input_ids, position_ids: (T,) int32.
        tiles: (n, 5) int32, as `Kernels.attend` takes them; the last ones may have no rows.
        spans: the rows of each job.
    """

    input_ids: mx.array
    position_ids: mx.array
    tiles: mx.array
    spans: list[slice]


def round_rows(rows: int) -> int:
    """How many rows run for so many: one of few sizes.

    The first product of a size takes the GPU's library 3 to 30 ms longer, so all sizes run before the first request.
    Multiples of 16 up to 512, then sixteen sizes to each doubling: 544, 576, ..., 1024, 1088, ...
    """
    step = max(FEWEST_ROWS, (1 << max(rows - 1, 0).bit_length()) // (2 * STEPS))
    return max(FEWEST_ROWS, -(-rows // step) * step)


def pack(jobs: Sequence[Job], pad_token_id: int) -> Packed:
    """Put the rows of all jobs in one line."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    tiles: list[tuple[int, int, int, int, int]] = []
    spans = []
    for job in jobs:
        start, tokens, rows = len(input_ids), len(job.input_ids), job.computed_rows
        live = range(tokens, rows)
        spans.append(slice(start, start + rows))
        input_ids += [*job.input_ids, *[pad_token_id] * len(live)]
        position_ids += [*range(tokens), *(live if job.pad_position is None else [job.pad_position] * len(live))]
        tiles += _tiles(start, rows, tokens)
    filling = round_rows(len(input_ids)) - len(input_ids)
    tiles += _tiles(len(input_ids), filling, 0)
    if len(tiles) > TILES_STEP:
        tiles += [(0, 0, 0, 0, 0)] * (-len(tiles) % TILES_STEP)
    return Packed(
        mx.array(np.array(input_ids + [pad_token_id] * filling, dtype=np.int32)),
        mx.array(np.array(position_ids + [0] * filling, dtype=np.int32)),
        mx.array(np.array(tiles, dtype=np.int32)),
        spans,
    )


def _tiles(start: int, rows: int, keys: int) -> list[tuple[int, int, int, int, int]]:
    return [(start + place, min(TILE_ROWS, rows - place), start, keys, place) for place in range(0, rows, TILE_ROWS)]


class FusedForward:
    """All rows one after the other, in few operations. Takes the model's weights over."""

    runs_on = True

    def __init__(self, model: Qwen3, pad_token_id: int, kernels: Kernels) -> None:
        self.fused = FusedQwen3(model, kernels)
        self.pad_token_id = pad_token_id

    def __call__(
        self, jobs: Sequence[Job], taps: Sequence[Tap], meanwhile: Callable[[], None] = lambda: None
    ) -> Mapping[Tap, Rows]:
        return self.fused.hidden_states_at(taps, jobs, self.pad_token_id, meanwhile)

    def tokens(self, lengths: Sequence[int]) -> int:
        return round_rows(sum(lengths))

    def first_sizes(self, most_rows: int) -> Sequence[int]:
        return sorted({round_rows(rows) for rows in range(1, min(max(most_rows, COMMON_WINDOW), LARGEST_FIRST) + 1)})


class FusedLayer(NamedTuple):
    """One layer's weights; the matrices are [in, out] views of what lies [out, in]."""

    qkv: mx.array
    q_norm: mx.array
    k_norm: mx.array
    o: mx.array
    gate_up: mx.array
    down: mx.array


class FusedQwen3:
    """The weights of a loaded Qwen3, joined. The model's layers are empty afterwards.

    Args:
        model: loaded; no biases, no attention sinks, nothing quantized. Create and run on one thread.
        kernels: for its config and dtype.
    """

    def __init__(self, model: Qwen3, kernels: Kernels) -> None:
        self.config = model.config
        self.model = model
        self.kernels = kernels
        self.layers: list[FusedLayer] = []
        self._layers_by_shape: dict[tuple[int, int], Callable[..., mx.array]] = {}  # rows and tiles
        # The rows as they were handed over, after LAYERS_AT_ONCE more layers each time, of this pass and those before.
        self.running: deque[mx.array] = deque(maxlen=HANDED_OVER)
        while model.layers:  # one at a time, so that no more than one layer is in memory twice
            self.layers.append(_join(model.layers.pop(0)))
            mx.clear_cache()  # else MLX keeps what the layer was read into

    def hidden_states_at(
        self, taps: Sequence[Tap], jobs: Sequence[Job], pad_token_id: int, meanwhile: Callable[[], None] = lambda: None
    ) -> dict[Tap, list[mx.array]]:
        """For each tap, the computed rows of each job, (computed_rows, D). No layer after the deepest tap runs.

        Args:
            meanwhile: called once the GPU has the first layers, if there are so many.
        """
        packed = pack(jobs, pad_token_id)
        turns = _turns(packed.position_ids, self.config)
        run_layer = self._layer_for(len(packed.input_ids), len(packed.tiles))
        x = self.model.embed_tokens(packed.input_ids)  # (T, D)
        wanted = {tap.depth for tap in taps}
        outputs = {0: x}
        for depth, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = run_layer(x, turns, packed.tiles, *layer)
            self.model.layers_run += 1
            if depth in wanted:
                outputs[depth] = x
            hands_over = depth % LAYERS_AT_ONCE == 0
            if hands_over:
                mx.async_eval(x)
                self.running.append(x)
            if depth == LAYERS_MEANWHILE:
                meanwhile()
            while hands_over and sum(map(len, self.running)) * LAYERS_AT_ONCE > ROWS_AHEAD:
                mx.eval(self.running.popleft())
        normed = {tap: self.model.norm(outputs[tap.depth]) if tap.normed else outputs[tap.depth] for tap in taps}
        return {tap: [rows[span] for span in packed.spans] for tap, rows in normed.items()}

    def _layer_for(self, rows: int, tiles: int) -> Callable[..., mx.array]:
        """`_layer` as MLX keeps it for this shape; by shape, as it would look through all that one function has had."""
        if not self.kernels.traceable:
            return self._layer
        if (rows, tiles) not in self._layers_by_shape:
            self._layers_by_shape[rows, tiles] = mx.compile(self._layer)
        return self._layers_by_shape[rows, tiles]

    def _layer(self, x: mx.array, turns: mx.array, tiles: mx.array, *weights: mx.array) -> mx.array:
        kernels, layer = self.kernels, FusedLayer(*weights)
        qkv = kernels.finish_heads(x, x @ layer.qkv, layer.q_norm, layer.k_norm, turns)  # (T, (H+2K)*d)
        x = mx.addmm(x, kernels.attend(qkv, tiles), layer.o)  # (T, D)
        return mx.addmm(x, kernels.swiglu(x, x @ layer.gate_up), layer.down)


def _turns(position_ids: mx.array, config: Qwen3Config) -> mx.array:
    """(T, d) float32: the cosine of the angle of each pair of a head, then the sine."""
    angles = position_ids[:, None].astype(mx.float32) * (1 / rope_periods(config.rope_theta, config.head_dim))
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def _join(layer: DecoderLayer) -> FusedLayer:
    """One layer's weights, evaluated."""
    attention, mlp = layer.self_attn, layer.mlp
    joined = FusedLayer(
        qkv=_stack(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=attention.q_norm.weight,
        k_norm=attention.k_norm.weight,
        o=attention.o_proj.weight.T,
        gate_up=_stack(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight.T,
    )
    mx.eval(joined)
    return joined


def _stack(norm: nn.RMSNorm, *projections: nn.Linear) -> mx.array:
    """One matrix, (D, all outputs), the norm's weight multiplied into it in float32."""
    scale = norm.weight.astype(mx.float32)
    return mx.concatenate([(p.weight * scale).astype(p.weight.dtype) for p in projections]).T
