"""Hidden states of a batch in, the prompt embeds of each job out. Step 5 of the path.

Takes each job's own rows and taps, combines them, settles the padding rows, casts, and checks that all is finite.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.errors import EncoderError, InvalidField, ModelFailure
from encoder.types import Job, PromptEmbeds, Rows, Tap


def select(hidden_states: Mapping[Tap, Rows], jobs: Sequence[Job]) -> list[PromptEmbeds | EncoderError]:
    """The result of each job, or the error that concerns it alone. Evaluates; call on the model thread.

    Args:
        hidden_states: for every tap that a job wants, the rows of each job in the order of `jobs`: (B, L, D), or B
            times (rows, D).
    """
    embeds = [combine(hidden_states, row, job) for row, job in enumerate(jobs)]
    cast = [x.astype(getattr(mx, job.dtype)) for x, job in zip(embeds, jobs, strict=True)]
    finite = [(mx.isfinite(x).all(), mx.isfinite(y).all()) for x, y in zip(embeds, cast, strict=True)]
    mx.eval(cast, finite)
    return [
        _not_finite(job, bool(computed.item())) if not delivered.item() else _export(x, job)
        for x, job, (computed, delivered) in zip(cast, jobs, finite, strict=True)
    ]


def combine(hidden_states: Mapping[Tap, Rows], row: int, job: Job) -> mx.array:
    """One job's hidden states as one array, its padding rows in place and the first rows dropped.

    Returns:
        (rows, n*D) for `concat` and `interleave`, (n, rows, D) for `stack`, (rows, n, D) for `stack_rows`.
    """
    rows = min(job.computed_rows, job.delivered_rows)
    taken = [hidden_states[tap][row][:rows] for tap in job.taps]  # n of (rows, D)
    if job.unit_rms:
        taken = [_unit_rms(x) for x in taken]
    if job.bundle > 1:
        taken = [mx.concatenate(taken[i : i + job.bundle], axis=-1) for i in range(0, len(taken), job.bundle)]
    placed = [_place_padding(x, job)[job.dropped_rows :] for x in taken]
    match job.combine:
        case "concat":
            return mx.concatenate(placed, axis=-1)
        case "interleave":
            return mx.stack(placed, axis=-1).flatten(-2)
        case "stack":
            return mx.stack(placed, axis=0)
        case "stack_rows":
            return mx.stack(placed, axis=1)


def _place_padding(x: mx.array, job: Job) -> mx.array:
    """(rows, D) to (delivered_rows, D): the rows that were not computed, in front of the tail."""
    missing = job.delivered_rows - x.shape[0]
    if missing <= 0:
        return x
    body, tail = x[: x.shape[0] - job.tail_rows], x[x.shape[0] - job.tail_rows :]
    alike = job.computed_rows > len(job.input_ids)  # a live padding row stands last: all others are like it
    padding = mx.repeat(body[-1:], missing, axis=0) if alike else mx.zeros((missing, x.shape[1]), x.dtype)
    return mx.concatenate([body, padding, tail], axis=0)


def _unit_rms(x: mx.array) -> mx.array:
    """Source: diffusers, pipelines/bria_fibo2/pipeline_bria_fibo2.py."""
    return mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6).astype(x.dtype)


def _not_finite(job: Job, finite_as_computed: bool) -> EncoderError:
    if finite_as_computed:
        return InvalidField("dtype", f"the hidden states overflow {job.dtype}. Ask for bfloat16 or float32.")
    return ModelFailure("The hidden states hold NaN or infinity. Check the checkpoint, or compute in float32.")


def _export(x: mx.array, job: Job) -> PromptEmbeds:
    bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x  # NumPy has no bfloat16
    rows_axis = 1 if job.combine == "stack" else 0
    return PromptEmbeds(np.array(bits, order="C"), _attention_mask(job), job.dtype, rows_axis)


def _attention_mask(job: Job) -> NDArray[np.bool_]:
    position, body = np.arange(job.delivered_rows), len(job.input_ids) - job.tail_rows
    return ((position < body) | (position >= job.delivered_rows - job.tail_rows))[job.dropped_rows :]
