"""JSON as other systems write it: with a byte order mark, or in a charset that is declared."""

import codecs
import json

import httpx
import pytest

from app.request.charset import charset_of

PROMPT = "un café œuf €"
ROUTES = ["/tokenize", "/encode", "/encode_layers", "/predict", "/te", "/sglang/encode", "/v1/hidden_states"]


def tokens(client: httpx.Client, content: bytes, content_type: str = "application/json") -> httpx.Response:
    return client.post("/tokenize", content=content, headers={"content-type": content_type})


@pytest.mark.parametrize(
    ("encoding", "content_type"),
    [
        pytest.param("utf-8-sig", "application/json", id="mark"),
        pytest.param("utf-8-sig", "application/json; charset=utf-8", id="mark-and-charset"),
        pytest.param("utf-8", "application/json; charset=utf-8", id="charset"),
        pytest.param("utf-8", 'Application/JSON;Charset="UTF-8"', id="quoted"),
        pytest.param("utf-8", "application/json; odata=verbose; charset = 'utf8';", id="other-parameters"),
        pytest.param("utf-8", "application/json; charset=", id="empty"),
        pytest.param("utf-16", "application/json; charset=utf-16", id="utf-16-with-mark"),
        pytest.param("utf-16-le", "application/json; charset=utf-16", id="utf-16-of-dotnet"),
        pytest.param("utf-16-be", "application/json; charset=UTF-16BE", id="utf-16-be"),
        pytest.param("utf-32", "application/json; charset=utf_32", id="utf-32"),
        pytest.param("windows-1252", "application/json; charset=windows-1252", id="windows-1252"),
    ],
)
def test_a_prompt_arrives_whole_in_every_charset(client: httpx.Client, encoding: str, content_type: str) -> None:
    content = json.dumps({"prompt": PROMPT}, ensure_ascii=False).encode(encoding)

    assert tokens(client, content, content_type).json()["prompts"][0]["text"] == PROMPT


@pytest.mark.parametrize("name", ["iso-8859-1", "ISO_8859-1", "latin1"])
def test_latin_1_is_read_where_it_is_declared(client: httpx.Client, name: str) -> None:
    content = '{"prompt": "un café"}'.encode("latin-1")
    declared = tokens(client, content, f"application/json; charset={name}")
    undeclared = tokens(client, content)

    assert declared.json()["prompts"][0]["text"] == "un café"
    assert undeclared.status_code == 400
    assert "not UTF-8: invalid continuation byte at byte 18" in undeclared.json()["error"]["message"]
    assert "charset=" in undeclared.json()["error"]["hint"]


def test_utf_16_is_named_where_it_is_not_declared(client: httpx.Client) -> None:
    response = tokens(client, '{"prompt": "é"}'.encode("utf-16"))

    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The body is not UTF-8: it is UTF-16."


def test_bytes_that_are_not_in_the_declared_charset_are_400(client: httpx.Client) -> None:
    response = tokens(client, '{"prompt": "é"}'.encode(), "application/json; charset=us-ascii")

    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The body is not ASCII: ordinal not in range(128) at byte 12."


def test_utf_16_that_is_cut_off_is_400(client: httpx.Client) -> None:
    body = '{"prompt": "a"}'.encode("utf-16")[:-1]
    response = tokens(client, body, "application/json; charset=utf-16")

    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The body is not UTF-16: truncated data at byte 30."


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_reads_past_a_byte_order_mark(client: httpx.Client, route: str) -> None:
    body = {
        "/te": ["a cat"],
        "/encode_layers": {"prompt": "a cat", "layers": [0]},
        "/v1/hidden_states": {"input": "a cat", "model": "demo"},
    }.get(route, {"prompt": "a cat"})
    content = json.dumps(body).encode()
    plain, marked = (
        client.post(route, content=start + content, headers={"content-type": "application/json"})
        for start in (b"", codecs.BOM_UTF8)
    )

    assert plain.status_code == marked.status_code == 200, marked.text


def test_a_parameter_of_another_name_is_no_charset() -> None:
    assert charset_of("application/json; xcharset=utf-7; profile=charset") == charset_of("application/json")
