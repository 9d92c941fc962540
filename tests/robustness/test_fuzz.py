"""Requests that no client should send get an answer that says so: never a 5xx, never silence."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from tests.robustness.clients import exchange
from tests.robustness.conftest import Figures
from tests.robustness.fuzz import Fuzz
from tests.robustness.service import known, running

pytestmark = pytest.mark.anyio

CLIENTS = 64
LIMITS = known(body_timeout_s=1, header_timeout_s=1, log_level="warning")
ENDED_S = 5.0  # the service must have ended the exchange by then, on the slowest machine
GRACE_S = 20.0


@pytest.mark.parametrize(("count", "seed"), [(250, 1), pytest.param(100_000, 2, marks=pytest.mark.long)])
async def test_no_request_gets_a_5xx_or_no_answer(log: Path, figures: Figures, count: int, seed: int) -> None:
    source, numbers = iter(Fuzz(seed)), iter(range(count))
    found: Counter[str] = Counter()
    bad: list[bytes] = []
    megabytes: list[float] = []
    async with running(log, **LIMITS) as service:

        async def client() -> None:
            for number in numbers:
                data = next(source)
                ended = await exchange(service.port, data, ENDED_S, GRACE_S)
                found.update([ended.how, *map(str, ended.replies)])
                if ended.how in ("hung", "refused") or any(status >= 500 for status in ended.replies):
                    bad.append(data[:2000])
                if number % (count // 5) == count // 5 - 1:
                    megabytes.append(service.memory_bytes() / 1e6)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    growth = 100 * (max(megabytes) / megabytes[0] - 1)
    figures.add(f"{count:,} fuzzed requests, seed {seed}", dict(found), "0 5xx, 0 hung")
    figures.add("memory after the first fifth of them", f"+{growth:.1f} % of {megabytes[0]:.0f} MB", "flat")

    assert not bad
    assert found["200"] > count // 100
