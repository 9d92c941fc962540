"""Every part gets its turn, and requests get turns by what their parts cost."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from encoder.errors import QueueFull, RequestTooLarge
from encoder.serving.batcher import WINDOW, Batcher
from encoder.serving.entry import Entry
from encoder.serving.fair_queue import FairQueue
from encoder.types import Job, Tap

LARGEST = 600


def parts(request: str, number: int, cost: float = 1.0) -> dict[str, float]:
    return {f"{request}{index}": cost for index in range(number)}


def served(queue: FairQueue[str]) -> Iterator[str]:
    while queue:
        [part] = queue.first(1)
        queue.take([part])
        yield part


def test_parts_of_one_request_keep_their_order() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(parts("a", 5))
    assert list(served(queue)) == ["a0", "a1", "a2", "a3", "a4"]


def test_a_request_that_comes_later_waits_for_no_large_one() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(parts("large", 64))
    queue.put(parts("small", 1))
    assert list(served(queue))[:2] == ["large0", "small0"]


def test_large_requests_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(parts("a", 4))
    queue.put(parts("b", 4))
    assert list(served(queue)) == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_turns_are_by_cost() -> None:
    """A part that costs as much as four others comes after them."""
    queue: FairQueue[str] = FairQueue()
    queue.put(parts("dear", 3, cost=4.0))
    queue.put(parts("cheap", 8))
    order = list(served(queue))
    assert order.index("dear1") > order.index("cheap3")
    assert order.index("dear2") > order.index("cheap7")


def test_a_stream_of_small_requests_starves_no_large_one() -> None:
    """Start-time fair queueing alone would serve each newcomer first, for ever."""
    queue: FairQueue[str] = FairQueue()
    queue.put(parts("large", 8))
    for number in range(100):
        queue.put(parts(f"small{number}-", 1))
        queue.take(queue.first(1))
    assert not any(part.startswith("large") for part in queue)


def test_what_was_put_first_goes_first() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(parts("a", 2))
    for part in ("probe", "another"):
        queue.put_first(part)
    assert list(served(queue)) == ["another", "probe", "a0", "a1"]


def test_a_part_that_another_request_wants_too_waits_no_longer_than_if_that_had_put_it() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(parts("large", 8))
    queue.take(queue.first(2))
    queue.hurry(["large7", "large6", "gone"])
    assert list(served(queue)) == ["large7", "large2", "large6", "large3", "large4", "large5"]


def test_a_part_is_never_put_off_by_another_request() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(parts("small", 1))
    queue.put(parts("large", 3))
    queue.hurry(["large2", "large1", "small0"])
    assert next(served(queue)) == "small0"


def make_entry(length: int, depth: int) -> Entry:
    return Entry(Job((1,) * length, length, length, 0, (Tap(depth, normed=False),), "concat", "float32"))


@given(
    waiting=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=8), max_size=8),
    wanted=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    taken=st.integers(0, 3),
)
def test_once_as_many_tokens_have_run_as_a_refused_request_was_told_there_is_room(
    waiting: list[list[int]], wanted: list[int], taken: int
) -> None:
    """`Retry-After` is the time that they take."""
    batcher = Batcher(max_queue_tokens=1000, max_batch_tokens=256)
    for lengths in waiting:
        with suppress(QueueFull, RequestTooLarge):
            batcher.put([make_entry(length, depth=1) for length in lengths], retry_after_s=1)
    running = [entry for _ in range(taken) for entry in batcher.take_batch()]
    entries = [make_entry(length, depth=1) for length in wanted]
    tokens = batcher.tokens_before_room(entries)

    batcher.finish(running)
    run = sum(entry.length for entry in running)
    while run < tokens:
        batch = batcher.take_batch()
        batcher.finish(batch)
        run += sum(entry.length for entry in batch)

    batcher.put(entries, retry_after_s=1)


class BatcherMachine(RuleBasedStateMachine):
    """Puts, takes, finishes and discards in any order, beside a model that knows which entries must wait and run."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher = Batcher(max_queue_tokens=LARGEST * 4, max_batch_tokens=256)
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []

    @rule(lengths=st.lists(st.integers(1, LARGEST), min_size=1, max_size=8), depth=st.integers(1, 3))
    def put(self, lengths: list[int], depth: int) -> None:
        entries = [make_entry(length, depth) for length in lengths]
        try:
            self.batcher.put(entries, retry_after_s=1)
        except (QueueFull, RequestTooLarge):
            assert sum(lengths) + sum(entry.length for entry in self.waiting) > LARGEST * 4
        else:
            self.waiting += entries

    @rule(length=st.integers(1, LARGEST))
    def put_first(self, length: int) -> None:
        entry = make_entry(length, depth=1)
        self.batcher.put_first(entry)
        self.waiting.append(entry)
        assert next(iter(self.batcher)) is entry

    @rule(place=st.integers(0, 100))
    def discard(self, place: int) -> None:
        if self.waiting:
            entry = self.waiting.pop(place % len(self.waiting))
            assert self.batcher.discard(entry)
            assert not self.batcher.discard(entry)

    @rule()
    def take(self) -> None:
        window = list(self.batcher)[:WINDOW]
        batch = self.batcher.take_batch()
        assert batch[:1] == window[:1]  # whose turn it is leads
        assert set(batch) <= set(window)
        assert len(batch) < 2 or self.batcher.count_tokens([entry.length for entry in batch]) <= 256
        for entry in batch:
            self.waiting.remove(entry)
        self.running += batch

    @rule(places=st.lists(st.integers(0, 100), max_size=4))
    def hurry(self, places: list[int]) -> None:
        if self.waiting:
            self.batcher.hurry([self.waiting[place % len(self.waiting)] for place in places])

    @rule()
    def finish(self) -> None:
        self.batcher.finish(self.running)
        self.running = []

    @invariant()
    def counts_are_exact(self) -> None:
        assert set(self.batcher) == set(self.waiting)
        assert len(self.batcher) == len(self.waiting)
        assert self.batcher.queued_tokens == sum(entry.length for entry in self.waiting)
        assert self.batcher.running == len(self.running)
        assert self.batcher.running_tokens == sum(entry.length for entry in self.running)

    def teardown(self) -> None:
        """Every entry that waits runs, even while single prompts keep coming."""
        late = set(self.waiting)
        self.batcher.max_queue_tokens = sys.maxsize
        for step in count():
            if not late:
                break
            assert step < 10 * LARGEST, "an entry starves"
            self.batcher.put([make_entry(1, depth=1)], retry_after_s=1)
            late -= set(self.batcher.take_batch())


TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
