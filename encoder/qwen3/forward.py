"""What a forward pass offers, and the choice of the fastest one that the model and the device allow.

`PlainForward` (plain.py) runs model.py on one padded rectangle: any model on any device, and the reference for the
others. `CpuForward` (cpu/) runs the same weights on a CPU, without padding, by compiled kernels. `FusedForward` (cuda/)
runs them on a CUDA GPU.
"""

import logging
from collections.abc import Mapping, Sequence, Set
from functools import cache
from typing import Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cpu.blas import available_cpus
from encoder.qwen3.cpu.forward import CpuForward
from encoder.qwen3.cpu.kernels.library import Kernels, load_kernels
from encoder.qwen3.cuda.forward import FusedForward
from encoder.qwen3.cuda.kernels import DTYPE, build_kernels
from encoder.qwen3.model import Qwen3
from encoder.qwen3.plain import PlainForward
from encoder.qwen3.proof import largest_error
from encoder.types import Job, Rows, Tap

logger = logging.getLogger(__name__)

MAX_PROOF_ERROR = 1e-5  # of a row's largest number, in float32


class Forward(Protocol):
    """The forward pass for one batch.

    `name` says how it computes: for people, and as part of what identifies a result.
    """

    name: str

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


@cache
def cpu_kernels() -> Kernels | None:
    """The compiled kernels for this CPU; None where there are none, or where they differ from the plain pass."""
    kernels = load_kernels()
    if kernels is None:
        logger.warning(
            "no compiled kernels for this CPU: the forward pass runs on MLX and a BLAS, short prompts take two to four "
            "times as long. Install a wheel, or a C compiler and then the package again."
        )
        return None
    for dtype in (mx.float32, mx.bfloat16):
        error = largest_error(lambda model: CpuForward(model, kernels, available_cpus()), dtype)
        if not error < MAX_PROOF_ERROR:  # NaN too
            logger.error(
                "the compiled kernels for %s differ from the reference by %.1e of a row, expected less than %.0e, with "
                "%s weights: not used. The forward pass runs on MLX and a BLAS, and takes longer. Please report this.",
                *(kernels.instruction_set, error, MAX_PROOF_ERROR, dtype),
            )
            return None
    return kernels


def widens_bfloat16(config: Qwen3Config) -> bool:
    """Whether float32 is computed from bfloat16 weights as they are: on a CPU with compiled kernels."""
    return mx.default_device().type == mx.DeviceType.cpu and _kernels_for(config) is not None


def _kernels_for(config: Qwen3Config) -> Kernels | None:
    """The compiled kernels, where they support a model of this config."""
    if _has_extras(config):
        return None
    kernels = cpu_kernels()
    return kernels if kernels and config.head_dim <= kernels.max_head_dim else None


def choose_forward(model: Qwen3, dtype: mx.Dtype) -> Forward:
    """The fast forward pass where one supports the model, else the plain one.

    Args:
        model: loaded in the dtype to compute in, its matrices perhaps in bfloat16 where `widens_bfloat16`.
        dtype: to compute in.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        if dtype == mx.float32 and _is_supported(model, {mx.float32, mx.bfloat16}):
            cpu = _kernels_for(model.config)
            return CpuForward(model, cpu, available_cpus()) if cpu else PlainForward(model)
    elif mx.cuda.is_available() and _is_supported(model, {DTYPE}) and (cuda := build_kernels(model.config)):
        return FusedForward(model, cuda)
    return PlainForward(model)


def _is_supported(model: Qwen3, dtypes: Set[mx.Dtype]) -> bool:
    """Whether a fast forward pass for these dtypes knows all that the model has: nothing quantized, no extras."""
    quantized = any(type(module) is not nn.Linear for layer in model.layers for module in layer.projections)
    in_dtypes = all(array.dtype in dtypes for array in dict(tree_flatten(model.parameters())).values())
    return in_dtypes and not quantized and not _has_extras(model.config)


def _has_extras(config: Qwen3Config) -> bool:
    """Whether the model has tensors that no fast forward pass supports."""
    return config.attention_bias or config.attention_sinks
