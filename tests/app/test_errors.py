"""Whatever is wrong with a request, the answer is a 4xx that says what, and the service goes on."""

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import msgpack
import pytest

from app import wire
from tests.conftest import RunningServer, Start


@pytest.fixture(autouse=True)
def still_serves(client: httpx.Client) -> Iterator[None]:
    """After each of these requests the next good one is answered."""
    yield
    assert client.post("/encode", json={"prompt": "a cat"}).status_code == 200


def assert_error(response: httpx.Response, status: int, code: str, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert error["code"] == code
    assert "Traceback" not in response.text
    for word in words:
        assert word in error["message"] + error.get("hint", "")


BAD_FIELDS = [
    pytest.param({}, ["prompt"], id="nothing"),
    pytest.param({"prompt": None}, ["prompt"], id="null prompt"),
    pytest.param({"prompt": "a", "prompts": ["a"]}, ["exactly one"], id="prompt and prompts"),
    pytest.param({"prompt": 5}, ["prompt", "5"], id="number for prompt"),
    pytest.param({"prompt": ["a"]}, ["prompt", "list"], id="list for prompt"),
    pytest.param({"prompt": {"a": 1}}, ["prompt", "object"], id="object for prompt"),
    pytest.param({"prompts": "a"}, ["prompts"], id="string for prompts"),
    pytest.param({"prompts": []}, ["prompts"], id="no prompts"),
    pytest.param({"prompts": ["a", 5]}, ["prompts[1]", "5"], id="number among prompts"),
    pytest.param({"prompts": ["a", None]}, ["prompts[1]"], id="null among prompts"),
    pytest.param({"prompts": [["a"]]}, ["prompts[0]"], id="nested prompts"),
    pytest.param({"prompt": "\ud800"}, ["prompt", "surrogate"], id="lone surrogate"),
    pytest.param({"prompts": ["a", "\udfff"]}, ["prompts[1]", "surrogate"], id="lone surrogate among prompts"),
    pytest.param({"prompt": "a", "prefix": "\ud800"}, ["prefix"], id="lone surrogate in prefix"),
    pytest.param({"prompt": "a", "prefix": "x" * 4097}, ["prefix", "4096"], id="long prefix"),
    pytest.param({"prompt": "a", "suffix": 1}, ["suffix"], id="number for suffix"),
    pytest.param({"prompt": "a", "preset": "sdxl"}, ["preset", "sdxl", "flux2-klein"], id="unknown preset"),
    pytest.param({"prompt": "a", "preset": ""}, ["preset"], id="empty preset"),
    pytest.param({"prompt": "a", "preset": "x" * 100_000}, ["preset", "flux2-klein"], id="long preset"),
    pytest.param({"prompt": "a", "preset": 1}, ["preset", "1"], id="number for preset"),
    pytest.param({"prompt": "a", "preset": "\ud800"}, ["preset"], id="lone surrogate in preset"),
    pytest.param({"prompt": "a", "preset": "flux2-klein-9b"}, ["4096"], id="preset of another size"),
    pytest.param({"prompt": "a", "dtype": "float64"}, ["dtype", "float64", "bfloat16"], id="unknown dtype"),
    pytest.param({"prompt": "a", "dtype": None}, ["dtype"], id="null dtype"),
    pytest.param({"prompt": "a", "padding": "left"}, ["padding", "left", "longest"], id="unknown padding"),
    pytest.param({"prompt": "a", "max_sequence_length": 0}, ["max_sequence_length", "0"], id="window 0"),
    pytest.param({"prompt": "a", "max_sequence_length": -1}, ["max_sequence_length", "-1"], id="negative window"),
    pytest.param({"prompt": "a", "max_sequence_length": 8193}, ["max_sequence_length", "8192"], id="window over limit"),
    pytest.param({"prompt": "a", "max_sequence_length": 10**30}, ["max_sequence_length"], id="huge window"),
    pytest.param({"prompt": "a", "max_sequence_length": 10**4000}, ["max_sequence_length"], id="window of 4000 digits"),
    pytest.param({"prompt": "a", "max_sequence_length": "5"}, ["max_sequence_length", "'5'"], id="string window"),
    pytest.param({"prompt": "a", "max_sequence_length": True}, ["max_sequence_length", "True"], id="true for window"),
    pytest.param({"prompt": "a", "max_sequence_length": 5.5}, ["max_sequence_length", "5.5"], id="float window"),
    pytest.param({"prompt": "a", "max_sequence_length": 1e300}, ["max_sequence_length"], id="large float window"),
    pytest.param({"prompt": "a", "max_sequence_length": []}, ["max_sequence_length"], id="list for window"),
    pytest.param({"text": "a"}, ["text", "unknown", "prompt"], id="unknown field"),
    pytest.param({"prompt": "a", "layers": [1]}, ["layers", "/encode_layers"], id="layers on encode"),
    pytest.param({"prompt": "a", "\ud800": 1}, ["ud800"], id="lone surrogate as a field"),
    pytest.param({"prompt": "a", "": 1}, ["unknown"], id="empty field name"),
    pytest.param({"prompt": "a", "x" * 10_000: 1}, ["unknown"], id="long field name"),
]


@pytest.mark.parametrize(("body", "words"), BAD_FIELDS)
def test_a_bad_field_is_named_with_its_value(client: httpx.Client, body: dict[str, Any], words: list[str]) -> None:
    content = json.dumps(body)

    response = client.post("/encode", content=content, headers={"content-type": wire.JSON})

    assert_error(response, 422, "invalid_field", *words)
    assert len(response.content) < 2000


BAD_LAYERS = [
    pytest.param({}, ["exactly one"], id="neither"),
    pytest.param({"layers": [1], "hidden_states": [1]}, ["exactly one"], id="both"),
    pytest.param({"layers": []}, ["layers"], id="empty"),
    pytest.param({"layers": 5}, ["layers"], id="no list"),
    pytest.param({"layers": "all"}, ["layers"], id="string"),
    pytest.param({"layers": [36]}, ["layers", "36", "35"], id="after the last"),
    pytest.param({"layers": [-37]}, ["layers", "-37", "-36"], id="before the first"),
    pytest.param({"hidden_states": [37]}, ["hidden_states", "37", "36"], id="hidden state after the last"),
    pytest.param({"hidden_states": [-38]}, ["hidden_states", "-38"], id="hidden state before the first"),
    pytest.param({"layers": [10**40]}, ["layers"], id="huge"),
    pytest.param({"layers": [10**4000]}, ["layers"], id="4000 digits"),
    pytest.param({"layers": [1, True]}, ["layers[1]", "True"], id="true"),
    pytest.param({"layers": [1.5]}, ["layers[0]", "1.5"], id="float"),
    pytest.param({"layers": ["1"]}, ["layers[0]"], id="digit in a string"),
    pytest.param({"layers": [None]}, ["layers[0]"], id="null"),
    pytest.param({"layers": [3, 3]}, ["layers", "twice"], id="twice"),
    pytest.param({"layers": [1], "combine": "sum"}, ["combine", "sum", "concat"], id="unknown combine"),
]


@pytest.mark.parametrize(("fields", "words"), BAD_LAYERS)
def test_bad_layers_are_refused_with_what_is_allowed(
    client: httpx.Client, fields: dict[str, Any], words: list[str]
) -> None:
    response = client.post("/encode_layers", json={"prompt": "a", **fields})

    assert_error(response, 422, "invalid_field", *words)
    assert len(response.content) < 2000


BAD_JSON = [
    pytest.param(b"", id="empty"),
    pytest.param(b" ", id="blank"),
    pytest.param(b"{", id="cut off"),
    pytest.param(b"{'prompt': 'a'}", id="Python"),
    pytest.param(b'{"prompt": "a"} x', id="trailing text"),
    pytest.param(b'{"prompt": "a",}', id="trailing comma"),
    pytest.param(b'{"prompt": "\xff"}', id="not UTF-8"),
    pytest.param('{"prompt": "a"}'.encode("utf-16"), id="UTF-16"),
    pytest.param(b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "a"}', id="two byte order marks"),
    pytest.param(b'{"prompt": "a", "max_sequence_length": NaN}', id="NaN"),
    pytest.param(b'{"prompt": "a", "max_sequence_length": -Infinity}', id="infinity"),
    pytest.param(b'{"max_sequence_length": ' + b"9" * 10_000 + b"}", id="integer of 10,000 digits"),
    pytest.param(b"[" * 200_000, id="deep arrays"),
    pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="deep objects"),
    pytest.param(b'{"prompt": "a\nb"}', id="raw newline"),
    pytest.param(b"\x00" * 100, id="zeros"),
    pytest.param(b"prompt=a", id="form"),
]


@pytest.mark.parametrize("content", BAD_JSON)
def test_what_is_not_json_is_400(client: httpx.Client, content: bytes) -> None:
    response = client.post("/encode", content=content, headers={"content-type": wire.JSON})

    assert_error(response, 400, "malformed_body")


BAD_MSGPACK = [
    pytest.param(b"", id="empty"),
    pytest.param(b"\xc1", id="never used byte"),
    pytest.param(msgpack.packb({"prompt": "a"})[:-1], id="cut off"),
    pytest.param(msgpack.packb({"prompt": "a"}) * 2, id="two values"),
    pytest.param(b"\x91" * 100_000, id="deep arrays"),
    pytest.param(b"\xdd\xff\xff\xff\xff", id="array of four billion"),
    pytest.param(b"\xdf\xff\xff\xff\xff", id="map of four billion"),
    pytest.param(b"\xc6\xff\xff\xff\xff", id="bytes of four billion"),
    pytest.param(b"\x81\xa6prompt\xa1\xff", id="not UTF-8"),
    pytest.param(msgpack.packb({1: "a"}), id="number as a field"),
    pytest.param(b"\x81\x90\x01", id="array as a field"),
    pytest.param(b'{"prompt": "a"}', id="JSON"),
]


@pytest.mark.parametrize("content", BAD_MSGPACK)
def test_what_is_not_msgpack_is_400(client: httpx.Client, content: bytes) -> None:
    response = client.post("/encode", content=content, headers={"content-type": wire.MSGPACK})

    assert_error(response, 400, "malformed_body")


@pytest.mark.parametrize("value", [b"a", msgpack.ExtType(1, b"a"), msgpack.Timestamp(1), float("nan")])
def test_msgpack_values_that_json_lacks_are_no_prompts(client: httpx.Client, value: object) -> None:
    content = msgpack.packb({"prompt": value})

    response = client.post("/encode", content=content, headers={"content-type": wire.MSGPACK})

    assert_error(response, 422, "invalid_field", "prompt")


@pytest.mark.parametrize("body", [[], ["a"], "a", 1, True, None, 1.5])
@pytest.mark.parametrize("path", ["/encode", "/encode_layers", "/tokenize"])
def test_a_body_that_is_no_object_is_422(client: httpx.Client, path: str, body: object) -> None:
    response = client.post(path, content=json.dumps(body), headers={"content-type": wire.JSON})

    assert_error(response, 422, "invalid_field", "body", "object")


@pytest.mark.parametrize(
    ("headers", "word"),
    [
        pytest.param(
            {"content-type": "application/x-www-form-urlencoded"}, "content-type: application/json", id="form"
        ),
        pytest.param({"content-type": "text/plain"}, "text/plain", id="text"),
        pytest.param({"content-type": "multipart/form-data; boundary=x"}, "multipart", id="multipart"),
        pytest.param({"content-type": ""}, "content-type", id="empty"),
        pytest.param({}, "content-type", id="none"),
        pytest.param({"content-type": wire.JSON, "content-encoding": "br"}, "'br'", id="other coding"),
        pytest.param({"content-type": wire.JSON, "content-encoding": "gzip, gzip"}, "gzip, gzip", id="two codings"),
        pytest.param({"content-type": f"{wire.JSON}; charset=utf-7"}, "'utf-7'", id="other charset"),
        pytest.param({"content-type": f"{wire.JSON}; charset={'x' * 500}"}, "expected one of utf-8", id="long charset"),
    ],
)
def test_other_content_types_are_415_with_the_remedy(client: httpx.Client, headers: dict[str, str], word: str) -> None:
    response = client.post("/encode", content=b'{"prompt": "a"}', headers=headers)

    assert_error(response, 415, "unsupported_media_type", word)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        pytest.param({"prompts": ["a"] * 65}, "64", id="prompts"),
        pytest.param({"prompt": "a" * 32_001}, "32000", id="characters"),
        pytest.param(
            {"prompts": [f"{n}" for n in range(64)], "preset": "flux2-klein", "max_sequence_length": 2048},
            "65536",
            id="tokens",
        ),
    ],
)
def test_more_than_the_limits_is_413(client: httpx.Client, body: dict[str, Any], word: str) -> None:
    response = client.post("/encode", json=body)

    assert_error(response, 413, "request_too_large", word)


def test_more_output_than_the_limit_is_413(start_server: Start) -> None:
    with start_server(max_output_bytes=1000) as server:
        server.wait_until_ready()
        response = httpx.post(f"{server.url}/encode", json={"prompt": "a cat " * 10})

    assert_error(response, 413, "request_too_large", "1000")


def test_more_numbers_in_json_than_the_limit_is_413(client: httpx.Client) -> None:
    body = {"prompts": ["a"] * 60, "preset": "flux2-klein", "max_sequence_length": 200}

    response = client.post("/encode?encoding=float", json=body, headers={"accept": wire.JSON})

    assert_error(response, 413, "response_too_large", "base64")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413(client: httpx.Client, chunked: bool) -> None:
    body = b'{"prompt": "' + b"a" * 20_000_000 + b'"}'
    content: Any = (body[at : at + 65_536] for at in range(0, len(body), 65_536)) if chunked else body

    response = client.post("/encode", content=content, headers={"content-type": wire.JSON})

    assert_error(response, 413, "body_too_large", "2,000,000")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_have_as_many_bytes_as_the_limit(start_server: Start, chunked: bool) -> None:
    body = b'{"prompt": "a cat"}'

    def post(server: RunningServer, body: bytes) -> httpx.Response:
        content: Any = iter([body[:10], body[10:]]) if chunked else body
        return httpx.post(f"{server.url}/encode", content=content, headers={"content-type": wire.JSON})

    with start_server(max_body_bytes=len(body)) as server:
        server.wait_until_ready()
        exact, over = post(server, body), post(server, body + b" ")

    assert exact.status_code == 200
    assert_error(over, 413, "body_too_large", f"{len(body)} bytes")


def test_a_body_that_does_not_arrive_is_408(start_server: Start) -> None:
    head = b"POST /encode HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n"
    with start_server(body_timeout_s=0.2) as server, socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(head + b'{"prompt": ')
        reply = b"".join(iter(lambda: connection.recv(65_536), b""))  # to the end: the service closes the connection

    assert reply.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in reply


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(
    server: RunningServer, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    head = b"POST /encode HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n"
    with socket.create_connection(server.address) as connection:
        connection.sendall(head + b'{"prompt": ')

    while "POST /encode 499" not in caplog.text:
        client.get("/livez")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("path", ["/", "/nothing", "/encode/", "/ENCODE", "/encode%2e", "/%ff", "/static/../../etc"])
def test_other_paths_are_404(client: httpx.Client, path: str) -> None:
    assert_error(client.get(path), 404, "not_found", "does not exist")


@pytest.mark.parametrize(("method", "path", "allowed"), [
    ("GET", "/encode", "OPTIONS, POST"),
    ("DELETE", "/encode", "OPTIONS, POST"),
    ("POST", "/info", "GET, HEAD, OPTIONS"),
    ("PUT", "/livez", "GET, HEAD, OPTIONS"),
])  # fmt: skip
def test_other_methods_are_405_with_those_allowed(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    response = client.request(method, path)

    assert_error(response, 405, "method_not_allowed", method)
    assert response.headers["allow"] == allowed


def test_options_lists_the_methods_and_allows_no_other_origin(client: httpx.Client) -> None:
    response = client.options("/encode", headers={"origin": "http://evil.example"})

    assert response.status_code == 204
    assert response.headers["allow"] == "OPTIONS, POST"
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/livez", "/info", "/metrics", "/openapi.json", "/docs"])
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)

    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_an_unknown_encoding_is_422(client: httpx.Client) -> None:
    assert_error(client.post("/encode?encoding=hex", json={"prompt": "a"}), 422, "invalid_field", "encoding", "hex")


def test_an_unexpected_error_is_500_without_its_details(start_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    """The log has them, under the request's id."""
    with start_server() as server:
        server.app.add_api_route("/broken", lambda: 1 / 0)
        response = httpx.get(f"{server.url}/broken", headers={"x-request-id": "req-7"})

    assert_error(response, 500, "internal_error")
    assert response.headers["x-request-id"] == "req-7"
    assert "ZeroDivisionError" not in response.text
    assert "req-7" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_limits_hold_for_one_prompt_and_many_alike(server: RunningServer) -> None:
    """A body just inside every limit is served."""
    response = httpx.post(f"{server.url}/encode", json={"prompts": ["a"] * 64}, timeout=60)

    assert response.status_code == 200
