"""Where the rows of a batch stand when they run without padding, and which of them look at which keys.

Step 3 of the path for encoder/qwen3/cpu/forward.py. Knows nothing of weights.

Shape letters: T packed rows, G query heads for each key-value head, d head_dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.model import rope_periods
from encoder.types import Job

Numbers = NDArray[np.float32]

QUERY_BLOCK = 128  # queries that share one product with the keys before them, so that long prompts skip half of it
SCORES_AT_ONCE = 2**19  # of one key-value head: few operations for many short prompts, little memory for a long one
HIDDEN = -1e9  # log2 of the weight of a key that may not be seen


class Span(NamedTuple):
    """Where one job's rows stand in the packed order: its real tokens, and its live padding rows."""

    real: slice
    live: slice


@dataclass(frozen=True, slots=True)
class Packed:
    """All rows of a batch: the real rows of every job, then the live rows of every job, then filling.

    Attributes:
        input_ids, position_ids: (T,) int32.
        spans: of each job.
        real_rows: of all jobs, rounded up; keys and values are computed for these alone.
    """

    input_ids: mx.array
    position_ids: NDArray[np.int32]
    spans: list[Span]
    real_rows: int


def pack(jobs: Sequence[Job], pad_token_id: int, row_multiple: int) -> Packed:
    """Put the rows of all jobs in one line, and fill it up to a multiple."""
    input_ids: list[int] = []
    positions: list[int] = []
    starts = []
    for job in jobs:
        starts.append(len(input_ids))
        input_ids += job.input_ids
        positions += range(len(job.input_ids))
    real_rows = len(input_ids)
    spans = []
    for job, start in zip(jobs, starts, strict=True):
        live = range(len(job.input_ids), job.computed_rows)
        spans.append(Span(slice(start, start + len(job.input_ids)), slice(len(input_ids), len(input_ids) + len(live))))
        input_ids += [pad_token_id] * len(live)
        positions += live if job.pad_position is None else [job.pad_position] * len(live)
    filling = -len(input_ids) % row_multiple or (row_multiple if not input_ids else 0)
    return Packed(
        mx.array(np.array(input_ids + [pad_token_id] * filling, dtype=np.int32)),
        np.array(positions + [0] * filling, dtype=np.int32),
        spans,
        max(1, -(-real_rows // row_multiple)) * row_multiple,
    )


def turns(packed: Packed, config: Qwen3Config) -> tuple[Numbers, Numbers]:
    """cos and sin of the angle by which RoPE turns each pair of a head, both (T, d/2)."""
    periods = np.array(rope_periods(config.rope_theta, config.head_dim))
    angles = packed.position_ids[:, None].astype(np.float32) * (1 / periods)
    return np.cos(angles), np.sin(angles)


class Block(NamedTuple):
    """Queries that look at the same keys, and where their scores stand in their look."""

    rows: slice
    keys: slice
    scores: slice


@dataclass(frozen=True, slots=True)
class Look:
    """Blocks whose scores become weights in one go.

    Attributes:
        blocks: in the order of their rows.
        visible: 1 for each score that counts and 0 for the others, (scores,) float32.
    """

    blocks: list[Block]
    visible: mx.array

    def hidden(self, block: Block) -> mx.array:
        """What is added to the scores of a block, (scores,)."""
        return (1 - self.visible[block.scores]) * HIDDEN


def plan_looks(spans: Sequence[Span], groups: int) -> list[Look]:
    """Which rows look at which keys: real rows at those up to themselves, live rows at all real rows of their job."""
    looks: list[Look] = []
    blocks: list[Block] = []
    visible: list[Numbers] = []
    end = 0
    for rows, keys in _rows_and_keys(spans):
        count, length = rows.stop - rows.start, keys.stop - keys.start
        if end and end + count * groups * length > SCORES_AT_ONCE:
            looks.append(Look(blocks, mx.array(np.concatenate(visible))))
            blocks, visible, end = [], [], 0
        blocks.append(Block(rows, keys, slice(end, end + count * groups * length)))
        seen = length if rows.start >= keys.stop else length - count + 1  # by the first row
        visible.append(np.tri(count, length, seen - 1, np.float32).repeat(groups, axis=0).reshape(-1))
        end = blocks[-1].scores.stop
    if blocks:
        looks.append(Look(blocks, mx.array(np.concatenate(visible))))
    return looks


def _rows_and_keys(spans: Sequence[Span]) -> Iterator[tuple[slice, slice]]:
    for span in spans:
        for start in range(span.real.start, span.real.stop, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, span.real.stop)
            yield slice(start, stop), slice(span.real.start, stop)
    for span in spans:
        if span.live.start < span.live.stop:
            yield span.live, span.real
