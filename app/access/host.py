"""The Host header: by which name a client calls the service.

A web page may give its own name the address of this machine (DNS rebinding). The browser then takes the service for a
part of that page's site, and lets the page read it. What gives such a request away is the name in its Host header. An
IP address cannot be rebound, and neither can localhost.
"""

import re
from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import HostNotAllowed, MalformedHost

# RFC 3986, section 3.2.2, without IPvFuture, which nobody has defined; and a zone as in RFC 6874 or bare.
HOST = re.compile(
    r"""
    (?: \[ (?P<ipv6> [0-9A-Fa-f:.]+ ) (?: % [\w.~%-]{1,64} )? \]
      | (?P<name> (?: [\w.~!$&'()*+,;=-] | %[0-9A-Fa-f]{2} )+ )
    )
    (?: : (?P<port> [0-9]{0,5} ) )?
    """,
    re.VERBOSE | re.ASCII,
)
MAX_CHARS = 300  # a name has 255 at most
MAX_PORT = 65_535
MAX_PASSED = 1000  # headers that are remembered


class Host(NamedTuple):
    """The host that a Host header names.

    Attributes:
        name: in lower case, without port, brackets, zone and the dot of the root.
        is_address: whether it is an IP address.
    """

    name: str
    is_address: bool


def parse_host(value: str) -> Host | None:
    """The host in a Host header; None where it is not of the form `host[:port]`."""
    match = HOST.fullmatch(value) if len(value) <= MAX_CHARS else None
    if match is None or int(match["port"] or 0) > MAX_PORT:
        return None
    try:
        if match["ipv6"] is not None:
            return Host(str(IPv6Address(match["ipv6"])), is_address=True)
        name = match["name"].lower().removesuffix(".")
        return Host(name, is_address=_is_ipv4(name))
    except AddressValueError:  # what is in brackets is no address
        return None


def _is_ipv4(name: str) -> bool:
    """Four decimal numbers. 127.1, 0x7f000001 and 017700000001 are names here; browsers write them out."""
    if not name[-1:].isdigit():
        return False
    try:
        IPv4Address(name)
    except AddressValueError:
        return False
    return True


class HostCheck:
    """Refuses a Host header that is neither an IP address nor one of the names of this service.

    Args:
        names: in lower case, without port.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self.app = app
        self.names = frozenset(names)
        self._passed: set[bytes] = set()  # headers that were checked, since clients send the same again and again

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. Errors: MalformedHost, HostNotAllowed."""
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"host" and value not in self._passed:
                    self._check(value)
        await self.app(scope, receive, send)

    def _check(self, header: bytes) -> None:
        value = str(header, "latin-1").strip(" \t")
        if value:  # HTTP/1.0 need not say a host, and a probe of a load balancer may leave it empty; no browser does
            self._expect_own(value)
        if len(self._passed) < MAX_PASSED:
            self._passed.add(header)

    def _expect_own(self, value: str) -> None:
        host = parse_host(value)
        if host is None:
            raise MalformedHost(f"host: {value[:100]!a} is not of the form host or host:port.", "Correct the header.")
        if not host.is_address and host.name not in self.names:
            raise HostNotAllowed(
                f"host: {host.name[:100]!a} is not a name of this service.",
                "If it is, start the service with --allowed-hosts NAME, or QWEN3_ENCODER_ALLOWED_HOSTS=NAME.",
            )
