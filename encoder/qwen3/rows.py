"""The rows of a batch without padding, one after the other: for the passes that need no rectangle. Knows no weights.

Shape letters: T rows, d head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from encoder.types import Job


class Span(NamedTuple):
    """Rows of one job: its tokens from `start` to `stop`, its live padding rows from `live` to `live_stop`."""

    start: int
    stop: int
    live: int
    live_stop: int


@dataclass(frozen=True, slots=True)
class BatchRows:
    """All rows of a batch.

    Live padding rows see the tokens of their own job and are seen by nobody, so they need no keys and values.

    Attributes:
        input_ids, position_ids: (T,) int32.
        spans: of each job.
        token_rows: how many of the rows are tokens.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    spans: list[Span]
    token_rows: int


def pack(jobs: Sequence[Job], pad_token_id: int, *, tokens_first: bool) -> BatchRows:
    """Concatenate the rows of all jobs.

    Args:
        tokens_first: the tokens of all jobs stand before the live padding rows of all jobs; else job follows job.
    """
    tokens = [len(job.input_ids) for job in jobs]
    live_rows = [job.computed_rows - len(job.input_ids) for job in jobs]
    token_rows, rows = sum(tokens), sum(tokens) + sum(live_rows)
    input_ids, position_ids = np.full(rows, pad_token_id, np.int32), np.empty(rows, np.int32)
    spans: list[Span] = []
    start, live = 0, token_rows
    for job, token_count, live_count in zip(jobs, tokens, live_rows, strict=True):
        stop = start + token_count
        live = live if tokens_first else stop
        span = Span(start, stop, live, live + live_count)
        input_ids[span.start : span.stop] = job.input_ids
        position_ids[span.start : span.stop] = range(token_count)
        own_positions = range(token_count, job.computed_rows) if job.pad_position is None else job.pad_position
        position_ids[span.live : span.live_stop] = own_positions
        spans.append(span)
        start, live = (span.stop, span.live_stop) if tokens_first else (span.live_stop, 0)
    return BatchRows(input_ids, position_ids, spans, token_rows)
