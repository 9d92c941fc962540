"""The rate at which batches run, and the `Retry-After` that a full queue derives from it."""

import asyncio
from collections.abc import Iterator

import pytest

from encoder.errors import QueueFull
from encoder.pipeline.limits import Limits
from encoder.serving.batch import Batch
from encoder.serving.batch_loop import FIRST_RATE, BatchLoop, BatchSizes
from encoder.serving.cache import ResultCache
from encoder.serving.entry import Entry
from encoder.serving.health import Health
from encoder.serving.in_flight import InFlight
from encoder.serving.rate import MAX_S
from encoder.types import Job, Tap


@pytest.fixture
def batch_loop() -> Iterator[BatchLoop]:
    """A queue of 1,000 tokens, without a model thread that would empty it."""
    health = Health()
    in_flight = InFlight(ResultCache(0, None, 0), health)
    loop = BatchLoop(Limits(max_queue_tokens=1000), in_flight, health, BatchSizes())
    loop._loop = asyncio.new_event_loop()
    yield loop
    loop._loop.close()


def entries(*lengths: int) -> list[Entry]:
    def job(length: int) -> Job:
        return Job((1,) * length, length, length, 0, (Tap(1, normed=False),), "concat", "float32")

    return [Entry(job(length)) for length in lengths]


def retry_after_s(batch_loop: BatchLoop) -> int:
    """The `Retry-After` of a request for which the queue has no room."""
    with pytest.raises(QueueFull) as caught:
        batch_loop.put(entries(1000))
    return caught.value.retry_after_s


def test_retry_after_follows_from_the_measured_rate(batch_loop: BatchLoop) -> None:
    """Not from the size of the queue alone: the same queue takes seconds on one machine and minutes on another."""
    batch_loop.put(entries(900))
    for _ in range(100):
        batch_loop._count(Batch(entries(20, 10), started_at=5.0, finished_at=5.5))  # 40 tokens as a rectangle

    assert retry_after_s(batch_loop) == 12  # 900 must leave the queue, at 80 a second


def test_a_failed_batch_does_not_change_the_rate(batch_loop: BatchLoop) -> None:
    batch_loop._count(Batch(entries(100), error=MemoryError(), started_at=1.0, finished_at=1.0))

    assert batch_loop._rate.per_s == FIRST_RATE
    assert batch_loop.counters()["batches"] == 0


def test_a_short_batch_does_not_let_a_long_one_hang(batch_loop: BatchLoop) -> None:
    """Most of its time is the fixed cost of a batch, which a long one has once, too."""
    batch_loop._count(Batch(entries(1), started_at=0.0, finished_at=0.1))
    batch_loop.put(entries(1000))
    batch_loop._take()

    assert batch_loop.pulse.patience_s < 1000 * 0.1


@pytest.mark.parametrize(("seconds", "expected"), [(1e-9, 1), (0.0, 1), (1e6, MAX_S)])
def test_retry_after_is_at_least_a_second_and_has_a_maximum(
    batch_loop: BatchLoop, seconds: float, expected: int
) -> None:
    batch_loop.put(entries(900))
    for _ in range(100):
        batch_loop._count(Batch(entries(100), started_at=0.0, finished_at=seconds))

    assert retry_after_s(batch_loop) == expected
