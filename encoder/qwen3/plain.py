"""Lengths, padding and masks: jobs in, model input out. Step 3 of the path.

Padding is always on the right. Attention is causal, so a padding row can never change a real row before it; a mask
array is needed only where the padding rows themselves are delivered.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from encoder.presets.preset import Preset
from encoder.types import Job, Mask

SHORTEST_BUCKET = 16  # rows; also what keeps OpenBLAS off its slow edge kernels


class ModelInput(NamedTuple):
    """What the model takes: input_ids (B, L) int32, a mask, and position_ids (B, L) int32 or None for 0, 1, 2, ..."""

    input_ids: mx.array
    mask: Mask
    position_ids: mx.array | None


def bucket_length(rows: int) -> int:
    """The padded length for `rows` rows, one of few so that MLX sees few shapes.

    Multiples of 16 up to 128, then four lengths to each doubling: 160, 192, 224, 256, 320, ...
    """
    step = max(SHORTEST_BUCKET, (1 << max(rows - 1, 0).bit_length()) // 8)
    return max(SHORTEST_BUCKET, -(-rows // step) * step)


def padded_lengths(num_tokens: Sequence[int], preset: Preset) -> list[int]:
    """How long each prompt of one request is after the preset's padding, in tokens."""
    longest = {"own": 0, "longest": max(num_tokens), "max_length": preset.max_sequence_length}[preset.padding]
    multiple = preset.pad_to_multiple_of
    rounded = [-(-max(longest, n, preset.min_length) // multiple) * multiple for n in num_tokens]
    return [min(n, preset.max_sequence_length) for n in rounded] if preset.padding == "own" else rounded


def pad(jobs: Sequence[Job], pad_token_id: int) -> ModelInput:
    """One rectangle for all jobs of a batch."""
    length = bucket_length(max(job.computed_rows for job in jobs))
    input_ids = np.full((len(jobs), length), pad_token_id, dtype=np.int32)
    for row, job in zip(input_ids, jobs, strict=True):
        row[: len(job.input_ids)] = job.input_ids
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
