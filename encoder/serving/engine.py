"""The asynchronous front of the encoder: tokenize, plan, find or compute the results, answer.

Everything here runs on the event loop and needs no lock; the model runs on its own thread.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from encoder.errors import NotReady
from encoder.options import ModelOptions
from encoder.pipeline.limits import Limits
from encoder.presets.preset import Preset
from encoder.qwen3.cuda.to_host import page_locked_bytes
from encoder.serving.batch_loop import BatchSizes
from encoder.serving.cache import ResultCache
from encoder.serving.deadline import Deadline
from encoder.serving.generation import Generation
from encoder.serving.guardian import Guardian
from encoder.serving.state import StateName
from encoder.types import CachePolicy, DType, EncodeResult, EngineStats, ModelInfo, TokenizedPrompt


class Engine:
    """One loaded model, served to many.

    Args:
        options: the model to load, and how.
        limits: on requests, queue and batches.
        cache_bytes: bound of the result cache in memory; 0 switches it off.
        disk_cache_dir: folder for results that outlive the process; None has no such cache.
        disk_cache_bytes: bound of that folder.
        stall_s: a step of a forward pass that takes longer, in seconds, is taken to hang: the engine fails.
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
        self._cache = ResultCache(cache_bytes, disk_cache_dir, disk_cache_bytes)
        self._batch_sizes = BatchSizes()
        self._guardian = Guardian(
            lambda on_failure, on_end: Generation(
                options, self.limits, self._cache, self._batch_sizes, measure_passes, on_failure, on_end
            ),
            stall_s,
        )

    async def start(self) -> None:
        """Load the model, warm it up, then accept requests. Errors: CheckpointError, ModelFailure."""
        await self._guardian.start()

    @property
    def state(self) -> StateName:
        """Whether the model serves, see state.py."""
        return self._guardian.state.name

    def check_ready(self) -> None:
        """Return if the next request can be expected to succeed. Errors: NotReady with the reason."""
        self._guardian.serving()
        if self.state != "ready":
            raise NotReady(f"The model is being checked. {self._guardian.state.reason}", 1)

    async def failed(self) -> str:
        """Return the reason once the model has failed for good: every request gets NotReady from then on."""
        await self._guardian.failed.wait()
        return self._guardian.state.reason

    async def close(self) -> None:
        """End the model thread; requests that still wait fail with NotReady."""
        writing = asyncio.create_task(self._cache.close())
        try:
            await self._guardian.close()
        finally:
            await writing

    @property
    def info(self) -> ModelInfo:
        """What is loaded. Errors: NotReady before it is."""
        return self._guardian.serving().encoder.info

    def stats(self) -> EngineStats:
        """Gauges and counters of this moment."""
        return EngineStats(
            state=self.state,
            batch_size=self._batch_sizes.prompts,
            batch_tokens=self._batch_sizes.tokens,
            restarts=self._guardian.restarts,
            probes_failed=self._guardian.probes_failed,
            mlx_active_bytes=mx.get_active_memory(),
            mlx_cache_bytes=mx.get_cache_memory(),
            mlx_peak_bytes=mx.get_peak_memory(),
            page_locked_bytes=page_locked_bytes(),
            **self._guardian.stats(),
            **self._cache.stats(),
        )

    def check(self, preset: Preset) -> None:
        """Return if the preset fits what is loaded. Errors: NotReady, InvalidField."""
        self._guardian.serving().encoder.check(preset)

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        """Each token as the tokenizer writes it."""
        return self._guardian.serving().encoder.checkpoint.tokenizer.tokens(input_ids)

    async def tokenize(
        self, prompts: Sequence[str], preset: Preset, timeout_s: float | Deadline = 300.0
    ) -> list[TokenizedPrompt]:
        """Apply the template and tokenize, as `encode` does.

        Errors: NotReady, RequestTooLarge, InvalidField, QueueFull, DeadlineExceeded, ModelFailure.
        """
        generation = self._guardian.serving()
        try:
            chars = self.limits.check_prompts(prompts, preset)
            return await generation.tokenizing.tokenize(prompts, preset, chars, _deadline(timeout_s))
        except BaseException as error:  # noqa: BLE001  # a SystemExit in a request would end the event loop
            raise generation.expected(error) from None

    async def encode(
        self,
        prompts: Sequence[str],
        preset: Preset,
        dtype: DType = "bfloat16",
        timeout_s: float | Deadline = 300.0,
        cache_policy: CachePolicy = "use",
        reserve: Callable[[int], None] = lambda _: None,
    ) -> EncodeResult:
        """Answer one request. Cancelling it frees its place in the queue.

        Args:
            prompts: of one request.
            preset: how they become prompt embeds.
            dtype: of the hidden states.
            timeout_s: how long that may take, in seconds; or when it must end.
            cache_policy: "refresh" reads no cache and keeps the results, "bypass" does neither.
            reserve: called with the bytes of the results before they are looked up or computed; what it raises ends
                the request.
        Errors: NotReady, RequestTooLarge, InvalidField, QueueFull, DeadlineExceeded, ModelFailure.
        """
        generation = self._guardian.serving()
        encoder = generation.encoder
        chars = self.limits.check_prompts(prompts, preset)
        deadline = _deadline(timeout_s)
        try:
            started_at = time.perf_counter()
            tokenized = await generation.tokenizing.tokenize(prompts, preset, chars, deadline)
            jobs = encoder.plan(tokenized, preset, dtype)
            reserve(self.limits.check_output(jobs, encoder.config.hidden_size))
            tokenization_ms = (time.perf_counter() - started_at) * 1e3
            answer = await generation.results.get(jobs, deadline, cache_policy)
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
        except BaseException as error:  # noqa: BLE001  # a SystemExit in a request would end the event loop
            raise generation.expected(error) from None


def _deadline(timeout_s: float | Deadline) -> Deadline:
    return timeout_s if isinstance(timeout_s, Deadline) else Deadline.after(timeout_s)
