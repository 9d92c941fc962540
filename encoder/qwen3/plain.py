"""The plain forward pass: one padded rectangle through model.py. The reference for all others, on any device.

Padding is always on the right. Attention is causal, so a padding row can never change a real row before it; a mask
array is needed only where the padding rows themselves are delivered.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from encoder.qwen3.model import Qwen3
from encoder.types import COMMON_WINDOW, Job, Mask, Rows, Tap

SHORTEST_BUCKET = 16  # rows; also what keeps OpenBLAS off its slow edge kernels


class ModelInput(NamedTuple):
    """What the model takes: input_ids (B, L) int32, a mask, and position_ids (B, L) int32 or None for 0, 1, 2, ..."""

    input_ids: mx.array
    mask: Mask
    position_ids: mx.array | None


class PlainForward:
    """One rectangle, padded on the right to one of few lengths."""

    name = "plain"

    def __init__(self, model: Qwen3) -> None:
        self.model = model

    def __call__(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> Mapping[Tap, Rows]:
        input_ids, mask, position_ids = pad(jobs)
        hidden_states = self.model.hidden_states_at(taps, input_ids, mask=mask, position_ids=position_ids)
        return dict(zip(taps, hidden_states, strict=True))

    def count_rows(self, lengths: Sequence[int]) -> int:
        return len(lengths) * bucket_length(max(lengths))

    def warmup_sizes(self, max_rows: int) -> Sequence[int]:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        return (1,) if on_cpu else sorted({bucket_length(rows) for rows in range(1, COMMON_WINDOW + 1)})


def bucket_length(rows: int) -> int:
    """The padded length for `rows` rows, one of few so that MLX sees few shapes.

    Multiples of 16 up to 128, then four lengths to each doubling: 160, 192, 224, 256, 320, ...
    """
    step = max(SHORTEST_BUCKET, (1 << max(rows - 1, 0).bit_length()) // 8)
    return max(SHORTEST_BUCKET, -(-rows // step) * step)


def pad(jobs: Sequence[Job]) -> ModelInput:
    """One rectangle for all jobs of a batch. Beyond the computed rows of a job it holds anything: nobody sees it."""
    length = bucket_length(max(job.computed_rows for job in jobs))
    input_ids = np.zeros((len(jobs), length), dtype=np.int32)
    for row, job in zip(input_ids, jobs, strict=True):
        row[: len(job.input_ids)] = job.input_ids
        row[len(job.input_ids) :] = job.pad_token_id
    if all(job.computed_rows == len(job.input_ids) for job in jobs):
        return ModelInput(mx.array(input_ids), "causal", None)
    lengths = mx.array([len(job.input_ids) for job in jobs])
    return ModelInput(mx.array(input_ids), make_attention_mask(lengths, length), make_position_ids(jobs, length))


def make_position_ids(jobs: Sequence[Job], length: int) -> mx.array | None:
    """(B, L) int32 where a job gives its padding rows a position of their own, None where all positions run on."""
    if all(job.pad_position is None for job in jobs):
        return None
    position_ids = np.tile(np.arange(length, dtype=np.int32), (len(jobs), 1))
    for row, job in zip(position_ids, jobs, strict=True):
        if job.pad_position is not None:
            row[len(job.input_ids) :] = job.pad_position
    return mx.array(position_ids)


def make_attention_mask(lengths: mx.array, length: int) -> mx.array:
    """Causal mask that also hides padding from every row, so that live padding rows see the prompt alone.

    Args:
        lengths: real tokens in each row, (B,) int.
        length: padded length L, in tokens.
    Returns:
        (B, 1, L, L) bool, True where query i may attend to key j.
    Source: transformers, masking_utils.create_causal_mask with an attention_mask.
    """
    positions = mx.arange(length)
    causal = positions[:, None] >= positions[None, :]  # (L, L)
    real = positions[None, :] < lengths[:, None]  # (B, L)
    return causal[None, None] & real[:, None, None, :]  # (B, 1, L, L)
