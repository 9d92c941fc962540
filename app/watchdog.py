"""Ends a process whose event loop hangs, or a thread that all requests of some kind need.

A thread asks each for a sign of life at each of its own ticks. Ticks are counted, not seconds: while the process or
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
from typing import Protocol

from app.threads import BUILDER, PARSER, Worker

logger = logging.getLogger(__name__)

TICK_S = 1.0
LOG_S = 2.0  # for the log to be written: the loop may hang because nobody reads it


class Watched(Protocol):
    """What may hang."""

    name: str

    def moves(self) -> bool:
        """Whether it has moved since this was last asked, or has nothing to do."""


class LoopLife:
    """An event loop moves if it calls back."""

    name = "the event loop"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._called_back = True

    def moves(self) -> bool:
        """As Watched says."""
        if not self._called_back:
            return False
        self._called_back = False
        self._loop.call_soon_threadsafe(self._sign_of_life)
        return True

    def _sign_of_life(self) -> None:
        self._called_back = True


class WorkerLife:
    """A worker moves if it begins calls, or has none."""

    def __init__(self, worker: Worker) -> None:
        self.name = f"the thread {worker.name!r}"
        self._worker = worker
        self._begun = worker.begun

    def moves(self) -> bool:
        """As Watched says."""
        ended, begun = self._worker.ended, self._worker.begun
        before, self._begun = self._begun, begun
        return begun != before or ended == begun


class Watchdog:
    """Watches one event loop, and the workers of app/threads.py.

    Args:
        loop: to watch.
        stall_s: how long it may do nothing else than one callback, and a worker than one call, in seconds.
        exit_code: of the process, if it does.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, stall_s: float, exit_code: int) -> None:
        self._loop = loop
        self._stall_s = stall_s
        self._exit_code = exit_code
        self._watched: list[Watched] = [LoopLife(loop), WorkerLife(PARSER), WorkerLife(BUILDER)]

    def start(self) -> None:
        """Watch until the process ends, on a thread of its own."""
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def _run(self) -> None:
        missed = dict.fromkeys(self._watched, 0)
        while not self._loop.is_closed():
            time.sleep(TICK_S)
            for watched in self._watched:
                missed[watched] = 0 if watched.moves() else missed[watched] + 1
                if missed[watched] * TICK_S >= self._stall_s:
                    self._end(watched.name)

    def _end(self, name: str) -> None:
        """Log what all threads are doing, then end the process, whether or not that could be written."""
        log = threading.Thread(target=self._log, args=(name,), daemon=True)
        log.start()
        log.join(LOG_S)
        os._exit(self._exit_code)

    def _log(self, name: str) -> None:
        logger.error(
            "%s has hung for more than %g s; the process ends with exit code %d, to be started again by "
            "its supervisor. Please report where it hung:\n%s",
            *(name, self._stall_s, self._exit_code, "\n".join(_stacks())),
        )
        logging.shutdown()


def _stacks() -> Iterator[str]:
    """What each thread is doing, most recent call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
