"""Hidden states of a batch in, the prompt embeds of each job out. Step 5 of the path.

Takes each job's own rows and taps, combines them, settles the padding rows, casts, and checks that all is finite.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.errors import EncoderError, InvalidField, ModelFailure
from encoder.types import Job, PromptEmbeds, Tap


def select(hidden_states: Mapping[Tap, mx.array], jobs: Sequence[Job]) -> list[PromptEmbeds | EncoderError]:
    """The result of each job, or the error that concerns it alone. Evaluates; call on the model thread.

    Args:
        hidden_states: (B, L, D) for every tap that a job wants, rows in the order of `jobs`.
    """
    embeds = [combine(hidden_states, row, job) for row, job in enumerate(jobs)]
    cast = [x.astype(getattr(mx, job.dtype)) for x, job in zip(embeds, jobs, strict=True)]
    finite = [(mx.isfinite(x).all(), mx.isfinite(y).all()) for x, y in zip(embeds, cast, strict=True)]
    mx.eval(cast, finite)
    return [
        _not_finite(job, bool(computed.item())) if not delivered.item() else _export(x, job)
        for x, job, (computed, delivered) in zip(cast, jobs, finite, strict=True)
    ]


def combine(hidden_states: Mapping[Tap, mx.array], row: int, job: Job) -> mx.array:
    """One job's hidden states as one array: (rows, n*D) for `concat`, (n, rows, D) for `stack`."""
    rows = min(job.computed_rows, job.delivered_rows)
    taken = [hidden_states[tap][row, :rows] for tap in job.taps]  # n of (rows, D)
    joined = mx.concatenate(taken, axis=-1) if job.combine == "concat" else mx.stack(taken, axis=0)
    zero_rows = [(0, 0)] * (joined.ndim - 2) + [(0, job.delivered_rows - rows), (0, 0)]
    return mx.pad(joined, zero_rows)[..., job.dropped_rows :, :]


def _not_finite(job: Job, finite_as_computed: bool) -> EncoderError:
    if finite_as_computed:
        return InvalidField("dtype", f"the hidden states overflow {job.dtype}. Ask for bfloat16 or float32.")
    return ModelFailure("The hidden states hold NaN or infinity. Check the checkpoint, or compute in float32.")


def _export(x: mx.array, job: Job) -> PromptEmbeds:
    bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x  # NumPy has no bfloat16
    return PromptEmbeds(np.array(bits, order="C"), _attention_mask(job), job.dtype)


def _attention_mask(job: Job) -> NDArray[np.bool_]:
    return np.arange(job.dropped_rows, job.delivered_rows) < len(job.input_ids)
