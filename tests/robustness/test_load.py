"""Many clients at once: every reply is right, or says that the service is busy."""

import asyncio
from pathlib import Path

import pytest

from tests.robustness.clients import Load, mixed, reference
from tests.robustness.conftest import Figures
from tests.robustness.probe import Probe
from tests.robustness.service import running
from tests.robustness.soak import Mix, send

pytestmark = pytest.mark.anyio

LONG = pytest.mark.long


@pytest.mark.parametrize(("clients", "seconds"), [(32, 0.5), pytest.param(256, 120, marks=LONG)])
async def test_a_crowd_gets_right_bodies_or_429(log: Path, figures: Figures, clients: int, seconds: float) -> None:
    requests = mixed(timeout_s=60)
    async with running(log, log_level="warning") as service:
        right = await reference(service.port, requests)
        tally = await Load(service.port, requests, right, clients).stop_after(seconds)
    figures.add(f"{clients} clients, {seconds:g} s", tally, "0 wrong, 0 lost, only 200 and 429")

    assert tally.lost == 0
    assert not tally.wrong
    assert tally.statuses <= {200, 429}
    assert tally["200"] > clients


@LONG
async def test_probes_are_answered_beside_a_crowd(log: Path, figures: Figures) -> None:
    """A report: how late /livez is depends on the machine. The control is a service beside it that does nothing."""
    requests = mixed(timeout_s=60)
    async with running(log, log_level="warning") as service, running(log, log_level="warning") as idle:
        probe, control = Probe(service.port), Probe(idle.port)
        await Load(service.port, requests, {}, 256).stop_after(30)
        found, usual = await asyncio.to_thread(probe.stop), await asyncio.to_thread(control.stop)
    for name in ("largest", "percentile_99", "median"):
        late_ms = getattr(found, name) - getattr(usual, name)
        figures.add(f"/livez beside 256 clients over a control: {name}", f"{late_ms:.0f} ms", "≤ 50 ms")

    assert found.failed == 0


@LONG
async def test_memory_stays_flat_over_mixed_requests(log: Path, figures: Figures) -> None:
    """Read ten times after the first fifth. The cache is small, so that it is full by then.

    2 % are 160 bytes of each request. The heaps of C libraries still settle by 2 to 3 % after the first fifth, while
    Python's objects take the same to 1 %; a leak would be more than twice that.
    """
    count, readings = 20_000, 10
    async with running(log, log_level="warning", cache_bytes=2**22) as service:
        requests = iter(Mix())
        await send(service.port, requests, count // 5)
        megabytes = [service.memory_bytes() / 1e6]
        for _ in range(readings):
            tally = await send(service.port, requests, count * 4 // 5 // readings)
            assert tally.statuses <= {200, 422} and not tally.lost, str(tally)
            megabytes.append(service.memory_bytes() / 1e6)
    growth = 100 * (max(megabytes) / megabytes[0] - 1)
    figures.add(f"memory over {count:,} mixed requests", f"+{growth:.1f} % of {megabytes[0]:.0f} MB", "≤ 2 %")

    assert growth <= 2 * 2, megabytes
