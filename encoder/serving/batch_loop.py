"""Runs the waiting entries, batch after batch.

The model thread forms each batch itself, when it is free to run it. Batches are formed at the last moment, so that more
requests can share them, and without a detour over the event loop, which may be busy with the answers of the batch
before.

Where `TextEncoder.overlaps`, the next batch begins before the results of the one before are collected: the device
computes while the host collects.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock

from encoder.errors import ModelFailure, NotReady
from encoder.pipeline.limits import Limits
from encoder.serving.batch import Batch, BatchRunner
from encoder.serving.batcher import Batcher
from encoder.serving.entry import Entry
from encoder.serving.health import Health
from encoder.serving.in_flight import InFlight
from encoder.serving.model_thread import ModelThread
from encoder.text_encoder import TextEncoder

FIRST_RATE = 500.0  # padded tokens per second, assumed until batches have been measured
NEW_RATE_WEIGHT = 0.2  # of the latest batch in the moving average
MAX_RETRY_AFTER_S = 60
# Fixed cost of a forward pass, in rows: measured on two CPUs of an AMD EPYC, and on an H100.
OVERHEAD_ROWS = {"cpu": 16, "gpu": 400}


class BatchLoop:
    """The queue, and the work of the model thread on it.

    Args:
        model_thread: runs the batches.
        limits: of queue and batches.
        in_flight: settles the entries that have run.
        health: counts unexpected failures.
    """

    def __init__(self, model_thread: ModelThread, limits: Limits, in_flight: InFlight, health: Health) -> None:
        self._model_thread = model_thread
        self._in_flight = in_flight
        # Shared by both threads, under the lock: the event loop fills the queue, the model thread empties it.
        self._lock = Lock()
        self._batcher = Batcher(limits.max_queue_tokens, limits.max_batch_tokens)
        self._running_prompts = 0  # of batches that have been taken and not delivered
        self._closed = False
        # The model thread appends and the event loop removes: a deque needs no lock for that.
        self._finished: deque[Batch] = deque()
        # The model thread's own.
        self._runner = BatchRunner(health)
        self._dispatched: Batch | None = None  # the device computes it, and its results are not collected yet
        # The event loop's own.
        self._awake = False  # the model thread looks at the queue, or will be told to
        self._rate = FIRST_RATE
        self._counters = dict.fromkeys(("batches", "prompts", "real_tokens", "padded_tokens"), 0)

    def start(self, encoder: TextEncoder) -> None:
        """Run batches from now on. Call on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._runner.encoder = encoder
        self._batcher.count_tokens = encoder.forward.count_rows
        self._batcher.overhead_rows = OVERHEAD_ROWS[encoder.info.device]

    def close(self) -> None:
        """Begin no other batch. Entries that wait stay in the queue."""
        with self._lock:
            self._closed = True

    def check(self, entries: Sequence[Entry]) -> None:
        """Refuse the entries of a request that would not fit an empty queue. Errors: RequestTooLarge."""
        self._batcher.check(entries)

    def put(self, entries: Sequence[Entry]) -> None:
        """Queue all entries of a request, or none of them. Errors: RequestTooLarge, QueueFull, NotReady once closed."""
        if self._closed:
            raise NotReady("The service was closed.", 10)
        self._wake()  # first, so that an error leaves nothing in the queue
        with self._lock:
            self._batcher.put(entries, self._retry_after_s())

    def put_first(self, entry: Entry) -> None:
        """Queue an entry before all others, even where there is no room."""
        self._wake()
        with self._lock:
            self._batcher.put_first(entry)

    def discard(self, entry: Entry) -> bool:
        """Take an entry out of the queue; False where it is not in the queue any more."""
        with self._lock:
            return self._batcher.discard(entry)

    def longest_running_s(self) -> float:
        """Seconds since the oldest running batch began, 0 where none runs."""
        return self._runner.longest_running_s()

    def stats(self) -> dict[str, int]:
        """Gauges and counters by the names of EngineStats."""
        return self._counters | {
            "queued_prompts": len(self._batcher),
            "queued_tokens": self._batcher.queued_tokens,
            "running_prompts": self._running_prompts,
        }

    # On the event loop.

    def _wake(self) -> None:
        """Let the model thread look at the queue, after the callbacks that are already due: they may add to it."""
        if not self._awake:
            self._loop.call_soon(self._submit_work)
            self._awake = True

    def _submit_work(self) -> None:
        waiting = list(self._batcher)
        with self._in_flight.error_boundary(waiting):
            try:
                self._model_thread.submit(self._work)
            except BaseException:  # all that wait fail, and must not run later
                self._awake = False
                for entry in waiting:
                    self.discard(entry)
                raise

    def _on_idle(self) -> None:
        """Note that the model thread looks at the queue no more. Wake it where entries have come since it looked."""
        self._awake = False
        if not self._closed and (len(self._batcher) or self._dispatched):
            self._wake()

    def _deliver(self) -> None:
        """Settle the entries of all batches that the model thread has finished."""
        while self._finished:
            batch = self._finished.popleft()
            with self._lock:
                self._running_prompts -= len(batch.entries)
            for entry, outcome in zip(batch.entries, batch.outcomes, strict=True):
                with self._in_flight.error_boundary([entry]):
                    self._in_flight.deliver(entry, outcome)
            with self._in_flight.error_boundary(batch.entries):
                self._count(batch)

    def _count(self, batch: Batch) -> None:
        if batch.error is not None:
            return
        padded_tokens = self._batcher.count_tokens([entry.length for entry in batch.entries])
        latest_rate = padded_tokens / max(batch.finished_at - batch.started_at, 1e-6)
        self._rate += NEW_RATE_WEIGHT * (latest_rate - self._rate)
        self._counters["batches"] += 1
        self._counters["prompts"] += len(batch.entries)
        self._counters["padded_tokens"] += padded_tokens
        self._counters["real_tokens"] += sum(entry.job.computed_rows for entry in batch.entries)

    def _retry_after_s(self) -> int:
        """Seconds until the queue is empty at the measured rate."""
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._batcher.queued_tokens / self._rate)))

    # On the model thread.

    def _work(self) -> None:
        """Run one batch. Only one, so that other work of the thread gets its turn."""
        try:
            previous, self._dispatched = self._dispatched, None
            batch = self._take()
            if batch is not None:
                self._runner.begin(batch)
            if previous is not None:
                self._finish(previous)
            if batch is not None:
                self._runner.dispatch(batch)
                if self._runner.encoder.overlaps:
                    self._dispatched = batch
                else:
                    self._finish(batch)
        finally:
            self._continue()

    def _continue(self) -> None:
        """Look at the queue again where there is work, else let the event loop know that there is none.

        After an error the event loop sees to the queue.
        """
        with self._runner.error_boundary("continue"):
            with self._lock:
                if not self._closed and (self._dispatched is not None or len(self._batcher)):
                    self._model_thread.submit(self._work)
                    return
            if self._dispatched is not None:  # closed: the thread may not end before the device has computed it
                batch, self._dispatched = self._dispatched, None
                self._finish(batch)
        self._call_on_loop(self._on_idle)

    def _take(self) -> Batch | None:
        """The next batch, or None where nothing waits. If forming it fails, the oldest entry alone gets the error."""
        batch = Batch()
        with self._lock:
            if self._closed:
                return None
            with self._runner.error_boundary("form a batch", batch):
                batch.entries = self._batcher.take_batch(self._running_prompts)
            if batch.error is not None:
                batch.entries = self._batcher.take_oldest()
            self._running_prompts += len(batch.entries)
        return batch if batch.entries else None

    def _finish(self, batch: Batch) -> None:
        """Wait for the outcomes of a batch and hand them to the event loop.

        If the batch failed, its entries run one by one, so that none can fail the others.
        """
        self._runner.collect(batch)
        if batch.error is None or len(batch.entries) == 1:
            self._hand_over(batch)
            return
        batch.release()
        for entry in batch.entries:
            alone = Batch([entry])
            self._runner.begin(alone)
            self._runner.dispatch(alone)
            self._finish(alone)

    def _hand_over(self, batch: Batch) -> None:
        """Let the event loop settle the entries of a batch."""
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
