"""The rows of a batch, concatenated, and who attends to whom. Jobs in, input of the fused forward pass out."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from encoder.qwen3.cuda.kernels import QUERY_BLOCK_ROWS
from encoder.qwen3.rows import pack
from encoder.types import Job

MIN_ROWS = 16  # keeps matrix products on their fast kernels
SIZES_PER_DOUBLING = 16  # sizes of a pass between one power of two and the next
QUERY_BLOCKS_STEP = 8  # above that, the number of query blocks is rounded up: each shape is traced by itself

QueryBlock = tuple[int, int, int, int, int]  # as `Kernels.attend` takes it


@dataclass(frozen=True, slots=True)
class Packed:
    """All rows of a batch, job after job, then filler rows.

    Attributes:
        input_ids, position_ids: (T,) int32.
        query_blocks: (n, 5) int32, as `Kernels.attend` takes them; the last ones may have no rows.
        spans: the rows of each job.
    """

    input_ids: mx.array
    position_ids: mx.array
    query_blocks: mx.array
    spans: list[slice]


def round_rows(rows: int) -> int:
    """The size of the pass that computes so many rows: one of few sizes.

    The first product of a size takes the GPU's library 3 to 30 ms longer, so all sizes run before the first request.
    Multiples of 16 up to 512, then sixteen sizes to each doubling: 544, 576, ..., 1024, 1088, ...
    """
    step = max(MIN_ROWS, (1 << max(rows - 1, 0).bit_length()) // (2 * SIZES_PER_DOUBLING))
    return max(MIN_ROWS, -(-rows // step) * step)


def pack_and_fill(jobs: Sequence[Job]) -> Packed:
    """Concatenate the rows of all jobs, and fill up to the size of a pass."""
    rows = pack(jobs, tokens_first=False)
    count = len(rows.input_ids)
    filler = round_rows(count) - count
    query_blocks: list[QueryBlock] = []
    for span in rows.spans:
        query_blocks += _query_blocks(span.start, span.live_stop - span.start, span.stop - span.start)
    query_blocks += _query_blocks(count, filler, 0)
    if len(query_blocks) > QUERY_BLOCKS_STEP:
        query_blocks += [(0, 0, 0, 0, 0)] * (-len(query_blocks) % QUERY_BLOCKS_STEP)
    return Packed(
        mx.array(np.array(rows.input_ids + [0] * filler, np.int32)),
        mx.array(np.array(rows.position_ids + [0] * filler, np.int32)),
        mx.array(np.array(query_blocks, dtype=np.int32)),
        [slice(span.start, span.live_stop) for span in rows.spans],
    )


def _query_blocks(start: int, rows: int, keys: int) -> list[QueryBlock]:
    """The blocks of one sequence of rows, which attend to its first `keys` rows."""
    return [
        (start + offset, min(QUERY_BLOCK_ROWS, rows - offset), start, keys, offset)
        for offset in range(0, rows, QUERY_BLOCK_ROWS)
    ]
