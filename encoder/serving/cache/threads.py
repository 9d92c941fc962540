"""Threads for calls that may hang. They are daemons, and nobody has to wait for them at the end of the process."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonThreads:
    """Runs calls for the event loop, in the order in which they come, as many at a time as there are threads."""

    def __init__(self, number: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=name, daemon=True) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def run(self, call: Callable[[], T]) -> "asyncio.Future[T]":
        """Call on one of the threads; the future gets the outcome."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """End each thread once it has nothing left to do."""
        for _ in self._threads:
            self._calls.put(None)

    def _work(self) -> None:
        with suppress(RuntimeError):  # the event loop has ended, because the last call took too long
            while (given := self._calls.get()) is not None:
                future, call = given
                try:
                    outcome, error = call(), None
                except BaseException as raised:  # noqa: BLE001  # it belongs to whoever waits for the outcome
                    outcome, error = None, raised
                self._loop.call_soon_threadsafe(_settle, future, outcome, error)
                del given, future, call, outcome, error  # a result may be large, and the next call late


def _settle(future: "asyncio.Future[Any]", outcome: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(outcome)
    else:
        future.set_exception(error)
        future.exception()  # whoever has asked may be gone, which is no reason for a warning
