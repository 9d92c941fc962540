"""Loads the model when the service starts, and closes the engine when it ends."""

import asyncio
import logging

from encoder import EncoderError, Engine

logger = logging.getLogger(__name__)


class Lifecycle:
    """Start and end of one engine.

    Args:
        engine: not started.
    Attributes:
        loading: the task that loads the model, once started. Its result is False if that failed; the log says why.
        failing: the task that ends when the model cannot be loaded, or has failed since; the log says why.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.loading: asyncio.Task[bool] | None = None
        self.failing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to load the model. Requests are answered meanwhile, those that need the model with 503."""
        self.loading = asyncio.create_task(_load(self._engine))
        self.failing = asyncio.create_task(self._watch())

    async def loaded(self) -> bool:
        """Wait for the load to end, and say whether it succeeded."""
        assert self.loading is not None, "call start first"
        return await asyncio.shield(self.loading)

    async def failed(self) -> None:
        """Return when the model cannot be loaded, or has failed since and was not replaced."""
        assert self.failing is not None, "call start first"
        await asyncio.shield(self.failing)

    async def stop(self) -> None:
        """End a load that is still under way, and close the engine. The caller sets a limit to both."""
        tasks = [task for task in (self.loading, self.failing) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        try:
            await self._engine.close()
        except TimeoutError:
            logger.warning("the model thread hangs; it is left behind")

    async def _watch(self) -> None:
        loaded = await self.loaded()
        reason = await self._engine.failed()
        if loaded:  # else the log has it
            logger.error("cannot serve any more: %s All requests get 503 until this process is started again.", reason)


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
