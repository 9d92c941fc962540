"""The asynchronous front of the encoder: tokenize, plan, find or compute the results, answer.

Everything here runs on the event loop and needs no lock; the model runs on its own thread.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from encoder.errors import EncoderError, NotReady
from encoder.options import ModelOptions
from encoder.pipeline.limits import Limits
from encoder.pipeline.tokenizer import count_chars
from encoder.presets.preset import Preset
from encoder.serving.batch_loop import BatchLoop
from encoder.serving.cache import ResultCache
from encoder.serving.health import Health
from encoder.serving.in_flight import InFlight
from encoder.serving.model_thread import ModelThread
from encoder.serving.recent_tokens import RecentTokens
from encoder.serving.results import Results
from encoder.serving.warmup import warmup_job
from encoder.text_encoder import TextEncoder
from encoder.types import CachePolicy, DType, EncodeResult, EngineStats, ModelInfo, TokenizedPrompt

# A request of so many characters, templates included, is tokenized on the event loop. That takes half a millisecond or
# less, not much more than the detour over another thread.
MAX_CHARS_ON_LOOP = 400


class Engine:
    """One loaded model, served to many.

    Args:
        options: the model to load, and how.
        limits: on requests, queue and batches.
        cache_bytes: bound of the result cache in memory; 0 switches it off.
        disk_cache_dir: folder for results that outlive the process; None has no such cache.
        disk_cache_bytes: bound of that folder.
        stall_s: a forward pass that takes longer, in seconds, makes the engine unready until it returns.
        measure_passes: tell in each result how long the steps of its pass took; the device pauses between them.
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
        self._model_thread = ModelThread(options, self.limits.max_batch_tokens)
        self._stall_s = stall_s
        self._measure_passes = measure_passes
        self._encoder: TextEncoder | None = None
        self._failure: str | None = None  # why there will be no encoder
        self._recent = RecentTokens()
        self._health = Health()
        self._cache = ResultCache(cache_bytes, disk_cache_dir, disk_cache_bytes)
        self._in_flight = InFlight(self._cache, self._health)
        self._batch_loop = BatchLoop(self._model_thread, self.limits, self._in_flight, self._health)
        self._results = Results(self._cache, self._in_flight, self._batch_loop)
        self._requests = 0  # accepted and not yet answered
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    async def start(self) -> None:
        """Load the model, warm it up, then accept requests. Errors: CheckpointError, ModelFailure."""
        try:
            encoder = await self._model_thread.start()
            await self._cache.open(encoder)
        except Exception as error:  # whatever it is, all requests and probes get it as the reason from now on
            self._failure = str(error)
            raise
        encoder.measures_passes = self._measure_passes
        self._batch_loop.start(encoder)
        self._encoder = encoder  # last: with it the engine accepts requests

    async def probe(self) -> None:
        """Return when the next request can be expected to succeed.

        After an unexpected failure, run a job through every step to find out.

        Errors: NotReady with the reason.
        """
        encoder = self._accepting()
        if self._batch_loop.longest_running_s() > self._stall_s:
            raise NotReady(f"A forward pass has not returned for more than {self._stall_s:g} s.", 10)
        if self._health.is_suspect:
            failures = self._health.failures
            try:
                await self._results.run_probe(warmup_job(encoder, rows=1), self._stall_s)
            except EncoderError as error:
                raise NotReady(f"The model fails: {error}", 10) from error
            self._health.clear(failures)

    def drain(self) -> None:
        """Refuse new work from now on; what was accepted is answered."""
        self._draining = True

    async def drained(self) -> None:
        """Return when every accepted request has been answered."""
        await self._idle.wait()

    async def close(self) -> None:
        """End the model thread; requests that still wait fail with NotReady."""
        self.drain()
        self._batch_loop.close()
        self._results.close()
        try:
            await self._model_thread.close()
        finally:
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
            **self._results.stats(),
            **self._batch_loop.stats(),
            **self._cache.stats(),
        )

    def check(self, preset: Preset) -> None:
        """Return if the preset fits what is loaded. Errors: NotReady, InvalidField."""
        self._loaded().check(preset)

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer writes it."""
        return self._loaded().checkpoint.tokenizer.tokens(input_ids)

    async def tokenize(self, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        """Apply the template and tokenize, as `encode` does. Errors: NotReady, RequestTooLarge, InvalidField."""
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

        Args:
            prompts: of one request.
            preset: how they become prompt embeds.
            dtype: of the hidden states.
            timeout_s: how long to wait for the results, in seconds.
            cache_policy: "refresh" reads no cache and keeps the results, "bypass" does neither.
        Errors: NotReady, RequestTooLarge, InvalidField, QueueFull, DeadlineExceeded, ModelFailure.
        """
        encoder = self._accepting()
        self.limits.check_prompts(prompts, preset)
        self._requests += 1
        self._idle.clear()
        try:
            started_at = time.perf_counter()
            tokenized = await self._tokenize(encoder, prompts, preset)
            jobs = encoder.plan(tokenized, preset, dtype)
            self.limits.check_output(jobs, encoder.config.hidden_size)
            tokenization_ms = (time.perf_counter() - started_at) * 1e3
            answer = await self._results.get(jobs, timeout_s, cache_policy)
            return EncodeResult(
                embeds=answer.embeds,
                prompts=tokenized,
                cache=answer.cache,
                tokenization_ms=tokenization_ms,
                queue_ms=answer.queue_ms,
                inference_ms=answer.inference_ms,
                layers_run=answer.layers_run,
                last_pass=answer.last_pass,
            )
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def _tokenize(self, encoder: TextEncoder, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        tokenized = self._recent.get(prompts, preset)
        if tokenized is None:
            if sum(count_chars(prompt, preset) for prompt in prompts) <= MAX_CHARS_ON_LOOP:
                tokenized = encoder.tokenize(prompts, preset)
            else:
                tokenized = await asyncio.to_thread(encoder.tokenize, prompts, preset)
            self._recent.put(prompts, preset, tokenized)
        return tokenized

    def _loaded(self) -> TextEncoder:
        """The encoder. Errors: NotReady before it is loaded."""
        if self._failure is not None:
            raise NotReady(f"The model could not be loaded: {self._failure}", 60)
        if self._encoder is None:
            raise NotReady("The model is still loading.", 5)
        return self._encoder

    def _accepting(self) -> TextEncoder:
        """The encoder, for new work. Errors: NotReady before it is loaded, and after `drain`."""
        if self._draining:
            raise NotReady("The service is shutting down.", 10)
        return self._loaded()
