"""Threads for work that would hold up the event loop: one for each kind of work.

One, because such work holds Python's lock or fills memory: the loop then shares the lock with few, and memory is that
of one large body or reply at a time. The work goes in steps of about a millisecond, between which the lock is free.
The watchdog looks after them: while one hangs, all later work of its kind would wait until its time is up.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """One thread, whose calls wait for each other. The thread writes the attributes, and any thread may read them.

    Attributes:
        name: of the thread.
        begun: calls that have begun.
        ended: calls that have ended.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.begun = self.ended = 0
        self.thread = ThreadPoolExecutor(1, name)

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; call on the thread."""
        self.begun += 1
        try:
            return work()
        finally:
            self.ended += 1


PARSER = Worker("parser")  # unpacks, parses and checks bodies
BUILDER = Worker("builder")  # copies results, writes numbers as text


async def on(worker: Worker, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns or raises. Cancelling this also cancels work that has not begun."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(worker.thread, worker.call, lambda: work(*args, **kwargs))
