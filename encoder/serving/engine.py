"""The asynchronous front of the encoder: tokenize, look in the cache, queue, run, answer.

Everything here runs on the event loop, so nothing needs a lock; the model runs on its own thread.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from encoder.errors import DeadlineExceeded, EncoderError, NotReady, Overloaded
from encoder.options import ModelOptions
from encoder.pipeline.limits import Limits
from encoder.presets.preset import Preset
from encoder.serving.batch_loop import BatchLoop
from encoder.serving.batcher import Entry
from encoder.serving.cache import ResultCache
from encoder.serving.model_thread import ModelThread
from encoder.serving.recent_tokens import RecentTokens
from encoder.text_encoder import TextEncoder
from encoder.types import (
    CachePolicy,
    DType,
    EncodeResult,
    EngineStats,
    Job,
    ModelInfo,
    Pass,
    PromptEmbeds,
    TokenizedPrompt,
)

# Characters of a request, templates included, that are tokenized on the event loop: half a millisecond or less, not
# much more than the way to another thread and back.
SHORT = 400


class Engine:
    """One loaded model, served to many.

    Args:
        options: the model to load, and how.
        limits: on requests, queue and batches.
        cache_bytes: bound of the result cache in memory; 0 switches it off.
        disk_cache_dir: folder for results that outlive the process; None has no such cache.
        disk_cache_bytes: bound of that folder.
        stall_s: a forward pass that takes longer makes the engine unready until it returns.
        measure_passes: say in each result what the steps of its pass took; costs a pause between them.
    """

    def __init__(
        self,
        options: ModelOptions,
        *,
        limits: Limits | None = None,
        cache_bytes: int = 512 * 2**20,
        disk_cache_dir: Path | None = None,
        disk_cache_bytes: int = 10 * 2**30,
        stall_s: float = 120.0,
        measure_passes: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self._model_thread = ModelThread(
            lambda progress: TextEncoder.open(options, progress), stall_s, self.limits.max_batch_tokens
        )
        self._measure_passes = measure_passes
        self._encoder: TextEncoder | None = None
        self._failure: str | None = None  # why there will be no encoder
        self._recent = RecentTokens()
        self._cache = ResultCache(cache_bytes, disk_cache_dir, disk_cache_bytes)
        self._lookups: set[asyncio.Task[None]] = set()
        self._batch_loop = BatchLoop(self._model_thread, self.limits, self._finish)
        self._unsettled: set[Entry] = set()  # looked for, waiting or running
        self._in_flight: dict[Job, Entry] = {}  # those of them that others who want the same may join
        self._requests = 0  # accepted and not yet answered
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._counters = dict.fromkeys(("cache_hits", "cache_misses", "cache_coalesced"), 0)

    async def start(self) -> None:
        """Load and warm the model, then accept requests. Errors: CheckpointError, ModelFailure."""
        try:
            self._encoder = await self._model_thread.start()
            await self._cache.open(self._encoder)
        except Exception as error:  # whatever it was, readiness says so from now on
            self._failure = str(error)
            raise
        self._encoder.measures_passes = self._measure_passes
        self._batch_loop.start(self._encoder)

    async def probe(self) -> None:
        """Return when the next request can be expected to succeed. Errors: NotReady with the reason."""
        await self._model_thread.probe(self._accepting())

    def drain(self) -> None:
        """Refuse new work from now on; what was accepted is answered."""
        self._draining = True

    async def drained(self) -> None:
        """Return when every accepted request has its answer."""
        await self._idle.wait()

    async def close(self) -> None:
        """End the model thread; requests that still wait fail with NotReady."""
        self.drain()
        self._batch_loop.close()
        for lookup in self._lookups:
            lookup.cancel()
        for entry in list(self._unsettled):
            self._settle(entry, NotReady("The service was closed.", 10))
        await self._model_thread.close()
        await self._cache.close()

    @property
    def info(self) -> ModelInfo:
        """What is loaded. Errors: NotReady before it is."""
        return self._loaded().info

    def stats(self) -> EngineStats:
        """Gauges and counters of this moment."""
        return EngineStats(
            layers_run=self._encoder.layers_run if self._encoder else 0,
            active_memory_bytes=mx.get_active_memory(),
            cache_memory_bytes=mx.get_cache_memory(),
            peak_memory_bytes=mx.get_peak_memory(),
            **self._counters,
            **self._batch_loop.stats(),
            **self._cache.stats(),
        )

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer writes it."""
        return self._loaded().checkpoint.tokenizer.tokens(input_ids)

    async def tokenize(self, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        """Step 1 alone. Errors: NotReady, RequestTooLarge, InvalidField."""
        encoder = self._accepting()
        self.limits.check_prompts(prompts, preset)
        return await self._tokenize(encoder, prompts, preset)

    async def encode(
        self,
        prompts: Sequence[str],
        preset: Preset,
        dtype: DType = "bfloat16",
        timeout_s: float = 300.0,
        cache_policy: CachePolicy = "use",
    ) -> EncodeResult:
        """Answer one request. Cancelling it frees its place in the queue.

        Errors: NotReady, RequestTooLarge, InvalidField, QueueFull, DeadlineExceeded, ModelFailure.
        """
        encoder = self._accepting()
        self.limits.check_prompts(prompts, preset)
        self._requests += 1
        self._idle.clear()
        try:
            started = time.perf_counter()
            tokenized = await self._tokenize(encoder, prompts, preset)
            jobs = encoder.plan(tokenized, preset, dtype)
            self.limits.check_output(jobs, encoder.config.hidden_size)
            tokenization_ms = (time.perf_counter() - started) * 1e3
            return await self._results(tokenized, tokenization_ms, jobs, timeout_s, cache_policy)
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def _tokenize(self, encoder: TextEncoder, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        tokenized = self._recent.get(prompts, preset)
        if tokenized is None:
            template = len(preset.prefix) + len(preset.suffix) + len(preset.tail)
            if sum(template + len(prompt) for prompt in prompts) <= SHORT:
                tokenized = encoder.tokenize(prompts, preset)
            else:
                tokenized = await asyncio.to_thread(encoder.tokenize, prompts, preset)
            self._recent.put(prompts, preset, tokenized)
        return tokenized

    async def _results(
        self,
        tokenized: list[TokenizedPrompt],
        tokenization_ms: float,
        jobs: list[Job],
        timeout_s: float,
        policy: CachePolicy,
    ) -> EncodeResult:
        """Memory, then others' work in flight, then the disk, then the queue. Equal jobs of one request run once."""
        asked_at = time.perf_counter()
        distinct = list(dict.fromkeys(jobs))
        use = policy == "use"
        cached = self._cache.get(distinct) if use else {}
        missing = [job for job in distinct if job not in cached] if cached else distinct
        joined = [self._in_flight[job] for job in missing if use and job in self._in_flight]
        new = [self._new_entry(job, policy) for job in missing if not use or job not in self._in_flight]
        for name, group in (("cache_hits", cached), ("cache_coalesced", joined)):
            self._counters[name] += len(group)
        if new:
            self._find_or_run(new, policy)
        entries = joined + new
        await self._wait(entries, timeout_s)
        results = cached | {entry.job: _result(entry, timeout_s) for entry in entries}
        computed = [entry for entry in entries if not entry.from_disk]
        queue_ms, inference_ms, last_pass = _last_batch(entries, asked_at)
        return EncodeResult(
            embeds=[results[job] for job in jobs],
            prompts=tokenized,
            cache="miss" if any(not entry.from_disk for entry in new) else "coalesced" if computed else "hit",
            tokenization_ms=tokenization_ms,
            queue_ms=queue_ms,
            inference_ms=inference_ms,
            layers_run=max((entry.job.depth for entry in computed), default=0),
            last_pass=last_pass,
        )

    def _new_entry(self, job: Job, policy: CachePolicy) -> Entry:
        return Entry(job, max(1, job.computed_rows), store=policy != "bypass")

    def _find_or_run(self, entries: Sequence[Entry], policy: CachePolicy) -> None:
        self._batch_loop.check(entries)  # before anybody can join them, who would get the same error for less
        self._unsettled.update(entries)
        if policy == "use":
            self._in_flight.update((entry.job, entry) for entry in entries)
        if policy == "use" and self._cache.has_disk:  # in a task of its own: others may join, and outstay this request
            lookup = asyncio.create_task(self._look_up(entries))
            self._lookups.add(lookup)
            lookup.add_done_callback(self._lookups.discard)
        else:
            self._enqueue(entries)

    async def _look_up(self, entries: Sequence[Entry]) -> None:
        """Answer what lies on disk, and queue the rest, if somebody still wants it."""
        found = await self._cache.find([entry.job for entry in entries])
        for entry in entries:
            if entry.job in found:
                entry.from_disk = True
                entry.started_at = entry.finished_at = time.perf_counter()
                self._settle(entry, found[entry.job])
            elif not entry.waiters:
                self._forget(entry)
        self._enqueue([entry for entry in entries if entry.waiters and entry.job not in found])

    def _enqueue(self, entries: Sequence[Entry]) -> None:
        """Queue all of them, or fail all of them."""
        try:
            self._batch_loop.put(entries)
        except Overloaded as error:
            for entry in entries:
                self._settle(entry, error)
        else:
            self._counters["cache_misses"] += len(entries)

    async def _wait(self, entries: Sequence[Entry], timeout_s: float) -> None:
        """Wait for all entries. Whoever stops waiting last takes an entry out of the queue."""
        unsettled = [entry for entry in entries if entry.outcome is None]
        if not unsettled:
            return
        loop = asyncio.get_running_loop()
        waiters = [loop.create_future() for _ in unsettled]
        for entry, waiter in zip(unsettled, waiters, strict=True):
            entry.waiters.append(waiter)
        timer = loop.call_later(timeout_s, _tell, waiters)
        try:
            for waiter in waiters:
                await waiter
        finally:
            timer.cancel()
            for entry, waiter in zip(unsettled, waiters, strict=True):
                entry.waiters.remove(waiter)
                if not entry.waiters and entry.outcome is None and self._batch_loop.discard(entry):
                    self._forget(entry)

    def _finish(self, entry: Entry, outcome: PromptEmbeds | EncoderError) -> None:
        if isinstance(outcome, PromptEmbeds) and entry.store:
            outcome = outcome.own()
            self._cache.put(entry.job, outcome)
        self._settle(entry, outcome)

    def _settle(self, entry: Entry, outcome: PromptEmbeds | EncoderError) -> None:
        self._forget(entry)
        if entry.outcome is None:
            entry.outcome = outcome
            _tell(entry.waiters)

    def _forget(self, entry: Entry) -> None:
        self._unsettled.discard(entry)
        if entry.store and self._in_flight.get(entry.job) is entry:
            del self._in_flight[entry.job]

    def _loaded(self) -> TextEncoder:
        if self._failure is not None:
            raise NotReady(f"The model could not be loaded: {self._failure}", 60)
        if self._encoder is None:
            raise NotReady("The model is still loading.", 5)
        return self._encoder

    def _accepting(self) -> TextEncoder:
        if self._draining:
            raise NotReady("The service is shutting down.", 10)
        return self._loaded()


def _last_batch(entries: Sequence[Entry], asked_at: float) -> tuple[float, float, Pass | None]:
    """The wait for the last of a request's batches and its run, in ms as the request saw them: it may join late."""
    if not entries:
        return 0.0, 0.0, None
    last = max(entries, key=lambda entry: entry.finished_at)
    began_at = max(asked_at, last.started_at)
    return (began_at - asked_at) * 1e3, (last.finished_at - began_at) * 1e3, last.last_pass


def _tell(waiters: Sequence[asyncio.Future[None]]) -> None:
    """That there is nothing more to wait for."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


def _result(entry: Entry, timeout_s: float) -> PromptEmbeds:
    if entry.outcome is None:
        raise DeadlineExceeded(f"No result within {timeout_s:g} s. Send fewer prompts, or allow more time.")
    if isinstance(entry.outcome, EncoderError):
        raise entry.outcome
    return entry.outcome
