"""The values that travel between the steps of a request. Data only.

Shape letters: B batch, L sequence length, D hidden size, n number of hidden states taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

DType = Literal["bfloat16", "float16", "float32"]
Combine = Literal["concat", "interleave", "stack", "stack_rows"]
PaddingRows = Literal["cut", "zero", "live"]
CachePolicy = Literal["use", "refresh", "bypass"]  # "refresh" reads nothing and keeps the result, "bypass" does neither
Mask = mx.array | Literal["causal", "none"]
Rows = mx.array | Sequence[mx.array]  # (B, L, D), or B times (rows, D)

LARGE_BYTES = 2**20  # of a result
COMMON_WINDOW = 512  # tokens: the max_sequence_length of nearly every preset


class Tap(NamedTuple):
    """A place in the model where hidden states are taken, free of both public numberings.

    `depth` counts the decoder layers that have run: 0 is the embedding output, k the output of decoder layer k-1.
    `normed` says whether the final norm is applied on top.
    """

    depth: int
    normed: bool


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt after the template: what the model will read.

    `text` is prefix + prompt + suffix + tail; `input_ids` are its tokens without padding, truncated to the window, the
    last `tail_tokens` of them the tail's.
    """

    text: str
    input_ids: tuple[int, ...]
    truncated: bool
    tail_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, tokenized and planned: everything that steps 3 to 5 need, and everything that changes the result.

    Equal jobs have equal results on one checkpoint, so a job is also the key of the cache.

    Attributes:
        input_ids: the real tokens.
        computed_rows: rows that go through the model: the real tokens, and the padding rows where those are live.
        delivered_rows: rows handed out, padding rows included, before the first `dropped_rows` are taken away.
        dropped_rows: rows dropped in front, e.g. a system turn.
        taps: the hidden states wanted, in order.
        combine: how several become one tensor.
        dtype: of the result.
        tail_rows: real rows that stand behind the padding.
        pad_position: position of every padding row, None where positions run on.
        unit_rms: scale each row of each hidden state to a root mean square of 1.
        bundle: hidden states that are joined on their features before `combine` sees them.
    """

    input_ids: tuple[int, ...]
    computed_rows: int
    delivered_rows: int
    dropped_rows: int
    taps: tuple[Tap, ...]
    combine: Combine
    dtype: DType
    tail_rows: int = 0
    pad_position: int | None = None
    unit_rms: bool = False
    bundle: int = 1

    @property
    def depth(self) -> int:
        """Decoder layers that must run."""
        return max(tap.depth for tap in self.taps)


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """The result for one prompt.

    Attributes:
        hidden_states: (L, n*D) for `concat` and `interleave`, (n, L, D) for `stack`, (L, n, D) for `stack_rows`;
            bfloat16 is held as its uint16 bit pattern.
        attention_mask: (L,) bool, True where a row belongs to a real token.
        dtype: of the numbers in hidden_states.
        rows_axis: of hidden_states.
        shares: whether hidden_states are a view of memory that other results of the batch use as well, or that a later
            batch will use again.
    """

    hidden_states: NDArray[np.generic]
    attention_mask: NDArray[np.bool_]
    dtype: DType
    rows_axis: int = 0
    shares: bool = False

    @property
    def is_large(self) -> bool:
        """Whether copying it would hold up the event loop."""
        return self.hidden_states.nbytes >= LARGE_BYTES

    def detach(self) -> "PromptEmbeds":
        """The same result in memory of its own: whoever keeps it must not keep the results of a whole batch."""
        if not self.shares:
            return self
        hidden_states = self.hidden_states.copy()
        hidden_states.setflags(write=False)
        return replace(self, hidden_states=hidden_states, shares=False)


@dataclass(frozen=True, slots=True)
class Pass:
    """One batch on the model thread: what ran, and how long each part took.

    `forward_ms` goes to padding, to describing the pass to MLX and to running it, `selection_ms` to step 5.
    """

    prompts: int
    real_tokens: int
    computed_tokens: int
    layers: int
    forward_ms: float
    selection_ms: float


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """The result of one request, in the order of its prompts.

    `cache` is "hit" when nothing had to run, "coalesced" when it only waited for prompts that others had asked for. Of
    several batches the last counts: `queue_ms` until it began, `inference_ms` from there on; `last_pass` is that batch,
    where batches are measured.
    """

    embeds: list[PromptEmbeds]
    prompts: list[TokenizedPrompt]
    cache: Literal["hit", "miss", "coalesced"]
    tokenization_ms: float
    queue_ms: float
    inference_ms: float
    layers_run: int
    last_pass: Pass | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded and how it computes."""

    model: str
    revision: str | None
    fingerprint: str
    quantization: str | None
    random_weights: bool
    compute_dtype: str
    device: str
    forward: str  # the forward pass in use
    blas: str
    parameter_bytes: int
    dims: dict[str, int | float | bool]
    num_layers: int  # loaded
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges (what is queued, running, held) and counters since the start (all others)."""

    queued_prompts: int
    queued_tokens: int
    running_prompts: int
    batches: int
    prompts: int
    real_tokens: int
    padded_tokens: int
    layers_run: int
    cache_hits: int
    cache_misses: int
    cache_coalesced: int
    active_memory_bytes: int
    cache_memory_bytes: int
    peak_memory_bytes: int
    cache_bytes: int = 0
    cache_entries: int = 0
    cache_evictions: int = 0
    disk_cache_bytes: int = 0
    disk_cache_entries: int = 0
    disk_cache_evictions: int = 0
    disk_cache_hits: int = 0
    disk_cache_errors: int = 0
    disk_cache_dropped: int = 0
