"""A service in a process of its own: started, watched, ended. Linux and macOS; memory is read on Linux alone."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

from app.settings import Settings
from tests.robustness.clients import HOST, Connection, Lost, get

START_S = 60.0
POLL_S = 0.05


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


class Service:
    """`python -m app serve`, or the same with planted faults.

    Args:
        log: where standard error goes.
        port: to listen on; a free one by default.
        faulty: whether it takes orders, see faulty.py.
        fault_at_start: `STAGE KIND TIMES`, from the beginning.
        settings: flags of `serve`, by name.
    Attributes:
        struck: how often a planted fault has struck.
    """

    def __init__(
        self,
        log: Path,
        port: int | None = None,
        *,
        faulty: bool = False,
        fault_at_start: str = "",
        **settings: object,
    ) -> None:
        self.log, self.port = log, port or free_port()
        module = "tests.robustness.faulty" if faulty else "app"
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self._command = [sys.executable, "-m", module, "serve", "--port", str(self.port), *flags]
        self._environment = os.environ | {"FAULT_AT_START": fault_at_start}
        self.struck, self._answered = 0, threading.Semaphore(0)
        self.start()

    def start(self) -> None:
        """Start a process. It is not ready yet."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self._environment
            )
        self.started_at = time.monotonic()
        self._listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self._listener.start()

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None and process.stdin is not None
        with process.stdin, process.stdout:
            for line in process.stdout:
                if line == b"struck\n":
                    self.struck += 1
                else:
                    self._answered.release()

    def order(self, text: str) -> None:
        """Give an order, see faulty.py, and wait until it holds. Nothing happens where the process has ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # closed by now
            self.process.stdin.write(f"{text}\n".encode())
            self.process.stdin.flush()
            self._answered.acquire(timeout=5)

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def memory_bytes(self) -> int:
        """Resident memory; 0 once the process has ended."""
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0

    def open_files(self) -> int:
        """How many files the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def is_ready(self) -> bool:
        """Whether /readyz says so."""
        return await status_of(self.port, "/readyz") == 200

    async def wait_until_ready(self, within_s: float = START_S) -> float:
        """Seconds until /readyz said so. Errors: AssertionError where it did not."""
        started = time.monotonic()
        while time.monotonic() - started < within_s:
            if await self.is_ready():
                return time.monotonic() - started
            assert self.is_running, f"the service ended with {self.process.returncode}: {self.tail()}"
            await asyncio.sleep(POLL_S)
        raise AssertionError(f"the service is not ready after {within_s:g} s: {self.tail()}")

    async def ended(self, within_s: float) -> int | None:
        """The exit code, or None where the process has not ended."""
        deadline = time.monotonic() + within_s
        while self.is_running and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        return self.process.poll()

    def tail(self) -> str:
        """The last lines of the log."""
        return self.log.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self._listener.join()


class MemoryWatch:
    """The largest resident memory of a service from now on.

    Attributes:
        before_bytes, largest_bytes: at the beginning, and since then.
    """

    def __init__(self, service: Service) -> None:
        self.before_bytes = self.largest_bytes = service.memory_bytes()
        self._task = asyncio.create_task(self._watch(service))

    async def _watch(self, service: Service) -> None:
        while True:
            self.largest_bytes = max(self.largest_bytes, service.memory_bytes())
            await asyncio.sleep(0.02)

    def stop(self) -> float:
        """Watch no more. Returns the growth in MB."""
        self._task.cancel()
        return (self.largest_bytes - self.before_bytes) / 1e6


class Supervisor:
    """Starts a service again whenever it ends, as systemd does.

    Attributes:
        codes: exit codes, in order.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.codes = service, list[int]()
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if not self.service.is_running:
                self.codes.append(self.service.process.returncode)
                self.service.start()

    async def stop(self) -> None:
        """Watch no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def status_of(port: int, path: str, timeout_s: float = 2.0) -> int | str:
    """The status of a GET, or how it was lost."""
    connection = Connection(port)
    try:
        return (await connection.ask(get(path, timeout_s))).status
    except Lost as lost:
        return lost.how
    finally:
        connection.close()


def known(**settings: object) -> dict[str, object]:
    """Those of these settings that the service has."""
    return {name: value for name, value in settings.items() if name in Settings.model_fields}


@contextlib.asynccontextmanager
async def running(log: Path, **options: object) -> AsyncIterator[Service]:
    """A service that is ready. It is killed at the end."""
    service = Service(log, **options)  # type: ignore[arg-type]
    try:
        await service.wait_until_ready()
        yield service
    finally:
        service.kill()
