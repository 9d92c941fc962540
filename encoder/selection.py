"""Hidden states of a batch in, the prompt embeds of each job out. Step 5 of the path.

Takes each job's own rows and taps, combines them, settles the padding rows, casts, and checks that all is finite.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.errors import EncoderError, InvalidField, ModelFailure
from encoder.finite import is_finite
from encoder.types import Job, PromptEmbeds, Rows, Tap

# NumPy has no bfloat16.
NUMPY_DTYPES = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


def select(hidden_states: Mapping[Tap, Rows], jobs: Sequence[Job]) -> list[PromptEmbeds | EncoderError]:
    """The result of each job, or the error that concerns it alone. Evaluates; call on the model thread.

    Args:
        hidden_states: for every tap that a job wants, the rows of each job in the order of `jobs`: (B, L, D), or B
            times (rows, D).
    """
    taken = [_take(hidden_states, row, job) for row, job in enumerate(jobs)]
    embeds = [
        combine([x.astype(getattr(mx, job.dtype)) for x in own], job) for own, job in zip(taken, jobs, strict=True)
    ]
    arrays = to_numpy(embeds, jobs, at_once=mx.default_device().type == mx.DeviceType.gpu)
    return [
        _not_finite(own, job) if array is None else _export(array, job)
        for array, own, job in zip(arrays, taken, jobs, strict=True)
    ]


def _take(hidden_states: Mapping[Tap, Rows], row: int, job: Job) -> list[mx.array]:
    """The computed rows of one job at each of its taps: n of (rows, D)."""
    rows = min(job.computed_rows, job.delivered_rows)
    taken = [hidden_states[tap][row][:rows] for tap in job.taps]
    return [_unit_rms(x) for x in taken] if job.unit_rms else taken


def combine(taken: list[mx.array], job: Job) -> mx.array:
    """One job's hidden states as one array, its padding rows in place and the first rows dropped.

    Args:
        taken: n of (rows, D), already in the dtype of the result, so that half as much is moved.
    Returns:
        (rows, n*D) for `concat` and `interleave`, (n, rows, D) for `stack`, (rows, n, D) for `stack_rows`.
    """
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


def _not_finite(taken: Sequence[mx.array], job: Job) -> EncoderError:
    if all(is_finite(x).item() for x in taken):
        return InvalidField("dtype", f"the hidden states overflow {job.dtype}. Ask for bfloat16 or float32.")
    return ModelFailure("The hidden states hold NaN or infinity. Check the checkpoint, or compute in float32.")


def to_numpy(embeds: Sequence[mx.array], jobs: Sequence[Job], at_once: bool) -> list[NDArray[Any] | None]:
    """The array of each job, None where a number in it is not finite. Evaluates.

    Each is in memory of its own: what keeps one must not keep the whole batch.

    Args:
        at_once: check all of a dtype together and move them out of MLX together. Each operation on a GPU has its price,
            and so has each way from it; a CPU would only need more memory.
    """
    groups = _alike(jobs) if at_once else [[index] for index in range(len(jobs))]
    joined = [mx.concatenate([embeds[index].reshape(-1) for index in group]) for group in groups]
    finite = mx.stack([is_finite(x) for x in joined])
    mx.async_eval(joined, finite)
    arrays: list[NDArray[Any] | None] = [None] * len(jobs)
    for group, x, all_finite in zip(groups, joined, np.array(finite), strict=True):
        numbers = np.array(x.view(mx.uint8), copy=False).view(NUMPY_DTYPES[jobs[group[0]].dtype])
        ends = np.cumsum([embeds[index].size for index in group])
        for index, own in zip(group, np.split(numbers, ends[:-1]), strict=True):
            if all_finite or is_finite(embeds[index]).item():
                arrays[index] = own.copy().reshape(embeds[index].shape)
    return arrays


def _alike(jobs: Sequence[Job]) -> list[list[int]]:
    """The jobs of each dtype, by index."""
    groups: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.dtype, []).append(index)
    return list(groups.values())


def _export(hidden_states: NDArray[Any], job: Job) -> PromptEmbeds:
    attention_mask = _attention_mask(job)
    for array in (hidden_states, attention_mask):
        array.setflags(write=False)  # replies send this very memory, several at a time where the cache has it
    return PromptEmbeds(hidden_states, attention_mask, job.dtype, rows_axis=1 if job.combine == "stack" else 0)


def _attention_mask(job: Job) -> NDArray[np.bool_]:
    position, body = np.arange(job.delivered_rows), len(job.input_ids) - job.tail_rows
    return ((position < body) | (position >= job.delivered_rows - job.tail_rows))[job.dropped_rows :]
