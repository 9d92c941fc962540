"""A client that sends much does not make one wait that sends little."""

import asyncio
import statistics
from collections import Counter
from pathlib import Path

import pytest

from tests.robustness.clients import Connection, Lost, post
from tests.robustness.conftest import Figures
from tests.robustness.service import running

pytestmark = pytest.mark.anyio

LONG = pytest.mark.long


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=LONG)])
async def test_a_single_prompt_does_not_wait_for_64(log: Path, figures: Figures, rounds: int) -> None:
    """Both clients ask again as soon as they are answered; the one with 64 prompts is the control."""
    async with running(log, log_level="warning", max_batch_tokens=512) as service:
        waits: dict[str, list[float]] = {"single": [], "many": []}
        stopping = False

        async def single(number: int) -> None:
            connection = Connection(service.port)
            while not stopping:
                waits["single"].append(await _wait(connection, [f"{number} {len(waits['single'])}" + "s" * 50]))
            connection.close()

        tasks = [asyncio.create_task(single(number)) for number in range(2)]
        connection = Connection(service.port)
        for number in range(rounds):
            prompts = [f"{number} {prompt}" + "m" * 200 for prompt in range(64)]
            waits["many"].append(await _wait(connection, prompts))
        stopping = True
        await asyncio.gather(*tasks)
        connection.close()
    ratio = statistics.mean(waits["single"]) / statistics.mean(waits["many"])
    figures.add("wait of a single prompt beside 64", f"{ratio:.2f} of theirs", "≤ 0.3")

    assert ratio <= 0.3


async def _wait(connection: Connection, prompts: list[str]) -> float:
    reply = await connection.ask(post("/encode", {"prompts": prompts}, "application/msgpack"))
    assert reply.status == 200, reply
    return reply.seconds


@pytest.mark.parametrize("clients", [6, pytest.param(48, marks=LONG)])
async def test_a_flood_of_long_prompts_is_answered_in_time(log: Path, figures: Figures, clients: int) -> None:
    """Their deadline is 3 s; a short prompt behind them is not in their way."""
    prompts = [f"{number} " + "word " * 5998 for number in range(64)]  # of 30,000 characters
    flood = post("/encode", {"prompts": prompts}, "application/msgpack", timeout_s=60)
    short = post("/encode", {"prompt": "y" * 500}, timeout_s=60)
    async with running(log, log_level="warning", request_timeout_s=3) as service:
        connections = [Connection(service.port) for _ in range(clients)]
        flooding = [asyncio.create_task(_ask(connection, flood)) for connection in connections]
        await asyncio.sleep(0.5)
        singles = [await _ask(Connection(service.port), short) for _ in range(3)]
        ends = await asyncio.gather(*flooding)
    slowest, waited = max(seconds for _, seconds in ends), max(seconds for _, seconds in singles)
    found = f"{dict(Counter(how for how, _ in ends))}, slowest {slowest:.1f} s; a short prompt {singles}"
    figures.add(f"{clients} × 64 × 30,000 characters, deadline 3 s", found, "≤ 3 s, each")

    assert {how for how, _ in ends} <= {"200", "413", "422", "429", "504"}
    assert {how for how, _ in singles} == {"200"}
    assert waited <= slowest


async def _ask(connection: Connection, request: object) -> tuple[str, float]:
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        how = str((await connection.ask(request)).status)  # type: ignore[arg-type]
    except Lost as lost:
        how = lost.how
    connection.close()
    return how, round(loop.time() - started, 2)
