"""Where the rows of a batch stand without padding."""

import pytest

from encoder.qwen3.rows import Span, pack
from encoder.types import Job


def make_job(tokens: int, rows: int, **fields: int) -> Job:
    ids = tuple(range(10, 10 + tokens))
    return Job(ids, rows, rows, dropped_rows=0, taps=(), combine="concat", dtype="float32", **fields)


JOBS = [
    make_job(2, 4, pad_token_id=5),
    make_job(0, 1, pad_token_id=6),
    make_job(3, 3),
    make_job(1, 3, pad_position=7, pad_token_id=5),
]


def test_tokens_of_all_jobs_stand_before_all_live_rows() -> None:
    rows = pack(JOBS, tokens_first=True)

    assert rows.spans == [Span(0, 2, 6, 8), Span(2, 2, 8, 9), Span(2, 5, 9, 9), Span(5, 6, 9, 11)]
    assert rows.input_ids == [10, 11, 10, 11, 12, 10, 5, 5, 6, 5, 5]
    assert rows.position_ids == [0, 1, 0, 1, 2, 0, 2, 3, 0, 7, 7]
    assert rows.token_rows == 6


def test_job_follows_job() -> None:
    rows = pack(JOBS, tokens_first=False)

    assert rows.spans == [Span(0, 2, 2, 4), Span(4, 4, 4, 5), Span(5, 8, 8, 8), Span(8, 9, 9, 11)]
    assert rows.input_ids == [10, 11, 5, 5, 6, 10, 11, 12, 10, 5, 5]
    assert rows.position_ids == [0, 1, 2, 3, 0, 0, 1, 2, 0, 7, 7]


@pytest.mark.parametrize("tokens_first", [True, False])
def test_an_empty_prompt_alone_has_no_rows(tokens_first: bool) -> None:
    rows = pack([make_job(0, 0)], tokens_first=tokens_first)

    assert rows.spans == [Span(0, 0, 0, 0)]
    assert rows.input_ids == rows.position_ids == []
