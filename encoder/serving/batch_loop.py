"""Runs the waiting entries, batch after batch.

The model thread forms each batch itself, when it is free to run it. Batches are formed at the last moment, so that more
requests can share them, and without a detour over the event loop, which may be busy with the answers of the batch
before.

Where `TextEncoder.overlaps`, the next batch begins before the results of the one before are collected: the device
computes while the host collects.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Lock

from encoder.distribution import Distribution
from encoder.errors import ModelFailure, NotReady
from encoder.pipeline.limits import Limits
from encoder.serving.batch import Batch, BatchRunner
from encoder.serving.batcher import Batcher
from encoder.serving.entry import Entry
from encoder.serving.health import Health
from encoder.serving.in_flight import InFlight
from encoder.serving.pulse import Pulse, StallCount
from encoder.serving.rate import Rate
from encoder.serving.warmup import WarmPass
from encoder.text_encoder import TextEncoder

FIRST_RATE = 500.0  # padded tokens per second, assumed until a pass has been measured
PATIENCE = 4  # a batch may take so many times as long as its rows took in the slowest batch of late
SLOW_DECAY = 0.9  # with each batch, so that what was slow once is forgotten
LOCK_S = 1.0  # the model thread holds the lock for less than a millisecond
# Fixed cost of a forward pass, in rows: measured on two CPUs of an AMD EPYC, and on an H100.
OVERHEAD_ROWS = {"cpu": 16, "gpu": 400}


class BatchSizes:
    """How large batches have been.

    Attributes:
        prompts, tokens: of each batch, the tokens with all padding.
    """

    def __init__(self) -> None:
        self.prompts = Distribution((1, 2, 4, 8, 16, 32, 64, 128, 256))
        self.tokens = Distribution((16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384))


class BatchLoop:
    """The queue, and the work of the model thread on it. For one loaded model: once closed, it stays closed.

    What a batch raises is contained, and ends that batch alone. What anything else raises on the model thread ends
    `run`, and so the thread.

    Args:
        limits: of queue and batches.
        in_flight: settles the entries that have run.
        health: hears of unexpected failures.
        sizes: counts the batches by their size.
    Attributes:
        pulse: whether the model thread moves.
        stall: ticks of the guardian in which it did not.
    """

    def __init__(self, limits: Limits, in_flight: InFlight, health: Health, sizes: BatchSizes) -> None:
        self._in_flight = in_flight
        self._sizes = sizes
        self._health = health
        self.pulse = Pulse()
        self.stall = StallCount(self.pulse, has_work=lambda: len(self._batcher) > 0)
        # Shared by both threads, under the lock: the event loop fills the queue, the model thread empties it.
        self._lock = Lock()
        self._batcher = Batcher(limits.max_queue_tokens, limits.max_batch_tokens)
        self._closed = False
        self._work_came = Event()  # the event loop sets it, the model thread clears it before it looks at the queue
        # The model thread appends and the event loop removes: a deque needs no lock for that.
        self._finished: deque[Batch] = deque()
        # The event loop's own.
        self._held_up = False
        self._slow_s_per_row = 0.0  # of the slowest batch of late
        self._rate = Rate(FIRST_RATE)
        self._counters = dict.fromkeys(("batches", "prompts", "real_tokens", "padded_tokens"), 0)

    def start(self, encoder: TextEncoder, warm_pass: WarmPass) -> None:
        """Queue entries for this model from now on, which has run this pass. Call on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._batcher.count_tokens = encoder.forward.count_rows
        overhead_rows = self._batcher.overhead_rows = OVERHEAD_ROWS[encoder.info.device]
        self._rate.measure(warm_pass.rows + overhead_rows, warm_pass.seconds)

    def close(self) -> None:
        """Begin no other batch, and let `run` return. Entries that wait stay in the queue. Safe on any thread."""
        self._closed = True
        self._work_came.set()

    def release(self) -> None:
        """Let go of the model, once the thread has ended."""
        self._batcher.count_tokens = len

    def check(self, entries: Sequence[Entry]) -> None:
        """Refuse the entries of a request that would not fit an empty queue. Errors: RequestTooLarge."""
        self._batcher.check(entries)

    def put(self, entries: Sequence[Entry]) -> None:
        """Queue all entries of a request, or none of them. Errors: RequestTooLarge, QueueFull, NotReady once closed."""
        if self._closed:
            raise NotReady("The service was closed.", 10)
        with self._queue() as queue:
            seconds = self._rate.retry_after_s(queue.tokens_before_room(entries))
            queue.put(entries, seconds)
        self._wake_for(entries)

    def put_first(self, entry: Entry) -> None:
        """Queue an entry before all others, even where there is no room."""
        with self._queue() as queue:
            queue.put_first(entry)
        self._wake_for([entry])

    def hurry(self, entries: Sequence[Entry]) -> None:
        """Let entries of others that another request wants too wait no longer than if it had queued them now."""
        with self._queue() as queue:
            queue.hurry(entries)

    def discard(self, entry: Entry) -> bool:
        """Take an entry out of the queue; False where it is not in the queue any more, or will never leave it."""
        if not self._closed:
            with suppress(NotReady), self._queue() as queue:
                return queue.discard(entry)
        return False

    def catch_up(self) -> None:
        """Settle what has finished and nobody was told of, as when a callback of the event loop was lost."""
        if self._finished:
            self._deliver()

    def stats(self) -> dict[str, int]:
        """Gauges by the names of EngineStats."""
        return {
            "queued_requests": self._batcher.num_requests,
            "queued_prompts": len(self._batcher),
            "queued_tokens": self._batcher.queued_tokens,
            "running_prompts": self._batcher.running,
        }

    def counters(self) -> dict[str, int]:
        """Counters by the names of EngineStats."""
        return self._counters

    # On the event loop.

    @contextmanager
    def _queue(self) -> Iterator[Batcher]:
        """The queue, under its lock. Errors: NotReady if the model thread hangs while it holds that.

        Then it is waited for once, and asked for without waiting until it is free.
        """
        self._held_up = not self._lock.acquire(timeout=0 if self._held_up else LOCK_S)
        if self._held_up:
            raise NotReady("The model thread does not let go of the queue.", 1)
        try:
            yield self._batcher
        finally:
            self._lock.release()

    def _wake(self) -> None:
        """Let the model thread look at the queue, after the callbacks that are already due: they may add to it."""
        self._loop.call_soon(self._work_came.set)

    def _wake_for(self, entries: Sequence[Entry]) -> None:
        """Wake the model thread. If that fails, the entries are not queued."""
        try:
            self._wake()
        except BaseException:
            for entry in entries:
                self.discard(entry)
            raise

    def _deliver(self) -> None:
        """Settle the entries of all batches that the model thread has finished."""
        try:
            while self._finished:
                self._settle(self._finished.popleft())
        except BaseException as error:  # noqa: BLE001  # some entries may never be settled now
            self._health.report_broken("Results could not be delivered.", error)

    def _settle(self, batch: Batch) -> None:
        with self._in_flight.error_boundary(batch.entries):
            with self._queue() as queue:
                queue.finish(batch.entries)
            for entry, outcome in zip(batch.entries, batch.outcomes, strict=True):
                with self._in_flight.error_boundary([entry]):
                    self._in_flight.deliver(entry, outcome)
            self._count(batch)

    def _count(self, batch: Batch) -> None:
        if batch.error is not None:
            return
        padded_tokens = self._batcher.count_tokens([entry.length for entry in batch.entries])
        # The fixed cost counts as rows: by its one token alone, a probe would let a long batch hang for an hour.
        s_per_row = (batch.finished_at - batch.started_at) / (padded_tokens + self._batcher.overhead_rows)
        self._slow_s_per_row = max(s_per_row, SLOW_DECAY * self._slow_s_per_row)
        if all(entry.is_probe for entry in batch.entries):
            return
        self._rate.measure(padded_tokens, batch.finished_at - batch.started_at)
        self._sizes.prompts.observe(len(batch.entries))
        self._sizes.tokens.observe(padded_tokens)
        self._counters["batches"] += 1
        self._counters["prompts"] += len(batch.entries)
        self._counters["padded_tokens"] += padded_tokens
        self._counters["real_tokens"] += sum(entry.job.computed_rows for entry in batch.entries)

    # On the model thread.

    def run(self, encoder: TextEncoder) -> None:
        """Run the batches that come, until this is closed. A batch that the device computes by then is finished."""
        runner = BatchRunner(encoder, self._health, self.pulse)
        dispatched: Batch | None = None  # the device computes it, and its results are not collected yet
        while True:
            batch = self._take()
            if batch is not None:
                runner.begin(batch)
            if dispatched is not None:
                self._finish(runner, dispatched)
                dispatched = None
            if batch is not None:
                runner.dispatch(batch)
                if encoder.overlaps:
                    dispatched = batch
                else:
                    self._finish(runner, batch)
            elif self._closed:
                return
            else:
                self._rest()

    def _rest(self) -> None:
        """Wait until there may be work."""
        self.pulse.rest()
        self._work_came.wait()
        self.pulse.begin("look for work")
        self._work_came.clear()

    def _take(self) -> Batch | None:
        """The next batch, or None where nothing waits. If forming it fails, the first entry alone gets the error."""
        self.pulse.begin("take a batch")
        batch = Batch()
        with self._lock:
            if self._closed:
                return None
            try:
                batch.entries = self._batcher.take_batch()
            except BaseException as error:  # noqa: BLE001  # whatever it is, the entries behind it can still run
                batch.error = error
                self._health.report("The model thread could not form a batch.", error)
                batch.entries = self._batcher.take_first()
        rows = sum(entry.length for entry in batch.entries) + self._batcher.overhead_rows
        self.pulse.patience_s = PATIENCE * self._slow_s_per_row * rows
        return batch if batch.entries else None

    def _finish(self, runner: BatchRunner, batch: Batch) -> None:
        """Wait for the outcomes of a batch and hand them to the event loop.

        If the batch failed, its entries run one by one, so that none can fail the others.
        """
        runner.collect(batch)
        if batch.error is None or len(batch.entries) == 1:
            self._hand_over(batch)
            return
        batch.release()
        for entry in batch.entries:
            alone = Batch([entry])
            runner.begin(alone)
            runner.dispatch(alone)
            self._finish(runner, alone)

    def _hand_over(self, batch: Batch) -> None:
        """Let the event loop settle the entries of a batch."""
        self.pulse.begin("hand over")
        if batch.error is not None:
            failure = ModelFailure(f"The batch failed: {batch.error!r}. The log has the details.")
            batch.outcomes = [failure] * len(batch.entries)
        batch.release()
        self._finished.append(batch)
        self._call_on_loop(self._deliver)

    def _call_on_loop(self, function: Callable[[], None]) -> None:
        """Let the event loop call a function. Do nothing where the loop has ended because this thread took too long."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)
