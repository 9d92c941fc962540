"""Qwen3's forward pass on a CPU: rows packed without padding, spread over several MLX streams.

Gives what encoder/qwen3/model.py gives, which stays the reference. What is different, and why, was measured in
docs/decisions/0002-packed-forward-on-cpu.md:

- The rows of all prompts stand one after the other, so no padding is computed. Live padding rows see the real tokens of
  their own prompt and are seen by nobody, so they have queries and no keys.
- Each stream has a part of the heads and of the MLP, and multiplies on one thread: no thread waits for another inside a
  matrix product, only twice in a layer where the parts are added up.

What a stream computes is packed_panels.py's, or where nothing was compiled packed_blas.py's.

Shape letters: T packed rows, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Protocol

import mlx.core as mx

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.blas import available_cpus, set_threads
from encoder.qwen3.cpu.rows import Packed, Span, pack
from encoder.qwen3.cpu.shards import Part, count_streams, cut
from encoder.qwen3.model import Qwen3
from encoder.types import Job, Rows, Tap


class Layers(Protocol):
    """How one stream computes its part of a decoder layer."""

    row_multiple: int  # of rows that it can multiply

    def __init__(self, config: Qwen3Config) -> None: ...

    def lay(self, part: Part, threads: Executor) -> Any:
        """A stream's part of a layer's weights as it takes them; threads share the work."""

    def start(self, packed: Packed) -> None:
        """All that is asked for from now on, and evaluated before the next start, is for this batch."""

    def attention(self, part: Any, x: mx.array) -> mx.array:
        """What this part adds to the rows x, (T, D) both."""

    def mlp(self, part: Any, x: mx.array) -> mx.array:
        """The same."""


class PackedForward:
    """All rows one after the other, on several streams with one thread each. Takes the model's weights over."""

    def __init__(self, model: Qwen3, pad_token_id: int, kind: type[Layers]) -> None:
        set_threads(1)
        self.packed = PackedQwen3(model, count_streams(model.config, available_cpus()), kind)
        self.pad_token_id = pad_token_id

    def __call__(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> Mapping[Tap, Rows]:
        return self.packed.hidden_states_at(taps, jobs, self.pad_token_id)

    def count_rows(self, lengths: Sequence[int]) -> int:
        multiple = self.packed.compute.row_multiple
        return -(-sum(lengths) // multiple) * multiple

    def warmup_sizes(self, max_rows: int) -> Sequence[int]:
        return (1,)  # as a proof: a CPU is as fast at the first pass of a size as at others


class PackedQwen3:
    """The weights of a loaded Qwen3, cut and laid out for a CPU. The model's layers are empty afterwards.

    Args:
        model: loaded, as `kind` takes it.
        streams: parts to cut it into; create and run on one thread.
        kind: how layers are computed.
    """

    def __init__(self, model: Qwen3, streams: int, kind: type[Layers]) -> None:
        self.model = model
        self.compute = kind(model.config)
        self.streams = [mx.new_stream(mx.cpu) for _ in range(streams)]
        self.layers: list[list[Any]] = []  # each with a part for each stream
        with ThreadPoolExecutor(streams) as threads:
            while model.layers:  # one at a time, so that no more than one layer is in memory twice
                parts = cut(model.layers.pop(0), model.config, streams)
                self.layers.append([self.compute.lay(part, threads) for part in parts])
                mx.clear_cache()

    def hidden_states_at(
        self, taps: Sequence[Tap], jobs: Sequence[Job], pad_token_id: int
    ) -> dict[Tap, list[mx.array]]:
        """For each tap, the computed rows of each job, (computed_rows, D). No layer after the deepest tap runs."""
        packed = pack(jobs, pad_token_id, self.compute.row_multiple)
        self.compute.start(packed)
        x = self.model.embed_tokens(packed.input_ids).astype(mx.float32)  # (T, D)
        states = [x] * len(self.streams)  # each stream has a sum of its own: cheaper than waiting for another's
        wanted = {tap.depth for tap in taps}
        outputs = {0: x}
        for depth, layer in enumerate(self.layers[: max(wanted)], start=1):
            for half in (self.compute.attention, self.compute.mlp):
                states = self._add(states, half, layer)
            self.model.layers_run += 1
            if depth in wanted:
                outputs[depth] = states[0]
        mx.eval(outputs)  # while all is there that is read: MLX does not know of everything
        return {tap: [self._rows(outputs[tap.depth], span, tap) for span in packed.spans] for tap in taps}

    def _add(
        self, states: list[mx.array], half: Callable[[Any, mx.array], mx.array], layer: Sequence[Any]
    ) -> list[mx.array]:
        """To each stream's rows, what all streams compute from theirs."""
        computed = []
        for stream, part, x in zip(self.streams, layer, states, strict=True):
            with mx.stream(stream):
                computed.append(half(part, x))
        added = []
        for stream, x in zip(self.streams, states, strict=True):
            with mx.stream(stream):
                added.append(sum(computed, start=x))
        return added

    def _rows(self, x: mx.array, span: Span, tap: Tap) -> mx.array:
        rows = mx.concatenate([x[span.real], x[span.live]]) if span.live.start < span.live.stop else x[span.real]
        return self.model.norm(rows) if tap.normed else rows
