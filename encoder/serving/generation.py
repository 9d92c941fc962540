"""One loaded model, and all that belongs to it: its thread, its queue, and the requests that wait for its results.

A restart makes a new one of everything, so nothing needs resetting, and nothing that the old model still does can reach
a request of the new one.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from copy import copy

from encoder.errors import EncoderError, InvalidField, ModelFailure, NotReady
from encoder.options import ModelOptions
from encoder.pipeline.limits import Limits
from encoder.presets.built_in import LAST_HIDDEN_STATE
from encoder.serving.batch_loop import BatchLoop, BatchSizes
from encoder.serving.cache import ResultCache
from encoder.serving.health import Health
from encoder.serving.in_flight import InFlight
from encoder.serving.model_thread import ModelThread
from encoder.serving.results import Results
from encoder.serving.tokenizing import Tokenizing
from encoder.serving.warmup import warmup_job
from encoder.text_encoder import TextEncoder


class Generation:
    """A model from its load to its end. Create it on the event loop.

    Args:
        options: the model to load, and how.
        limits: on requests, queue and batches.
        cache: of results; it outlives the model.
        batch_sizes: of the batches that run; likewise.
        measure_passes: see Engine.
        on_failure: called on the event loop for each unexpected failure, with a sentence.
        on_end: called on the event loop when nothing can run any more, as when the model thread has ended; likewise.
    Attributes:
        tokenizing, in_flight, batch_loop, results, thread: its parts.
    """

    def __init__(
        self,
        options: ModelOptions,
        limits: Limits,
        cache: ResultCache,
        batch_sizes: BatchSizes,
        measure_passes: bool,
        on_failure: Callable[["Generation", str], None],
        on_end: Callable[["Generation", str], None],
    ) -> None:
        health = Health(lambda reason: on_failure(self, reason), lambda reason: on_end(self, reason))
        self.in_flight = InFlight(cache, health)
        self.batch_loop = BatchLoop(limits, self.in_flight, health, batch_sizes)
        self.results = Results(cache, self.in_flight, self.batch_loop, health)
        self.tokenizing = Tokenizing(limits.max_tokenizing_chars, health)
        self.thread = ModelThread(
            options,
            limits.max_batch_tokens,
            work=self.batch_loop.run,
            stop=self.batch_loop.close,
            on_end=lambda reason: on_end(self, reason),
        )
        self._health = health
        self._cache = cache
        self._measure_passes = measure_passes
        self._encoder: TextEncoder | None = None
        self._closed: NotReady | None = None
        self._earlier_layers_run = 0  # by an encoder that has been released

    @property
    def encoder(self) -> TextEncoder:
        """The loaded model. Errors: NotReady before it is loaded, and once it has been released."""
        if self._encoder is None:
            raise NotReady("The model is still loading.", 5)
        return self._encoder

    async def load(self) -> None:
        """Load the model, and open the cache for it.

        Errors: CheckpointError, ModelFailure, what MLX raises, and NotReady if it was closed meanwhile.
        """
        encoder = await self.thread.load()
        await self._cache.open(encoder)
        if self._closed is not None:
            raise copy(self._closed)
        encoder.measures_passes = self._measure_passes
        self._health.start()
        self.tokenizing.start(encoder)
        self.batch_loop.start(encoder, self.thread.warm_pass)
        self._encoder = encoder

    async def probe(self) -> None:
        """Take the steps of a request, from tokens to a result. Errors: whatever a step raises."""
        with suppress(InvalidField):  # a tokenizer that works may refuse
            self.encoder.tokenize(["a"], LAST_HIDDEN_STATE)
        await self.results.run_probe(warmup_job(self.encoder, rows=1))

    def expected(self, error: BaseException) -> BaseException:
        """What a request raises in place of this error: itself, or ModelFailure where nobody meant to raise it."""
        if isinstance(error, EncoderError | asyncio.CancelledError | GeneratorExit):
            return error
        self._health.report("A request failed.", error)
        return ModelFailure(f"The request failed: {error!r}. The log has the details.")

    def close(self, error: NotReady) -> None:
        """Fail all that waits with this error, refuse what comes, and let the thread end."""
        self._closed = self._closed or error
        self.tokenizing.close(error)
        self.batch_loop.close()
        self.results.close(error)

    def release(self) -> None:
        """Let go of the model's memory, once the thread has ended.

        By reference counts alone: what the garbage collector has frozen it never frees, and this object is in a cycle.
        """
        self._earlier_layers_run = self.layers_run
        self._encoder = None
        self.batch_loop.release()

    @property
    def layers_run(self) -> int:
        """As in EngineStats."""
        return self._encoder.layers_run if self._encoder is not None else self._earlier_layers_run

    def stats(self) -> dict[str, int]:
        """Gauges by the names of EngineStats."""
        return self.tokenizing.stats() | self.batch_loop.stats()

    def counters(self) -> dict[str, int]:
        """Counters by the names of EngineStats."""
        return {"layers_run": self.layers_run, **self.results.counters(), **self.batch_loop.counters()}
