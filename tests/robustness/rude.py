"""Clients that hold connections, bytes or replies. Each is a coroutine that is rude until its time is over.

Each returns how its connections ended, by name; `open` are those that the service left open to the end.
"""

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.robustness.clients import HOST, post, statuses

BODY = 1_900_000  # bytes, below the limit of a body
# A reply of 8 MB that takes one pass of five rows.
LARGE = {
    "prompt": "a cat",
    "layers": list(range(36)),
    "dtype": "float32",
    "max_sequence_length": 1800,
    "padding": "max_length",
}
Rude = Callable[[int, float], Awaitable[Counter[str]]]


async def _open(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    try:
        return await asyncio.open_connection(HOST, port, limit=2**16)
    except OSError:
        return None


async def _crowd(port: int, count: int, client: Callable[[int], Awaitable[str]]) -> Counter[str]:
    return Counter(await asyncio.gather(*(client(number) for number in range(count))))


async def _end(reader: asyncio.StreamReader, seconds: float) -> str:
    """How the service ended a connection, within so many seconds."""
    received = b""
    try:
        async with asyncio.timeout(seconds):
            while part := await reader.read(2**16):
                received += part
    except TimeoutError:
        return "open"
    except OSError:
        return "reset"
    found = statuses(received)
    return str(found[0]) if found else "closed"


def _sends(data: bytes, count: int) -> Rude:
    """Clients that send this, and then nothing more."""

    async def rude(port: int, seconds: float) -> Counter[str]:
        async def client(_: int) -> str:
            streams = await _open(port)
            if streams is None:
                return "refused"
            reader, writer = streams
            try:
                writer.write(data)
                return await _end(reader, seconds)
            finally:
                writer.transport.abort()

        return await _crowd(port, count, client)

    return rude


def _trickles(data: bytes, count: int, every_s: float, first: bytes = b"") -> Rude:
    """Clients that send this byte after byte, after what they send at once."""

    async def rude(port: int, seconds: float) -> Counter[str]:
        async def client(_: int) -> str:
            streams = await _open(port)
            if streams is None:
                return "refused"
            reader, writer = streams
            ending = asyncio.create_task(_end(reader, seconds))
            writer.write(first)
            for place in range(len(data)):
                if ending.done():
                    break
                with contextlib.suppress(OSError):
                    writer.write(data[place : place + 1])
                await asyncio.sleep(every_s)
            how = await ending
            writer.transport.abort()
            return how

        return await _crowd(port, count, client)

    return rude


def _pours(head: bytes, part: bytes, parts: int, count: int = 1) -> Rude:
    """Clients that send a head that does not end."""

    async def rude(port: int, seconds: float) -> Counter[str]:
        async def client(_: int) -> str:
            streams = await _open(port)
            if streams is None:
                return "refused"
            reader, writer = streams
            ending = asyncio.create_task(_end(reader, seconds))
            with contextlib.suppress(OSError):
                writer.write(head)
                for _part in range(parts):
                    writer.write(part)
                    await writer.drain()
                    if ending.done():
                        break
            how = await ending
            writer.transport.abort()
            return how

        return await _crowd(port, count, client)

    return rude


async def never_reading(port: int, seconds: float, count: int = 150) -> Counter[str]:
    """Clients that ask for 8 MB each and read nothing of it."""
    loop, request = asyncio.get_running_loop(), post("/encode_layers", LARGE).data

    async def client(_: int) -> str:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, (HOST, port))
            await loop.sock_sendall(sock, request)
            await asyncio.sleep(seconds)
            return "asked"
        except OSError:
            return "refused"
        finally:
            sock.close()

    return await _crowd(port, count, client)


async def reading_slowly(port: int, seconds: float, count: int = 50) -> Counter[str]:
    """Clients that read a reply of 8 MB at 10 kB a second."""
    request = post("/encode_layers", LARGE).data

    async def client(_: int) -> str:
        streams = await _open(port)
        if streams is None:
            return "refused"
        reader, writer = streams
        writer.write(request)
        try:
            async with asyncio.timeout(seconds):
                while await reader.read(1000):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return "still reads"  # what the kernel holds
        except OSError:
            return "reset"
        finally:
            writer.transport.abort()
        return "closed"

    return await _crowd(port, count, client)


async def disconnect_storm(port: int, seconds: float, count: int = 40) -> Counter[str]:
    """Clients that ask and reset the connection, again and again."""
    deadline = asyncio.get_running_loop().time() + seconds
    request = post("/encode", {"prompts": [f"{number} cat" for number in range(8)]}).data

    async def client(number: int) -> str:
        while asyncio.get_running_loop().time() < deadline:
            streams = await _open(port)
            if streams is None:
                return "refused"
            _, writer = streams
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.write(request[: len(request) // (number % 3 + 1)])
            await asyncio.sleep(number % 5 * 0.002)
            writer.transport.abort()
        return "left"

    return await _crowd(port, count, client)


async def pipelining(port: int, seconds: float, count: int = 20) -> Counter[str]:
    """Clients that send a thousand requests at once and read nothing."""
    return await _sends(post("/encode_layers", LARGE, store=True).data * 1000, count)(port, seconds)


_BIG = post("/encode", {"prompt": "x" * BODY}).data
_HEAD = b"POST /encode HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
_CHUNKED = _HEAD + b"transfer-encoding: chunked\r\n\r\n"
RUDE: dict[str, Rude] = {
    "silent": _sends(b"", 300),
    "half a request line": _sends(b"POST /enc", 300),
    "half a head": _sends(_HEAD + b"content-le", 300),
    "a head byte by byte": _trickles(_HEAD, 100, 0.1),
    "half a small body": _sends(_HEAD + b'content-length: 100\r\n\r\n{"prompt', 300),
    "half of 1.9 MB": _sends(_BIG[:-10], 300),
    "a body byte by byte": _trickles(b" " * 999, 100, 0.1, _HEAD + b"content-length: 1000\r\n\r\n"),
    "a target of 48 MB": _pours(b"GET /", b"a" * 2**16, 768),
    "headers of 8 MB": _pours(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n", b"x: " + b"a" * 60_000 + b"\r\n", 140, 20),
    "a header of 8 MB": _pours(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ", b"a" * 60_000, 140, 20),
    "many small headers": _pours(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n", b"a: b\r\n" * 1000, 300, 20),
    "endless chunk extensions": _pours(_CHUNKED + b"1;", b"a" * 2**16, 200, 20),
    "endless trailers": _pours(_CHUNKED + b"1\r\n{\r\n0\r\n", b"a: b\r\n" * 1000, 300, 20),
    "endless small chunks": _pours(_CHUNKED, b"1\r\n \r\n" * 1000, 2000, 4),
    "after the end": _pours(b"GET /livez HTTP/1.1\r\nconnection: close\r\nhost: 127.0.0.1\r\n\r\n", b"a" * 2**16, 768),
    "2,000 connections": _sends(b"", 2000),
    "never reading": never_reading,
    "reading slowly": reading_slowly,
    "pipelining": pipelining,
    "disconnect storm": disconnect_storm,
}
