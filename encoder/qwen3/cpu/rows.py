"""Where the rows of a batch stand when they run without padding. Knows nothing of weights.

Shape letters: T rows, d head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.model import rope_periods
from encoder.types import Job


class Span(NamedTuple):
    """Rows of one job: its tokens from `start` to `stop`, its live padding rows from `live` to `live_stop`."""

    start: int
    stop: int
    live: int
    live_stop: int


@dataclass(frozen=True, slots=True)
class BatchRows:
    """All rows of a batch: the tokens of every job, then the live padding rows of every job.

    Live padding rows see the tokens of their own job and are seen by nobody, so they need no keys and values.

    Attributes:
        input_ids, position_ids: (T,) int32.
        spans: of each job.
        token_rows: rows that are tokens; they come first.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    spans: list[Span]
    token_rows: int


def pack(jobs: Sequence[Job], pad_token_id: int) -> BatchRows:
    """Put the rows of all jobs one after the other."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    for job in jobs:
        input_ids += job.input_ids
        position_ids += range(len(job.input_ids))
    token_rows = len(input_ids)
    spans: list[Span] = []
    start = 0
    for job in jobs:
        stop, live = start + len(job.input_ids), len(input_ids)
        positions = range(len(job.input_ids), job.computed_rows)
        input_ids += [pad_token_id] * len(positions)
        position_ids += positions if job.pad_position is None else [job.pad_position] * len(positions)
        spans.append(Span(start, stop, live, len(input_ids)))
        start = stop
    return BatchRows(np.array(input_ids, np.int32), np.array(position_ids, np.int32), spans, token_rows)


def rope_cos_sin(
    position_ids: NDArray[np.int32], config: Qwen3Config
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of the angle by which RoPE rotates each pair of a head, (T, d/2) each."""
    periods = np.array(rope_periods(config.rope_theta, config.head_dim))
    angles = position_ids[:, None].astype(np.float32) * (1 / periods)
    return np.cos(angles), np.sin(angles)
