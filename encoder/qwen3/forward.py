"""What a forward pass offers, and the choice of the fastest one that the model and the device allow.

`PlainForward` (plain.py) runs model.py on one padded rectangle: any model on any device, and the reference for the
others. `PackedForward` (cpu/) runs the same weights on a CPU without padding, `FusedForward` (cuda/) on a CUDA GPU.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.forward import PackedForward
from encoder.qwen3.cpu.packed_blas import BlasLayers
from encoder.qwen3.cpu.packed_panels import MOST_HEAD_DIM, PanelsLayers
from encoder.qwen3.cpu.panels import has_panels
from encoder.qwen3.cuda.forward import FusedForward
from encoder.qwen3.cuda.kernels import DTYPE, build_kernels
from encoder.qwen3.model import Qwen3
from encoder.qwen3.plain import PlainForward
from encoder.types import Job, Rows, Tap


class Forward(Protocol):
    """The forward pass for one batch."""

    def __call__(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> Mapping[Tap, Rows]:
        """For each tap, the computed rows of each job, in the order of `jobs`; a rectangle may have more rows."""

    def count_rows(self, lengths: Sequence[int]) -> int:
        """Rows that run, padding included, for a batch of jobs with so many computed rows each."""

    def warmup_sizes(self, max_rows: int) -> Sequence[int]:
        """Sizes of the passes that run before the first request, in rows: a GPU is slow at the first pass of a size.

        Args:
            max_rows: of a batch.
        """


class ForwardPass(Protocol):
    """A pass whose first layers the device has."""

    def finish(self) -> Mapping[Tap, Rows]:
        """Give the device the rest of the pass, and return as `Forward.__call__` does."""


@runtime_checkable
class OverlappingForward(Forward, Protocol):
    """A forward pass that the device computes after the call has returned.

    The host can take the results of one batch while the device computes the next, so that the device never waits.
    """

    def begin(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> ForwardPass:
        """Give the device the first layers: enough work for the time in which the host does something else."""


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
