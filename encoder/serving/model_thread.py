"""The one thread that touches MLX: it loads the model, warms it up, runs batches, and releases MLX's streams.

MLX arrays and streams belong to the thread that made them, so nothing lazy ever leaves this thread: weights come in,
NumPy buffers go out. A thread has one model: another model needs another thread. Knows nothing of queues and requests.
"""

import asyncio
import atexit
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

import mlx.core as mx

from encoder.errors import ModelFailure
from encoder.options import ModelOptions
from encoder.serving.warmup import WarmPass, warm_up
from encoder.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

# Freed memory that MLX may keep for reuse. On a CPU passes take as long with 4 MiB as with 64, and the service stays
# small; on a GPU MLX's own default is nearly all of its memory.
MLX_CACHE_BYTES = {"cpu": 4 * 2**20, "gpu": 2**30}
PROGRESS_EVERY_S = 5.0
AT_EXIT_S = 5.0  # a thread that takes longer to end is left behind


class ModelThread:
    """A thread that owns a TextEncoder.

    Args:
        options: the model to load, and how.
        max_rows: of a batch.
        work: what the thread does with the loaded model, until `stop` lets it return.
        stop: lets `work` return soon; safe on any thread.
        on_end: called on the event loop when the thread has ended, with the reason.
    Attributes:
        warm_pass: how fast the model is, once it is loaded.
    """

    def __init__(
        self,
        options: ModelOptions,
        max_rows: int,
        work: Callable[[TextEncoder], None],
        stop: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._options = options
        self._max_rows = max_rows
        self._work = work
        self._stop = stop
        self._on_end = on_end
        # A daemon, so that a pass that hangs does not keep the process alive.
        self._thread = Thread(target=self._run, name="model", daemon=True)
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[TextEncoder] | None = self._loop.create_future()
        self._ended = asyncio.Event()
        self._death: str | None = None
        self.warm_pass = WarmPass(0, 0.0)

    async def load(self) -> TextEncoder:
        """Start the thread and wait for its model. Errors: CheckpointError, ModelFailure, and what MLX raises."""
        atexit.register(self._end_at_exit)
        self._thread.start()
        assert self._loaded is not None, "load is called once"
        return await self._loaded

    async def ended(self) -> None:
        """Return when the thread has ended, or if it was never started."""
        if self._thread.ident is not None:
            await self._ended.wait()

    @property
    def is_gone(self) -> bool:
        """Whether it ran and runs no more, even if the event loop has not heard of that."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def hear_of_its_end(self) -> None:
        """Act on the end of the thread, once. Call on the event loop."""
        if not self._ended.is_set():
            self._ended.set()
            atexit.unregister(self._end_at_exit)
            self._settle(ModelFailure("The model thread ended while it loaded the model."))
            self._on_end(self._death or "The model thread ended.")

    # On the thread.

    def _run(self) -> None:
        try:
            self._load_and_work()
        except BaseException as error:  # whatever it is, the event loop must hear that the thread ends
            self._death = f"The model thread ended: {error!r}."
            with suppress(BaseException):
                logger.error("The model thread ended.", exc_info=error)
        finally:
            # What the device still computes, it may not find freed; and a thread that leaves its streams behind can
            # abort the process at exit.
            for release in (mx.synchronize, mx.clear_streams):
                with suppress(Exception):
                    release()
            self._call_on_loop(self.hear_of_its_end)

    def _load_and_work(self) -> None:
        try:
            encoder = self._load()
        except BaseException as error:  # noqa: BLE001  # it belongs to whoever waits for the model
            raised = error if isinstance(error, Exception) else ModelFailure(f"Loading ended: {error!r}.")
            self._call_on_loop(self._settle, raised)
            return
        self._call_on_loop(self._settle, encoder)
        self._work(encoder)

    def _settle(self, outcome: TextEncoder | Exception) -> None:
        loaded, self._loaded = self._loaded, None  # a future keeps its result, and the model must be free to go
        if loaded is None or loaded.done():
            return
        if isinstance(outcome, Exception):
            loaded.set_exception(outcome)
        else:
            loaded.set_result(outcome)

    def _call_on_loop(self, function: Callable[..., None], *args: object) -> None:
        """Let the event loop call a function. Do nothing where the loop has ended because this thread took too long."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

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
        self.warm_pass = warm_up(encoder, self._max_rows)
        mx.clear_cache()
        logger.info("warm in %.1f s", time.perf_counter() - started_at)
        return encoder

    def _end_at_exit(self) -> None:
        self._stop()
        self._thread.join(AT_EXIT_S)


class _LoadingLog:
    """Logs the progress of loading, every few seconds."""

    def __init__(self) -> None:
        self._next_at = time.perf_counter() + PROGRESS_EVERY_S

    def __call__(self, done: int, total: int) -> None:
        if time.perf_counter() >= self._next_at:
            self._next_at += PROGRESS_EVERY_S
            logger.info("loading: %.2f of %.2f GB", done / 1e9, total / 1e9)
