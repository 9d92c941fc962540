"""Reports of unexpected failures, from any thread to the event loop."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)


class Health:
    """Hears of the unexpected failures of one loaded model.

    Args:
        on_failure: called on the event loop for each failure, with a sentence; before anyone gets its consequences.
        on_broken: likewise for a failure after which requests would wait in vain.
    Attributes:
        failures: how many there were.
    """

    def __init__(
        self, on_failure: Callable[[str], None] = lambda _: None, on_broken: Callable[[str], None] = lambda _: None
    ) -> None:
        self.failures = 0
        self._on_failure = on_failure
        self._on_broken = on_broken
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Pass failures on from now on. Call on the event loop."""
        self._loop = asyncio.get_running_loop()

    def report(self, message: str, error: BaseException) -> None:
        """Count a failure, log it, and let the event loop know. Safe on any thread. Raises nothing."""
        self._report(message, error, self._on_failure)

    def report_broken(self, message: str, error: BaseException) -> None:
        """The same where nothing but another model can help."""
        self._report(message, error, self._on_broken)

    def _report(self, message: str, error: BaseException, notify: Callable[[str], None]) -> None:
        self.failures += 1
        # Without memory, any of this may fail as well. A loop that has ended needs to know nothing.
        with suppress(BaseException):
            logger.error(message, exc_info=error)
        with suppress(BaseException):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(notify, f"{message} {error!r}")
