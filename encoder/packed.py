"""Qwen3's forward pass on a CPU: rows packed without padding, spread over several MLX streams.

Gives what encoder/qwen3.py gives, which stays the reference. What is different, and why, was measured in
docs/decisions/0002-packed-forward-on-cpu.md:

- The rows of all prompts stand one after the other, so no padding is computed. Live padding rows see the real tokens of
  their own prompt and are seen by nobody, so they have queries and no keys.
- Each stream has a part of the heads and of the MLP, and multiplies on one thread: no thread waits for another inside a
  matrix product, only twice in a layer where the parts are added up.

What a stream computes is encoder/packed_panels.py's, or where nothing was compiled encoder/packed_blas.py's.

Shape letters: T packed rows, D hidden size.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from encoder.config import Qwen3Config
from encoder.packed_weights import Part, cut
from encoder.packing import Packed, Span, pack
from encoder.pointwise import add
from encoder.qwen3 import Qwen3
from encoder.types import Job, Tap


class Layer(Protocol):
    """One stream's part of a decoder layer: what it adds to the rows x, (T, D) both."""

    def attention(self, x: mx.array, batch: Any) -> mx.array: ...

    def mlp(self, x: mx.array) -> mx.array: ...


class Kind(NamedTuple):
    """A way to compute layers.

    Attributes:
        row_multiple: of rows that it can multiply.
        layer: makes one from a stream's part of the weights, with threads that share the work.
        batch: makes what all layers' attention needs to know of a batch.
    """

    row_multiple: int
    layer: Callable[[Part, Qwen3Config, Executor], Layer]
    batch: Callable[[Packed, Qwen3Config], Any]


class PackedQwen3:
    """The weights of a loaded Qwen3, cut and laid out for a CPU. The model's layers are empty afterwards.

    Args:
        model: loaded, as `kind` takes it.
        streams: parts to cut it into; create and run on one thread.
        kind: how layers are computed.
    """

    def __init__(self, model: Qwen3, streams: int, kind: Kind) -> None:
        self.config = model.config
        self.model = model
        self.kind = kind
        self.streams = [mx.new_stream(mx.cpu) for _ in range(streams)]
        self.layers: list[list[Layer]] = []  # each with a part for each stream
        with ThreadPoolExecutor(streams) as threads:
            while model.layers:  # one at a time, so that no more than one layer is in memory twice
                parts = cut(model.layers.pop(0), self.config, streams)
                self.layers.append([kind.layer(part, self.config, threads) for part in parts])
                mx.clear_cache()

    def hidden_states_at(
        self, taps: Sequence[Tap], jobs: Sequence[Job], pad_token_id: int
    ) -> dict[Tap, list[mx.array]]:
        """For each tap, the computed rows of each job, (computed_rows, D). No layer after the deepest tap runs."""
        packed = pack(jobs, pad_token_id, self.kind.row_multiple)
        batch = self.kind.batch(packed, self.config)
        x = self.model.embed_tokens(packed.input_ids).astype(mx.float32)  # (T, D)
        states = [x] * len(self.streams)  # each stream has a sum of its own: cheaper than waiting for another's
        wanted = {tap.depth for tap in taps}
        outputs = {0: x}
        for depth, layer in enumerate(self.layers[: max(wanted)], start=1):
            states = self._add(states, lambda part, x: part.attention(x, batch), layer)
            states = self._add(states, lambda part, x: part.mlp(x), layer)
            self.model.layers_run += 1
            if depth in wanted:
                outputs[depth] = states[0]
        mx.eval(outputs)  # here, while weights and batch are there: MLX need not know of all that is read
        return {tap: [self._rows(outputs[tap.depth], span, tap) for span in packed.spans] for tap in taps}

    def _add(
        self, states: list[mx.array], compute: Callable[[Layer, mx.array], mx.array], layer: Sequence[Layer]
    ) -> list[mx.array]:
        """To each stream's state what all streams compute from it."""
        computed = []
        for stream, part, x in zip(self.streams, layer, states, strict=True):
            with mx.stream(stream):
                computed.append(compute(part, x))
        added = []
        for stream, x in zip(self.streams, states, strict=True):
            with mx.stream(stream):
                added.append(add(x, computed))
        return added

    def _rows(self, x: mx.array, span: Span, tap: Tap) -> mx.array:
        rows = mx.concatenate([x[span.real], x[span.live]]) if span.live.start < span.live.stop else x[span.real]
        return self.model.norm(rows) if tap.normed else rows
