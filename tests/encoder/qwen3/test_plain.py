from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from encoder.qwen3.plain import bucket_length, make_attention_mask, pad
from encoder.types import Job, Tap

PAD = 99


def make_job(num_tokens: int, computed_rows: int | None = None) -> Job:
    rows = num_tokens if computed_rows is None else computed_rows
    return Job(
        input_ids=tuple(range(num_tokens)),
        computed_rows=rows,
        delivered_rows=rows,
        dropped_rows=0,
        taps=(Tap(1, False),),
        combine="concat",
        dtype="float32",
        pad_token_id=PAD,
    )


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [(0, 16), (1, 16), (16, 16), (17, 32), (112, 112), (128, 128), (129, 160), (512, 512), (513, 640), (2048, 2048)],
)
def test_a_bucket_is_the_next_of_few_lengths(rows: int, bucket: int) -> None:
    assert bucket_length(rows) == bucket


def test_buckets_are_few_and_waste_little() -> None:
    """MLX keeps buffers and plans for every shape that it has seen."""
    buckets = {bucket_length(rows) for rows in range(1, 2049)}

    assert len(buckets) == 24
    assert all(bucket_length(rows) <= 1.25 * rows for rows in range(64, 2049))
    assert all(bucket_length(bucket) == bucket for bucket in buckets)


def test_positions_run_on_unless_padding_has_its_own() -> None:
    """A job that gives its padding rows one position leaves its neighbours' alone."""
    one = replace(make_job(2, computed_rows=3), pad_position=1)
    batch = pad([one, make_job(2, computed_rows=5)])

    assert batch.position_ids is not None
    assert batch.position_ids[:, :5].tolist() == [[0, 1, 1, 1, 1], [0, 1, 2, 3, 4]]
    assert pad([make_job(2, computed_rows=5)]).position_ids is None


def test_a_tail_stands_right_behind_the_prompt_in_the_model() -> None:
    """Padding in the middle is put there afterwards: positions and attention do not count it."""
    job = replace(make_job(4), delivered_rows=10, tail_rows=2)
    batch = pad([job])

    assert batch.input_ids[0, :5].tolist() == [0, 1, 2, 3, PAD]
    assert batch.mask == "causal" and batch.position_ids is None


def test_a_batch_without_live_padding_needs_no_mask_array() -> None:
    batch = pad([make_job(3), make_job(20)])

    assert batch.mask == "causal"
    assert batch.input_ids.shape == (2, 32)
    assert batch.input_ids[0].tolist() == [0, 1, 2] + [PAD] * 29


def test_jobs_of_one_batch_pad_with_their_own_tokens() -> None:
    """Two presets share a batch."""
    batch = pad([make_job(1, computed_rows=3), replace(make_job(2, computed_rows=3), pad_token_id=7)])

    assert batch.input_ids[:, :3].tolist() == [[0, PAD, PAD], [0, 1, 7]]


def test_live_padding_rows_see_the_prompt_alone() -> None:
    batch = pad([make_job(2, computed_rows=16), make_job(16)])

    assert isinstance(batch.mask, mx.array)
    mask = np.array(batch.mask)
    assert mask.shape == (2, 1, 16, 16)
    assert mask[0, 0, 0].tolist() == [True] + [False] * 15
    assert mask[0, 0, 15].tolist() == [True, True] + [False] * 14
    assert mask[1, 0, 15].all()


def test_the_mask_is_causal_and_hides_padding() -> None:
    mask = np.array(make_attention_mask(mx.array([2, 3]), 3))

    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, False]]
    assert mask[1, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
