"""Clients that speak plain HTTP/1.1 on sockets of their own, and say exactly how each request ended."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TENSOR = "tensor/binary"  # the numbers alone: equal requests have equal bodies, cached or not
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Request:
    """A request and its deadline.

    Attributes:
        name: equal names have equal replies.
        data: as it is sent.
        timeout_s: until the last byte of the reply; then it counts as hung.
    """

    name: str
    data: bytes
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


class Lost(Exception):
    """No whole reply came. `how` is refused, closed (no byte came), cut (in the middle), or hung."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


@dataclass
class Tally:
    """How the requests of a run ended: their statuses, what was lost, bodies that were wrong."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def __getitem__(self, how: str) -> int:
        return self.ended[how]

    def __str__(self) -> str:
        return ", ".join(f"{how}: {count}" for how, count in sorted(self.ended.items())) + (
            f", {len(self.wrong)} wrong bodies: {self.wrong[:3]}" if self.wrong else ""
        )

    @property
    def statuses(self) -> set[int]:
        """The statuses that came."""
        return {int(how) for how in self.ended if how.isdecimal()}

    @property
    def lost(self) -> int:
        """Requests without a whole reply."""
        return sum(count for how, count in self.ended.items() if not how.isdecimal())

    def __iadd__(self, other: "Tally") -> "Tally":
        self.ended += other.ended
        self.wrong += other.wrong
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        return self


class Connection:
    """A kept connection, opened anew when it is needed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Request) -> Reply:
        """Send a request and read the whole reply. Errors: Lost."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(request.timeout_s):
                return await self._ask(request, started)
        except TimeoutError:
            self.close()
            raise Lost("hung") from None
        except Lost:
            self.close()
            raise

    async def _ask(self, request: Request, started: float) -> Reply:
        kept = self._streams is not None
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(HOST, self.port, limit=2**20)
        except OSError:
            raise Lost("refused") from None
        reader, writer = self._streams
        head = b""
        try:
            writer.write(request.data)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            status, headers = parse_head(head)
            length = int(headers.get("content-length", 0))
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            nothing = not head and not getattr(error, "partial", b"")
            if nothing and kept:  # the service may close a kept connection at any time: every client asks again then
                return await self._ask(request, started)
            raise Lost("closed" if nothing else "cut") from None
        if headers.get("connection") == "close":
            self.close()
        return Reply(status, headers, body, time.monotonic() - started)

    def close(self) -> None:
        """Close it, if it is open."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers, whose names are in lower case."""
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    return int(first.split()[1]), {name.lower(): value for name, value in headers.items()}


def post(
    path: str, fields: Any, accept: str = TENSOR, *, store: bool = False, name: str = "", timeout_s: float = 30.0
) -> Request:
    """A POST with JSON. Without `store` nothing is cached, so that the model runs for each."""
    body = json.dumps(fields).encode()
    cache = "" if store else "cache-control: no-store\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\naccept: {accept}\r\ncontent-type: application/json\r\n"
        f"{cache}content-length: {len(body)}\r\n\r\n"
    )
    return Request(name or f"{path} {accept} {body[:80]!r}", head.encode() + body, timeout_s)


def get(path: str, timeout_s: float = 30.0) -> Request:
    """A GET."""
    return Request(path, f"GET {path} HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode(), timeout_s)


def mixed(seed: int = 0, timeout_s: float = 30.0) -> list[Request]:
    """Requests of many routes, formats and sizes, each with one right reply."""
    dice = random.Random(seed)
    words = ["a cat", "on a red sofa", "in the rain", "oil on canvas", "with a hat", "at night", "very small", "blue"]
    requests = []
    for number in range(48):
        text = f"{number} " + " ".join(dice.choices(words, k=dice.choice((1, 2, 8, 40))))
        store, options = number % 4 == 0, {"timeout_s": timeout_s}
        match number % 8:
            case 5:
                requests.append(post("/te", [text], store=store, **options))
            case 6:
                fields = {"prompts": [f"{text} {n}" for n in range(6)], "preset": "z-image", "padding": "max_length"}
                requests.append(post("/encode", fields, store=store, **options))
            case 7:
                fields = {"input": text, "encoding_format": "base64"}
                requests.append(post("/v1/hidden_states", fields, "application/json", store=store, **options))
            case 4:
                requests.append(post("/tokenize", {"prompt": text}, "application/json", store=store, **options))
            case _:
                requests.append(post("/encode", {"prompt": text, "preset": "z-image"}, store=store, **options))
    return requests


async def reference(port: int, requests: Sequence[Request]) -> dict[str, bytes]:
    """The reply to each request when nothing else runs."""
    connection, bodies = Connection(port), {}
    for request in requests:
        reply = await connection.ask(request)
        assert reply.status == 200, (request.name, reply)
        bodies[request.name] = reply.body
    connection.close()
    return bodies


class End(NamedTuple):
    """How a request ended: the status or how it was lost; when it was sent, by the monotonic clock."""

    name: str
    how: str
    sent_at: float


class Load:
    """Clients that ask one request after the other.

    Args:
        port: of the service.
        requests: drawn from at random; every third is a new one if `new` makes some.
        right: the body of each by its name; others are not compared.
        clients: how many.
        pause_s: how long a client waits after a refusal or a lost request.
    Attributes:
        tally: how the requests ended, in numbers.
        ends: the same, one by one.
    """

    def __init__(
        self,
        port: int,
        requests: Sequence[Request],
        right: dict[str, bytes],
        clients: int = 16,
        pause_s: float = 0.05,
        new: Callable[[], Request] | None = None,
    ) -> None:
        self.port = port
        self.tally = Tally()
        self.ends: list[End] = []
        self._requests, self._right, self._pause_s, self._new = requests, right, pause_s, new
        self._stopping = False
        self._tasks = [asyncio.create_task(self._client(random.Random(number))) for number in range(clients)]

    async def stop(self) -> Tally:
        """Let each client finish its request."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        return self.tally

    async def stop_after(self, seconds: float) -> Tally:
        """Run for so long."""
        await asyncio.sleep(seconds)
        return await self.stop()

    async def _client(self, dice: random.Random) -> None:
        connection = Connection(self.port)
        while not self._stopping:
            request = self._new() if self._new is not None and dice.random() < 1 / 3 else dice.choice(self._requests)
            status = await self.count(connection, request)
            if status != "200":
                await asyncio.sleep(self._pause_s)
        connection.close()

    async def count(self, connection: Connection, request: Request) -> str:
        """Ask, and count how it ended."""
        sent_at = time.monotonic()
        try:
            reply = await connection.ask(request)
        except Lost as lost:
            self.tally.ended[lost.how] += 1
            self.ends.append(End(request.name, lost.how, sent_at))
            return lost.how
        self.tally.ended[str(reply.status)] += 1
        self.ends.append(End(request.name, str(reply.status), sent_at))
        self.tally.slowest_s = max(self.tally.slowest_s, reply.seconds)
        expected = self._right.get(request.name)
        if reply.status == 200 and expected is not None and reply.body != expected:
            self.tally.wrong.append(request.name)
        return str(reply.status)


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a connection ended that sent some bytes, and then nothing more.

    Attributes:
        replies: the status of each reply.
        how: `ended` if the service closed it, `left` if it did so once the client had closed its side, else `hung`.
    """

    replies: list[int]
    how: str


async def exchange(port: int, data: bytes, timeout_s: float, grace_s: float) -> Exchange:
    """Send bytes on a new connection and read until the service closes it.

    Args:
        timeout_s: after that, close the sending half.
        grace_s: after that, it hangs.
    """
    received = bytearray()
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return Exchange([], "refused")
    how = "hung"
    try:
        writer.write(data)
        for limit, ending in ((timeout_s, "ended"), (grace_s, "left")):
            try:
                async with asyncio.timeout(limit):
                    while part := await reader.read(2**18):
                        received += part
            except TimeoutError:
                writer.write_eof()
                continue
            how = ending
            break
    except OSError:
        how = "ended"
    finally:
        writer.transport.abort()
    return Exchange(statuses(bytes(received)), how)


def statuses(received: bytes) -> list[int]:
    """The status of each reply in what was received. Interim replies (1xx) do not count."""
    found = []
    while received.startswith(b"HTTP/1."):
        head, _, rest = received.partition(b"\r\n\r\n")
        status, headers = parse_head(head)
        if status >= 200:
            found.append(status)
        received = rest[int(headers.get("content-length", 0)) :] if status not in (204, 304) else rest
        start = received.find(b"HTTP/1.")
        if start > 0 and start < 3:
            received = received[start:]
    return found
