"""When a request must be answered: a time after its first byte, which covers every stage of it.

Our server bounds the arrival of a body and the sending of a reply by limits of their own.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from app.settings import Settings
from encoder import Deadline, RequestStage


def set_deadline(request: Request, settings: Settings, timeout_ms: int | None = None) -> Deadline:
    """Give a request the server's deadline, or its own if that is sooner.

    Args:
        timeout_ms: milliseconds that the request allows.
    """
    timeout_s = settings.request_timeout_s
    if timeout_ms is not None and timeout_ms < timeout_s * 1000:
        timeout_s = timeout_ms / 1000
    began_at = received_at(request) or request.scope.setdefault("began_at", time.perf_counter())
    deadline = request.scope["deadline"] = Deadline(timeout_s, began_at + timeout_s)
    return deadline


def received_at(request: Request) -> float | None:
    """When the first byte of the request came, in seconds of time.perf_counter; None under another server than ours."""
    at: float | None = request.scope.get("state", {}).get("received_at")
    return at


def deadline_of(request: Request) -> Deadline:
    """The deadline of a request whose body has been read."""
    deadline: Deadline = request.scope["deadline"]
    return deadline


@asynccontextmanager
async def limited(deadline: Deadline | None, stage: RequestStage) -> AsyncIterator[None]:
    """End the block where it takes longer than the request has time, if it has a deadline. Errors: DeadlineExceeded."""
    timer = asyncio.timeout(deadline.left_s() if deadline is not None else None)
    try:
        async with timer:
            yield
    except TimeoutError as error:
        if deadline is not None and timer.expired():
            raise deadline.exceeded(stage) from error
        raise
