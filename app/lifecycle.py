"""Loads the model when the service starts, and closes the engine when it ends."""

import asyncio
import logging

from encoder import EncoderError, Engine

logger = logging.getLogger(__name__)


class Lifecycle:
    """Start and end of one engine.

    Args:
        engine: not started.
        drain_timeout_s: maximum wait for the model thread to end, in seconds.
    Attributes:
        loading: the task that loads the model, once started. Its result is False if that failed; the log says why.
        is_stuck: whether a load or a forward pass still occupies the model thread, although the engine was closed.
    """

    def __init__(self, engine: Engine, drain_timeout_s: float) -> None:
        self.is_stuck = False
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self.loading: asyncio.Task[bool] | None = None
        self._close_called = False

    def start(self) -> None:
        """Begin to load the model. Requests are answered meanwhile, those that need the model with 503."""
        self.loading = asyncio.create_task(_load(self._engine))

    async def loaded(self) -> bool:
        """Wait for the load to end, and say whether it succeeded."""
        assert self.loading is not None, "call start first"
        return await asyncio.shield(self.loading)

    async def stop(self) -> None:
        """End a load that is still under way, and close the engine."""
        if self.loading is not None:
            self.loading.cancel()
            await asyncio.wait([self.loading])
        await self.close()

    async def close(self) -> None:
        """Close the engine, once. Requests that it has not answered fail with NotReady."""
        if self._close_called:
            return
        self._close_called = self.is_stuck = True
        try:
            await asyncio.wait_for(self._engine.close(), self._drain_timeout_s)
            self.is_stuck = False
        except TimeoutError:
            logger.warning("the model thread has not ended within %g s", self._drain_timeout_s)


async def _load(engine: Engine) -> bool:
    """Load the model. False if that failed; the log says why."""
    try:
        await engine.start()
    except EncoderError as error:
        logger.error("cannot serve: %s", error)
        return False
    except Exception:  # a bug, or anything MLX raises: log the traceback, the process ends
        logger.exception("cannot serve: loading failed")
        return False
    return True
