"""The values that pass between the steps of a request. Data only.

Shape letters: B batch, L sequence length, D hidden size, n number of hidden states taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.distribution import Distribution

DType = Literal["bfloat16", "float16", "float32"]
Combine = Literal["concat", "interleave", "stack", "stack_rows"]
PaddingRows = Literal["cut", "zero", "live"]
CachePolicy = Literal["use", "refresh", "bypass"]  # "refresh" only writes the cache, "bypass" does not touch it
Mask = mx.array | Literal["causal", "none"]
Rows = mx.array | Sequence[mx.array]  # (B, L, D), or B times (rows, D)

LARGE_BYTES = 2**20  # of a result; copying more holds up the event loop
COMMON_WINDOW = 512  # tokens: the max_sequence_length of nearly every preset


class Tap(NamedTuple):
    """A place in the model where hidden states are taken, independent of both public numberings.

    `depth` counts the decoder layers that have run: 0 is the embedding output, k the output of decoder layer k-1.
    `normed` says whether the final norm is applied on top.
    """

    depth: int
    normed: bool


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt in its template: what the model will read.

    Attributes:
        text: prefix + prompt + suffix + tail.
        input_ids: the tokens of the text without padding, truncated to the window.
        truncated: whether the window cut tokens off.
        tail_tokens: tokens of the tail, which are the last ones.
    """

    text: str
    input_ids: tuple[int, ...]
    truncated: bool
    tail_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, tokenized and planned: all that the model and the selection need, and all that changes the result.

    Equal jobs have equal results on one checkpoint, so a job is also a key of the cache.

    Attributes:
        input_ids: the real tokens.
        computed_rows: rows that go through the model: the real tokens, and the padding rows where those are live.
        delivered_rows: rows of the result, padding rows included, before the first `dropped_rows` are removed.
        dropped_rows: rows removed at the front, e.g. a system turn.
        taps: the hidden states wanted, in order.
        combine: how several become one tensor.
        dtype: of the result.
        tail_rows: real rows that are placed after the padding.
        pad_position: position of every padding row; None means consecutive positions.
        pad_token_id: what computed padding rows hold; 0 where none is computed, so that equal results have equal jobs.
        unit_rms: scale each row of each hidden state to a root mean square of 1.
        bundle: number of consecutive hidden states that are concatenated on their features before `combine`.
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
    pad_token_id: int = 0
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
        shares_memory: whether hidden_states are a view of memory that other results of the batch use as well, or that a
            later batch will use again.
    """

    hidden_states: NDArray[np.generic]
    attention_mask: NDArray[np.bool_]
    dtype: DType
    rows_axis: int = 0
    shares_memory: bool = False

    @property
    def is_large(self) -> bool:
        """Whether copying it would hold up the event loop."""
        return self.hidden_states.nbytes >= LARGE_BYTES

    def detach(self) -> "PromptEmbeds":
        """The same result in memory of its own: whoever keeps it must not keep the results of a whole batch."""
        if not self.shares_memory:
            return self
        hidden_states = self.hidden_states.copy()
        hidden_states.setflags(write=False)
        return replace(self, hidden_states=hidden_states, shares_memory=False)


@dataclass(frozen=True, slots=True)
class Pass:
    """One batch on the model thread: what ran, and how long each part took.

    Attributes:
        prompts: in the batch.
        real_tokens, computed_tokens: without and with padding.
        layers: decoder layers that ran.
        forward_ms: time for padding, for describing the pass to MLX, and for computing it.
        selection_ms: time for selecting the results and copying them to the host.
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

    Attributes:
        embeds, prompts: one for each prompt.
        cache: "hit" when nothing had to run; "coalesced" when all that had to run had been queued by other requests.
        tokenization_ms: time for tokenizing and planning.
        queue_ms: wait until the last batch of the request began.
        inference_ms: time from then until its results were there.
        layers_run: decoder layers of the deepest prompt that ran, 0 for a hit.
        last_pass: the last batch, where passes are measured.
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
class MergedLora:
    """A LoRA that is merged into the weights.

    Attributes:
        source: as the user named it.
        scale: factor of its strength.
        weights: how many of the checkpoint's weights it changes.
    """

    source: str
    scale: float
    weights: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded and how it computes.

    Attributes:
        model: the checkpoint's name.
        revision: of a hub repository, else None.
        fingerprint: hex digits made of the loaded weights.
        quantization: the format of quantized weights, else None.
        random_weights: whether the weights are random, as the demo's are.
        loras: merged into the weights, in this order.
        compute_dtype, device: what it computes in and on.
        forward: the forward pass in use, see `Forward.name`.
        blas: the library that computes matrix products where the forward pass does not.
        parameter_bytes: of the loaded weights.
        dims: the fields of the checkpoint's config.
        num_layers: decoder layers that are loaded.
        origin: what format, config, rope_theta and tokenizer were taken from, in words.
        warnings: what was assumed about the checkpoint or left out of it.
        versions: of Python and of the libraries that decide the numbers.
    """

    model: str
    revision: str | None
    fingerprint: str
    quantization: str | None
    random_weights: bool
    loras: tuple[MergedLora, ...]
    compute_dtype: str
    device: str
    forward: str
    blas: str
    parameter_bytes: int
    dims: dict[str, Any]
    num_layers: int
    origin: dict[str, str]
    warnings: list[str]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of this moment (queued, running, bytes and entries), counters since the start (all others), and the state.

    Attributes:
        state: of the engine: "loading", "ready", "suspect", "restarting" or "failed".
        restarts: how often the model was replaced.
        probes_failed: how often a model that was suspect did not work.
        batch_size, batch_tokens: prompts of each forward pass, and its tokens with all padding.
    """

    state: str
    batch_size: Distribution
    batch_tokens: Distribution
    restarts: int = 0
    probes_failed: int = 0
    tokenizing_requests: int = 0
    tokenizing_chars: int = 0
    queued_requests: int = 0
    queued_prompts: int = 0
    queued_tokens: int = 0
    running_prompts: int = 0
    batches: int = 0
    prompts: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    layers_run: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_coalesced: int = 0
    mlx_active_bytes: int = 0
    mlx_cache_bytes: int = 0
    mlx_peak_bytes: int = 0
    page_locked_bytes: int = 0
    cache_bytes: int = 0
    cache_entries: int = 0
    cache_evictions: int = 0
    disk_cache_bytes: int = 0
    disk_cache_entries: int = 0
    disk_cache_evictions: int = 0
    disk_cache_hits: int = 0
    disk_cache_errors: int = 0
    disk_cache_dropped: int = 0
