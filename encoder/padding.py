"""Lengths, padding and masks: jobs in, model input out. Step 3 of the path.

Padding is always on the right. Attention is causal, so a padding row can never change a real row before it; a mask
array is needed only where the padding rows themselves are delivered.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from encoder.presets import Preset
from encoder.types import Job, Mask

SHORTEST_BUCKET = 16  # rows; also what keeps OpenBLAS off its slow edge kernels


class ModelInput(NamedTuple):
    """input_ids (B, L) int32; mask as the model takes it. Positions are 0, 1, 2, ... in every row."""

    input_ids: mx.array
    mask: Mask


def bucket_length(rows: int) -> int:
    """The padded length for `rows` rows, one of few so that MLX sees few shapes.

    Multiples of 16 up to 128, then four lengths to each doubling: 160, 192, 224, 256, 320, ...
    """
    step = max(SHORTEST_BUCKET, (1 << max(rows - 1, 0).bit_length()) // 8)
    return max(SHORTEST_BUCKET, -(-rows // step) * step)


def padded_lengths(num_tokens: Sequence[int], preset: Preset) -> list[int]:
    """How long each prompt of one request is after the preset's padding, in tokens."""
    target = preset.max_sequence_length if preset.padding == "max_length" else max(num_tokens, default=0)
    return [max(target, n) for n in num_tokens]


def pad(jobs: Sequence[Job], pad_token_id: int) -> ModelInput:
    """One rectangle for all jobs of a batch."""
    length = bucket_length(max(job.computed_rows for job in jobs))
    input_ids = np.full((len(jobs), length), pad_token_id, dtype=np.int32)
    for row, job in zip(input_ids, jobs, strict=True):
        row[: len(job.input_ids)] = job.input_ids
    if all(job.computed_rows == len(job.input_ids) for job in jobs):
        return ModelInput(mx.array(input_ids), "causal")
    lengths = mx.array([len(job.input_ids) for job in jobs])
    return ModelInput(mx.array(input_ids), make_attention_mask(lengths, length))


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
