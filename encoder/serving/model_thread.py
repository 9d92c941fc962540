"""The one thread that touches MLX: it loads the model, warms it up, runs batches, and releases MLX's streams.

MLX arrays and streams belong to the thread that made them, so nothing lazy ever leaves this thread: weights come in,
NumPy buffers go out. Knows nothing of queues and requests.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import mlx.core as mx

from encoder.options import ModelOptions
from encoder.serving.warmup import warm_up
from encoder.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

# Freed memory that MLX may keep for reuse. On a CPU passes take as long with 4 MiB as with 64, and the service stays
# small; on a GPU MLX's own default is nearly all of its memory.
MLX_CACHE_BYTES = {"cpu": 4 * 2**20, "gpu": 2**30}
PROGRESS_EVERY_S = 5.0


class ModelThread:
    """A thread that owns a TextEncoder.

    Args:
        options: the model to load, and how.
        max_rows: of a batch.
    """

    def __init__(self, options: ModelOptions, max_rows: int) -> None:
        self._options = options
        self._max_rows = max_rows
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._closed = False

    async def start(self) -> TextEncoder:
        """Load the model and warm it up. Errors: CheckpointError, ModelFailure."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    def submit(self, work: Callable[[], None]) -> None:
        """Let the thread do some work after everything that was submitted before. It should raise nothing."""
        self._thread.submit(work).add_done_callback(_log_error)

    async def close(self) -> None:
        """End the thread, once. A thread that leaves its MLX streams behind can abort the process at exit."""
        if not self._closed:
            self._closed = True
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, mx.clear_streams)
            finally:
                self._thread.shutdown()

    def _load(self) -> TextEncoder:
        started_at = time.perf_counter()
        encoder = TextEncoder.open(self._options, _LoadingLog())
        info = encoder.info
        mx.set_cache_limit(MLX_CACHE_BYTES[info.device])
        logger.info("loaded %s in %.1f s", info.model, time.perf_counter() - started_at)
        logger.info(
            "%.3f GB of weights, computing in %s on %s, forward pass: %s",
            *(info.parameter_bytes / 1e9, info.compute_dtype, info.device, info.forward),
        )
        started_at = time.perf_counter()
        warm_up(encoder, self._max_rows)
        mx.clear_cache()
        logger.info("warm in %.1f s", time.perf_counter() - started_at)
        return encoder


def _log_error(done: "Future[None]") -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.error("Work on the model thread failed.", exc_info=error)


class _LoadingLog:
    """Logs the progress of loading, every few seconds."""

    def __init__(self) -> None:
        self._next_at = time.perf_counter() + PROGRESS_EVERY_S

    def __call__(self, done: int, total: int) -> None:
        if time.perf_counter() >= self._next_at:
            self._next_at += PROGRESS_EVERY_S
            logger.info("loading: %.2f of %.2f GB", done / 1e9, total / 1e9)
