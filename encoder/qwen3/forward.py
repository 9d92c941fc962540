"""A batch of jobs through the model, in the way that suits the device. Steps 3 and 4 of the path.

`PlainForward` runs model.py on one padded rectangle: any model on any device, and the reference for all others.
`PackedForward` runs the same weights on a CPU without padding, `FusedForward` on a CUDA GPU. Here alone is decided
which.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.blas import available_cpus, set_threads
from encoder.qwen3.cpu.forward import Layers, PackedQwen3
from encoder.qwen3.cpu.packed_blas import BlasLayers
from encoder.qwen3.cpu.packed_panels import MOST_HEAD_DIM, PanelsLayers
from encoder.qwen3.cpu.panels import has_panels
from encoder.qwen3.cpu.shards import count_streams
from encoder.qwen3.cuda.forward import FusedQwen3, round_rows
from encoder.qwen3.cuda.kernels import DTYPE, Kernels, build_kernels
from encoder.qwen3.model import Qwen3
from encoder.qwen3.plain import bucket_length, pad
from encoder.types import Job, Rows, Tap

WINDOW = 512  # tokens, of nearly every preset
LARGEST_FIRST = 4096  # rows of a pass before the first request; larger ones take longer than what they would spare
ONE_PROOF = (1,)  # that the model runs: a CPU is as fast at the first pass of a size as at others


class Forward(Protocol):
    """The forward pass for one batch.

    `runs_on` says whether the device still works on a pass when the call returns, and has but little of it left: then
    the next pass may be begun, so that the device need not wait for it.
    """

    runs_on: bool

    def __call__(
        self, jobs: Sequence[Job], taps: Sequence[Tap], meanwhile: Callable[[], None] = lambda: None
    ) -> Mapping[Tap, Rows]:
        """For each tap, the computed rows of each job; a rectangle may have more rows.

        Args:
            meanwhile: where the pass runs on, called once the device has so much work that it need not wait for more.
        """

    def tokens(self, lengths: Sequence[int]) -> int:
        """Rows that run for a batch of such lengths."""

    def first_sizes(self, most_rows: int) -> Sequence[int]:
        """Rows of the passes that are to run before the first request: a GPU is slow at the first of each size.

        Args:
            most_rows: of a batch.
        """


class PlainForward:
    """One rectangle, padded on the right to one of few lengths."""

    runs_on = False

    def __init__(self, model: Qwen3, pad_token_id: int) -> None:
        self.model = model
        self.pad_token_id = pad_token_id

    def __call__(
        self, jobs: Sequence[Job], taps: Sequence[Tap], meanwhile: Callable[[], None] = lambda: None
    ) -> Mapping[Tap, Rows]:
        input_ids, mask, position_ids = pad(jobs, self.pad_token_id)
        hidden_states = self.model.hidden_states_at(taps, input_ids, mask=mask, position_ids=position_ids)
        return dict(zip(taps, hidden_states, strict=True))

    def tokens(self, lengths: Sequence[int]) -> int:
        return len(lengths) * bucket_length(max(lengths))

    def first_sizes(self, most_rows: int) -> Sequence[int]:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        return ONE_PROOF if on_cpu else sorted({bucket_length(rows) for rows in range(1, WINDOW + 1)})


class PackedForward:
    """All rows one after the other, on several streams with one thread each. Takes the model's weights over."""

    runs_on = False

    def __init__(self, model: Qwen3, pad_token_id: int, kind: type[Layers]) -> None:
        set_threads(1)
        self.packed = PackedQwen3(model, count_streams(model.config, available_cpus()), kind)
        self.pad_token_id = pad_token_id

    def __call__(
        self, jobs: Sequence[Job], taps: Sequence[Tap], meanwhile: Callable[[], None] = lambda: None
    ) -> Mapping[Tap, Rows]:
        return self.packed.hidden_states_at(taps, jobs, self.pad_token_id)

    def tokens(self, lengths: Sequence[int]) -> int:
        multiple = self.packed.compute.row_multiple
        return -(-sum(lengths) // multiple) * multiple

    def first_sizes(self, most_rows: int) -> Sequence[int]:
        return ONE_PROOF


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
        return sorted({round_rows(rows) for rows in range(1, min(max(most_rows, WINDOW), LARGEST_FIRST) + 1)})


def widens_bfloat16(config: Qwen3Config) -> bool:
    """Whether float32 is computed from bfloat16 weights as they are: on a CPU, where panels are at hand."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return on_cpu and _takes_panels(config) and not (config.attention_bias or config.attention_sinks)


def _takes_panels(config: Qwen3Config) -> bool:
    return has_panels() and config.head_dim <= MOST_HEAD_DIM


def choose_forward(model: Qwen3, pad_token_id: int, dtype: mx.Dtype) -> Forward:
    """The fast way where there is one that knows all that the model has, else the plain one.

    Args:
        model: loaded in the dtype to compute in, its matrices perhaps in bfloat16 where `widens_bfloat16`.
        dtype: to compute in.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        as_panels = _takes_panels(model.config)
        if dtype == mx.float32 and _is_simple(model, {mx.float32, mx.bfloat16} if as_panels else {mx.float32}):
            return PackedForward(model, pad_token_id, PanelsLayers if as_panels else BlasLayers)
    elif mx.cuda.is_available() and _is_simple(model, {DTYPE}) and (kernels := build_kernels(model.config)):
        return FusedForward(model, pad_token_id, kernels)
    return PlainForward(model, pad_token_id)


def _is_simple(model: Qwen3, dtypes: Set[mx.Dtype]) -> bool:
    plain = all(type(module) is nn.Linear for layer in model.layers for module in layer.projections)
    alike = all(array.dtype in dtypes for array in dict(tree_flatten(model.parameters())).values())
    return plain and alike and not (model.config.attention_bias or model.config.attention_sinks)
