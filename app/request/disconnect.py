"""Stops the work for a client that has disconnected, so that other requests get its place."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from app.errors import ClientDisconnected

T = TypeVar("T")
WATCH_AFTER_S = 0.1  # a disconnect is noticed at the earliest this long after the work began


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects first. Call after the body has been read.

    The work runs in the task of the request: a task of its own would cost a switch there and back. Watching the client
    does take a task, so it starts only after WATCH_AFTER_S, which most requests do not reach.

    Errors: ClientDisconnected, and whatever `work` raises.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = Watch(request, task)
    try:
        return await work
    except asyncio.CancelledError as error:
        if watch.disconnected and task.uncancel() == 0:  # above 0, something else has cancelled the request as well
            raise ClientDisconnected("The client disconnected before its reply was ready.") from error
        raise
    finally:
        watch.end()


class Watch:
    """Cancels the task of a request when its client disconnects.

    Attributes:
        disconnected: whether that has happened.
    """

    def __init__(self, request: Request, task: "asyncio.Task[object]") -> None:
        self.disconnected = self._ended = False
        self._request = request
        self._task = task
        self._watching: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def end(self) -> None:
        """Stop watching: the work is done, and a disconnect from now on cancels nothing."""
        self._ended = True
        self._timer.cancel()
        if self._watching is not None:
            self._watching.cancel()

    def _begin(self) -> None:
        self._watching = asyncio.ensure_future(_wait_for_disconnect(self._request))
        self._watching.add_done_callback(self._cancel)

    def _cancel(self, _: "asyncio.Future[None]") -> None:
        if not self._ended:
            self.disconnected = True
            self._task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
