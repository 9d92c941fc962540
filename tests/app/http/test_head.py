"""What is HTTP/1 and what is not: one request more or less than a proxy sees is a way past that proxy."""

import pytest

from tests.app.http.raw import BODY, LIVEZ, connected, head, read_all, read_reply, send, statuses
from tests.conftest import RunningServer

CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
INNER = b"GET /presets HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def get(*headers: str, line: str = "GET /livez HTTP/1.1") -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1")


def chunked(*headers: str, version: str = "1.1") -> bytes:
    return head(*headers, line=f"POST /tokenize HTTP/{version}", length=None) + CHUNKS


MALFORMED = [
    pytest.param(get("Host: 127.0.0.1", "Host: 127.0.0.1"), id="two hosts"),
    pytest.param(get("Host: 127.0.0.1", "Host: a", line="GET /livez HTTP/1.0"), id="two hosts of HTTP/1.0"),
    pytest.param(get(), id="no host"),
    pytest.param(get("Host : 127.0.0.1"), id="space before the colon"),
    pytest.param(get("Host: 127.0.0.1", line="GET http://evil/livez HTTP/1.1"), id="target of another host"),
    pytest.param(get("Host: 127.0.0.1", line="GET http://u@127.0.0.1/livez HTTP/1.1"), id="target with a user"),
    pytest.param(get("Host: 127.0.0.1", line="GET ftp://127.0.0.1/livez HTTP/1.1"), id="target of another scheme"),
    pytest.param(get("Host: 127.0.0.1", line="GET /livez#a HTTP/1.1"), id="target with a fragment"),
    pytest.param(get("Host: 127.0.0.1", line="GET * HTTP/1.1"), id="GET *"),
    pytest.param(get("Host: 127.0.0.1", line="GET /li\0vez HTTP/1.1"), id="NUL in the target"),
    pytest.param(get("Host: 127.0.0.1", line="GET /livez\xe9 HTTP/1.1"), id="target that is not ASCII"),
    pytest.param(get("Host: 127.0.0.1", line="GET /li vez HTTP/1.1"), id="space in the target"),
    pytest.param(get("Host: 127.0.0.1", line="GET /livez HTTP/2.0"), id="HTTP/2"),
    pytest.param(get("Host: 127.0.0.1", line="GET /livez HTTP/1.2"), id="HTTP/1.2"),
    pytest.param(b"GET /livez\r\n\r\n", id="HTTP/0.9"),
    pytest.param(get("Host: 127.0.0.1", "X: a\0b"), id="NUL in a value"),
    pytest.param(get("Host: 127.0.0.1", "X: a\rb"), id="CR in a value"),
    pytest.param(get("Host: 127.0.0.1", "X: a\nY: b"), id="LF alone"),
    pytest.param(get("Host: 127.0.0.1", "X: a\r\n b"), id="folded line"),
    pytest.param(get("Host: 127.0.0.1", "X y: a"), id="space in a name"),
    pytest.param(get("Host: 127.0.0.1", ": a"), id="no name"),
    pytest.param(chunked("Transfer-Encoding: chunked", f"Content-Length: {len(BODY)}"), id="chunked, then a length"),
    pytest.param(chunked(f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"), id="a length, then chunked"),
    pytest.param(chunked("Transfer-Encoding: chunked", version="1.0"), id="chunked in HTTP/1.0"),
    pytest.param(chunked("Transfer-Encoding: gzip, chunked"), id="another coding"),
    pytest.param(chunked("Transfer-Encoding: identity"), id="identity"),
    pytest.param(chunked("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), id="chunked twice"),
    pytest.param(chunked("Transfer-Encoding: \x0bchunked"), id="chunked behind a control character"),
    pytest.param(head(f"Content-Length: {len(BODY)}") + BODY, id="two equal lengths"),
    pytest.param(head("Content-Length: 3") + BODY, id="two lengths"),
    pytest.param(head("Content-Length: 19, 19", length=None) + BODY, id="a list of lengths"),
    pytest.param(head("Content-Length: +19", length=None) + BODY, id="a length with a sign"),
    pytest.param(head("Content-Length: 0x13", length=None) + BODY, id="a length in hexadecimal"),
    pytest.param(head("Transfer-Encoding: chunked", length=None) + b"0x13\r\n", id="a chunk's size with 0x"),
    pytest.param(head("Transfer-Encoding: chunked", length=None) + b"1\r\na0\r\n\r\n", id="a chunk without its end"),
    pytest.param(head("Transfer-Encoding: chunked", length=None) + b"1;x\ny\r\n", id="LF in a chunk's extension"),
    pytest.param(chunked("Transfer-Encoding: chunked")[:-2] + b"Content-Length: 1\r\n\r\n", id="a length as trailer"),
]


@pytest.mark.parametrize("data", MALFORMED)
def test_what_is_ambiguous_is_refused_and_nothing_behind_it_is_served(server: RunningServer, data: bytes) -> None:
    answer = send(server, data + INNER)

    assert statuses(answer)[-1:] == [400]
    assert b"connection: close\r\n" in answer
    assert b"flux2-klein" not in answer


WELL_FORMED = [
    pytest.param(get("Host: 127.0.0.1"), id="plain"),
    pytest.param(get("Host:"), id="empty host"),
    pytest.param(get(line="GET /livez HTTP/1.0"), id="HTTP/1.0 without a host"),
    pytest.param(get("Host: 127.0.0.1", line="GET http://127.0.0.1/livez?a HTTP/1.1"), id="target of the same host"),
    pytest.param(get("Host: LOCALHOST:80", line="GET http://localhost/livez HTTP/1.1"), id="the port of the scheme"),
    pytest.param(b"\r\n" + get("Host: 127.0.0.1"), id="an empty line before it"),
    pytest.param(get("Host: 127.0.0.1", "X: \xe9\t\xff"), id="bytes of obs-text"),
    pytest.param(chunked("Transfer-Encoding: Chunked"), id="chunked"),
    pytest.param(chunked("Transfer-Encoding: chunked")[:-2] + b"X: y\r\n\r\n", id="a trailer"),
    pytest.param(head("Transfer-Encoding: chunked", length=None) + b"13;a=b\r\n" + CHUNKS[4:], id="an extension"),
    pytest.param(head(line="POST /tokenize HTTP/1.0") + BODY, id="HTTP/1.0 with a body"),
]


@pytest.mark.parametrize("data", WELL_FORMED)
def test_what_is_right_is_served(server: RunningServer, data: bytes) -> None:
    """And the connection goes on, if it is of HTTP/1.1."""
    with connected(server) as connection:
        connection.sendall(data)
        first = read_reply(connection)
        assert statuses(first) == [200]
        if b"HTTP/1.0" in data:
            assert (b"connection: close\r\n" in first, read_all(connection)) == (True, b"")
        else:
            connection.sendall(LIVEZ)
            assert statuses(read_reply(connection)) == [200]


def test_target_of_an_absolute_form_is_a_host_of_http_1_0_too(server: RunningServer) -> None:
    """Which has no Host header to compare it with."""
    assert statuses(send(server, get(line="GET http://evil/livez HTTP/1.0"))) == [421]
    assert statuses(send(server, get(line="GET http://localhost/livez HTTP/1.0"))) == [200]


def test_expectation_is_met_when_the_body_is_wanted(server: RunningServer) -> None:
    with connected(server) as connection:
        connection.sendall(head("Expect: 100-Continue"))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert statuses(read_reply(connection)) == [200]


def test_expectation_is_answered_at_once_where_the_body_is_not_wanted(server: RunningServer) -> None:
    with connected(server) as connection:
        connection.sendall(head("Expect: 100-continue", length=10**9))
        assert statuses(read_reply(connection)) == [413]


def test_expectation_of_http_1_0_is_none(server: RunningServer) -> None:
    assert statuses(send(server, head("Expect: 100-continue", line="POST /tokenize HTTP/1.0") + BODY)) == [200]


@pytest.mark.parametrize("value", ["foo", "100-continue, foo"])
def test_other_expectations_are_refused(server: RunningServer, value: str) -> None:
    answer = send(server, head(f"Expect: {value}") + BODY)

    assert statuses(answer) == [417]
    assert b'"code":"expectation_failed"' in answer
