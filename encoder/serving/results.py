"""Where the results of a request come from: memory, the work of another request, the disk, or the model, in this order.

Belongs to the event loop.
"""

import asyncio
import time
from collections.abc import Sequence
from copy import copy
from typing import Literal, NamedTuple

from encoder.errors import EncoderError, NotReady, Overloaded
from encoder.serving.batch_loop import BatchLoop
from encoder.serving.cache import ResultCache
from encoder.serving.deadline import Deadline
from encoder.serving.entry import Entry
from encoder.serving.health import Health
from encoder.serving.in_flight import InFlight
from encoder.types import CachePolicy, Job, Pass, PromptEmbeds


class Answer(NamedTuple):
    """The results of one request, in the order of its jobs. Attributes as in EncodeResult."""

    embeds: list[PromptEmbeds]
    cache: Literal["hit", "miss", "coalesced"]
    queue_ms: float = 0.0
    inference_ms: float = 0.0
    layers_run: int = 0
    last_pass: Pass | None = None


class Results:
    """Answers requests for jobs. Equal jobs run once, within a request and across requests.

    Args:
        cache: asked first.
        in_flight: entries of all requests.
        batch_loop: runs what is found nowhere.
        health: hears of unexpected failures.
    """

    def __init__(self, cache: ResultCache, in_flight: InFlight, batch_loop: BatchLoop, health: Health) -> None:
        self._cache = cache
        self._in_flight = in_flight
        self._batch_loop = batch_loop
        self._health = health
        self._lookups: set[asyncio.Task[None]] = set()
        self._closed: NotReady | None = None
        self._counters = dict.fromkeys(("cache_hits", "cache_misses", "cache_coalesced"), 0)

    def close(self, error: NotReady) -> None:
        """Fail everything that waits, and refuse what comes, with this error."""
        self._closed = self._closed or error
        self._in_flight.close(error)
        for lookup in self._lookups:
            lookup.cancel()

    def counters(self) -> dict[str, int]:
        """Counters by the names of EngineStats."""
        return self._counters

    async def get(self, jobs: Sequence[Job], deadline: Deadline, policy: CachePolicy) -> Answer:
        """The results of one request.

        Errors: RequestTooLarge, QueueFull, NotReady once closed, DeadlineExceeded, InvalidField, ModelFailure.
        """
        asked_at = time.perf_counter()
        distinct = list(dict.fromkeys(jobs))
        results = self._cache.get_from_memory(distinct) if policy == "use" else {}
        self._counters["cache_hits"] += len(results)
        if len(results) == len(distinct):
            return Answer([results[job] for job in jobs], "hit")
        missing = [job for job in distinct if job not in results]
        in_flight = {job: self._in_flight.find(job) if policy == "use" else None for job in missing}
        joined = [entry for entry in in_flight.values() if entry is not None]
        new = [Entry(job, store=policy != "bypass") for job, entry in in_flight.items() if entry is None]
        self._counters["cache_coalesced"] += len(joined)
        if joined:
            self._batch_loop.hurry(joined)
        if new:
            self._look_up_or_queue(new, policy)
        await self._wait(joined + new, deadline.left_s())
        for entry in joined + new:
            if entry.outcome is None:
                raise deadline.exceeded(entry.stage)
        results |= {entry.job: _result(entry) for entry in joined + new}
        return _answer([results[job] for job in jobs], joined, new, asked_at)

    async def run_probe(self, job: Job) -> None:
        """Run a job before all that wait, through every step of a request except the look-ups.

        Errors: the error of the job, NotReady once closed.
        """
        self._check_open()
        entry = Entry(job, store=False, is_probe=True)
        with self._in_flight.error_boundary([entry]):
            self._in_flight.add([entry], joinable=False)
            self._batch_loop.put_first(entry)
        await self._wait([entry], timeout_s=None)
        _result(entry)

    def _look_up_or_queue(self, entries: Sequence[Entry], policy: CachePolicy) -> None:
        self._check_open()
        self._batch_loop.check(entries)  # before anyone can join them: a request that joins could be small enough
        with self._in_flight.error_boundary(entries):
            self._in_flight.add(entries, joinable=policy == "use")
            if policy == "use" and self._cache.has_disk:
                # In a task of its own: other requests may join the entries and wait longer than this one.
                lookup = asyncio.create_task(self._look_up(entries))
                self._lookups.add(lookup)
                lookup.add_done_callback(self._on_looked_up)
            else:
                self._queue(entries)

    def _on_looked_up(self, lookup: "asyncio.Task[None]") -> None:
        self._lookups.discard(lookup)
        if not lookup.cancelled() and (error := lookup.exception()) is not None:
            self._health.report_broken("Requests could not be failed.", error)

    async def _look_up(self, entries: Sequence[Entry]) -> None:
        """Settle what is found on disk, and queue the rest as far as requests still want it."""
        with self._in_flight.error_boundary(entries):
            found = await self._cache.find_on_disk([entry.job for entry in entries])
            for entry in entries:
                if entry.job in found:
                    entry.from_disk = True
                    entry.started_at = entry.finished_at = time.perf_counter()
                    self._in_flight.settle(entry, found[entry.job])
                elif not entry.waiters:
                    self._in_flight.forget(entry)
            self._queue([entry for entry in entries if entry.waiters and entry.outcome is None])

    def _check_open(self) -> None:
        """Errors: NotReady once closed."""
        if self._closed is not None:
            raise copy(self._closed)

    def _queue(self, entries: Sequence[Entry]) -> None:
        """Queue all of them, or fail all of them."""
        try:
            self._batch_loop.put(entries)
        except Overloaded as error:
            self._in_flight.fail(entries, error)
        else:
            self._counters["cache_misses"] += len(entries)

    async def _wait(self, entries: Sequence[Entry], timeout_s: float | None) -> None:
        """Wait for all entries. Then take those out of the queue that no request waits for any more."""
        try:
            await self._in_flight.wait(entries, timeout_s)
        finally:
            for entry in entries:
                if not entry.waiters and entry.outcome is None and self._batch_loop.discard(entry):
                    self._in_flight.forget(entry)


def _result(entry: Entry) -> PromptEmbeds:
    assert entry.outcome is not None, "call once it is settled"
    if isinstance(entry.outcome, EncoderError):
        raise copy(entry.outcome)  # several requests may wait for this entry
    return entry.outcome


def _answer(embeds: list[PromptEmbeds], joined: list[Entry], new: list[Entry], asked_at: float) -> Answer:
    computed = [entry for entry in joined + new if not entry.from_disk]
    queue_ms, inference_ms, last_pass = _last_batch(joined + new, asked_at)
    return Answer(
        embeds=embeds,
        cache="miss" if any(not entry.from_disk for entry in new) else "coalesced" if computed else "hit",
        queue_ms=queue_ms,
        inference_ms=inference_ms,
        layers_run=max((entry.job.depth for entry in computed), default=0),
        last_pass=last_pass,
    )


def _last_batch(entries: Sequence[Entry], asked_at: float) -> tuple[float, float, Pass | None]:
    """The wait for the last of a request's batches and its run, both in ms: the request may have joined it late."""
    if not entries:
        return 0.0, 0.0, None
    last = max(entries, key=lambda entry: entry.finished_at)
    began_at = max(asked_at, last.started_at)
    return (began_at - asked_at) * 1e3, (last.finished_at - began_at) * 1e3, last.last_pass
