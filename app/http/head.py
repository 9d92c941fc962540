"""The rules of a request's head that the parser leaves to the server. Which hosts are allowed is HostCheck's matter.

Source: RFC 9112, sections 3.2 (targets, Host), 5.2 (folded lines) and 6 (framing). RFC 9110, section 10.1.1 (Expect).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

import httptools

from app.errors import ExpectationFailed, MalformedRequest
from app.request.validation import shorten

Header = tuple[bytes, bytes]  # the name in lower case

ORIGIN = re.compile(rb"/[!-~]*")


class Target(NamedTuple):
    """A request target, as the scope of ASGI has it."""

    path: str
    raw_path: bytes
    query_string: bytes


def check_headers(headers: Sequence[Header], version: str) -> bool:
    """Whether the client waits for 100 before it sends the body.

    The parser has refused two Content-Lengths, and one beside Transfer-Encoding.

    Errors: MalformedRequest, ExpectationFailed.
    """
    if version not in ("1.0", "1.1"):
        raise MalformedRequest(f"HTTP/{version} is not spoken here, expected HTTP/1.1.")
    hosts = 0
    expects_continue = False
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            _check_coding(value, version)
        elif name == b"expect":
            expects_continue = _expects_continue(value, version)
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise MalformedRequest(f"host: found {hosts} headers, expected one.")
    return expects_continue


def _check_coding(value: bytes, version: str) -> None:
    if version != "1.1":
        raise MalformedRequest(f"transfer-encoding: HTTP/{version} has none.")
    if value.strip().lower() != b"chunked":
        raise MalformedRequest(f"transfer-encoding: {_text(value)} is not read here, expected chunked.")


def _expects_continue(value: bytes, version: str) -> bool:
    if version == "1.0":  # which has no such header; a proxy has passed it on
        return False
    if value.strip().lower() != b"100-continue":
        raise ExpectationFailed(f"expect: {_text(value)} is not met here, only 100-continue is.")
    return True


def parse_target(url: bytes, method: bytes, headers: list[Header]) -> Target:
    """The target of a request. One that names a host, as a proxy gets, has to name that of the Host header.

    Where HTTP/1.0 has no such header, it gets one.

    Errors: MalformedRequest.
    """
    if ORIGIN.fullmatch(url) and b"#" not in url:
        raw_path, _, query = url.partition(b"?")
    elif url == b"*" and method == b"OPTIONS":
        raw_path, query = b"*", b""
    else:
        raw_path, query = _absolute(url, headers)
    path = raw_path.decode("ascii")
    return Target(unquote(path) if "%" in path else path, raw_path, query)


def _absolute(url: bytes, headers: list[Header]) -> tuple[bytes, bytes]:
    """Path and query of `http://host/path?query`."""
    try:
        parsed = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError as error:
        raise MalformedRequest(f"The target {_text(url)} is no address.") from error
    if parsed.schema is None or parsed.schema.lower() not in (b"http", b"https") or parsed.fragment is not None:
        raise MalformedRequest(f"The target {_text(url)} is no path, and no http:// address.")
    named = url.split(b"//", 1)[1].partition(b"/")[0].partition(b"?")[0].lower()
    host = next((value.lower() for name, value in headers if name == b"host"), None)
    if host is None:
        headers.append((b"host", named))
    elif named.removesuffix(b":80") != host.removesuffix(b":80"):
        raise MalformedRequest(f"The target names the host {_text(named)}, the Host header {_text(host)}.")
    return parsed.path or b"/", parsed.query or b""


def _text(value: bytes) -> str:
    return shorten(value.decode("latin-1"))
