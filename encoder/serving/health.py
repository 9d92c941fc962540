"""Unexpected failures, and whether a request has succeeded since."""

import logging
from contextlib import suppress

logger = logging.getLogger(__name__)


class Health:
    """Counts unexpected failures. Any thread may report one; all other methods belong to the event loop."""

    def __init__(self) -> None:
        self.failures = 0
        self._cleared = 0  # the first so many failures

    @property
    def is_suspect(self) -> bool:
        """Whether something has failed, and no request that began later is known to have succeeded."""
        return self.failures > self._cleared

    def report(self, message: str, error: BaseException) -> None:
        """Count a failure and log it. Raises nothing."""
        self.failures += 1
        with suppress(Exception):  # without memory, logging may fail as well
            logger.error(message, exc_info=error)

    def clear(self, failures: int) -> None:
        """Forgive the first so many failures: a request that began after them has succeeded."""
        self._cleared = max(self._cleared, failures)
