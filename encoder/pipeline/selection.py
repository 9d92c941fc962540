"""Hidden states of a batch in, the prompt embeds of each job out. Step 5 of the path.

Takes each job's own rows and taps, combines them, settles the padding rows, casts, and checks that all is finite.
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
from encoder.qwen3.cuda.to_host import Leaving, leave
from encoder.types import LARGE_BYTES, Job, PromptEmbeds, Rows, Tap

Outcome = PromptEmbeds | EncoderError  # of one job: its result, or the error that concerns it alone

# NumPy has no bfloat16.
NUMPY_DTYPES = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What a batch's jobs get, on its way: MLX has been told to compute it.

    Attributes:
        jobs: of the batch.
        taken: the rows of each job at each of its taps, as the model gave them.
        embeds: of each job, combined and cast.
        groups: the jobs, by index, that are checked and moved out of MLX together.
        leaving: the bytes of each group's embeds, in one line.
        finite: for each group, whether all its numbers are; bool.
    """

    jobs: Sequence[Job]
    taken: list[list[mx.array]]
    embeds: list[mx.array]
    groups: list[list[int]]
    leaving: list[Leaving]
    finite: mx.array


def select(hidden_states: Mapping[Tap, Rows], jobs: Sequence[Job], at_once: bool | None = None) -> Selection:
    """Tell MLX what to compute, and don't wait for it. Call on the model thread, as `export`.

    Args:
        hidden_states: for every tap that a job wants, the rows of each job in the order of `jobs`: (B, L, D), or B
            times (rows, D).
        at_once: check all jobs of a dtype together and move them out of MLX together. A GPU does unless told otherwise:
            each operation has its price there, and so has each way from it. A CPU would only need more memory.
    """
    taken = [_take(hidden_states, row, job) for row, job in enumerate(jobs)]
    embeds = [
        combine([x.astype(getattr(mx, job.dtype)) for x in own], job) for own, job in zip(taken, jobs, strict=True)
    ]
    if at_once is None:
        at_once = mx.default_device().type == mx.DeviceType.gpu
    groups = _alike(jobs) if at_once else [[index] for index in range(len(jobs))]
    numbers = [mx.concatenate([embeds[index].reshape(-1) for index in group]) for group in groups]
    leaving = [leave(x.view(mx.uint8)) for x in numbers]  # now: what is asked for later stands behind the next batch
    finite = mx.stack([is_finite(x) for x in numbers])
    mx.async_eval([each.done for each in leaving], finite)
    return Selection(jobs, taken, embeds, groups, leaving, finite)


def export(selection: Selection) -> list[Outcome]:
    """Wait for a selection, and take the result of each job out of MLX, or the error that concerns it alone.

    What has left for memory of ours stays there. What MLX holds is copied, each result by itself, but small ones of a
    group together: one by one they would take the thread as many turns with the others of Python's, while a GPU may
    wait for it. `PromptEmbeds.own` is for whoever keeps one.
    """
    jobs, embeds = selection.jobs, selection.embeds
    outcomes: dict[int, Outcome] = {}
    for group, leaving, all_finite in zip(selection.groups, selection.leaving, np.array(selection.finite), strict=True):
        whole = leaving.wait().view(NUMPY_DTYPES[jobs[group[0]].dtype])
        ends = np.cumsum([embeds[index].size for index in group])
        for index, own in zip(group, np.split(whole, ends[:-1]), strict=True):
            if all_finite or is_finite(embeds[index]).item():
                shares = leaving.host is not None or (len(group) > 1 and own.nbytes < LARGE_BYTES)
                numbers = (own if shares else own.copy()).reshape(embeds[index].shape)
                outcomes[index] = _prompt_embeds(numbers, jobs[index], shares)
            else:
                outcomes[index] = _not_finite(selection.taken[index], jobs[index])
    return [outcomes[index] for index in range(len(jobs))]


def _take(hidden_states: Mapping[Tap, Rows], row: int, job: Job) -> list[mx.array]:
    """The computed rows of one job at each of its taps: n of (rows, D)."""
    rows = min(job.computed_rows, job.delivered_rows)
    taken = [x if len(x) == rows else x[:rows] for x in (hidden_states[tap][row] for tap in job.taps)]
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


def _alike(jobs: Sequence[Job]) -> list[list[int]]:
    """The jobs of each dtype, by index."""
    groups: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.dtype, []).append(index)
    return list(groups.values())


def _prompt_embeds(hidden_states: NDArray[Any], job: Job, shares: bool) -> PromptEmbeds:
    hidden_states.setflags(write=False)  # replies send this very memory, several at a time where the cache has it
    body = len(job.input_ids) - job.tail_rows
    attention_mask = _attention_mask(job.delivered_rows, body, job.tail_rows, job.dropped_rows)
    rows_axis = 1 if job.combine == "stack" else 0
    return PromptEmbeds(hidden_states, attention_mask, job.dtype, rows_axis, shares)


@lru_cache(maxsize=1024)  # prompts have few lengths, and a batch many prompts
def _attention_mask(delivered_rows: int, body_rows: int, tail_rows: int, dropped_rows: int) -> NDArray[np.bool_]:
    position = np.arange(delivered_rows)
    mask = ((position < body_rows) | (position >= delivered_rows - tail_rows))[dropped_rows:]
    mask.setflags(write=False)
    return mask
