"""Asks /livez again and again, in a process of its own, until standard input ends; then prints the delays.

    python -m tests.robustness.probe PORT

A second one beside it asks a service that does nothing: what both see is the machine, what one sees is the service.
"""

import asyncio
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from tests.robustness.clients import Connection, Lost, get

EVERY_S = 0.01
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Delays:
    """Milliseconds of the replies of /livez, and how many failed."""

    largest: float
    percentile_99: float
    median: float
    count: int
    failed: int


class Probe:
    """Asks a service from now on."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-m", "tests.robustness.probe", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has begun

    def stop(self) -> Delays:
        """Ask no more."""
        out, _ = self._process.communicate("\n")
        return Delays(*json.loads(out))


def main(port: int) -> None:
    stopping = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stopping.set()), daemon=True).start()
    print("begun", flush=True)
    delays, failed = asyncio.run(_ask(port, stopping))
    delays = sorted(delays) or [0.0]
    count = len(delays)
    print(json.dumps([delays[-1], delays[count * 99 // 100], delays[count // 2], count, failed]))


async def _ask(port: int, stopping: threading.Event) -> tuple[list[float], int]:
    connection, delays, failed = Connection(port), list[float](), 0
    while not stopping.is_set():
        started = time.perf_counter()
        try:
            reply = await connection.ask(get("/livez", TIMEOUT_S))
            failed += reply.status != 200
        except Lost:
            failed += 1
        delays.append((time.perf_counter() - started) * 1e3)
        await asyncio.sleep(EVERY_S)
    connection.close()
    return delays, failed


if __name__ == "__main__":
    main(int(sys.argv[1]))
