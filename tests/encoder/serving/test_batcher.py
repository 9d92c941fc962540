from collections.abc import Callable

import pytest

from encoder.errors import QueueFull, RequestTooLarge
from encoder.serving.batcher import ROOM_SHARE, Batcher
from encoder.serving.entry import Entry
from encoder.types import Job, Tap

MakeEntry = Callable[..., Entry]


@pytest.fixture
def batcher() -> Batcher:
    return Batcher(max_queue_tokens=1024, max_batch_tokens=256)


@pytest.fixture
def make_entry() -> MakeEntry:
    def make(length: int, depth: int = 1) -> Entry:
        job = Job(
            input_ids=(1,) * length,
            computed_rows=length,
            delivered_rows=length,
            dropped_rows=0,
            taps=(Tap(depth, False),),
            combine="concat",
            dtype="float32",
        )
        return Entry(job)

    return make


def lengths(entries: list[Entry]) -> list[int]:
    return [entry.length for entry in entries]


def test_an_empty_queue_gives_an_empty_batch(batcher: Batcher) -> None:
    assert batcher.take_batch() == []


def test_one_prompt_alone_is_a_batch_at_once(batcher: Batcher, make_entry: MakeEntry) -> None:
    """It does not wait for others."""
    batcher.put([make_entry(16)], retry_after_s=1)

    assert lengths(batcher.take_batch()) == [16]
    assert len(batcher) == 0
    assert batcher.queued_tokens == 0


def test_the_entry_whose_turn_it_is_leads_every_batch(batcher: Batcher, make_entry: MakeEntry) -> None:
    """A long prompt behind a stream of short ones would starve if batches were chosen for their fit alone."""
    batcher.put([make_entry(256)], retry_after_s=1)
    batcher.put([make_entry(16) for _ in range(8)], retry_after_s=1)

    assert lengths(batcher.take_batch()) == [256]


def test_a_batch_stays_inside_its_token_budget(batcher: Batcher, make_entry: MakeEntry) -> None:
    batcher.put([make_entry(64) for _ in range(6)], retry_after_s=1)

    assert lengths(batcher.take_batch()) == [64] * 4
    assert lengths(batcher.take_batch()) == [64] * 2


def test_the_nearest_in_length_join_first(batcher: Batcher, make_entry: MakeEntry) -> None:
    batcher.put([make_entry(n) for n in (64, 16, 80, 64)], retry_after_s=1)

    assert lengths(batcher.take_batch()) == [64, 64, 80]


def test_a_prompt_that_would_make_all_others_longer_runs_apart(batcher: Batcher, make_entry: MakeEntry) -> None:
    """One long and several short prompts cost more in one rectangle than apart."""
    batcher.put([make_entry(n) for n in (16, 16, 80)], retry_after_s=1)

    assert lengths(batcher.take_batch()) == [16, 16]  # 3 x 80 would be within the budget
    assert lengths(batcher.take_batch()) == [80]


def test_a_prompt_that_would_take_all_others_deeper_runs_apart(batcher: Batcher, make_entry: MakeEntry) -> None:
    """FLUX.2 klein's 512 rows need 27 layers; beside a short Z-Image prompt they would run through 35."""
    batcher.count_tokens = sum
    batcher.put([make_entry(200, depth=27), make_entry(40, depth=35), make_entry(16, depth=27)], retry_after_s=1)

    assert lengths(batcher.take_batch()) == [200, 16]
    assert lengths(batcher.take_batch()) == [40]


def test_with_a_high_fixed_cost_different_prompts_share_a_batch(batcher: Batcher, make_entry: MakeEntry) -> None:
    """On a GPU a short prompt alone takes nearly as long as a long one."""
    batcher.count_tokens = sum
    batcher.overhead_rows = 400
    batcher.put([make_entry(200, depth=27), make_entry(40, depth=35)], retry_after_s=1)

    assert lengths(batcher.take_batch()) == [200, 40]


def test_an_entry_over_the_budget_runs_alone(batcher: Batcher, make_entry: MakeEntry) -> None:
    batcher.put([make_entry(512), make_entry(512)], retry_after_s=1)

    assert lengths(batcher.take_batch()) == [512]
    assert lengths(batcher.take_batch()) == [512]


def test_a_full_queue_takes_all_prompts_of_a_request_or_none(batcher: Batcher, make_entry: MakeEntry) -> None:
    batcher.put([make_entry(256) for _ in range(3)], retry_after_s=1)

    with pytest.raises(QueueFull, match=r"holds 768 of 1024 tokens, this request adds 512. Retry in 7 s") as caught:
        batcher.put([make_entry(256), make_entry(256)], retry_after_s=7)

    assert caught.value.retry_after_s == 7
    assert len(batcher) == 3
    assert batcher.queued_tokens == 768


def test_a_request_that_would_not_fit_an_empty_queue_is_too_large(batcher: Batcher, make_entry: MakeEntry) -> None:
    """429 would tell the client to retry for ever."""
    with pytest.raises(RequestTooLarge, match="adds 1280 padded tokens, the whole queue holds 1024"):
        batcher.put([make_entry(256) for _ in range(5)], retry_after_s=1)


def test_a_prompt_without_rows_takes_a_place_in_the_queue(batcher: Batcher, make_entry: MakeEntry) -> None:
    """Else the queue would have no bound for empty prompts."""
    batcher.put([make_entry(0)], retry_after_s=1)

    assert batcher.queued_tokens == 1


def test_a_discarded_entry_frees_its_place(batcher: Batcher, make_entry: MakeEntry) -> None:
    entries = [make_entry(256) for _ in range(4)]
    batcher.put(entries, retry_after_s=1)

    assert batcher.discard(entries[1])
    assert not batcher.discard(entries[1])
    batcher.put([make_entry(256)], retry_after_s=1)
    assert batcher.queued_tokens == 1024


def test_a_batch_takes_half_of_the_prompts_that_wait_and_run(make_entry: MakeEntry) -> None:
    """One half runs while the other is answered and its clients ask again. One batch would leave the model idle."""
    batcher = Batcher(max_queue_tokens=4096, max_batch_tokens=4096)
    for _ in range(64):
        batcher.put([make_entry(16)], retry_after_s=1)

    first = batcher.take_batch()
    assert len(first) == 32
    second = batcher.take_batch()
    assert len(second) == 32  # of 32 that wait and 32 that run

    batcher.finish([*first, *second[4:]])
    for _ in range(60):
        batcher.put([make_entry(16)], retry_after_s=1)
    assert len(batcher.take_batch()) == 32  # of 60 that wait and 4 that run


def test_prompts_of_one_request_share_a_batch_whole(make_entry: MakeEntry) -> None:
    """They are answered together, so halving them would only delay the answer."""
    batcher = Batcher(max_queue_tokens=4096, max_batch_tokens=4096)
    for _ in range(2):
        batcher.put([make_entry(16) for _ in range(64)], retry_after_s=1)

    assert sorted(entry.request for entry in batcher.take_batch()) == [1] * 32 + [2] * 32


def test_a_single_prompt_shares_a_batch_with_a_few_prompts_of_a_large_request(make_entry: MakeEntry) -> None:
    """In a batch with all 64 it would wait as long as they do."""
    batcher = Batcher(max_queue_tokens=4096, max_batch_tokens=4096)
    batcher.put([make_entry(16) for _ in range(64)], retry_after_s=1)
    batcher.put([make_entry(16)], retry_after_s=1)

    assert [entry.request for entry in batcher.take_batch()] == [1, 2, 1, 1, 1]


def test_large_requests_come_in_small_batches_for_a_while_after_a_small_one(make_entry: MakeEntry) -> None:
    """Its client may ask again at any time, and waits for the batch that runs then."""
    batcher = Batcher(max_queue_tokens=1024, max_batch_tokens=4096)
    batcher.put([make_entry(16)], retry_after_s=1)
    batcher.take_batch()
    batcher.put([make_entry(16) for _ in range(64)], retry_after_s=1)
    in_small_batches = [len(batcher.take_batch()) for _ in range(16)]
    batcher.put([make_entry(16)], retry_after_s=1)
    batcher.take_batch()
    for _ in range(2):
        batcher.put([make_entry(16) for _ in range(64)], retry_after_s=1)
        while batcher.take_batch():
            pass

    batcher.put([make_entry(16) for _ in range(64)], retry_after_s=1)

    assert in_small_batches == [4] * 16
    assert len(batcher.take_batch()) == 64


def test_a_small_share_still_pays_for_the_fixed_cost_of_its_batch(make_entry: MakeEntry) -> None:
    """A GPU takes as long for four short prompts as for fifty."""
    batcher = Batcher(max_queue_tokens=4096, max_batch_tokens=4096, overhead_rows=400)
    batcher.put([make_entry(16) for _ in range(64)], retry_after_s=1)
    batcher.put([make_entry(16)], retry_after_s=1)

    assert len(batcher.take_batch()) == 51  # 800 tokens of the large request, and the single prompt


def test_what_runs_and_what_is_asked_for_counts_before_there_is_room(make_entry: MakeEntry) -> None:
    batcher = Batcher(max_queue_tokens=1024, max_batch_tokens=256)
    batcher.put([make_entry(256) for _ in range(4)], retry_after_s=1)
    running = batcher.take_batch()

    assert batcher.tokens_before_room([make_entry(16)]) == 256  # that run; a quarter of the queue is free
    assert batcher.tokens_before_room([make_entry(512)]) == 512
    batcher.put([make_entry(256)], retry_after_s=1)
    assert batcher.tokens_before_room([make_entry(16)]) == 256 + 1024 // ROOM_SHARE
    batcher.finish(running)
    assert batcher.tokens_before_room([make_entry(16)]) == 1024 // ROOM_SHARE


def test_a_batch_below_its_fixed_cost_is_not_halved(make_entry: MakeEntry) -> None:
    """A GPU takes as long for eight short prompts as for one."""
    batcher = Batcher(max_queue_tokens=4096, max_batch_tokens=4096, overhead_rows=400)
    for _ in range(8):
        batcher.put([make_entry(16)], retry_after_s=1)

    assert len(batcher.take_batch()) == 8
