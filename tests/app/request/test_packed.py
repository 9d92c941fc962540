"""Compressed bodies: read where they are within the limit, and cheap to refuse where they are not."""

import gzip
import json
import tracemalloc
import zlib

import httpx
import msgpack
import pytest

from app import wire
from app.errors import BodyTooLarge
from app.request.packed import unpack
from tests.conftest import Start

BODY = json.dumps({"prompt": "a cat"}).encode()
JSON = {"content-type": wire.JSON}
TOO_LARGE = 2_000_001


def post(client: httpx.Client, content: bytes, coding: str = "gzip", content_type: str = wire.JSON) -> httpx.Response:
    return client.post("/tokenize", content=content, headers={"content-type": content_type, "content-encoding": coding})


@pytest.mark.parametrize(
    ("content", "coding"),
    [
        pytest.param(gzip.compress(BODY), "gzip", id="gzip"),
        pytest.param(gzip.compress(BODY), "X-GZip", id="old name"),
        pytest.param(gzip.compress(BODY[:5]) + gzip.compress(b"") + gzip.compress(BODY[5:]), "gzip", id="members"),
        pytest.param(zlib.compress(BODY), "deflate", id="deflate"),
        pytest.param(BODY, "identity", id="identity"),
        pytest.param(gzip.compress(BODY), "identity, gzip", id="identity and gzip"),
    ],
)
def test_compressed_body_is_read(client: httpx.Client, content: bytes, coding: str) -> None:
    assert post(client, content, coding).json() == client.post("/tokenize", content=BODY, headers=JSON).json()


def test_compressed_msgpack_is_read(client: httpx.Client) -> None:
    content = gzip.compress(msgpack.packb({"prompt": "a cat"}))

    assert post(client, content, content_type=wire.VND_MSGPACK).status_code == 200


@pytest.mark.parametrize(
    ("content", "coding", "message"),
    [
        pytest.param(BODY, "gzip", "is not gzip: Error -3", id="not compressed"),
        pytest.param(zlib.compress(BODY), "gzip", "is not gzip", id="zlib"),
        pytest.param(gzip.compress(BODY)[:-1], "gzip", "ends before its gzip data", id="cut off"),
        pytest.param(gzip.compress(BODY)[:5], "gzip", "ends before its gzip data", id="cut off in its header"),
        pytest.param(gzip.compress(BODY)[:-8] + bytes(8), "gzip", "is not gzip", id="wrong checksum"),
        pytest.param(gzip.compress(BODY) + b"more", "gzip", "goes on after member 1", id="more after it"),
        pytest.param(zlib.compress(BODY) + b"more", "deflate", "goes on after the end", id="more after deflate"),
        pytest.param(gzip.compress(b"") * 100_000, "gzip", "goes on after the end", id="many members"),
        pytest.param(gzip.compress(b""), "gzip", "is empty", id="nothing inside"),
        pytest.param(b"", "gzip", "is empty", id="nothing"),
    ],
)
def test_damaged_body_is_400_in_one_line(client: httpx.Client, content: bytes, coding: str, message: str) -> None:
    response = post(client, content, coding)

    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]


def test_bomb_is_refused_at_the_limit_of_an_uncompressed_body(client: httpx.Client) -> None:
    """Ten gigabytes fit into ten megabytes; in several members as in one."""
    fits, over = (gzip.compress(BODY + b" " * (size - len(BODY))) for size in (TOO_LARGE - 1, TOO_LARGE))
    members = gzip.compress(b" " * 1_999_000) * 60

    assert post(client, fits).status_code == 200
    for content in (over, members, gzip.compress(bytes(100_000_000))):
        response = post(client, content)
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "The body may have 2,000,000 bytes, unpacked it has more."


def test_bomb_is_not_unpacked_beyond_the_limit() -> None:
    """Else a few requests of 50 kB would take gigabytes."""
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            unpack(bomb, "gzip", 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1_000_000


def test_limit_applies_to_what_is_sent_as_well(start_server: Start) -> None:
    with start_server(max_body_bytes=100) as server, httpx.Client(base_url=server.url) as client:
        assert post(client, gzip.compress(BODY)).status_code in (200, 503)  # the model may still be loading
        assert post(client, gzip.compress(BODY) + bytes(100)).status_code == 413


def test_other_coding_is_told_what_is_read(client: httpx.Client) -> None:
    response = post(client, BODY, "zstd")

    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "gzip, deflate"
    assert "'zstd' is not read here, expected gzip, deflate or identity" in response.json()["error"]["message"]
