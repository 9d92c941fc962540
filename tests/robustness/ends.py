"""What must hold when the service is told to end while clients of every kind are busy with it."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.robustness.clients import HOST, Connection, Load, Request, get, post, statuses
from tests.robustness.service import Service

ACCEPTED_S = 0.1  # a request sent so long before the signal has been accepted
# A reply of 8 MB that takes one pass of five rows.
LARGE = {
    "prompt": "a cat",
    "layers": list(range(36)),
    "dtype": "float32",
    "max_sequence_length": 1800,
    "padding": "max_length",
}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a service ended.

    Attributes:
        code: exit code; None if it did not end.
        seconds: from the signal to the end.
        accepted: how the requests ended that were under way at the signal.
        later: how those ended that were sent after it.
        others: the same for half-sent bodies, slow readers and idle connections.
        wrong: bodies that were wrong.
    """

    code: int | None
    seconds: float
    accepted: Counter[str]
    later: Counter[str]
    others: Counter[str]
    wrong: list[str]

    def complaints(self) -> list[str]:
        """What a client would complain of."""
        bad = [f"accepted: {how} {count}" for how, count in self.accepted.items() if how not in ("200", "503")]
        bad += [f"later: {how} {count}" for how, count in self.later.items() if how not in ("200", "503", "refused")]
        allowed = ("half: 200", "half: 503", "slow: 200", "kept: 503", "kept: 200", "kept: refused", "idle: closed")
        bad += [f"{how} {count}" for how, count in self.others.items() if how not in allowed]
        if self.accepted["503"]:
            bad.append(f"accepted: 503 {self.accepted['503']}")
        return bad + self.wrong + ([] if self.code == 0 else [f"exit {self.code}"])


async def end_under_load(
    service: Service, number: signal.Signals, requests: Sequence[Request], right: dict[str, bytes], within_s: float
) -> Ending:
    """Send a signal to a busy service."""
    load = Load(service.port, requests, right, clients=12, pause_s=0.02)
    others = [asyncio.create_task(_send_in_halves(service.port, delay_s)) for delay_s in (0.6, 0.9, 1.5)]
    others += [asyncio.create_task(_read_slowly(service.port)) for _ in range(3)]
    others += [asyncio.create_task(_keep(service.port, ask)) for ask in (True, True, False)]
    await asyncio.sleep(0.5)
    sent_at = time.monotonic()
    service.signal(number)
    code = await service.ended(within_s)
    seconds = time.monotonic() - sent_at
    tally = await load.stop()
    accepted = Counter(end.how for end in load.ends if sent_at - 30 < end.sent_at < sent_at - ACCEPTED_S)
    later = Counter(end.how for end in load.ends if end.sent_at >= sent_at)
    ended = Counter(await asyncio.gather(*others))
    return Ending(code, seconds, accepted, later, ended, tally.wrong)


async def _send_in_halves(port: int, delay_s: float) -> str:
    """A body whose second half comes after the signal."""
    data = post("/encode", {"prompt": "half a cat"}).data
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(data[:-10])
    await asyncio.sleep(delay_s)
    return f"half: {await _finish(reader, writer, data[-10:])}"


async def _finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rest: bytes) -> str:
    received = b""
    try:
        writer.write(rest)
        async with asyncio.timeout(20):
            while not (found := statuses(received)) and (part := await reader.read(2**16)):
                received += part
    except (OSError, TimeoutError) as error:
        return type(error).__name__
    finally:
        writer.transport.abort()
    return str(found[0]) if found else "closed"


async def _read_slowly(port: int) -> str:
    """A large reply, most of which is read after the signal: some 2 s for 8 MB."""
    request = post("/encode_layers", LARGE)
    reader, writer = await asyncio.open_connection(HOST, port, limit=2**16)
    try:
        writer.write(request.data)
        head = await reader.readuntil(b"\r\n\r\n")
        left = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        status = head.split()[1].decode()
        while left:
            part = await reader.read(2**18)
            if not part:
                return f"slow: cut, {left} bytes are missing"
            left -= len(part)
            await asyncio.sleep(0.01)
    except (OSError, asyncio.IncompleteReadError) as error:
        return f"slow: {type(error).__name__}"
    finally:
        writer.transport.abort()
    return f"slow: {status}"


async def _keep(port: int, ask: bool) -> str:
    """A kept connection: idle, or used again after the signal."""
    if ask:
        connection = Connection(port)
        await connection.ask(get("/livez"))
        await asyncio.sleep(0.7)
        load = Load(port, [], {}, clients=0)
        how = await load.count(connection, post("/encode", {"prompt": "late"}))
        connection.close()
        return f"kept: {how}"
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(get("/livez").data)
        await reader.readuntil(b"}")
        async with asyncio.timeout(30):
            return "idle: told something" if await reader.read() else "idle: closed"
    except (OSError, TimeoutError) as error:
        return f"idle: {type(error).__name__}"
    finally:
        writer.transport.abort()
