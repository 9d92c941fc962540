"""Failures that nobody foresaw, and whether the service has been proven since."""

import logging
from contextlib import suppress

logger = logging.getLogger(__name__)


class Health:
    """Counts failures. Any thread may report one; the event loop asks and proves."""

    def __init__(self) -> None:
        self.failures = 0
        self._made_up_for = 0

    @property
    def is_suspect(self) -> bool:
        """Whether something has failed since the service was last proven."""
        return self.failures > self._made_up_for

    def report(self, what: str, error: BaseException) -> None:
        """Remember a failure and log it. Raises nothing."""
        self.failures += 1
        with suppress(Exception):  # without memory, logging may fail as well
            logger.error(what, exc_info=error)

    def prove(self, failures: int) -> None:
        """Forget the first so many failures: a request that began after them has succeeded."""
        self._made_up_for = max(self._made_up_for, failures)
