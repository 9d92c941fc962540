"""The rows of a batch without padding, one after the other: for the passes that need no rectangle. Knows no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
        input_ids, position_ids: of each row.
        spans: of each job.
        token_rows: how many of the rows are tokens.
    """

    input_ids: list[int]
    position_ids: list[int]
    spans: list[Span]
    token_rows: int


def pack(jobs: Sequence[Job], *, tokens_first: bool) -> BatchRows:
    """Concatenate the rows of all jobs.

    Args:
        tokens_first: the tokens of all jobs stand before the live padding rows of all jobs; else job follows job.
    """
    token_rows = sum(len(job.input_ids) for job in jobs)
    input_ids: list[int] = []
    position_ids: list[int] = []
    live_ids, live_positions = ([], []) if tokens_first else (input_ids, position_ids)
    first_live = token_rows if tokens_first else 0
    spans: list[Span] = []
    for job in jobs:
        start = len(input_ids)
        input_ids += job.input_ids
        position_ids += range(len(job.input_ids))
        stop, live = len(input_ids), first_live + len(live_ids)
        positions = range(len(job.input_ids), job.computed_rows)
        live_ids += [job.pad_token_id] * len(positions)
        live_positions += positions if job.pad_position is None else [job.pad_position] * len(positions)
        spans.append(Span(start, stop, live, first_live + len(live_ids)))
    if tokens_first:
        input_ids += live_ids
        position_ids += live_positions
    return BatchRows(input_ids, position_ids, spans, token_rows)
