"""Threads for work that would hold up the event loop: one for each kind of work.

One, because such work holds Python's lock or fills memory: the loop then shares the lock with few, and memory is that
of one large body or reply at a time. The work goes in steps of about a millisecond, between which the lock is free.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PARSER = ThreadPoolExecutor(1, "parser")  # unpacks, parses and checks bodies
BUILDER = ThreadPoolExecutor(1, "builder")  # copies results, writes numbers as text


async def on(thread: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns or raises. Cancelling this also cancels work that has not begun."""
    return await asyncio.get_running_loop().run_in_executor(thread, lambda: work(*args, **kwargs))
