"""Qwen3's forward pass on a Linux CPU, by compiled kernels: rows packed without padding, layers run in one C call.

Gives what encoder/qwen3/model.py gives, which stays the reference. docs/decisions/0002, 0008 and 0009 say what is
different, why, and what it is worth.

Shape letters: T rows, D hidden size, d head_dim.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.kernels.library import Batch, Kernels, Numbers
from encoder.qwen3.cpu.weights import CpuWeights
from encoder.qwen3.model import Qwen3
from encoder.qwen3.rows import Span, pack
from encoder.types import Job, Tap

# Multiplications of one layer that are worth a thread, some 50 us: threads wait for each other eight times in a layer,
# and on a busy machine each wait can take as long as another program's turn.
THREAD_WORK = 2**21


class CpuForward:
    """All rows of a batch one after the other, on all CPUs. Takes the model's layers over.

    Args:
        model: loaded, as `CpuWeights` takes it.
        kernels: proven, see encoder/qwen3/proof.py.
        threads: of a pass, at most. Results do not depend on it.
    """

    def __init__(self, model: Qwen3, kernels: Kernels, threads: int) -> None:
        self.model = model
        self.kernels = kernels
        self.name = f"cpu kernels, {kernels.instruction_set}"
        self.threads = threads
        self.weights = CpuWeights(model, kernels, threads)
        self._row_work = _row_work(model.config)

    def __call__(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> dict[Tap, list[mx.array]]:
        """For each tap, the computed rows of each job, (computed_rows, D). No layer after the deepest tap runs.

        Errors: MemoryError.
        """
        rows = pack(jobs, tokens_first=True)
        spans = np.array(rows.spans, np.int32)
        cos, sin = self.model.config.rope.cos_sin(np.array(rows.position_ids, np.float32))  # (T, d/2) each
        addresses = (array.ctypes.data for array in (spans, cos, sin))
        batch = Batch(*addresses, len(spans), len(rows.input_ids), rows.token_rows)
        embeddings = self.model.embed_tokens(mx.array(np.array(rows.input_ids, np.int32))).astype(mx.float32)
        x = np.array(embeddings)  # (T, D), a copy: the kernels write into it
        outputs: dict[int, mx.array] = {}
        done = 0
        for depth in sorted({tap.depth for tap in taps}):
            self._run(batch, x, done, depth)
            outputs[depth] = mx.array(x)
            done = depth
        return {tap: [self._rows_of(span, outputs[tap.depth], tap) for span in rows.spans] for tap in taps}

    def count_rows(self, lengths: Sequence[int]) -> int:
        """Rows that run for jobs of such lengths: no padding."""
        return sum(lengths)

    def warmup_sizes(self, max_rows: int) -> Sequence[int]:
        """One pass, as proof that the model runs: a CPU is as fast at the first pass of a size as at others."""
        return (1,)

    def _run(self, batch: Batch, x: Numbers, first: int, end: int) -> None:
        """Run layers `first` to `end`, the latter not included, over x, (T, D), in place."""
        if first == end or not len(x):
            return
        threads = min(self.threads, max(1, len(x) * self._row_work // THREAD_WORK))
        self.kernels.run_layers(self.weights.dims, self.weights.from_layer(first), end - first, batch, x, threads)
        self.model.layers_run += end - first

    def _rows_of(self, span: Span, x: mx.array, tap: Tap) -> mx.array:
        tokens, live = x[span.start : span.stop], x[span.live : span.live_stop]
        rows = mx.concatenate([tokens, live]) if len(live) else tokens
        return self.model.norm(rows) if tap.normed else rows


def _row_work(config: Qwen3Config) -> int:
    """Multiplications of a row with the matrices of one layer."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
