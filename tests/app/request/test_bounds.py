"""A body is refused at the first value that is too many: its values are counted before they are made."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import httpx
import msgpack
import pytest
from pydantic import ValidationError

from app import wire
from app.errors import BodyTooLarge
from app.request import json_body, msgpack_body
from app.request.body import parse
from app.request.charset import UTF_8
from app.request.schemas import EncodeLayersRequest, EncodeRequest
from app.routes.dropins.sdnext import TextEncoderRequest
from tests.conftest import Start

LIMIT = 2064  # with the default settings
HUGE: dict[str, object] = {
    "wrong values": {"prompts": [1] * 600_000},
    "lists": {"prompts": [[]] * 500_000},
    "unknown fields": {f"f{number}": 1 for number in range(150_000)},
    "layers": {"prompt": "a", "layers": [1] * 500_000},
    "one-letter prompts": {"prompts": ["a"] * 300_000},
    "a bare list": ["a"] * 300_000,
    "objects": {"prompts": [{}] * 500_000},
    "in a field that is ignored": {"prompt": "a", "seed": [[1, 2]] * 200_000},
}
ROUTES = ["/encode", "/encode_layers", "/tokenize", "/predict", "/te", "/sglang/encode", "/v1/hidden_states"]
PACK: dict[str, Callable[[object], bytes]] = {
    wire.JSON: lambda document: json.dumps(document).encode(),
    wire.MSGPACK: msgpack.packb,
}


@pytest.mark.parametrize("media_type", PACK)
@pytest.mark.parametrize("case", HUGE)
def test_too_many_values_take_no_memory(case: str, media_type: str) -> None:
    """600,000 wrong values were 1 GB, and 24 s of a service that did not answer."""
    body = PACK[media_type](HUGE[case])
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge, match="2,064 values"):
            parse(body, media_type, UTF_8, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 4 * len(body)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("media_type", PACK)
def test_every_route_refuses_too_many_values(client: httpx.Client, route: str, media_type: str) -> None:
    content = PACK[media_type](HUGE["one-letter prompts"])

    plain = client.post(route, content=content, headers={"content-type": media_type})
    packed = client.post(
        route, content=gzip.compress(content, 1), headers={"content-type": media_type, "content-encoding": "gzip"}
    )

    assert (plain.status_code, plain.json()["error"]["code"]) == (413, "body_too_large")
    assert packed.json() == plain.json()


def test_more_prompts_may_be_allowed(start_server: Start) -> None:
    """The bound follows the setting: it leaves room for every prompt, and refuses one list of them too many."""
    with start_server(max_prompts=10_000) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        allowed = client.post("/tokenize", json={"prompts": ["a"] * 10_000})
        refused = client.post("/tokenize", json={"prompts": ["a"] * 12_000})

    assert allowed.status_code == 200
    assert refused.json()["error"]["message"] == "The body may have 12,000 values, it has more."


@pytest.mark.parametrize("charset", ["utf-8", "utf-16", "utf-32"])
def test_every_charset_is_counted(client: httpx.Client, charset: str) -> None:
    """UTF-16 has the bytes of a bracket in other characters, so text is counted, not bytes."""
    content_type = f"{wire.JSON}; charset={charset}"
    many, few = (json.dumps({"prompts": [text] * 40}, ensure_ascii=False) for text in ("[,,,,]" * 40, "\u5b5b" * 400))

    for text in (many, few):
        response = client.post("/tokenize", content=text.encode(charset), headers={"content-type": content_type})
        assert response.status_code == 200, response.text
    response = client.post(
        "/tokenize", content=json.dumps([1] * 3000).encode(charset), headers={"content-type": content_type}
    )
    assert response.status_code == 413


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"prompt": "' + "\\n" * 990_000 + '"}', id="escapes"),
        pytest.param('{"prompt": "' + "[{,}]" * 390_000 + '"}', id="structure in a string"),
        pytest.param('{"prompt": "a"' + " " * 1_900_000 + "}", id="spaces"),
        pytest.param('{"prompt": "' + "a" * 1_900_000 + '\N{CAT FACE}"}', id="wide characters"),
    ],
)
def test_one_long_string_is_one_value(text: str) -> None:
    assert list(parse(text.encode(), wire.JSON, UTF_8, LIMIT)) == ["prompt"]
    assert json_body.check_size(text, LIMIT) == 4  # two brackets, two strings


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('"' * 2_000_000, id="strings without structure"),
        pytest.param("]" * 2_000_000, id="brackets that nothing opened"),
        pytest.param("[[],[]]" * 300_000, id="values after the value"),
    ],
)
def test_what_is_not_json_is_read_until_there_are_too_many(text: str) -> None:
    with pytest.raises(BodyTooLarge):
        json_body.check_size(text, LIMIT)


@pytest.mark.parametrize("text", ['"' + "\\n" * 900_000, '"' + "a" * 1_900_000, "\\" * 1_900_000, "\\" * 1_900_001])
def test_a_string_without_end_is_read_once(client: httpx.Client, text: str) -> None:
    """Read again from each of its characters, it would take hours."""
    response = client.post("/encode", content=text, headers={"content-type": wire.JSON})

    assert json_body.check_size(text, LIMIT) == text.count('"')
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        pytest.param(wire.JSON, b"[" * 2_000_000, id="JSON lists"),
        pytest.param(wire.JSON, b'{"a":' * 1000 + b"1" + b"}" * 1000, id="JSON objects"),
        pytest.param(wire.MSGPACK, b"\x91" * 2_000_000, id="msgpack lists"),
        pytest.param(wire.MSGPACK, b"\x81\xa1a" * 2000, id="msgpack maps"),
        pytest.param(wire.MSGPACK, b"\x91" * 900, id="short msgpack"),
    ],
)
def test_deep_bodies_are_refused(client: httpx.Client, media_type: str, body: bytes) -> None:
    response = client.post("/encode", content=body, headers={"content-type": media_type})

    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_body")


@pytest.mark.parametrize("number", ["0." + "1" * 1_900_000, "1" * 1_900_000, "-1e" + "1" * 1_900_000])
@pytest.mark.parametrize("body", ['{{"prompt": "a", "timeout_ms": {}}}', "{}"])
def test_a_number_of_absurd_length_is_not_read(client: httpx.Client, body: str, number: str) -> None:
    """Reading it would hold up all other requests."""
    reply = client.post("/encode", content=body.format(number), headers={"content-type": wire.JSON})

    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "The body has a number of more than 4,300 characters."


def test_blanks_between_values_may_be_of_any_length(client: httpx.Client) -> None:
    body = '{"prompt":' + " " * 10_000 + '"a"' + "\n" * 10_000 + "}" + " " * 10_000

    assert client.post("/encode", content=body, headers={"content-type": wire.JSON}).status_code == 200


def test_declared_lists_make_no_room() -> None:
    """Each three bytes declare a list of 2,000, for which msgpack takes 16 kB."""
    body = b"\xdc\x07\xd0" * 1000
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            msgpack_body.parse_msgpack(body, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 100_000


DOUBLED = [
    pytest.param(wire.JSON, b'{"prompt": "a", "prompt": "b"}', "'prompt'", id="JSON"),
    pytest.param(wire.JSON, b'{"prompt": "a", "\\u0070rompt": "b"}', "'prompt'", id="JSON, escaped"),
    pytest.param(wire.JSON, b'{"prompt": "a", "seed": [{"x": 1, "y": 2, "x": 1}]}', "'x'", id="JSON, within"),
    pytest.param(wire.MSGPACK, b"\x82\xa6prompt\xa1a\xa6prompt\xa1b", "'prompt'", id="msgpack"),
    pytest.param(wire.MSGPACK, b"\x82\xa6prompt\xa1a\xa4seed\x91\x82\xa1x\x01\xa1x\x02", "'x'", id="msgpack, within"),
]


@pytest.mark.parametrize(("media_type", "body", "key"), DOUBLED)
@pytest.mark.parametrize("route", ROUTES)
def test_a_key_comes_once(client: httpx.Client, route: str, media_type: str, body: bytes, key: str) -> None:
    """Of two values, readers before this service may have checked the other one."""
    response = client.post(route, content=body, headers={"content-type": media_type})

    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"The body has the key {key} twice in one object."


def test_an_object_has_256_keys_at_most(client: httpx.Client) -> None:
    response = client.post("/encode", json={f"f{number}": 1 for number in range(257)})

    assert response.json()["error"]["message"] == "An object of the body may have 256 keys, it has 257."


def test_the_first_wrong_value_of_a_list_ends_its_check() -> None:
    with pytest.raises(ValidationError) as prompts:
        EncodeRequest.model_validate({"prompts": [1] * 2000})
    with pytest.raises(ValidationError) as layers:
        EncodeLayersRequest.model_validate({"prompt": "a", "layers": ["1"] * 2000})
    with pytest.raises(ValidationError) as bare:
        TextEncoderRequest.model_validate([1] * 2000)

    assert [error.value.error_count() for error in (prompts, layers, bare)] == [1, 1, 1]


@pytest.mark.parametrize("media_type", PACK)
def test_a_whole_number_is_an_integer_however_it_is_written(client: httpx.Client, media_type: str) -> None:
    """As in JSON Schema and JavaScript."""

    def post(route: str, body: dict[str, Any]) -> int:
        return client.post(route, content=PACK[media_type](body), headers={"content-type": media_type}).status_code

    for good, bad in ((77.0, 77.5), (1e2, 1e300)):
        assert post("/encode", {"prompt": "a", "max_sequence_length": good}) == 200
        assert post("/encode", {"prompt": "a", "max_sequence_length": bad}) == 422
    assert post("/encode_layers", {"prompt": "a", "layers": [1.0, 2]}) == 200
    assert post("/encode_layers", {"prompt": "a", "layers": [1.0, 1]}) == 422  # twice
    assert post("/v1/hidden_states", {"input": "a", "layer": -2.0, "max_length": 77.0}) == 200
    assert post("/v1/hidden_states", {"input": "a", "layer": -2.5}) == 422


def test_a_long_value_is_cut_before_it_is_shown(client: httpx.Client) -> None:
    for body in ({"prompt": "a", "dtype": "é" * 900_000}, {"prompt": "a", "max_sequence_length": 10**4000}):
        response = client.post("/encode", json=body)

        assert response.status_code == 422
        assert len(response.content) < 400
