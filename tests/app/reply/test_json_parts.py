"""JSON in parts is the JSON that one call would write, and no part takes long."""

import asyncio
import base64
import json
import threading
import tracemalloc
from collections.abc import Callable, MutableMapping
from typing import Any

import httpx
import numpy as np
import pytest

from app import wire
from app.reply import json_parts as json_parts_module
from app.reply.formats import FORMATS, JSON_FLOATS
from app.reply.json_parts import BASE64_AT_ONCE, Base64, Part, in_base64, in_numbers, json_parts
from app.reply.reply import JOIN_BELOW, PartsResponse, joined, respond
from app.wire import Tensor, Written
from encoder import PromptEmbeds

MIB = 1024 * 1024


def text(parts: list[Part]) -> bytes:
    return b"".join(b"".join(part) if isinstance(part, Base64) else part for part in parts)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"model": '\N{CAT FACE} "\\', "num_tokens": [1, 2], "usage": {"layers_run": 0}, "none": None},
        {"prompts": []},
        {"prompts": [{"text": "a", "input_ids": [1]}, {"text": "", "input_ids": []}]},
        {"deep": {"er": [{"est": {}}]}, "mixed": [1, {"a": 1}]},
    ],
)
def test_parts_are_what_one_call_writes(document: dict[str, Any]) -> None:
    assert text(json_parts(document)) == wire.dump_json(document)


@pytest.mark.parametrize(
    "shape", [(0,), (1,), (3, 0), (999,), (1001,), (2, 3, 4), (2, 1500), (40, 30, 2), (3, 2, 2001)]
)
def test_numbers_are_nested_lists(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = {"x": {"dtype": "float32", "shape": list(shape), "data": array.tolist()}}

    assert text(json_parts({"x": Tensor(array, "float32")}, in_numbers)) == wire.dump_json(expected)


@pytest.mark.parametrize("length", [0, 1, 2, 3, BASE64_AT_ONCE - 1, BASE64_AT_ONCE, 2 * BASE64_AT_ONCE + 1])
def test_base64_in_pieces_is_that_of_the_whole(length: int) -> None:
    data = np.random.default_rng(0).bytes(length)

    lazy = Base64(memoryview(data))

    assert b"".join(lazy) == base64.b64encode(data)
    assert len(lazy) == len(base64.b64encode(data))


def test_no_part_has_more_than_a_thousand_numbers() -> None:
    """A call that writes a million holds up all threads."""
    for shape in [(1_000_000,), (3, 100_000), (100, 40, 32), (2, 3, 50_000)]:
        parts = json_parts({"x": Tensor(np.zeros(shape, np.float32), "float32")}, in_numbers)
        assert max(bytes(part).count(b",") for part in parts if not isinstance(part, Base64)) < 1000


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def send_nowhere(message: MutableMapping[str, Any]) -> None:
    """A client that takes all at once, and keeps nothing."""


@pytest.mark.parametrize("media_type", FORMATS)
def test_a_reply_takes_no_memory_beside_its_tensor(media_type: str) -> None:
    """The text of 32 MiB in base64 has 43, and was there three times."""
    embeds = PromptEmbeds(np.zeros((8192, 2048), "<u2"), np.ones(8192, bool), "bfloat16")

    async def answer() -> None:
        response = await respond(FORMATS[media_type], [embeds], {"model": "m"})
        await response({"type": "http"}, None, send_nowhere)  # type: ignore[arg-type]

    assert peak_of(lambda: asyncio.run(answer())) < 2 * MIB


def test_numbers_take_the_memory_of_their_text() -> None:
    numbers = np.full((64, 1024), 1.2345678, np.float32)
    embeds = PromptEmbeds(numbers, np.ones(64, bool), "float32")
    size = len(json.dumps(numbers.tolist(), separators=(",", ":")))

    peak = peak_of(lambda: asyncio.run(respond(JSON_FLOATS, [embeds], {"model": "m"})))

    assert peak < 2.5 * size


def test_others_get_a_turn_between_two_pieces_of_a_reply() -> None:
    """To a client that reads fast, sending never waits."""
    data = memoryview(bytes(20 * BASE64_AT_ONCE))
    turns = bodies = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal bodies
        bodies += message["type"] == "http.response.body"
        assert len(message.get("body", b"")) <= 4 * BASE64_AT_ONCE // 3

    async def answer() -> None:
        task = asyncio.create_task(other())
        await PartsResponse([b'"', Base64(data), b'"'], {}, wire.JSON)({"type": "http"}, None, send)  # type: ignore[arg-type]
        task.cancel()

    asyncio.run(answer())
    assert bodies == 22
    assert turns >= 20


@pytest.mark.parametrize("parts", [[b"x" * JOIN_BELOW, b""], [b"x", b"y"], [b""], []])
def test_the_last_message_of_a_reply_is_the_one_that_says_so(parts: list[bytes]) -> None:
    """A message after it would end the connection."""
    more: list[bool] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            more.append(message["more_body"])

    asyncio.run(PartsResponse([*parts], {}, wire.JSON)({"type": "http"}, None, send))  # type: ignore[arg-type]

    assert more == [False]


def test_a_large_reply_in_base64_arrives_whole(client: httpx.Client) -> None:
    body = {"prompts": ["a", "b"], "layers": [0, 1, 2, 3], "max_sequence_length": 2048, "padding": "max_length"}

    reply = client.post("/encode_layers", json=body, headers={"accept": wire.JSON})

    expected = wire.unpack(client.post("/encode_layers", json=body).content)
    found = wire.unpack_json(reply.content)
    assert int(reply.headers["content-length"]) == len(reply.content) > 4 * BASE64_AT_ONCE
    assert bytes(found["hidden_states"].tobytes()) == bytes(expected["hidden_states"].tobytes())


def test_small_pieces_are_joined_to_pieces_of_one_size() -> None:
    """A million numbers are thousands of parts, and one message of them all would be one copy of them all."""
    parts: list[Part] = [b"x" * 1000] * 1000

    found = list(joined(parts))

    assert {len(part) < JOIN_BELOW + 1000 for part in found} == {True}
    assert len(found) == 1000 // 66 + 1
    assert text(found) == text(parts)


def test_the_base64_of_a_small_tensor_is_part_of_one_message() -> None:
    parts = json_parts({"x": Tensor(np.zeros(10, np.float32), "float32")})

    [message] = joined(parts)

    assert json.loads(bytes(message))["x"]["shape"] == [10]


def test_a_value_can_be_written_already() -> None:
    data = in_base64(Tensor(np.zeros(3, np.float32), "float32"))

    assert text(json_parts({"a": data, "b": [1]})) == b'{"a":"AAAAAAAAAAAAAAAA","b":[1]}'
    assert text(json_parts({"a": Written([b"1", b"2"])})) == b'{"a":12}'


def test_numbers_are_written_beside_the_event_loop(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    original = json_parts_module.dump_json

    def dump_json(document: object) -> bytes:
        if isinstance(document, list) and document and isinstance(document[0], list):
            threads.add(threading.current_thread().name.partition("_")[0])
        return original(document)

    monkeypatch.setattr(json_parts_module, "dump_json", dump_json)
    prompt = "a cat on a red sofa " * 20  # large enough
    body = {"prompt": prompt, "layers": [0, 1, 2, 3, 4, 5, 6, 7], "dtype": "float32"}
    numbers = [
        client.post("/v1/hidden_states", json={"input": prompt}),
        client.post("/encode_layers?encoding=float", json=body, headers={"accept": wire.JSON}),
    ]

    assert [response.status_code for response in numbers] == [200, 200]
    assert threads == {"builder"}
