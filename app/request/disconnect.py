"""Stops the work for a client that has gone, so that its place goes to another."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from app.errors import ClientDisconnected

T = TypeVar("T")
WATCH_AFTER_S = 0.1  # what a request has for nothing if its client goes at once


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first. Call after the body has been read.

    The work stays in the task of its request, and is spared the way into another and back. Nobody looks after the
    client until the work has taken some time: the task for that is more than a short request should pay for.

    Errors: ClientDisconnected, and whatever `work` raises.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = Watch(request, task)
    try:
        return await work
    except asyncio.CancelledError as error:
        if watch.stopped and not task.uncancel():  # else somebody else has cancelled the request, too
            raise ClientDisconnected("The client went away before its answer was there.") from error
        raise
    finally:
        watch.end()


class Watch:
    """Cancels a request's task when its client goes away.

    Attributes:
        stopped: whether it has.
    """

    def __init__(self, request: Request, task: "asyncio.Task[object]") -> None:
        self.stopped = self._ended = False
        self._request = request
        self._task = task
        self._leaving: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def end(self) -> None:
        """The work is done; a client that goes now cancels nothing."""
        self._ended = True
        self._timer.cancel()
        if self._leaving is not None:
            self._leaving.cancel()

    def _begin(self) -> None:
        self._leaving = asyncio.ensure_future(_disconnected(self._request))
        self._leaving.add_done_callback(self._stop)

    def _stop(self, _: "asyncio.Future[None]") -> None:
        if not self._ended:
            self.stopped = True
            self._task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
