"""Work for a client: its result, its error, and its end when the client goes or the request is cancelled."""

import asyncio

import pytest
from starlette.requests import Request
from starlette.types import Message

from app.errors import ClientDisconnected
from app.request.disconnect import unless_disconnected

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


class Client:
    """One that is there until it goes, and knows whether anybody looks after it."""

    def __init__(self) -> None:
        self.watched, self.gone = asyncio.Event(), asyncio.Event()
        self.request = Request({"type": "http"}, self._receive)

    async def _receive(self) -> Message:
        self.watched.set()
        await self.gone.wait()
        return {"type": "http.disconnect"}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients are looked after from the beginning."""
    monkeypatch.setattr("app.request.disconnect.WATCH_AFTER_S", 0)


async def test_the_result_comes_back_and_nothing_goes_on_waiting_for_the_client(at_once: None) -> None:
    client, before = Client(), asyncio.all_tasks()

    async def work() -> str:
        await asyncio.wait_for(client.watched.wait(), 30)
        return "result"

    assert await unless_disconnected(client.request, work()) == "result"
    await asyncio.sleep(0)  # a turn of the loop, in which what was cancelled ends
    assert asyncio.all_tasks() == before


async def test_nobody_looks_after_the_client_of_short_work() -> None:
    """A task for that is more than such a request should pay for."""
    client = Client()

    async def tasks() -> int:
        for _ in range(5):
            await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert await unless_disconnected(client.request, tasks()) == len(asyncio.all_tasks())
    assert not client.watched.is_set()


async def test_a_client_that_went_before_anybody_looked_is_noticed() -> None:
    client, work = Client(), Work()
    client.gone.set()
    with pytest.raises(ClientDisconnected):
        async with asyncio.timeout(30):
            await unless_disconnected(client.request, work())
    assert work.stopped


async def test_an_error_comes_back_as_it_is() -> None:
    async def fail() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        await unless_disconnected(Client().request, fail())


async def test_a_client_that_goes_stops_the_work(at_once: None) -> None:
    client, work = Client(), Work()
    waiting = asyncio.create_task(unless_disconnected(client.request, work()))
    await asyncio.wait_for(client.watched.wait(), 30)
    client.gone.set()
    with pytest.raises(ClientDisconnected):
        await waiting
    assert work.stopped


async def test_a_cancelled_request_stops_the_work_and_is_no_client_that_went(at_once: None) -> None:
    client, work = Client(), Work()
    waiting = asyncio.create_task(unless_disconnected(client.request, work()))
    await asyncio.wait_for(client.watched.wait(), 30)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.stopped


async def test_a_request_cancelled_while_its_work_stops_for_a_client_that_went_ends_as_cancelled(at_once: None) -> None:
    """Whoever cancels a task waits for it to end as cancelled: a server that shuts down, a task group, a timeout."""
    client, stopping = Client(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopping.set()
            await asyncio.sleep(30)

    waiting = asyncio.create_task(unless_disconnected(client.request, work()))
    await asyncio.wait_for(client.watched.wait(), 30)
    client.gone.set()
    await asyncio.wait_for(stopping.wait(), 30)
    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("first", ["the client", "the answer"])
async def test_a_client_that_goes_as_its_answer_comes_cancels_nothing_that_follows(at_once: None, first: str) -> None:
    """What follows is the reply, which fails by itself if nobody is there."""
    client, answer = Client(), asyncio.get_running_loop().create_future()

    async def serve() -> str:
        result: str = await unless_disconnected(client.request, answer)
        for _ in range(5):
            await asyncio.sleep(0)
        return result

    serving = asyncio.create_task(serve())
    await asyncio.wait_for(client.watched.wait(), 30)
    if first == "the client":
        client.gone.set()
    answer.set_result("result")
    client.gone.set()

    assert await serving == "result"
    assert serving.cancelling() == 0


async def test_a_request_that_is_cancelled_as_its_client_goes_ends_as_cancelled(at_once: None) -> None:
    client, work = Client(), Work()
    waiting = asyncio.create_task(unless_disconnected(client.request, work()))
    await asyncio.wait_for(client.watched.wait(), 30)
    client.gone.set()
    waiting.cancel()
    await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.stopped
