"""A supervised service is killed, or told to end, while clients of every kind are busy with it."""

import asyncio
import signal
from pathlib import Path

import numpy as np
import pytest

from app.client import AsyncClient
from tests.robustness.clients import HOST, mixed, post, reference
from tests.robustness.conftest import Figures
from tests.robustness.ends import end_under_load
from tests.robustness.service import Supervisor, running

pytestmark = pytest.mark.anyio

LONG = pytest.mark.long
WITHIN_S = 40.0  # drain_timeout_s of 10, the last bytes, and a busy machine
TWO_STEPS = [
    *(post("/sglang/encode", {"prompt": f"{n} " + "x" * 300, "negative_prompt": f"no {n}"}, "*/*") for n in range(6)),
    *(
        post(
            "/v1/hidden_states/structured",
            {"user_prompt": f"{n} " + "x" * 300, "return_token_boundaries": True, "encoding_format": "base64"},
            "application/json",
        )
        for n in range(6)
    ),
]


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=LONG)])
async def test_our_client_gets_through_a_service_that_is_killed(log: Path, figures: Figures, times: int) -> None:
    wrong: list[str] = []
    calls = 0
    stopping = False
    async with running(log, log_level="warning") as service:
        where = f"http://{HOST}:{service.port}"
        supervisor = Supervisor(service)
        prompts = [f"{number} cat" for number in range(6)]
        async with AsyncClient(where) as client:
            right = [(await client.encode(prompt, "z-image")).hidden_states.numpy() for prompt in prompts]

        async def call(offset: int) -> None:
            nonlocal calls
            async with AsyncClient(where) as client:
                while not stopping:
                    number = (offset + calls) % len(prompts)
                    calls += 1
                    try:
                        embeds = await client.encode(prompts[number], "z-image")
                    except Exception as error:  # noqa: BLE001  # whatever a user of the client would see
                        wrong.append(repr(error))
                        await asyncio.sleep(0.1)
                        continue
                    if not np.array_equal(embeds.hidden_states.numpy(), right[number]):
                        wrong.append(prompts[number])

        tasks = [asyncio.create_task(call(offset)) for offset in range(4)]
        for _ in range(times):
            await asyncio.sleep(0.5)
            service.process.kill()
            await asyncio.sleep(0.2)
            await service.wait_until_ready()
        stopping = True
        await asyncio.gather(*tasks)
        await supervisor.stop()
    figures.add(f"{times} × kill -9", f"{calls} calls, {len(wrong)} failed", "every call right")

    assert len(supervisor.codes) == times
    assert not wrong


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 20, marks=LONG),
        pytest.param(signal.SIGINT, 20, marks=LONG),
    ],
)
async def test_a_signal_under_load_cuts_nobody(log: Path, figures: Figures, number: signal.Signals, times: int) -> None:
    """Drop-ins of two steps, bodies sent in halves, large replies read slowly, and kept connections among them."""
    requests, right = mixed() + TWO_STEPS, dict[str, bytes]()
    complaints: list[str] = []
    slowest = 0.0
    for _ in range(times):
        async with running(log, drain_timeout_s=10) as service:
            right = right or await reference(service.port, mixed())
            ending = await end_under_load(service, number, requests, right, WITHIN_S)
        complaints += ending.complaints()
        slowest = max(slowest, ending.seconds)
    found = f"{len(complaints)} complaints {complaints[:3]}, slowest {slowest:.1f} s"
    figures.add(f"{times} × {number.name} under load", found, "none cut, exit 0")

    assert not complaints
