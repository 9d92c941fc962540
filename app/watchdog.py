"""Ends a process whose event loop hangs: nothing else in it could answer anyone any more.

A thread asks the loop for a sign of life at each of its own ticks. Ticks are counted, not seconds: while the process or
the machine is suspended the thread does not tick either. What holds the GIL and never returns stops this thread too;
only a probe from outside, as `GET /livez`, notices that.
"""

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

logger = logging.getLogger(__name__)

TICK_S = 1.0
LOG_S = 2.0  # for the log to be written: the loop may hang because nobody reads it


class Watchdog:
    """Watches one event loop.

    Args:
        loop: to watch.
        stall_s: how long it may do nothing else than one callback, in seconds.
        exit_code: of the process, if it does.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stall_s: float, exit_code: int) -> None:
        self._loop = loop
        self._stall_s = stall_s
        self._exit_code = exit_code
        self._alive = True  # the loop has called back

    def start(self) -> None:
        """Watch until the process ends, on a thread of its own."""
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def _run(self) -> None:
        missed = 0
        while not self._loop.is_closed():
            time.sleep(TICK_S)
            if self._alive:
                missed, self._alive = 0, False
                self._loop.call_soon_threadsafe(self._sign_of_life)
            elif (missed := missed + 1) * TICK_S >= self._stall_s:
                self._end()

    def _sign_of_life(self) -> None:
        self._alive = True

    def _end(self) -> None:
        """Log what all threads are doing, then end the process, whether or not that could be written."""
        log = threading.Thread(target=self._log, daemon=True)
        log.start()
        log.join(LOG_S)
        os._exit(self._exit_code)

    def _log(self) -> None:
        logger.error(
            "the event loop has hung for more than %g s; the process ends with exit code %d, to be started again by "
            "its supervisor. Please report where it hung:\n%s",
            *(self._stall_s, self._exit_code, "\n".join(_stacks())),
        )
        logging.shutdown()


def _stacks() -> Iterator[str]:
    """What each thread is doing, most recent call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
