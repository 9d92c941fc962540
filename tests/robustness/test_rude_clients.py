"""Clients that hold connections, bytes or replies hurt nobody else, and what they held comes back."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.robustness.clients import Load, post, reference
from tests.robustness.conftest import Figures
from tests.robustness.loop import HEAVY, effect_of
from tests.robustness.rude import RUDE
from tests.robustness.service import MemoryWatch, known, running

pytestmark = pytest.mark.anyio

LONG = pytest.mark.long
LIMITS = known(
    body_timeout_s=1,
    header_timeout_s=1,
    write_timeout_s=1,
    idle_timeout_s=1,
    request_timeout_s=20,
    max_reply_bytes=2**26,
    log_level="warning",
)
MAX_GROWTH_MB = 150.0  # of all rude clients together, whatever they send
SHORT = ("half a head", "half of 1.9 MB", "endless trailers")
MAX_FILES = 8  # more than before: the polite clients' connections
RETURN_S = 30.0


async def test_rude_clients_hurt_nobody_else(log: Path) -> None:
    """Several kinds at once."""
    await _attack(log, SHORT, seconds=4)


@LONG
@pytest.mark.parametrize("name", RUDE)
async def test_each_kind_of_rude_client_hurts_nobody_else(log: Path, figures: Figures, name: str) -> None:
    figures.add(f"rude: {name}", await _attack(log, [name], seconds=12), "others 200; none open; memory bounded")


async def _attack(log: Path, names: Sequence[str], seconds: float) -> str:
    """Be rude beside polite clients. Returns what happened."""
    polite = [post("/encode", {"prompt": f"{n} cat", "preset": "z-image"}, timeout_s=30) for n in range(20)]
    async with running(log, **LIMITS) as service:
        right = await reference(service.port, polite)
        files, memory = service.open_files(), MemoryWatch(service)
        load = Load(service.port, polite, right, clients=4)
        ends = sum(await asyncio.gather(*(RUDE[name](service.port, seconds) for name in names)), Counter[str]())
        tally, growth_mb = await load.stop(), memory.stop()
        await _until(lambda: service.open_files() <= files + MAX_FILES)
        left_mb = (service.memory_bytes() - memory.before_bytes) / 1e6
    assert not tally.lost and not tally.wrong, str(tally)
    assert tally["200"] > 0 and tally.statuses <= {200, 429}, str(tally)
    assert growth_mb < MAX_GROWTH_MB
    assert not ends["open"], ends
    return f"{dict(ends)}; others {tally}, slowest {tally.slowest_s:.1f} s; +{growth_mb:.0f} MB, +{left_mb:.0f} left"


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(RETURN_S):
        while not condition():
            await asyncio.sleep(0.1)


@LONG
@pytest.mark.parametrize("name", HEAVY)
async def test_a_heavy_request_leaves_the_event_loop_free(log: Path, figures: Figures, name: str) -> None:
    """A report: how late /livez is depends on the machine."""
    async with running(log, log_level="warning") as service, running(log, log_level="warning") as idle:
        effect = await effect_of(service, idle, HEAVY[name]())
    found = f"{effect.status}, {effect.late_ms:.0f} ms late, +{effect.memory_mb:.0f} MB, reply {effect.body_mb:.1f} MB"
    figures.add(f"heavy: {name}", found, "/livez ≤ 50 ms late")

    assert effect.status in (200, 400, 413, 422)
    assert effect.memory_mb < 100 + 6 * effect.body_mb
