"""What a forward pass offers, and the choice of the fastest one that the model and the device allow.

`PlainForward` (plain.py) runs model.py on one padded rectangle: any model on any device, and the reference for the
others. `PackedForward` (cpu/) runs the same weights on a CPU without padding, `FusedForward` (cuda/) on a CUDA GPU.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

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
