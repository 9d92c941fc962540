"""One fault under load: what the clients saw, and how the service came back."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.robustness.clients import Connection, Load, Lost, Reply, Request, Tally, post
from tests.robustness.service import POLL_S, Service, Supervisor

CLIENTS = 12
STALL_S = 2.0
REQUEST_TIMEOUT_S = 8.0
CLIENT_TIMEOUT_S = REQUEST_TIMEOUT_S + 7.0  # a reply later than that is none
BACK_S = 30.0  # looked for it so long
# The cache in memory is so small that results are read from the disk again and again.
SETTINGS = {
    "stall_s": STALL_S,
    "request_timeout_s": REQUEST_TIMEOUT_S,
    "cache_bytes": 200_000,
    "drain_timeout_s": 3,
    "log_level": "info",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault has done.

    Attributes:
        struck: how often it struck.
        tally: how the requests ended.
        back_s: seconds until the service answered everything again: after the last strike of a hang, which lasts, or
            else after the fault was gone. None if it did not come back.
        exits: exit codes of the processes that ended meanwhile.
    """

    struck: int
    tally: Tally
    back_s: float | None
    exits: list[int]

    def __str__(self) -> str:
        back = "not back" if self.back_s is None else f"back after {self.back_s:.1f} s"
        return f"struck {self.struck}×, {self.tally}, {back}, exits {self.exits}, slowest {self.tally.slowest_s:.1f} s"

    def complaints(self) -> list[str]:
        """What a client or an operator would complain of."""
        found = [f"{how} {self.tally[how]}" for how in ("hung", "400", "404", "422") if self.tally[how]]
        if not self.struck:
            found.append("never struck")
        if self.back_s is None:
            found.append("did not come back")
        if self.tally.wrong:
            found.append(f"wrong bodies {self.tally.wrong[:2]}")
        if self.tally.lost and not self.exits:
            found.append(f"lost {self.tally.lost} without an exit")
        if 0 in self.exits:
            found.append("exit 0")
        if self.tally["429"]:
            found.append(f"429 {self.tally['429']} without a crowd")
        return found


async def strike(
    service: Service,
    fault: tuple[str, str],
    requests: Sequence[Request],
    right: dict[str, bytes],
    *,
    rounds: int = 1,
    lasting_s: float = 1.0,
) -> Outcome:
    """Let a fault strike `rounds` times under load; one that raises then lasts for a while."""
    stage, kind = fault
    supervisor = Supervisor(service)
    struck = service.struck
    load = Load(service.port, requests, right, CLIENTS, new=_new_request)
    await asyncio.sleep(0.2)
    back_s: float | None = None
    for _ in range(rounds):
        back_s = await _once(service, supervisor, stage, kind)
    if kind not in ("hang", "slow"):
        await _ordered(service, f"strike {stage} {kind} 0")
        await asyncio.sleep(lasting_s)
        back_s = await _until_back(service, supervisor)
    tally = await load.stop()
    await supervisor.stop()
    return Outcome(service.struck - struck, tally, back_s, supervisor.codes)


def _new_request() -> Request:
    """One that no cache knows, of its tokens or its result."""
    number = time.monotonic_ns()
    if number % 3 == 0:
        fields = {"prompts": [f"{number} {n}" for n in range(3)], "dtype": "float32"}
        return post("/encode", fields, store=True, timeout_s=CLIENT_TIMEOUT_S)
    if number % 3 == 1:
        return post("/tokenize", {"prompt": f"{number} " * 60}, "application/json", timeout_s=CLIENT_TIMEOUT_S)
    return post("/encode", {"prompt": f"{number} cat", "preset": "z-image"}, timeout_s=CLIENT_TIMEOUT_S)


async def _once(service: Service, supervisor: Supervisor, stage: str, kind: str) -> float | None:
    struck = service.struck
    await _ordered(service, f"strike {stage} {kind} 1")
    deadline = time.monotonic() + 3
    while service.struck == struck and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return await _until_back(service, supervisor, release=kind != "hang")


async def _ordered(service: Service, order: str) -> None:
    """Give an order without stopping the clients, who share this thread."""
    await asyncio.to_thread(service.order, order)


async def _until_back(service: Service, supervisor: Supervisor, *, release: bool = True) -> float | None:
    """Seconds until every route answers. What hangs is released only where that is asked for."""
    if release:
        await _ordered(service, "stop")
    started = time.monotonic()
    while time.monotonic() - started < BACK_S:
        if await _works(service):
            return time.monotonic() - started
        await asyncio.sleep(POLL_S)
    await _ordered(service, "stop")
    return None


async def _works(service: Service) -> bool:
    """Whether the service is ready and answers a new request of each kind."""
    number = time.monotonic_ns()
    new = [
        post("/encode", {"prompt": f"new {number}", "preset": "z-image"}, timeout_s=1),
        post(
            "/encode", {"prompts": [f"new {number} {n}" for n in range(3)], "dtype": "float32"}, store=True, timeout_s=1
        ),
        post("/tokenize", {"prompt": f"{number} " * 60}, "application/json", timeout_s=1),
    ]
    if not await service.is_ready():
        return False
    replies = await asyncio.gather(*(_ask(service.port, request) for request in new))
    return all(reply is not None and reply.status == 200 for reply in replies)


async def _ask(port: int, request: Request) -> Reply | None:
    connection = Connection(port)
    try:
        return await connection.ask(request)
    except Lost:
        return None
    finally:
        connection.close()
