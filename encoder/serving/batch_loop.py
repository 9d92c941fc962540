"""Runs what waits, batch after batch.

The model's thread forms each batch itself when it is free for it: late, so that as much as can be has come that runs
together, and without a way to the event loop and back, which may be busy with all that the batch before has answered.

Where a forward pass runs on by itself (`TextEncoder.runs_on`) the next one is begun before the results of the one
before are taken, so that the device need not wait for that.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from encoder.errors import EncoderError, NotReady
from encoder.pipeline.limits import Limits
from encoder.serving.batcher import Batcher, Entry
from encoder.serving.model_thread import ModelThread, Outcome, Running
from encoder.text_encoder import TextEncoder
from encoder.types import PromptEmbeds

FIRST_RATE = 500.0  # padded tokens a second, assumed until batches have been measured
LONGEST_RETRY_S = 60
# What a forward pass costs beside its rows, in rows: measured on two CPUs of an AMD EPYC, and on an H100.
BATCH_ROWS = {"cpu": 16, "gpu": 400}


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Entries that run together."""

    entries: list[Entry]
    running: Running


class BatchLoop:
    """The queue, and what the model's thread does about it.

    Args:
        model_thread: runs the batches.
        limits: of queue and batches.
        finish: called on the event loop with each entry that has run, and its outcome.
    """

    def __init__(
        self,
        model_thread: ModelThread,
        limits: Limits,
        finish: Callable[[Entry, PromptEmbeds | EncoderError], None],
    ) -> None:
        self._model_thread = model_thread
        self._finish = finish
        self._lock = Lock()  # for the next three: the event loop fills the queue, the model's thread empties it
        self._batcher = Batcher(limits.max_queue_tokens, limits.max_batch_tokens)
        self._running_prompts = 0  # of batches that have been taken and not delivered
        self._closed = False
        self._working = False  # the model's thread has been told to look at the queue
        self._begun: Batch | None = None  # and not ended; the thread's own
        self._last_finished_at = 0.0  # the same
        self._rate = FIRST_RATE
        self._counters = dict.fromkeys(("batches", "prompts", "real_tokens", "padded_tokens"), 0)

    def start(self, encoder: TextEncoder) -> None:
        """Run batches from now on; call on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._encoder = encoder
        self._batcher.count_tokens = encoder.forward.tokens
        self._batcher.batch_rows = BATCH_ROWS[encoder.info.device]

    def close(self) -> None:
        """Start no other batch. What waits is left where it is."""
        with self._lock:
            self._closed = True

    def check(self, entries: Sequence[Entry]) -> None:
        """Errors: RequestTooLarge when the entries of a request would not fit an empty queue."""
        self._batcher.check(entries)

    def put(self, entries: Sequence[Entry]) -> None:
        """Queue all entries of a request, or none of them. Errors: as `check`, QueueFull, and NotReady once closed."""
        if self._closed:
            raise NotReady("The service was closed.", 10)
        with self._lock:
            self._batcher.put(entries, self._retry_after_s())
        self._go_on()

    def discard(self, entry: Entry) -> bool:
        """Take an entry out of the queue; False when it had left already."""
        with self._lock:
            return self._batcher.discard(entry)

    def stats(self) -> dict[str, int]:
        """Gauges and counters by the names of EngineStats."""
        return self._counters | {
            "queued_prompts": len(self._batcher),
            "queued_tokens": self._batcher.queued_tokens,
            "running_prompts": self._running_prompts,
        }

    def _go_on(self) -> None:
        """Have the model's thread look at the queue, once all that the event loop is at just now has come."""
        if not self._working:
            self._working = True
            self._loop.call_soon(self._model_thread.submit, self._work)

    def _rest(self) -> None:
        self._working = False
        if len(self._batcher) and not self._closed:
            self._go_on()

    def _work(self) -> None:
        """Begin a batch if something waits, and end the one before; on the model's thread.

        One at a time, so that what else the thread is told to do finds its turn.
        """
        before, self._begun = self._begun, None
        entries = self._take()
        try:
            if entries:
                self._begin(entries, before)
            elif before:
                self._end(before)
        finally:
            self._look_again()

    def _look_again(self) -> None:
        """Go on with what is left; nothing is left behind for a thread that is told to end next."""
        with self._lock:
            if not self._closed and (self._begun or len(self._batcher)):
                self._model_thread.submit(self._work)
                return
        if self._begun:
            begun, self._begun = self._begun, None
            self._end(begun)
        self._tell(self._rest)

    def _take(self) -> list[Entry]:
        with self._lock:
            entries = [] if self._closed else self._batcher.take_batch(self._running_prompts)
            self._running_prompts += len(entries)
            return entries

    def _begin(self, entries: list[Entry], before: Batch | None) -> None:
        jobs = [entry.job for entry in entries]
        running = self._model_thread.begin(self._encoder, jobs, lambda: self._end(before) if before else None)
        batch = Batch(entries, running)
        if self._encoder.runs_on:
            self._begun = batch
        else:
            self._end(batch)

    def _end(self, batch: Batch) -> None:
        ran = self._model_thread.end(self._encoder, batch.running)
        results = zip(batch.entries, ran.outcomes, strict=True)
        outcomes = [_kept(outcome) if entry.store else outcome for entry, outcome in results]
        started_at, finished_at = max(batch.running.begun_at, self._last_finished_at), time.perf_counter()
        self._last_finished_at = finished_at
        for entry in batch.entries:
            entry.started_at, entry.finished_at, entry.last_pass = started_at, finished_at, ran.last_pass
        self._tell(self._deliver, batch.entries, outcomes, finished_at - started_at)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call it, unless that has ended because the thread hung for too long."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, entries: list[Entry], outcomes: list[Outcome], seconds: float) -> None:
        """On the event loop again."""
        with self._lock:
            self._running_prompts -= len(entries)
        self._count(entries, seconds)
        for entry, outcome in zip(entries, outcomes, strict=True):
            self._finish(entry, outcome)

    def _count(self, entries: list[Entry], seconds: float) -> None:
        padded_tokens = self._batcher.count_tokens([entry.length for entry in entries])
        self._rate = 0.8 * self._rate + 0.2 * padded_tokens / seconds
        self._counters["batches"] += 1
        self._counters["prompts"] += len(entries)
        self._counters["padded_tokens"] += padded_tokens
        self._counters["real_tokens"] += sum(entry.job.computed_rows for entry in entries)

    def _retry_after_s(self) -> int:
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._batcher.queued_tokens / self._rate)))


def _kept(outcome: Outcome) -> Outcome:
    """What the cache will keep, a large result in memory of its own: on the event loop others wait to be answered."""
    return outcome.own() if isinstance(outcome, PromptEmbeds) and outcome.is_large else outcome
