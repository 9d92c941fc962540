"""Runs what waits, batch after batch.

A batch is formed when the one before is about to end: late, so that as much as can be has come that runs together, and
early enough for the model's thread to go on to it at once.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from encoder.batcher import Batcher, Entry
from encoder.errors import EncoderError
from encoder.limits import Limits
from encoder.model_thread import ModelThread
from encoder.text_encoder import TextEncoder
from encoder.types import PromptEmbeds

FIRST_RATE = 500.0  # padded tokens a second, assumed until batches have been measured
LONGEST_RETRY_S = 60
# What a forward pass costs beside its rows, in rows: measured on two CPUs of an AMD EPYC, and on an H100.
BATCH_ROWS = {"cpu": 16, "gpu": 400}


class BatchLoop:
    """The queue and the task that empties it. Belongs to the event loop.

    Args:
        model_thread: runs the batches.
        limits: of queue and batches.
        finish: called with each entry that has run, and its outcome.
    """

    def __init__(
        self,
        model_thread: ModelThread,
        limits: Limits,
        finish: Callable[[Entry, PromptEmbeds | EncoderError], None],
    ) -> None:
        self._model_thread = model_thread
        self._finish = finish
        self._batcher = Batcher(limits.max_queue_tokens, limits.max_batch_tokens)
        self._queued = asyncio.Event()  # something waits
        self._tasks: set[asyncio.Task[None]] = set()
        self._running_prompts = 0
        self._last_finished_at = 0.0
        self._rate = FIRST_RATE
        self._counters = dict.fromkeys(("batches", "prompts", "real_tokens", "padded_tokens"), 0)

    def start(self, encoder: TextEncoder) -> None:
        """Run batches from now on."""
        self._batcher.count_tokens = encoder.forward.tokens
        self._batcher.batch_rows = BATCH_ROWS[encoder.info.device]
        self._tasks.add(asyncio.create_task(self._run_batches(encoder)))

    async def close(self) -> None:
        """Start no other batch. What waits is left where it is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self, entries: Sequence[Entry]) -> None:
        """Errors: RequestTooLarge when the entries of a request would not fit an empty queue."""
        self._batcher.check(entries)

    def put(self, entries: Sequence[Entry]) -> None:
        """Queue all entries of a request, or none of them. Errors: as `check`, and QueueFull."""
        self._batcher.put(entries, self._retry_after_s())
        self._queued.set()

    def discard(self, entry: Entry) -> bool:
        """Take an entry out of the queue; False when it had left already."""
        return self._batcher.discard(entry)

    def stats(self) -> dict[str, int]:
        """Gauges and counters by the names of EngineStats."""
        return self._counters | {
            "queued_prompts": len(self._batcher),
            "queued_tokens": self._batcher.queued_tokens,
            "running_prompts": self._running_prompts,
        }

    async def _run_batches(self, encoder: TextEncoder) -> None:
        while True:
            await self._queued.wait()
            batch = self._batcher.take_batch(self._running_prompts)
            if batch:
                ending = asyncio.Event()
                task = asyncio.create_task(self._run_batch(encoder, batch, ending))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                await ending.wait()
            else:
                self._queued.clear()

    async def _run_batch(self, encoder: TextEncoder, batch: list[Entry], ending: asyncio.Event) -> None:
        given_at = time.perf_counter()
        self._running_prompts += len(batch)
        try:
            ran = await self._model_thread.run(encoder, [entry.job for entry in batch], ending.set)
        finally:
            ending.set()
            self._running_prompts -= len(batch)
        started_at, finished_at = max(given_at, self._last_finished_at), time.perf_counter()
        self._last_finished_at = finished_at
        self._count(batch, finished_at - started_at)
        for entry, outcome in zip(batch, ran.outcomes, strict=True):
            entry.started_at, entry.finished_at, entry.last_pass = started_at, finished_at, ran.last_pass
            self._finish(entry, outcome)

    def _count(self, batch: list[Entry], seconds: float) -> None:
        padded_tokens = self._batcher.count_tokens([entry.length for entry in batch])
        self._rate = 0.8 * self._rate + 0.2 * padded_tokens / seconds
        self._counters["batches"] += 1
        self._counters["prompts"] += len(batch)
        self._counters["padded_tokens"] += padded_tokens
        self._counters["real_tokens"] += sum(entry.job.computed_rows for entry in batch)

    def _retry_after_s(self) -> int:
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._batcher.queued_tokens / self._rate)))
