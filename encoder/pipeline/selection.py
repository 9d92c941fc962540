"""Hidden states of a batch in, the prompt embeds of each job out.

Takes each job's rows at its taps, combines them, adds or cuts padding rows, casts, and checks that all are finite.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.errors import EncoderError, InvalidField, ModelFailure
from encoder.pipeline.finite import is_finite
from encoder.qwen3.cuda.to_host import HostCopy, copy_to_host
from encoder.types import LARGE_BYTES, Job, PromptEmbeds, Rows, Tap

Outcome = PromptEmbeds | EncoderError  # of one job: its result, or the error that concerns it alone

# NumPy has no bfloat16.
NUMPY_DTYPES = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The results of a batch, while MLX computes them.

    Attributes:
        jobs: of the batch.
        taken: the rows of each job at each of its taps, as the model gave them.
        embeds: of each job, combined and cast.
        groups: the jobs, by index, that are checked together and copied to the host together.
        copies: the bytes of each group's embeds, concatenated.
        finite: (groups,) bool, whether all numbers of a group are finite.
    """

    jobs: Sequence[Job]
    taken: list[list[mx.array]]
    embeds: list[mx.array]
    groups: list[list[int]]
    copies: list[HostCopy]
    finite: mx.array


def select(hidden_states: Mapping[Tap, Rows], jobs: Sequence[Job], grouped: bool | None = None) -> Selection:
    """Let MLX compute the results, and don't wait for them. Call this and `export` on the model thread.

    Args:
        hidden_states: for every tap that a job wants, the rows of each job in the order of `jobs`: (B, L, D), or B
            times (rows, D).
        jobs: of the batch.
        grouped: whether all jobs of a dtype are checked together and copied to the host together. None means on a GPU,
            where each operation and each copy has a fixed cost; on a CPU it would only take more memory.
    """
    taken = [_take(hidden_states, index, job) for index, job in enumerate(jobs)]
    embeds = [
        combine([x.astype(getattr(mx, job.dtype)) for x in states], job)
        for states, job in zip(taken, jobs, strict=True)
    ]
    if grouped is None:
        grouped = mx.default_device().type == mx.DeviceType.gpu
    groups = _group_by_dtype(jobs) if grouped else [[index] for index in range(len(jobs))]
    numbers = [mx.concatenate([embeds[index].reshape(-1) for index in group]) for group in groups]
    # Describe the copies now. If `export` did, the device would compute them after the batch that has begun by then.
    copies = [copy_to_host(x.view(mx.uint8)) for x in numbers]
    finite = mx.stack([is_finite(x) for x in numbers])
    mx.async_eval([copy.done for copy in copies], finite)
    return Selection(jobs, taken, embeds, groups, copies, finite)


def export(selection: Selection) -> list[Outcome]:
    """Wait for a selection, and return the result of each job, or the error that concerns it alone.

    Results that were copied to page-locked memory stay there. Small results of a group of several stay in the memory
    that MLX holds for all of the group: each copy would let other Python threads take over while the GPU waits. These
    two kinds share memory, see `PromptEmbeds.detach`. All other results are copied out of MLX's memory one by one.
    """
    jobs, embeds = selection.jobs, selection.embeds
    outcomes: dict[int, Outcome] = {}
    for group, copy, all_finite in zip(selection.groups, selection.copies, np.array(selection.finite), strict=True):
        whole = copy.wait().view(NUMPY_DTYPES[jobs[group[0]].dtype])
        ends = np.cumsum([embeds[index].size for index in group])
        for index, own in zip(group, np.split(whole, ends[:-1]), strict=True):
            if all_finite or is_finite(embeds[index]).item():
                shares_memory = copy.host is not None or (len(group) > 1 and own.nbytes < LARGE_BYTES)
                numbers = (own if shares_memory else own.copy()).reshape(embeds[index].shape)
                outcomes[index] = _prompt_embeds(numbers, jobs[index], shares_memory)
            else:
                outcomes[index] = _not_finite(selection.taken[index], jobs[index])
    return [outcomes[index] for index in range(len(jobs))]


def _take(hidden_states: Mapping[Tap, Rows], index: int, job: Job) -> list[mx.array]:
    """The computed rows of the job with this index in its batch, at each of its taps: n of (rows, D)."""
    rows = min(job.computed_rows, job.delivered_rows)
    taken = [x if len(x) == rows else x[:rows] for x in (hidden_states[tap][index] for tap in job.taps)]
    return [_unit_rms(x) for x in taken] if job.unit_rms else taken


def combine(taken: list[mx.array], job: Job) -> mx.array:
    """One job's hidden states as one array, with its padding rows and without its dropped rows.

    Args:
        taken: n of (rows, D), already in the dtype of the result, so that fewer bytes move.
        job: says how they are combined.
    Returns:
        (rows, n*D) for `concat` and `interleave`, (n, rows, D) for `stack`, (rows, n, D) for `stack_rows`.
    """
    if job.bundle > 1:
        taken = [mx.concatenate(taken[i : i + job.bundle], axis=-1) for i in range(0, len(taken), job.bundle)]
    placed = [_place_padding(x, job) for x in taken]
    if job.dropped_rows:
        placed = [x[job.dropped_rows :] for x in placed]
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
    """(rows, D) to (delivered_rows, D): insert the rows that were not computed before the tail."""
    missing = job.delivered_rows - x.shape[0]
    if missing <= 0:
        return x
    body, tail = x[: x.shape[0] - job.tail_rows], x[x.shape[0] - job.tail_rows :]
    has_live_row = job.computed_rows > len(job.input_ids)  # the last row; all other padding rows equal it
    padding = mx.repeat(body[-1:], missing, axis=0) if has_live_row else mx.zeros((missing, x.shape[1]), x.dtype)
    return mx.concatenate([body, padding, tail], axis=0)


def _unit_rms(x: mx.array) -> mx.array:
    """Scale each row to a root mean square of 1. Source: diffusers, pipelines/bria_fibo2/pipeline_bria_fibo2.py."""
    return mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6).astype(x.dtype)


def _not_finite(taken: Sequence[mx.array], job: Job) -> EncoderError:
    """Whether the cast to the job's dtype made the numbers infinite, or the model did."""
    if all(is_finite(x).item() for x in taken):
        return InvalidField("dtype", f"the hidden states overflow {job.dtype}. Ask for bfloat16 or float32.")
    return ModelFailure("The hidden states hold NaN or infinity. Check the checkpoint, or compute in float32.")


def _group_by_dtype(jobs: Sequence[Job]) -> list[list[int]]:
    """The jobs of each dtype, by index."""
    groups: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.dtype, []).append(index)
    return list(groups.values())


def _prompt_embeds(hidden_states: NDArray[Any], job: Job, shares_memory: bool) -> PromptEmbeds:
    hidden_states.setflags(write=False)  # replies send this very memory, several at a time for a cached result
    body = len(job.input_ids) - job.tail_rows
    attention_mask = _attention_mask(job.delivered_rows, body, job.tail_rows, job.dropped_rows)
    rows_axis = 1 if job.combine == "stack" else 0
    return PromptEmbeds(hidden_states, attention_mask, job.dtype, rows_axis, shares_memory)


@lru_cache(maxsize=1024)  # a batch has many prompts of few lengths
def _attention_mask(delivered_rows: int, body_rows: int, tail_rows: int, dropped_rows: int) -> NDArray[np.bool_]:
    position = np.arange(delivered_rows)
    mask = ((position < body_rows) | (position >= delivered_rows - tail_rows))[dropped_rows:]
    mask.setflags(write=False)
    return mask
