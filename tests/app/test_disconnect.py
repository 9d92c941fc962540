"""Work for a client: its result, its error, and its end when the client goes or the request is cancelled."""

import asyncio

import pytest
from starlette.requests import Request
from starlette.types import Message

from app.disconnect import unless_disconnected
from app.errors import ClientDisconnected

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Work:
    """Never ends by itself, and knows whether it was stopped."""

    def __init__(self) -> None:
        self.started, self.stopped = asyncio.Event(), False

    async def __call__(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped = True


def request(gone: asyncio.Event) -> Request:
    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http"}, receive)


async def test_the_result_comes_back_and_nothing_goes_on_waiting_for_the_client() -> None:
    before = asyncio.all_tasks()
    assert await unless_disconnected(request(asyncio.Event()), asyncio.sleep(0, "result")) == "result"
    await asyncio.sleep(0)  # a turn of the loop, in which what was cancelled ends
    assert asyncio.all_tasks() == before


async def test_an_error_comes_back_as_it_is() -> None:
    async def fail() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        await unless_disconnected(request(asyncio.Event()), fail())


async def test_a_client_that_goes_stops_the_work() -> None:
    gone, work = asyncio.Event(), Work()
    waiting = asyncio.create_task(unless_disconnected(request(gone), work()))
    await work.started.wait()
    gone.set()
    with pytest.raises(ClientDisconnected):
        await waiting
    assert work.stopped


async def test_a_cancelled_request_stops_the_work_and_is_no_client_that_went() -> None:
    work = Work()
    waiting = asyncio.create_task(unless_disconnected(request(asyncio.Event()), work()))
    await work.started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.stopped


async def test_a_client_that_goes_as_its_answer_comes_cancels_nothing_that_follows() -> None:
    """What follows is the reply, which fails by itself if nobody is there."""
    gone, answer = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def serve() -> str:
        result: str = await unless_disconnected(request(gone), answer)
        for _ in range(5):
            await asyncio.sleep(0)
        return result

    serving = asyncio.create_task(serve())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    answer.set_result("result")
    gone.set()

    assert await serving == "result"
    assert serving.cancelling() == 0


async def test_a_request_that_is_cancelled_as_its_client_goes_ends_as_cancelled() -> None:
    gone, work = asyncio.Event(), Work()
    waiting = asyncio.create_task(unless_disconnected(request(gone), work()))
    await work.started.wait()
    gone.set()
    waiting.cancel()
    await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.stopped
