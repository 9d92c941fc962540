"""Which requests are let in, and which of them have no reply yet. Belongs to the event loop.

A request is let in or refused once, when its head has come. From then on it may ask the engine as often as it needs to,
also while the service drains.
"""

import asyncio
from typing import Any

from starlette.types import Scope

from encoder import NotReady

RETRY_AFTER_S = 3  # until a supervisor has started another process, which then says itself how long it loads
CANCELLED_FOR = "cancelled_for"  # in the state of a request's scope
WORK = "POST"  # the method of every route that needs the model; the others answer to the end


class Admission:
    """The requests without a reply.

    Attributes:
        draining: whether the service is about to end: what asks for work from now on is refused.
    """

    def __init__(self) -> None:
        self.draining = False
        self._unanswered: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._unanswered)

    def enter(self, task: "asyncio.Task[Any]", method: str) -> None:
        """The task serves a request that has begun. Errors: NotReady when it is not let in."""
        self._unanswered.add(task)
        if self.draining and method == WORK:
            raise shutting_down()

    def leave(self, task: "asyncio.Task[Any]") -> None:
        """The reply to the request begins, or there will be none."""
        self._unanswered.discard(task)

    def check(self) -> None:
        """Return if the next request would be let in. Errors: NotReady."""
        if self.draining:
            raise shutting_down()

    def end(self) -> int:
        """Cancel what has no reply, which then gets 503. Returns how many requests that are."""
        for task in self._unanswered:
            task.cancel()
        return len(self._unanswered)


def why_cancelled(scope: Scope) -> Exception:
    """What a request is answered with that the server has cancelled: what the server says, or that it ends."""
    error: Exception | None = scope.get("state", {}).get(CANCELLED_FOR)
    return error or shutting_down()


def shutting_down() -> NotReady:
    """What a request is told that was not let in, or not answered in time."""
    return NotReady("The service is shutting down.", RETRY_AFTER_S)
