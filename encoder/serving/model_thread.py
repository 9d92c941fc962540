"""The one thread that touches MLX: it loads the model, warms it, runs batches, and cleans up after itself.

MLX arrays and streams belong to the thread that made them, so nothing lazy ever leaves this one: weights come in, NumPy
buffers go out. Knows nothing of queues and requests.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from encoder.errors import EncoderError, ModelFailure, NotReady
from encoder.text_encoder import Begun, TextEncoder
from encoder.types import COMMON_WINDOW, Job, Pass, PromptEmbeds, Tap

logger = logging.getLogger(__name__)

Outcome = PromptEmbeds | EncoderError
T = TypeVar("T")

# What MLX may keep for reuse. On a CPU passes take as long with 4 MiB as with 64, and the service stays small; on a
# GPU MLX's own default is nearly all of its memory.
MLX_CACHE_BYTES = {"cpu": 4 * 2**20, "gpu": 2**30}
PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A batch that has been begun: what of it, or why it could not be, and when, in seconds of time.perf_counter."""

    jobs: Sequence[Job]
    begun: Begun | Exception
    begun_at: float


class Ran(NamedTuple):
    """A batch that has run: the outcome of each job, and the pass, where passes are measured."""

    outcomes: list[Outcome]
    last_pass: Pass | None


class ModelThread:
    """A TextEncoder on a thread of its own.

    Args:
        open_text_encoder: opens the model; called on the thread with a progress callback.
        stall_s: a call that takes longer makes the thread unready until it returns.
        most_rows: of a batch.
    """

    def __init__(
        self,
        open_text_encoder: Callable[[Callable[[int, int], None]], TextEncoder],
        stall_s: float,
        most_rows: int,
    ) -> None:
        self._open_text_encoder = open_text_encoder
        self._stall_s = stall_s
        self._most_rows = most_rows
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._closed = False
        self._busy_since: dict[int, float] = {}  # by batch: one ends, another may have begun behind it
        self._suspect = False  # the last batch failed: prove the model before calling it ready

    async def start(self) -> TextEncoder:
        """Load and warm the model. Errors: CheckpointError, ModelFailure."""
        return await self._call(self._load)

    def submit(self, function: Callable[[], None]) -> None:
        """Have the thread call it when it has done what it was told before."""
        self._thread.submit(function).add_done_callback(_log_error)

    def begin(self, encoder: TextEncoder, jobs: Sequence[Job], meanwhile: Callable[[], None]) -> Running:
        """Begin a batch. On the thread.

        Args:
            meanwhile: called once, as soon as the device has work: what else the thread has to do.
        """
        begun_at = time.perf_counter()
        self._busy_since[id(jobs)] = begun_at
        todo = [meanwhile]

        def do() -> None:
            if todo:
                todo.pop()()

        try:
            begun: Begun | Exception = encoder.begin(jobs, do)
        except Exception as error:  # RuntimeError, ValueError, MemoryError: whatever MLX raises means the same here
            begun = error
        do()
        return Running(jobs, begun, begun_at)

    def end(self, encoder: TextEncoder, running: Running) -> Ran:
        """Wait for a batch and take its results. On the thread.

        If it fails, its jobs run one by one, so that none can fail the others.
        """
        try:
            if isinstance(running.begun, Exception):
                raise running.begun
            return Ran(encoder.end(running.begun), running.begun.measured)
        except Exception as error:  # as above
            logger.exception("a batch of %d prompts failed", len(running.jobs))
            self._suspect = True
            if len(running.jobs) == 1:
                return Ran([ModelFailure(f"The forward pass failed: {error}. The log has the details.")], None)
        finally:
            del self._busy_since[id(running.jobs)]
        alone = [self.end(encoder, self.begin(encoder, [job], lambda: None)) for job in running.jobs]
        return Ran([outcome for ran in alone for outcome in ran.outcomes], alone[-1].last_pass)

    async def probe(self, encoder: TextEncoder) -> None:
        """Return when the next batch can be expected to succeed; after a failed batch, prove it by running the model.

        Errors: NotReady with the reason.
        """
        if any(time.perf_counter() - since > self._stall_s for since in list(self._busy_since.values())):
            raise NotReady(f"A forward pass has not returned for more than {self._stall_s:g} s.", 10)
        if self._suspect:
            try:
                await self._call(_warm, encoder, 1)
            except Exception as error:  # as above
                raise NotReady(f"The model fails: {error}", 10) from error
            self._suspect = False

    async def close(self) -> None:
        """End the thread, once. A thread that leaves its MLX streams behind can abort the process at exit."""
        if not self._closed:
            self._closed = True
            await self._call(mx.clear_streams)
            self._thread.shutdown()

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def _load(self) -> TextEncoder:
        started = time.perf_counter()
        encoder = self._open_text_encoder(_LoadingLog())
        info = encoder.info
        mx.set_cache_limit(MLX_CACHE_BYTES[info.device])
        logger.info("loaded %s in %.1f s", info.model, time.perf_counter() - started)
        logger.info(
            "%.3f GB of weights, computing in %s on %s with %s",
            *(info.parameter_bytes / 1e9, info.compute_dtype, info.device, info.blas),
        )
        started = time.perf_counter()
        _warm_all(encoder, self._most_rows)
        mx.clear_cache()
        logger.info("warm in %.1f s", time.perf_counter() - started)
        return encoder


def _log_error(done: "Future[None]") -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.error("the model's thread has met a bug", exc_info=error)


class _LoadingLog:
    """Logs how far loading is, every few seconds."""

    def __init__(self) -> None:
        self._next = time.perf_counter() + PROGRESS_EVERY_S

    def __call__(self, done: int, total: int) -> None:
        if time.perf_counter() >= self._next:
            self._next += PROGRESS_EVERY_S
            logger.info("loading: %.2f of %.2f GB", done / 1e9, total / 1e9)


def _warm_all(encoder: TextEncoder, most_rows: int) -> None:
    """Run the model at all sizes that are worth it. Errors: whatever it raises within a window."""
    for rows in encoder.forward.first_sizes(most_rows):
        try:
            _warm(encoder, rows)
        except Exception as error:  # whatever MLX raises where a GPU has no room for a large batch beside the model
            if rows <= COMMON_WINDOW:
                raise
            logger.warning("a batch of %d tokens does not run: %s. Set max_batch_tokens below that.", rows, error)
            return


def _warm(encoder: TextEncoder, rows: int) -> None:
    """Run the model on as many tokens, and on live padding rows within a window. Errors: whatever the model raises."""
    for num_tokens in (rows, 1) if rows <= COMMON_WINDOW else (rows,):
        job = Job(
            input_ids=(encoder.checkpoint.tokenizer.pad_token_id,) * num_tokens,
            computed_rows=rows,
            delivered_rows=rows,
            dropped_rows=0,
            taps=(Tap(encoder.num_layers, normed=True),),
            combine="concat",
            dtype="bfloat16",
        )
        [outcome] = encoder.run([job])
        if isinstance(outcome, EncoderError):
            raise outcome
