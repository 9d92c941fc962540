"""How long a request holds up the others: the delays of /livez beside it, and beside a service that does nothing."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

import msgpack

from tests.robustness.clients import HOST, Connection, Lost, Request, get, post
from tests.robustness.probe import Probe
from tests.robustness.service import MemoryWatch, Service

SIZE = 1_990_000


def _json(body: str, path: str = "/encode", accept: str = "application/json") -> Request:
    return _raw(body.encode(), "application/json", path, accept)


def _raw(body: bytes, media_type: str, path: str = "/encode", accept: str = "application/json") -> Request:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\naccept: {accept}\r\ncontent-type: {media_type}\r\n"
        f"cache-control: no-store\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return Request(path, head.encode() + body, 120.0)


def _repeated(part: str, before: str = '{"prompts": [', after: str = "]}") -> Request:
    """A body as large as allowed that consists of one part, again and again."""
    count = (SIZE - len(before) - len(after)) // (len(part) + 1)
    return _json(before + ",".join([part] * count) + after)


def _msgpack(value: object) -> Request:
    return _raw(msgpack.packb(value), "application/msgpack")


LAYERS = {"layers": list(range(36)), "dtype": "float32"}
# What the limits of a body allow, or nearly so.
HEAVY: dict[str, Callable[[], Request]] = {
    "nothing": lambda: get("/livez"),
    "a million wrong values": lambda: _repeated("1"),
    "a million wrong values in msgpack": lambda: _msgpack({"prompts": [1] * SIZE}),
    "600,000 lists": lambda: _repeated("[]"),
    "600,000 objects": lambda: _repeated("{}"),
    "nested lists": lambda: _json('{"prompts": ' + "[" * 900_000 + "]" * 900_000 + "}"),
    "maps in msgpack": lambda: _msgpack({"prompts": [{}] * SIZE}),
    "maps of maps in msgpack": lambda: _raw(b"\x81\xa1a" * 600_000, "application/msgpack"),
    "150,000 unknown fields": lambda: _json("{" + ",".join(f'"u{n}":1' for n in range(150_000)) + "}"),
    "unknown fields in msgpack": lambda: _msgpack({f"u{n}": 1 for n in range(200_000)}),
    "500,000 layers": lambda: _repeated("1", '{"prompt": "a", "layers": ['),
    "400,000 one-letter prompts": lambda: _repeated('"a"'),
    "a million empty prompts": lambda: _msgpack({"prompts": [""] * SIZE}),
    "one long wrong string": lambda: _json(json.dumps({"dtype": "x" * (SIZE - 20)})),
    "one long key": lambda: _json(json.dumps({"x" * (SIZE - 20): 1})),
    "a prompt of 2 MB": lambda: _json(json.dumps({"prompt": "x" * (SIZE - 20)})),
    "a million escapes": lambda: _json('{"prompt": "' + "\\n" * (SIZE // 2 - 20) + '"}'),
    "a number of 2 million digits": lambda: _json('{"max_sequence_length": ' + "9" * (SIZE - 40) + "}"),
    "a float of 2 million digits": lambda: _json('{"max_sequence_length": 0.' + "9" * (SIZE - 40) + "}"),
    "blanks": lambda: _json(" " * (SIZE - 20) + '{"prompt": "a"}'),
    "bytes in msgpack": lambda: _msgpack({"prompt": b"x" * (SIZE - 20)}),
    "utf-16": lambda: _raw(json.dumps({"prompt": "x" * 900_000}).encode("utf-16"), "application/json; charset=utf-16"),
    "drop-in, 600,000 values": lambda: _json(json.dumps({"prompt": [1] * 600_000}), "/predict"),
    "drop-in, a million prompts": lambda: _json(json.dumps(["a"] * 400_000), "/te"),
    "drop-in, fields that are ignored": lambda: _json(
        json.dumps({"prompt": "a", **{f"u{n}": {} for n in range(120_000)}}), "/sglang/encode"
    ),
    "base64 of 100 MB": lambda: post("/encode_layers", LAYERS | {"prompts": _long(18, 512)}, "application/json"),
    "safetensors of 100 MB": lambda: post(
        "/encode_layers", LAYERS | {"prompts": _long(18, 512)}, "application/x-safetensors"
    ),
    "a million floats": lambda: post(
        "/encode?encoding=float", {"prompts": _long(4, 512), "preset": "z-image"}, "application/json"
    ),
    "tokenize 60 long prompts": lambda: post("/tokenize", {"prompts": _long(60, 30_000)}, "application/json"),
    "tokenize 64 in msgpack": lambda: post("/tokenize", {"prompts": _long(64, 30_000)}, "application/msgpack"),
    "torch of 8 MB": lambda: post("/predict", {"prompt": _long(4, 400)}, "*/*"),
    "sglang": lambda: post("/sglang/encode?preset=flux2-klein", {"prompt": "a" * 400, "negative_prompt": "b"}, "*/*"),
}


def _long(count: int, chars: int) -> list[str]:
    return [f"{number:03}" + "x" * (chars - 3) for number in range(count)]


@dataclass(frozen=True, slots=True)
class Effect:
    """What a heavy request does.

    Attributes:
        status: of its reply.
        late_ms: the largest delay of /livez beside it, less that of a service that does nothing.
        memory_mb: how much the service grew.
        body_mb: of its reply.
    """

    status: int | str
    late_ms: float
    memory_mb: float
    body_mb: float


async def effect_of(service: Service, control: Service, request: Request, times: int = 2) -> Effect:
    """Send a heavy request a few times, with both probes running."""
    probe, beside = Probe(service.port), Probe(control.port)
    memory, connection = MemoryWatch(service), Connection(service.port)
    status: int | str = "none"
    size = 0
    for _ in range(times):
        try:
            reply = await connection.ask(request)
            status, size = reply.status, len(reply.body)
        except Lost as lost:
            status = lost.how
        await asyncio.sleep(0.1)
    connection.close()
    late, usual = await asyncio.gather(asyncio.to_thread(probe.stop), asyncio.to_thread(beside.stop))
    return Effect(status, late.largest - usual.largest, memory.stop(), size / 1e6)
