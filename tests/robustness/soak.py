"""Mixed requests of every route, format and size, to see whether memory grows."""

import asyncio
import base64
import random
from collections.abc import Iterator

import msgpack

from tests.robustness.clients import HOST, TENSOR, Connection, Load, Request, Tally, post

ACCEPTS = ("application/msgpack", "application/x-safetensors", "application/json", TENSOR)
WORDS = ("cat", "sofa", "rain", "oil", "canvas", "hat", "night", "small", "blue", "ink", "film", "chalk", "gouache")


class Mix:
    """An endless source of requests, all different. Equal seeds give equal requests."""

    def __init__(self, seed: int = 0) -> None:
        self._dice = random.Random(seed)
        self._number = 0

    def __iter__(self) -> Iterator[Request]:
        while True:
            self._number += 1
            yield self._next()

    def _text(self) -> str:
        count = self._dice.choice((1, 3, 8, 20, 60))
        return f"{self._number} " + " ".join(self._dice.choices(WORDS, k=count))

    def _next(self) -> Request:
        dice = self._dice
        store = dice.random() < 0.5
        match dice.randrange(14):
            case 0:
                return post("/te", [self._text()], store=store)
            case 1:
                fields = {"input": self._text(), "encoding_format": dice.choice(("base64", "float"))}
                return post("/v1/hidden_states", fields, "application/json", store=store)
            case 2:
                fields = {"user_prompt": self._text(), "return_token_boundaries": True, "encoding_format": "base64"}
                return post("/v1/hidden_states/structured", fields, "application/json", store=store)
            case 3:
                return post(
                    "/sglang/encode", {"prompt": self._text(), "negative_prompt": self._text()}, "*/*", store=store
                )
            case 4:
                return post("/predict", {"prompt": self._text()}, "*/*", store=store)
            case 5:
                fields = {"prompts": [self._text() for _ in range(dice.choice((1, 8, 40)))]}
                return post("/tokenize", fields, "application/json", store=store)
            case 6:
                fields = {"prompts": [self._text() for _ in range(dice.choice((2, 8, 20)))], "preset": "z-image"}
                return post("/encode", fields, dice.choice(ACCEPTS[:3]), store=store)
            case 7:
                fields = {"prompt": self._text(), "layers": dice.sample(range(36), dice.choice((1, 3, 6)))}
                return post("/encode_layers", fields, dice.choice(ACCEPTS), store=store)
            case 8:
                wrong = {"prompt": self._text(), f"unknown {self._number}": 1, "dtype": self._text()[:60]}
                return post("/encode", wrong, store=store)
            case 9:
                return self._packed_request(store)
            case _:
                fields = {
                    "prompt": self._text(),
                    "preset": dice.choice(("z-image", "z-image", "last-hidden-state", "flux2-klein")),
                    "dtype": dice.choice(("bfloat16", "float32", "float16")),
                }
                return post("/encode", fields, dice.choice(ACCEPTS), store=store)

    def _packed_request(self, store: bool) -> Request:
        body = msgpack.packb({"prompt": self._text(), "preset": "z-image"})
        head = (
            f"POST /encode HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/msgpack\r\n"
            f"x-request-id: {base64.b32encode(str(self._number).encode()).decode().strip('=')}\r\n"
            f"{'' if store else 'cache-control: no-store' + chr(13) + chr(10)}content-length: {len(body)}\r\n\r\n"
        )
        return Request(f"msgpack {self._number}", head.encode() + body)


async def send(port: int, requests: Iterator[Request], count: int, clients: int = 24) -> Tally:
    """Send so many of them. One in fifty disconnects instead of reading its reply."""
    load = Load(port, [], {}, clients=0)
    left, dice = iter(range(count)), random.Random(count)

    async def client() -> None:
        connection = Connection(port)
        for _ in left:
            request = next(requests)
            if dice.random() < 0.02:
                _, writer = await asyncio.open_connection(HOST, port)
                writer.write(request.data)
                await asyncio.sleep(0.002)
                writer.transport.abort()
                continue
            await load.count(connection, request)
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return load.tally
