"""The asynchronous front of the encoder: tokenize, look in the cache, queue, run, answer.

Everything here runs on the event loop, so nothing needs a lock; the model runs on its own thread. A batch is formed as
late as possible, when that thread is free.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from encoder.batcher import Batcher, Entry
from encoder.cache import Cache
from encoder.errors import DeadlineExceeded, EncoderError, NotReady
from encoder.limits import Limits
from encoder.model_thread import ModelThread
from encoder.preset import Preset
from encoder.text_encoder import TextEncoder
from encoder.types import DType, EncodeResult, EngineStats, Job, ModelInfo, Pass, PromptEmbeds, TokenizedPrompt

FIRST_RATE = 500.0  # padded tokens a second, assumed until batches have been measured
LONGEST_RETRY_S = 60


class Engine:
    """One loaded model, served to many.

    Args:
        model: a folder, a hub id, or "demo".
        revision, cache_dir, tokenizer, compute_dtype, force_float16, quantize, num_layers: as in TextEncoder.open.
        limits: on requests, queue and batches.
        cache_bytes: bound of the result cache; 0 switches it off.
        stall_s: a forward pass that takes longer makes the engine unready until it returns.
        measure_passes: say in each result what the steps of its pass took; costs a pause between them.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        compute_dtype: str = "auto",
        force_float16: bool = False,
        tokenizer: str | None = None,
        quantize: str = "auto",
        num_layers: int | None = None,
        cache_dir: Path | None = None,
        limits: Limits | None = None,
        cache_bytes: int = 512 * 2**20,
        stall_s: float = 120.0,
        measure_passes: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self._model_thread = ModelThread(
            lambda progress: TextEncoder.open(
                model,
                revision=revision,
                compute_dtype=compute_dtype,
                force_float16=force_float16,
                tokenizer=tokenizer,
                quantize=quantize,
                num_layers=num_layers,
                cache_dir=cache_dir,
                progress=progress,
            ),
            stall_s,
        )
        self._measure_passes = measure_passes
        self._encoder: TextEncoder | None = None
        self._failure: str | None = None  # why there will be no encoder
        self._batch_loop: asyncio.Task[None] | None = None
        self._cache = Cache(cache_bytes)
        self._batcher = Batcher(self.limits.max_queue_tokens, self.limits.max_batch_tokens)
        self._queued = asyncio.Event()  # something waits in the queue
        self._in_flight: dict[Job, Entry] = {}  # waiting or running, for others who want the same
        self._running_prompts = 0
        self._requests = 0  # accepted and not yet answered
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._rate = FIRST_RATE
        self._counters = dict.fromkeys(
            ("batches", "prompts", "real_tokens", "padded_tokens", "cache_hits", "cache_misses", "cache_coalesced"), 0
        )

    async def start(self) -> None:
        """Load and warm the model, then accept requests. Errors: CheckpointError, ModelFailure."""
        try:
            self._encoder = await self._model_thread.start()
        except Exception as error:  # whatever it was, readiness says so from now on
            self._failure = str(error)
            raise
        self._encoder.measures_passes = self._measure_passes
        self._batcher.count_tokens = self._encoder.forward.tokens
        self._batch_loop = asyncio.create_task(self._run_batches())

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
        if self._batch_loop is not None:
            self._batch_loop.cancel()
            await asyncio.wait([self._batch_loop])
        for entry in list(self._in_flight.values()):
            self._settle(entry, NotReady("The service was closed.", 10))
        await self._model_thread.close()

    @property
    def info(self) -> ModelInfo:
        """What is loaded. Errors: NotReady before it is."""
        return self._loaded().info

    def stats(self) -> EngineStats:
        """Gauges and counters of this moment."""
        return EngineStats(
            queued_prompts=len(self._batcher),
            queued_tokens=self._batcher.queued_tokens,
            running_prompts=self._running_prompts,
            layers_run=self._encoder.layers_run if self._encoder else 0,
            cache_bytes=self._cache.bytes,
            active_memory_bytes=mx.get_active_memory(),
            cache_memory_bytes=mx.get_cache_memory(),
            peak_memory_bytes=mx.get_peak_memory(),
            **self._counters,
        )

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer writes it."""
        return self._loaded().checkpoint.tokenizer.tokens(input_ids)

    async def tokenize(self, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        """Step 1 alone. Errors: NotReady, RequestTooLarge, InvalidField."""
        encoder = self._accepting()
        self.limits.check_prompts(prompts, preset)
        return await asyncio.to_thread(encoder.tokenize, prompts, preset)

    async def encode(
        self,
        prompts: Sequence[str],
        preset: Preset,
        dtype: DType = "bfloat16",
        timeout_s: float = 300.0,
        use_cache: bool = True,
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
            tokenized = await asyncio.to_thread(encoder.tokenize, prompts, preset)
            jobs = encoder.plan(tokenized, preset, dtype)
            self.limits.check_output(jobs, encoder.config.hidden_size)
            tokenization_ms = (time.perf_counter() - started) * 1e3
            result = await self._results(jobs, timeout_s, use_cache)
            return replace(result, prompts=tokenized, tokenization_ms=tokenization_ms)
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def _results(self, jobs: list[Job], timeout_s: float, use_cache: bool) -> EncodeResult:
        """Cache, then others' work in flight, then the queue. Equal jobs of one request run once."""
        asked_at = time.perf_counter()
        distinct = list(dict.fromkeys(jobs))
        cached = {job: hit for job in distinct if use_cache and (hit := self._cache.get(job))}
        missing = [job for job in distinct if job not in cached]
        joined = [self._in_flight[job] for job in missing if use_cache and job in self._in_flight]
        new = [self._new_entry(job) for job in missing if not use_cache or job not in self._in_flight]
        self._batcher.put(new, self._retry_after_s())
        self._queued.set()
        if use_cache:
            self._in_flight.update((entry.job, entry) for entry in new)
        for name, group in (("cache_hits", cached), ("cache_coalesced", joined), ("cache_misses", new)):
            self._counters[name] += len(group)
        entries = joined + new
        await self._wait(entries, timeout_s)
        results = cached | {entry.job: _result(entry, timeout_s) for entry in entries}
        queue_ms, inference_ms, last_pass = _last_batch(entries, asked_at)
        return EncodeResult(
            embeds=[results[job] for job in jobs],
            prompts=[],
            cache="miss" if new else "coalesced" if joined else "hit",
            tokenization_ms=0.0,
            queue_ms=queue_ms,
            inference_ms=inference_ms,
            layers_run=max((entry.job.depth for entry in entries), default=0),
            last_pass=last_pass,
        )

    def _new_entry(self, job: Job) -> Entry:
        return Entry(job, max(1, job.computed_rows), asyncio.get_running_loop().create_future())

    async def _wait(self, entries: Sequence[Entry], timeout_s: float) -> None:
        """Wait for all entries. Whoever stops waiting last takes an entry out of the queue."""
        for entry in entries:
            entry.waiters += 1
        try:
            if entries:
                await asyncio.wait([entry.done for entry in entries], timeout=timeout_s)
        finally:
            for entry in entries:
                entry.waiters -= 1
                if not entry.waiters and self._batcher.discard(entry):
                    self._forget(entry)

    async def _run_batches(self) -> None:
        while True:
            await self._queued.wait()
            batch = self._batcher.take_batch()
            if batch:
                await self._run_batch(batch)
            else:
                self._queued.clear()

    async def _run_batch(self, batch: list[Entry]) -> None:
        started = time.perf_counter()
        for entry in batch:
            entry.started_at = started
        self._running_prompts = len(batch)
        outcomes = await self._model_thread.run(self._loaded(), [entry.job for entry in batch])
        self._running_prompts = 0
        self._count(batch, time.perf_counter() - started)
        for entry, outcome in zip(batch, outcomes, strict=True):
            entry.finished_at = time.perf_counter()
            entry.last_pass = self._loaded().last_pass
            if isinstance(outcome, PromptEmbeds):
                self._cache.put(entry.job, outcome)
            self._settle(entry, outcome)

    def _count(self, batch: list[Entry], seconds: float) -> None:
        padded_tokens = self._batcher.count_tokens([entry.length for entry in batch])
        self._rate = 0.8 * self._rate + 0.2 * padded_tokens / seconds
        self._counters["batches"] += 1
        self._counters["prompts"] += len(batch)
        self._counters["padded_tokens"] += padded_tokens
        self._counters["real_tokens"] += sum(len(entry.job.input_ids) for entry in batch)

    def _settle(self, entry: Entry, outcome: PromptEmbeds | EncoderError) -> None:
        self._forget(entry)
        if not entry.done.done():
            entry.done.set_result(outcome)

    def _forget(self, entry: Entry) -> None:
        if self._in_flight.get(entry.job) is entry:
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

    def _retry_after_s(self) -> int:
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._batcher.queued_tokens / self._rate)))


def _last_batch(entries: Sequence[Entry], asked_at: float) -> tuple[float, float, Pass | None]:
    """The wait for the last of a request's batches and its run, in ms as the request saw them: it may join late."""
    if not entries:
        return 0.0, 0.0, None
    last = max(entries, key=lambda entry: entry.finished_at)
    began_at = max(asked_at, last.started_at)
    return (began_at - asked_at) * 1e3, (last.finished_at - began_at) * 1e3, last.last_pass


def _result(entry: Entry, timeout_s: float) -> PromptEmbeds:
    if not entry.done.done():
        raise DeadlineExceeded(f"No result within {timeout_s:g} s. Send fewer prompts, or allow more time.")
    outcome = entry.done.result()
    if isinstance(outcome, EncoderError):
        raise outcome
    return outcome
