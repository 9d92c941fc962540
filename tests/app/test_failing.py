"""A service that can serve no more says so, and ends."""

import asyncio
import logging
import threading
from collections.abc import Callable

import httpx
import pytest

from app.listen import listening_socket
from app.main import create_app, lifespan
from app.server import FAILED, Server
from app.service import service_of
from app.settings import Settings
from tests.app.running import PATIENCE_S


def run_until_it_ends(act: Callable[[Server], None], when_loaded: Callable[[], None] = lambda: None) -> Server:
    """A server that does something once its model is loaded, after it has ended by itself."""
    settings = Settings(port=0)
    with listening_socket(settings) as sock:
        server = Server(create_app(settings), sock, when_loaded)

        async def serve() -> None:
            serving = asyncio.create_task(server.serve([sock]))
            while server.service.engine.state == "loading":
                await asyncio.sleep(0.01)
            act(server)
            await asyncio.wait_for(serving, PATIENCE_S)

        thread = threading.Thread(target=asyncio.run, args=[serve()])
        thread.start()
        thread.join()
    return server


def test_a_service_whose_model_has_failed_ends_with_3_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """What happened and what to do, for whoever reads the log after the supervisor has acted."""
    caplog.set_level(logging.WARNING)
    server = run_until_it_ends(lambda server: server.service.engine._guardian._give_up("The device is lost."))

    assert server.exit_code == FAILED
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "The device is lost." in line and "started again" in line


def test_a_task_of_the_service_that_fails_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody else would hear of a model that fails later."""

    def fail() -> None:
        raise MemoryError("an unexpected error")

    server = run_until_it_ends(lambda server: None, when_loaded=fail)

    assert server.exit_code == FAILED
    assert "an unexpected error" in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_under_another_server_a_model_that_has_failed_is_said_in_readyz() -> None:
    """There the process is not ours to end."""
    app = create_app(Settings())
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        engine = service_of(app).engine
        async with asyncio.timeout(PATIENCE_S):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
        engine._guardian._give_up("The device is lost.")
        ready, alive = await client.get("/readyz"), await client.get("/livez")
        refused = await client.post("/encode", json={"prompt": "a cat"})

    assert ready.status_code == 503 and "The device is lost." in ready.json()["error"]["message"]
    assert alive.status_code == 200
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
