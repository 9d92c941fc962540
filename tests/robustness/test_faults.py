"""A fault at any stage, under load: every client gets an answer, and the service comes back or ends."""

import pkgutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.robustness.clients import mixed, reference
from tests.robustness.conftest import Figures
from tests.robustness.faults import CLIENT_TIMEOUT_S, SETTINGS, strike
from tests.robustness.faulty import ON_LOOP, STAGES
from tests.robustness.service import Service

pytestmark = pytest.mark.anyio

AT_START = ("load", "identity", "warm-up")
ROUNDS = 20
SERVED = [stage for stage in STAGES if stage not in AT_START]
EVERY = [(stage, kind) for stage in SERVED for kind in ("exception", "memory", "exit", "slow", "hang")]
EVERY.append(("select", "nan"))
SAMPLE = [("tokenize", "exception"), ("select", "nan")]


def test_every_stage_is_a_function_of_the_service() -> None:
    for path in STAGES.values():
        assert callable(pkgutil.resolve_name(path)), path


class Healthy:
    """A service that takes orders. It is started anew where a fault has left it broken."""

    def __init__(self, folder: Path) -> None:
        self.requests = mixed(timeout_s=CLIENT_TIMEOUT_S)
        self.right: dict[str, bytes] = {}
        self._folder = folder
        self._service: Service | None = None

    async def service(self) -> Service:
        """One that is ready."""
        if self._service is not None and not (self._service.is_running and await self._service.is_ready()):
            self.end()
        if self._service is None:
            self._service = Service(
                self._folder / "log", faulty=True, disk_cache_dir=self._folder / "results", **SETTINGS
            )
            await self._service.wait_until_ready()
            self.right = self.right or await reference(self._service.port, self.requests)
        return self._service

    def end(self) -> None:
        """End it."""
        if self._service is not None:
            self._service.kill()
        self._service = None


@pytest.fixture(scope="module")
async def healthy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Healthy]:
    """One service for all faults, as long as it survives them."""
    healthy = Healthy(tmp_path_factory.mktemp("faults"))
    yield healthy
    healthy.end()


def _name(fault: tuple[str, str]) -> str:
    return "-".join(fault)


@pytest.mark.parametrize("fault", SAMPLE, ids=_name)
async def test_a_fault_fails_its_own_requests_and_the_service_comes_back(
    healthy: Healthy, fault: tuple[str, str]
) -> None:
    service = await healthy.service()
    outcome = await strike(service, fault, healthy.requests, healthy.right, lasting_s=0.2)

    assert not outcome.complaints(), str(outcome)


async def test_a_hanging_pass_ends_the_process_or_is_replaced(healthy: Healthy) -> None:
    service = await healthy.service()
    outcome = await strike(service, ("dispatch", "hang"), healthy.requests, healthy.right)

    assert not outcome.complaints(), str(outcome)


@pytest.mark.long
@pytest.mark.parametrize("fault", EVERY, ids=_name)
async def test_every_fault_at_every_stage(healthy: Healthy, figures: Figures, fault: tuple[str, str]) -> None:
    """A hang on the event loop ends the process each time, so it strikes less often."""
    service = await healthy.service()
    stage, kind = fault
    rounds = ROUNDS if kind != "hang" else 3
    outcome = await strike(service, fault, healthy.requests, healthy.right, rounds=rounds)
    if kind == "hang":
        healthy.end()  # it may still hang, where the service can do without what hangs
    where = "on the loop" if stage in ON_LOOP else ""
    figures.add(f"{stage}: {kind} {where}", outcome, "0 hung; back ≤ 5 s or exit ≠ 0")

    assert not outcome.complaints(), str(outcome)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["exception", "memory", "exit"])
@pytest.mark.parametrize("stage", AT_START)
async def test_a_fault_at_the_start_ends_the_process(log: Path, tmp_path: Path, stage: str, kind: str) -> None:
    """The cache's identity alone is not needed to serve."""
    service = Service(
        log, faulty=True, fault_at_start=f"{stage} {kind} 0", disk_cache_dir=tmp_path / "results", **SETTINGS
    )
    try:
        code = await service.ended(20)
        ready = service.is_running and await service.is_ready()
    finally:
        service.kill()

    assert code or (stage == "identity" and ready)
