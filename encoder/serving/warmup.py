"""The passes that run before the first request, and the job that they and the probes run."""

import logging
import time
from dataclasses import replace
from typing import NamedTuple

from encoder.errors import EncoderError
from encoder.text_encoder import TextEncoder
from encoder.types import COMMON_WINDOW, Job, Tap

logger = logging.getLogger(__name__)


class WarmPass(NamedTuple):
    """A pass of so many rows, of a size that had run before, and how long it took."""

    rows: int
    seconds: float


def warm_up(encoder: TextEncoder, max_rows: int) -> WarmPass:
    """Run the model once at each size that is slow the first time.

    Args:
        encoder: to run.
        max_rows: of a batch.
    Returns:
        The largest pass within a common window.
    Errors: whatever the model raises for a pass within a common window.
    """
    largest = WarmPass(0, 0.0)
    for rows in encoder.forward.warmup_sizes(max_rows):
        try:
            _run(encoder, warmup_job(encoder, rows))
            if rows <= COMMON_WINDOW:  # also one token and live padding, for which the plain pass needs a mask array
                started_at = time.perf_counter()
                _run(encoder, replace(warmup_job(encoder, 1), computed_rows=rows, delivered_rows=rows))
                largest = WarmPass(rows, time.perf_counter() - started_at)
        except Exception as error:  # whatever MLX raises where a GPU has no room for a large batch beside the model
            if rows <= COMMON_WINDOW:
                raise
            logger.warning("A batch of %d tokens does not run: %s. Set max_batch_tokens below that.", rows, error)
            break
    return largest


def warmup_job(encoder: TextEncoder, rows: int) -> Job:
    """A job of so many tokens, through all layers."""
    return Job(
        input_ids=(0,) * rows,
        computed_rows=rows,
        delivered_rows=rows,
        dropped_rows=0,
        taps=(Tap(encoder.num_layers, normed=True),),
        combine="concat",
        dtype="bfloat16",
    )


def _run(encoder: TextEncoder, job: Job) -> None:
    [outcome] = encoder.run([job])
    if isinstance(outcome, EncoderError):
        raise outcome
