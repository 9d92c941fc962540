"""Stops the work for a client that has gone, so that its place goes to another."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from app.errors import ClientDisconnected

T = TypeVar("T")


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first. Call after the body has been read.

    The work stays in the task of its request, and is spared the way into another and back.

    Errors: ClientDisconnected, and whatever `work` raises.
    """
    task = asyncio.current_task()
    assert task is not None
    leaving = asyncio.ensure_future(_disconnected(request))
    works, stopped = True, False

    def stop(_: "asyncio.Future[None]") -> None:
        nonlocal stopped
        if works:
            stopped = True
            task.cancel()

    leaving.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError as error:
        if stopped and not task.uncancel():  # else somebody else has cancelled the request, too
            raise ClientDisconnected("The client went away before its answer was there.") from error
        raise
    finally:
        works = False
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
